"""The cache in a run: real networks, counted by hooks on every forward of every module of the process."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import Encoder
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import CLIPTextModel

from decant.data.source import read
from decant.models.families.of import family_of
from decant.models.load import load
from decant.recipe.runner import run_recipe
from decant.recipe.schema import Recipe
from decant.scenes.folder import draw_folder
from decant.stages import distill, prune
from decant.stages.encode import encode_data
from decant.stages.stage import Inputs

STAGES = {"prune": prune.STAGE, "distill": distill.STAGE}


@contextmanager
def _forwards() -> Iterator[Counter[str]]:
    """Counts the rows that encoders are given."""
    seen: Counter[str] = Counter()

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, Encoder | CLIPTextModel):
            seen[type(module).__name__] += 1

    handle = register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data") / "pictures", 24, "train")


def _run(data: Path, out: Path, names: tuple[str, ...], cache: Path | None = None) -> tuple[Counter[str], list[str]]:
    settings = {"steps": 2, "batch_size": 2, "held_out": 0.3, "checkpoint_every": 1}
    stages = [{"stage": "prune", "name": "cut", "from": "teacher", "settings": {"student": "bk-tiny"}}]
    stages += [{"stage": "distill", "name": name, "from": "cut", "settings": settings} for name in names]
    recipe = Recipe.model_validate({"name": "test", "stages": stages})
    said: list[str] = []
    with _forwards() as seen:
        run_recipe(recipe, teacher="scenes", data=data, out=out, stages=STAGES, talk=said.append, cache=cache)
    return seen, said


def test_a_run_from_a_full_cache_never_runs_the_encoders_and_gives_the_same_weights(data: Path, tmp_path: Path) -> None:
    """Two distillations of a run encode once, and a run from their cache not at all; all three students are equal."""
    cold, _ = _run(data, tmp_path / "cold", ("one", "two"))
    cache = tmp_path / "cold/.work/cache"  # without --cache, a run keeps its own
    warm, said = _run(data, tmp_path / "warm", ("one",), cache)
    assert 0 < cold["Encoder"] <= 3 and 0 < cold["CLIPTextModel"] <= 6  # two parts, chunks of sixteen, and nulls
    assert not warm and not list((tmp_path / "warm").rglob("*/cache"))
    assert any("pictures were encoded before" in line for line in said)
    students = [tmp_path / "cold/02-one", tmp_path / "cold/03-two", tmp_path / "warm/02-one"]
    first, *others = [load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in students]
    assert all(first[name].equal(other[name]) for other in others for name in first)


def test_latents_do_not_depend_on_what_the_cache_held(data: Path, tmp_path: Path) -> None:
    """The scenes teacher's own networks: alone and in other company a picture has the same bits."""
    family, device = family_of(load("scenes")), torch.device("cpu")
    whole = read(data)

    def encoded(cache: str, *sizes: int) -> Any:
        for most in sizes:
            inputs = Inputs("scenes", {}, data, 0, tmp_path / "work", cache=tmp_path / cache)
            latents = encode_data(family, whole.first(most), 64, inputs, device)
        return latents.batch(tuple(range(latents.n)))

    at_once, grown = encoded("a", 24), encoded("b", 1, 6, 19, 24)
    assert at_once.mean.equal(grown.mean) and at_once.std.equal(grown.std)
    for key, value in at_once.condition.items():
        assert value.equal(grown.condition[key]) and at_once.null[key].equal(grown.null[key])


def test_what_made_the_rows_is_known_by_its_weights_and_words(tmp_path: Path) -> None:
    pipeline = load("scenes")
    first = family_of(pipeline).made_by()
    family_of(pipeline).condition(["a small red circle"])
    assert family_of(load("scenes")).made_by() == family_of(pipeline).made_by() == first
    with torch.no_grad():
        next(pipeline.vae.parameters()).view(-1)[0] += 1e-3
    changed = family_of(pipeline).made_by()
    assert changed["pictures"] != first["pictures"] and changed["captions"] == first["captions"]
    pipeline.tokenizer.model_max_length = 16
    assert family_of(pipeline).made_by()["captions"] != first["captions"]
