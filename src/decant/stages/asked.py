"""What an evaluation asks of every model: captions and seeds, the same for all."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from decant.data.captioned import Captioned, split
from decant.data.picture import Aspect
from decant.data.source import Data, read
from decant.errors import UserError, refuse
from decant.scenes.captions import parse
from decant.scenes.folder import captions_of

Captions = Literal["auto", "scenes", "data"]
# Far from the seeds that training scenes are drawn from; the split itself is by combination.
HELD_OUT_SEED = 1_000_000


@dataclass(frozen=True)
class Asked:
    """The captions and seeds of one evaluation, one picture each.

    ``scenes``: whether every caption says a scene, which the checker can look for. ``held``: the held-out pictures
    that the captions come from, where they come from data, and ``aspect``, how they become squares.
    """

    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    scenes: bool
    held: Captioned | None = None
    aspect: Aspect = "crop"


@dataclass(frozen=True)
class HeldOut:
    """Which pictures were kept from training: the share, the run's seed, and how many may be unreadable.

    index: a folder that may keep what was seen of the data. aspect: how a picture becomes a square.
    """

    data: Data | None
    share: float
    seed: int
    max_skipped: float
    index: Path | None = None
    aspect: Aspect = "crop"


def asked(captions: Captions, images: int, held_out: HeldOut) -> Asked:
    """At most ``images`` captions, of held-out scenes or of held-out pictures.

    Raises:
        UserError: captions of data are wanted and there is no data, or it cannot be read.
    """
    wanted = captions if captions != "auto" else "data" if held_out.data else "scenes"
    if wanted == "scenes":
        seeds, told = zip(*captions_of(images, "held-out", HELD_OUT_SEED), strict=True)
        return Asked(told, seeds, scenes=True)
    if held_out.data is None:
        allowed = "scenes, or data with --data FOLDER"
        raise refuse("evaluate.captions", "data", allowed=allowed, hint="add --data FOLDER")
    held = split(read(held_out.data, held_out.max_skipped, index=held_out.index), held_out.share, held_out.seed)[1]
    told = tuple(held.captions[:images])
    return Asked(told, tuple(map(seed_of, held.names[:images])), all(map(is_scene, told)), held, held_out.aspect)


def seed_of(name: str) -> int:
    """A picture's seed follows from its name, so that it does not depend on the other pictures."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")


def is_scene(caption: str) -> bool:
    """Whether a caption says a scene, which the checker can look for."""
    try:
        parse(caption)
    except UserError:
        return False
    return True
