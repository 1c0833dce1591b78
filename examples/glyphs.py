"""Make a folder of captioned pictures that decant did not draw: glyphs of a font that matplotlib brings.

    python examples/glyphs.py OUT [N]

Each glyph is black on white, 64 x 64 pixels, captioned with its Unicode name; metadata.jsonl beside them.
"""

import json
import sys
import unicodedata
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSerif-Bold.ttf"


def named_characters(n: int) -> list[str]:
    """The first ``n`` visible characters that the font has a glyph of its own for."""
    font = ImageFont.truetype(str(FONT), 32, layout_engine=ImageFont.Layout.BASIC)
    missing = font.getmask("\U0010fffe").getbbox(), bytes(font.getmask("\U0010fffe"))
    found = []
    for code in range(0x21, 0x3000):
        mask = font.getmask(chr(code))
        if unicodedata.name(chr(code), "") and mask.getbbox() and (mask.getbbox(), bytes(mask)) != missing:
            found.append(chr(code))
    return found[:n]


def glyph(character: str, side: int = 64) -> Image.Image:
    """One character in the middle of a white square."""
    picture = Image.new("RGB", (side, side), "white")
    font = ImageFont.truetype(str(FONT), 44, layout_engine=ImageFont.Layout.BASIC)
    ImageDraw.Draw(picture).text((side / 2, side / 2), character, font=font, fill="black", anchor="mm")
    return picture


def main(out: Path, n: int) -> None:
    """Write ``n`` glyphs and their names into a new folder."""
    out.mkdir(parents=True)
    lines = []
    for index, character in enumerate(named_characters(n)):
        name = f"{index:04d}.png"
        glyph(character).save(out / name)
        lines.append(json.dumps({"file_name": name, "text": unicodedata.name(character).lower()}))
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} glyphs in {out}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 600)
