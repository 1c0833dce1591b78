"""What stands between a downloaded file and the libraries that open it: nothing here reads a weight.

A model comes from strangers. So a file is opened only when it is an ordinary file of its own folder, a JSON file only
when it is small, and a weights file only when its header is small, whole and of numbers that a network can have.
"""

import json
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from decant.errors import UserError, refuse

_MB = 10**6
_JSON_BYTES = 4 * _MB
_HEADER_BYTES = 16 * _MB
_DTYPES = ("F16", "BF16", "F32", "F64")
# Buffers that older tools saved beside the weights, some as integers: positions 0, 1, 2, ..., counts of training steps.
_BUFFERS = ("position_ids", "model_ema.num_updates", "global_step")
# Tensors that may be integers: those buffers, and a LoRA's alphas.
_INTEGERS = (*_BUFFERS, ".alpha")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: shapes and dtypes by tensor, and the free text beside them."""

    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]

    @property
    def numbers(self) -> int:
        """How many numbers the weights are, buffers left out."""
        return sum(_product(shape) for name, shape in self.shapes.items() if not name.endswith(_BUFFERS))


def read_header(file: Path) -> Header:
    """The header of a weights file.

    Raises:
        UserError: it is no ordinary file, is truncated or damaged, or holds something else than floats.
    """
    _check_ordinary(file, "weights file")
    _check_length(file)
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
            metadata = dict(tensors.metadata() or {})
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise _damaged(file, first_line(error)) from error
    _check_dtypes(file, dtypes)
    return Header(file, shapes, dtypes, metadata)


def read_json(path: Path, *, most_bytes: int = _JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a small, ordinary file.

    Raises:
        UserError: it is missing, too large, nested too deep, no JSON, or no object.
    """
    _check_ordinary(path, "model")
    size = path.stat().st_size
    if size > most_bytes:
        raise refuse(
            "model",
            f"{path} has {size / _MB:.1f} MB",
            allowed=f"at most {most_bytes / _MB:.0f} MB of JSON",
            hint="this is not the file that diffusers writes; copy it again from where the model came",
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        hint = f"it cannot be read: {first_line(error)}"
        raise refuse("model", path, allowed="a JSON file", hint=hint) from error
    if not isinstance(document, dict):
        raise refuse("model", path, allowed="a JSON object", hint="copy the file again from where it came")
    return document


def check_inside(folder: Path, files: Iterable[Path]) -> None:
    """Refuse a file whose real place is outside the folder that is being opened.

    The hub's cache keeps what it downloads in `blobs` and links to it from `snapshots`: that is inside too.
    """
    real = folder.resolve()
    allowed = [real]
    if real.parent.name == "snapshots":
        allowed.append(real.parent.parent / "blobs")
    for file in files:
        try:
            inside = any(file.resolve().is_relative_to(home) for home in allowed)
        except (OSError, RuntimeError, ValueError):  # a loop of links
            inside = False
        if not inside:
            raise refuse(
                "model",
                f"{file} leaves the model's folder",
                allowed=f"files inside {folder}",
                hint="a link or a path that points elsewhere is not followed; copy the file itself into the folder",
            )


def first_line(error: BaseException) -> str:
    """The first sentence of a library's message, at most 200 characters: what is wrong, without the advice."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0].split(". ")[0]
    return line if len(line) <= 200 else line[:197] + "..."


def _check_ordinary(file: Path, place: str) -> None:
    """Refuse what is missing, and what would hang or never end: pipes, devices, folders."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        hint = f"{file.name} is missing; is this the right folder?"
        raise refuse(place, file, allowed="a file of a whole pipeline folder", hint=hint) from None
    except (OSError, ValueError) as error:  # a loop of links, a name too long
        raise refuse(place, file, allowed="a file that can be read", hint=first_line(error)) from error
    if not stat.S_ISREG(mode):
        raise refuse(place, f"{file} is no file", allowed="an ordinary file", hint="copy the whole pipeline again")


def _check_length(file: Path) -> None:
    """Refuse a header that claims more than a network's could need, before anything parses it."""
    size = file.stat().st_size
    if size < 8:
        raise _damaged(file, "it is empty" if size == 0 else f"it has {size} bytes")
    with file.open("rb") as opened:
        claimed = int.from_bytes(opened.read(8), "little")
    if claimed > min(size - 8, _HEADER_BYTES):
        raise _damaged(file, f"its header claims {claimed} bytes of {size}")


def _check_dtypes(file: Path, dtypes: Mapping[str, str]) -> None:
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES and not name.endswith(_INTEGERS):
            raise refuse(
                f"weights file {file}",
                f"{name[:80]!r} is stored as {dtype}",
                allowed="floating point of 16, 32 or 64 bits",
                hint="take the file in fp16 or fp32; models of fewer bits cannot be opened yet",
            )


def _damaged(file: Path, why: str) -> UserError:
    return refuse(
        "weights file",
        file,
        allowed="a whole safetensors file",
        hint=f"truncated or damaged, copy it again ({why})",
    )


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
