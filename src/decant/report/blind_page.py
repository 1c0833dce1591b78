"""``OUT/blind.html``: pairs of pictures to choose from, in one file that needs no network and says no names."""

import base64
import hashlib
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from decant.errors import refuse
from decant.report.compare_page import style_sheet
from decant.report.page import environment
from decant.report.pictures import read_picture

_MOST = 512  # pixels of a picture's longer side
_SMALL = 128  # up to here PNG; all pictures of a page are of one kind, which tells nothing


def write_blind(out: Path) -> Path:
    """Write the page for ``OUT/blind-key.json``, which must not go along with it: it says which picture is whose.

    Raises:
        UserError: the key or a picture is missing.
    """
    key = json.loads((out / "blind-key.json").read_text(encoding="utf-8"))
    pairs = [
        {"prompt": pair["prompt"], **{side: _uri(out, pair[side]) for side in ("left", "right")}}
        for pair in key["pairs"]
    ]
    script = files("decant.report").joinpath("blind.js").read_text(encoding="utf-8")
    view: dict[str, Any] = {
        **style_sheet("style.css", "blind.css"),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": {"page": key["page"], "pairs": pairs},
        "n": len(pairs),
    }
    path, temporary = out / "blind.html", out / "blind.html.tmp"
    temporary.write_text(environment().get_template("blind.html.j2").render(view), encoding="utf-8")
    temporary.replace(path)
    return path


def _uri(out: Path, name: str) -> str:
    """A picture drawn anew, so that nothing of its file but the picture is left."""
    image = read_picture(out, name)
    if image is None:
        raise refuse("blind page", f"{name} is missing", allowed="the comparison's pictures", hint="compare again")
    small = max(image.size) <= _SMALL
    image.thumbnail((_MOST, _MOST), Image.Resampling.LANCZOS)
    clean = Image.new("RGB", image.size)
    clean.paste(image)
    buffer = io.BytesIO()
    clean.save(buffer, "PNG") if small else clean.save(buffer, "JPEG", quality=92)
    return f"data:image/{'png' if small else 'jpeg'};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
