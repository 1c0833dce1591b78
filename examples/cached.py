"""What it saves to encode pictures and captions once: a distillation step at full size with and without the encoders.

    python examples/cached.py [--size 256] [--rounds 3] [--page PAGE]

SD 1.5's layout with random weights and BK-SDM Tiny, batch 1: the weights do not matter for speed. Both kinds of step
take the same latents' shape, draws, terms and optimiser; the uncached one also runs the VAE's encoder and the text
encoder, as a training without a cache does. They are timed in turns.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from full_size import TEXT, VAE
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from decant.bench.machine import machine
from decant.data.batch import Batch
from decant.maths.schedules import scaled_linear
from decant.methods.kd import KD
from decant.models.families import latents
from decant.models.families.sd1 import SD1
from decant.models.load import architecture
from decant.models.surgery.presets import published
from decant.models.surgery.surgery import build
from decant.train.loop import loop
from decant.train.state import RunSettings, TrainState

TOKENS = 77


def players(device: str, steps: int) -> tuple[KD, TrainState]:
    """The method and a fresh run of it."""
    torch.manual_seed(0)
    teacher = UNet2DConditionModel.from_config(architecture("sd15"))
    cut = published(dict(teacher.config), teacher.state_dict(), "bk-tiny")
    family = SD1("epsilon", scaled_linear(0.00085, 0.012, 1000), None, None, None)  # type: ignore[arg-type]
    method = KD.of(family, build(cut), teacher, cut.surgery_map.features)
    return method, TrainState.start(method, RunSettings(steps=steps), device=device)  # type: ignore[arg-type]


@torch.no_grad()
def encoded(vae: nn.Module, text: nn.Module, picture: Tensor, tokens: Tensor, step: int) -> Batch:
    """One picture and caption through both encoders; the unconditional caption too is a cached one."""
    mean, std = latents.moments(vae, picture)  # type: ignore[arg-type]
    told = {"encoder_hidden_states": text(tokens)[0]}
    return Batch((step,), mean, std, told, {name: torch.zeros_like(value) for name, value in told.items()})


def measure(size: int, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each kind of step, after one of each that is not counted."""
    torch.manual_seed(1)
    vae = AutoencoderKL(**VAE).eval().to(device)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, eos_token_id=2, **TEXT)).eval().to(device)
    picture = torch.randn(1, 3, size, size, device=device)
    tokens = torch.randint(49408, (1, TOKENS), device=device)
    once = encoded(vae, text, picture, tokens, 0).to("cpu")
    method, state = players(device, 2 * (rounds + 1))
    kinds = {
        "cached": lambda step: [Batch((step,), once.mean, once.std, once.condition, once.null)],
        "uncached": lambda step: [encoded(vae, text, picture, tokens, step)],
    }
    order = [name for _ in range(rounds + 1) for name in kinds]
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    begin = time.perf_counter()
    for name, _ in zip(order, loop(method, lambda step: kinds[order[step]](step), state), strict=True):
        now = time.perf_counter()
        seconds[name].append(now - begin)
        begin = now
    return {name: each[1:] for name, each in seconds.items()}


def page(size: int, rounds: int, device: str) -> str:
    """The figures, as a page."""
    seconds = measure(size, rounds, device)
    cached, uncached = (statistics.median(seconds[name]) for name in ("cached", "uncached"))
    here = machine()
    rows = [
        f"| {name} | {statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f}) |"
        for name, each in seconds.items()
    ]
    return "\n".join(
        [
            "# Cached and uncached data at full size",
            "",
            f"Written by `python examples/cached.py --size {size} --rounds {rounds} --page docs/cached.md`.",
            "",
            f"SD 1.5's layout, BK-SDM Tiny, {size} px, batch 1, float32, random weights; {here['threads']} threads on "
            f"{here['processor']}, torch {here['torch']}.",
            f"{rounds} steps of each kind in turns; medians, range in brackets.",
            "",
            "| latents and text | seconds a step |",
            "|---|---|",
            *rows,
            "",
            f"Cached data is {uncached / cached:.2f} times as fast.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    device = "cuda" if asked.device == "auto" and torch.cuda.is_available() else asked.device.replace("auto", "cpu")
    text = page(asked.size, asked.rounds, device)
    print(text)
    if asked.page is not None:
        asked.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
