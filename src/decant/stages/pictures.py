"""Pictures to files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def save_picture(picture: NDArray[np.uint8], path: Path) -> None:
    """Write one (H, W, 3) uint8 picture as PNG, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def save_strip(pictures: Sequence[NDArray[np.uint8]], path: Path) -> None:
    """Write pictures of one size side by side."""
    save_picture(np.concatenate(list(pictures), axis=1), path)
