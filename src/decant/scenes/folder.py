"""Scenes as a folder of pictures with ``metadata.jsonl``, as Hugging Face's ImageFolder reads it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from decant.errors import refuse
from decant.scenes.captions import caption
from decant.scenes.render import render
from decant.scenes.world import Split, scenes


def draw_folder(
    out: Path, n: int, split: Split, first_seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Draw ``n`` scenes into a new folder: ``000000.png`` ... and ``metadata.jsonl`` with the text and what it says.

    Raises:
        UserError: ``n`` is not positive, or the folder already holds something.
    """
    if n < 1:
        raise refuse("--n", n, allowed="1 or more", hint="500 is enough to look at, 4000 to train on")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise refuse("--out", f"{out} is not empty", allowed="a new or empty folder", hint="name another")
    drawing = out.with_name(f".{out.name}.drawing")  # whole or not there: a killed drawing is begun again
    shutil.rmtree(drawing, ignore_errors=True)
    drawing.mkdir(parents=True)
    lines = []
    for index, (seed, scene) in enumerate(scenes(n, split, first_seed)):
        name = f"{index:06d}.png"
        Image.fromarray(render(scene, seed)).save(drawing / name)
        lines.append(json.dumps({"file_name": name, "text": caption(scene, seed), "scene": asdict(scene)}))
        if progress and (index + 1) % 100 == 0:
            progress(index + 1, n)
    (drawing / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    drawing.replace(out)
    return out


def captions_of(n: int, split: Split, first_seed: int = 0) -> list[tuple[int, str]]:
    """``n`` (seed, caption) pairs of a split: what an evaluation asks for."""
    return [(seed, caption(scene, seed)) for seed, scene in scenes(n, split, first_seed)]
