"""The teachers that the package carries, by their names."""

from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

Shipped = Literal["scenes", "scenes-xl"]
NAMES: tuple[Shipped, ...] = get_args(Shipped)


def shipped_folder(name: Shipped) -> Path:
    """The pipeline folder of a shipped teacher: `scenes` of Stable Diffusion 1.x's layout, `scenes-xl` of SDXL's."""
    return Path(str(files("decant.scenes").joinpath("teacher" if name == "scenes" else "teacher_xl")))
