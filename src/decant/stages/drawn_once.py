"""Pictures that are drawn once and kept: each PNG says what made it, and is drawn anew where that is something else."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from decant.models.generate import generate
from decant.models.layout import Pipeline
from decant.models.samplers import Sampler

_KEY = "decant"


@dataclass(frozen=True)
class Job:
    """One picture: what is drawn, and where it is kept."""

    prompt: str
    seed: int
    file: Path


def picture_name(prompt: str, seed: int) -> str:
    """A file name that is readable, and another for every prompt and seed."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:48].rstrip("-")
    digest = blake2b(prompt.encode(), digest_size=4).hexdigest()
    return f"{words}-{digest}-seed{seed}.png"


def draw_missing(  # noqa: PLR0913 (what a picture depends on)
    open_pipeline: Callable[[], Pipeline],
    jobs: Sequence[Job],
    made_by: Mapping[str, Any],
    *,
    steps: int,
    guidance_scale: float,
    sampler: Sampler,
    size: int | None,
    batch_size: int,
    tick: Callable[[int], None],
) -> int:
    """Draw those pictures that are not there yet, each written whole or not at all; gives how many were drawn.

    A batch of which one is missing is drawn whole, since the last digits of a picture depend on its batch: pictures of
    an interrupted call and of an uninterrupted one are equal.

    Args:
        open_pipeline: called if anything is to be drawn.
        made_by: what makes a picture besides its prompt and seed, as JSON holds it.
        tick: told how many of the jobs are done.
    """
    new = 0
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        missing = [job for job in batch if not _kept(job, made_by)]
        if missing:
            drawn = generate(
                open_pipeline(),
                [job.prompt for job in batch],
                [job.seed for job in batch],
                steps=steps,
                guidance_scale=guidance_scale,
                sampler=sampler,
                batch_size=batch_size,
                size=size,
            )
            for job, picture in zip(batch, drawn, strict=True):
                if job in missing:
                    _keep(job, made_by, picture)
            new += len(missing)
        tick(start + len(batch))
    return new


def read_picture(file: Path) -> NDArray[np.uint8]:
    """A kept picture (H, W, 3)."""
    with Image.open(file, formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"))


def _note(job: Job, made_by: Mapping[str, Any]) -> str:
    return json.dumps({**made_by, "prompt": job.prompt, "seed": job.seed}, sort_keys=True)


def _kept(job: Job, made_by: Mapping[str, Any]) -> bool:
    """Whether a whole picture is there that this very maker drew of this prompt and seed."""
    try:
        with Image.open(job.file, formats=("PNG",)) as image:
            image.load()
            return image.info.get(_KEY) == _note(job, made_by)
    except (OSError, SyntaxError, ValueError):  # not there, or damaged
        return False


def _keep(job: Job, made_by: Mapping[str, Any], picture: NDArray[np.uint8]) -> None:
    notes = PngInfo()
    notes.add_itxt(_KEY, _note(job, made_by))
    job.file.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.file.with_name(f".{job.file.name}.tmp")
    try:
        Image.fromarray(picture).save(temporary, format="PNG", pnginfo=notes)
        temporary.replace(job.file)
    finally:
        temporary.unlink(missing_ok=True)
