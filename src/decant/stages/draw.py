"""Pictures on demand, and what a model is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decant.models.device import Device, pick
from decant.models.families.sd1 import SD1
from decant.models.generate import Sampler, generate
from decant.models.load import load, place_of
from decant.stages.pictures import save_picture
from decant.stages.record import figures_of, read_record


def draw_to(  # noqa: PLR0913 (the options of a picture)
    model: str,
    prompts: Sequence[str],
    steps: Sequence[int],
    seed: int,
    out: Path,
    device: Device,
    *,
    guidance_scale: float = 7.5,
    sampler: Sampler = "ddim",
    size: int | None = None,
) -> list[dict[str, Any]]:
    """Draw every prompt with every number of steps; prompt i has seed ``seed + i``. Gives what was written."""
    pipeline = load(model).to(pick(device))
    seeds = [seed + index for index in range(len(prompts))]
    written = []
    for n in steps:
        drawn = generate(
            pipeline,
            prompts,
            seeds,
            steps=n,
            guidance_scale=guidance_scale,
            sampler=sampler,
            size=size,
            batch_size=1,
        )
        for index, picture in enumerate(drawn):
            file = out / f"{index:03d}-seed{seeds[index]}-steps{n}.png"
            save_picture(picture, file)
            written.append({"file": str(file), "prompt": prompts[index], "seed": seeds[index], "steps": n})
    return written


def describe(model: str) -> dict[str, Any]:
    """Family, parameters, MACs and the record of a model."""
    pipeline = load(model)
    return {
        "family": "sd1",
        **figures_of(pipeline.unet, SD1.of(pipeline).tokens),
        "record": read_record(place_of(model)),
    }
