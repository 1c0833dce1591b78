"""The command that compares cached with uncached data does so, on networks of a bearable size."""

from importlib import import_module
from pathlib import Path

import pytest
from diffusers.models.autoencoders.vae import Encoder
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import CLIPTextModel

from decant.models.load import unet_config

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_only_uncached_steps_run_the_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    cached = import_module("cached")
    config = unet_config("scenes")
    text = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(cached, "architecture", lambda name: config)
    monkeypatch.setattr(cached, "TEXT", {**text, "hidden_size": config["cross_attention_dim"]})
    monkeypatch.setattr(cached, "VAE", {**cached.VAE, "block_out_channels": (32, 32, 32, 32)})
    seen: list[str] = []

    def note(module: nn.Module, inputs: tuple[object, ...]) -> None:
        if isinstance(module, Encoder | CLIPTextModel):
            seen.append(type(module).__name__)

    handle = register_module_forward_pre_hook(note)
    page = cached.page(64, 2, "cpu")
    handle.remove()
    assert sorted(seen) == ["CLIPTextModel"] * 4 + ["Encoder"] * 4, "once for the cache, then in three uncached steps"
    assert "2 steps of each kind in turns" in page and "| uncached |" in page and "times as fast" in page
