"""One picture: whether it can be used, and its pixels."""

import hashlib
import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar, assert_never

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from decant.errors import UserError, refuse
from decant.maths.seeds import seed_of

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
"""What the names of pictures end in; the contents decide what they are."""
CROP = "first frame, upright, white behind transparency, shortest side by Lanczos, centre, 8 bits"
"""What `picture` does, in words: a part of the key of whatever is made from its pixels."""

# Only formats whose decoders run no other program and need no interpreter (EPS would start one).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MOST_PIXELS = 89_478_485  # Pillow's own: a quarter of a gigabyte of RGB
MOST_BYTES = 256 * 2**20
"""The largest picture file that is read."""
TOO_LARGE = f"the file is larger than {MOST_BYTES >> 20} MB"

warnings.filterwarnings("ignore", module=r"PIL\.")  # of harmless metadata; what is harmful is refused below

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class Frame:
    """How a picture came to its square; every pair is (height, width) or (top, left) in pixels.

    original: of the upright picture. corner: where the crop begins in the picture once its shortest side is resized.
    target: of the crop.
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]

    @classmethod
    def cropped(cls, original: tuple[int, int], size: int, at: tuple[float, float] = (0.5, 0.5)) -> "Frame":
        """Shortest side resized to ``size``, and a crop: 0 at the top or left, 1 at the bottom or right."""
        top, left = (
            round((size * side // min(original) - size) * part) for side, part in zip(original, at, strict=True)
        )
        return cls(original, (top, left), (size, size))

    @classmethod
    def whole(cls, height: int, width: int) -> "Frame":
        """A picture made at this size, and not cropped: what sampling asks for."""
        return cls((height, width), (0, 0), (height, width))


class Content(Protocol):
    """Where a picture's contents lie, as a file does; a ``Path`` is one."""

    @property
    def name(self) -> str:
        """What the picture is called."""
        ...

    def read_bytes(self) -> bytes:
        """The whole contents. Raises ``OSError`` where they cannot be read."""
        ...


Aspect = Literal["crop", "letterbox", "stretch"]


@dataclass(frozen=True)
class View:
    """One way to make a square of a picture.

    aspect: crop the longer side, letterbox (black) or stretch. crop: None is the centre, k the k-th of the picture's
    random crops. flip: mirrored, left for right.
    """

    aspect: Aspect = "crop"
    crop: int | None = None
    flip: bool = False

    @classmethod
    def several(cls, aspect: Aspect, crops: int, *, flip: bool) -> tuple["View", ...]:
        """Every view that training may see: so many random crops, or with 0 the centre; each mirrored too."""
        places = range(crops) if crops else (None,)
        return tuple(
            cls(aspect, place, mirrored) for mirrored in ((False, True) if flip else (False,)) for place in places
        )

    def key(self, digest: bytes) -> bytes:
        """What the view of a picture is kept under; the plain centre crop under the picture's own digest."""
        if self == View():
            return digest
        words = f"{self.aspect} {self.crop} {self.flip}".encode()
        return hashlib.sha256(digest + words).digest()

    def of(self, image: Image.Image, size: int, digest: bytes) -> tuple[Image.Image, Frame]:
        """The square, and how it came about."""
        image = ImageOps.mirror(image) if self.flip else image
        original, square = (image.height, image.width), (size, size)
        match self.aspect:
            case "crop":
                at = self._place(digest)
                # fit crops in the source and resizes once, so a very long picture never grows in memory.
                fitted = ImageOps.fit(image, square, Image.Resampling.LANCZOS, centering=at[::-1])
                return fitted, Frame.cropped(original, size, at)
            case "letterbox":
                return ImageOps.pad(image, square, Image.Resampling.LANCZOS), Frame(original, (0, 0), square)
            case "stretch":
                return image.resize(square, Image.Resampling.LANCZOS), Frame(original, (0, 0), square)
        assert_never(self.aspect)

    def _place(self, digest: bytes) -> tuple[float, float]:
        """Where the crop lies; a flipped one shows what the plain one shows."""
        if self.crop is None:
            return (0.5, 0.5)
        down, right = (seed_of("crop", self.crop, side, digest.hex()) / 2**64 for side in ("down", "right"))
        return down, 1 - right if self.flip else right


