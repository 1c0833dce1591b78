"""Pictures of a run as data URIs: small, re-encoded, and never from outside the run."""

import base64
import io
from pathlib import Path

from PIL import Image

from decant.errors import refuse

_SIDE = 256  # pictures are shown small; larger ones would only make the file heavy
_DRAWING_BYTES = 16_000  # a PNG up to this size is embedded as it is
_MOST_BYTES = 30_000  # of a picture as WebP, where quality can be had for it
_HINT = "report.json names its pictures as pictures/<model>/<index>.png"


def picture_uri(run: Path, name: str) -> str:
    """A picture as a data URI of at most 256 pixels a side; "" where there is no such file.

    Drawings stay exact (PNG); photographs, for which PNG is several times larger, become WebP.

    Raises ``UserError`` where the name leaves RUN, by itself or through a link, or the file is no PNG.
    """
    image = read_picture(run, name)
    if image is None:
        return ""
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    exact, light = _encoded(image, "PNG", optimize=True), _webp(image)
    kind, content = ("png", exact) if len(exact) <= max(_DRAWING_BYTES, len(light)) else ("webp", light)
    return f"data:image/{kind};base64," + base64.b64encode(content).decode("ascii")


def read_picture(run: Path, name: str) -> Image.Image | None:
    """A picture of a run in RGB; None where there is no such file.

    Raises ``UserError`` where the name leaves RUN, by itself or through a link, or the file is no PNG.
    """
    if not _inside(run, name):
        raise refuse("report.json pictures", f"{name!r} leaves the run", allowed="files inside the run", hint=_HINT)
    if not _kept(run / name):
        return None
    try:
        with Image.open(run / name, formats=("PNG",)) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise anything on damaged input
        raise refuse("report.json pictures", f"{name!r} does not decode", allowed="PNG files", hint=_HINT) from error


def _webp(image: Image.Image) -> bytes:
    """WebP at the best quality that stays small; noise, such as an untrained network draws, packs worst."""
    for quality in (85, 60, 30):
        content = _encoded(image, "WEBP", quality=quality, method=4)
        if len(content) <= _MOST_BYTES:
            break
    return content


def _encoded(image: Image.Image, kind: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def _inside(run: Path, name: str) -> bool:
    """Whether a file name stays in the run, links followed."""
    if "\0" in name or Path(name).is_absolute():
        return False
    try:
        return (run / name).resolve().is_relative_to(run.resolve())
    except (OSError, RuntimeError):  # a loop of links
        return False


def _kept(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name longer than the system allows
        return False