class ChangedError(UserError):
    """A picture is no longer what it was when it was looked at."""


@dataclass(frozen=True, slots=True)
class Look:
    """A file's sha256, and why it cannot be used as a picture, or ""."""

    digest: bytes
    problem: str = ""


# Every stage of a run looks at every picture; whether given contents decode does not change between them.
_decoded: set[bytes] = set()


def look(file: Content) -> Look:
    """Read a picture once, and decode it to the end, unless the same contents decoded before in this process."""
    try:
        if isinstance(file, Path) and file.stat().st_size > MOST_BYTES:
            return Look(b"", TOO_LARGE)
        content = file.read_bytes()
    except OSError as error:
        return Look(b"", f"the file cannot be read ({error.strerror})")
    digest = hashlib.sha256(content).digest()
    if digest in _decoded:
        return Look(digest)
    seen = Look(digest, _problem(content))
    if not seen.problem:
        _decoded.add(digest)
    return seen


def look_at(content: bytes) -> Look:
    """As `look`, of contents that were read already; nothing of them is remembered."""
    return Look(hashlib.sha256(content).digest(), _problem(content))


def _problem(content: bytes) -> str:
    try:
        _open_rgb(content)
    except Exception as error:  # decoders raise anything on damaged input
        return _reason(error)
    return ""


def picture(file: Content, size: int, digest: bytes | None = None) -> Tensor:
    """One picture as ``(3, size, size)`` float32 in [-1, 1]: shortest side resized (Lanczos), centre crop.

    Rotated as its EXIF says; transparency over white. Raises ``UserError`` where it no longer decodes, or its
    contents are no longer those that ``digest`` is the sha256 of.
    """
    return framed_picture(file, size, digest)[0]


def framed_picture(
    file: Content, size: int, digest: bytes | None = None, view: View | None = None
) -> tuple[Tensor, Frame]:
    """A `picture`, or another view of it, and how it was framed. Raises `ChangedError`."""
    try:
        content = file.read_bytes()
        image = _open_rgb(content)
    except UserError:  # not about this picture, but about what brings it
        raise
    except Exception as error:  # decoders raise anything on damaged input
        raise _changed(file, _reason(error)) from error
    found = hashlib.sha256(content).digest()
    if digest is not None and found != digest:
        raise _changed(file, "its contents are others than a moment ago")
    square, frame = (view or View()).of(image, size, found)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()
    return pixels, frame


def ahead(function: Callable[[_In], _Out], items: Iterable[_In], most: int = 64) -> Iterator[_Out]:
    """``map`` with threads that work at most so many items ahead of what is taken: decoders let other threads run."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        waiting: deque[Future[_Out]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def _changed(file: Content, value: str) -> ChangedError:
    hint = "it changed after it was looked at: run again"
    return ChangedError(str(refuse(f"picture {file}", value, allowed="a picture that decodes", hint=hint)))


def _reason(error: Exception) -> str:
    """Why a picture does not decode, without paths."""
    match error:
        case Image.DecompressionBombError():
            return "too many pixels (a decompression bomb?)"
        case Image.UnidentifiedImageError():
            return "not a picture in a known format"
        case OSError() if error.errno:
            return f"the file cannot be read ({error.strerror})"
        case _:
            return "the picture is damaged or truncated"


def _open_rgb(content: bytes) -> Image.Image:
    """The first frame as 8-bit RGB, upright, transparency over white."""
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I") or upright.mode == "F":
            return _from_deep(np.asarray(upright)).convert("RGB")
        if not upright.has_transparency_data:
            return upright.convert("RGB")
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")


def _from_deep(values: np.ndarray) -> Image.Image:
    """Greyscale of more than 8 bits as 8 bits: PIL alone would clip at 255. Floats count from 0 to 1."""
    if values.dtype.kind == "f":
        scaled = np.nan_to_num(values, posinf=1.0, neginf=0.0) * 255.0
    else:
        scaled = values / (65535.0 / 255.0)
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))
