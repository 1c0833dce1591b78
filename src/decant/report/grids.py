"""``OUT/grids/``: for every prompt a picture of pictures, arms side by side, a row a seed."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from decant.report.compare_record import Comparison
from decant.report.pictures import read_picture
from decant.report.record import Row

_LEAST, _MOST = 128, 256  # pixels of a cell
_ROWS = 8
_GAP, _LINE = 6, 16
_FONT = ImageFont.load_default(13)
_PAPER, _INK, _SOFT = "#fdfdfb", "#1d2125", "#596169"


def write_grids(comparison: Comparison, out: Path) -> list[Path]:
    """A PNG for every prompt, of at most eight seeds each; gives their files."""
    folder = out / "grids"
    folder.mkdir(exist_ok=True)
    written = []
    for number, start in enumerate(range(0, len(comparison.pictures), comparison.images)):
        rows = comparison.pictures[start : start + min(comparison.images, _ROWS)]
        first = next(iter(rows[0].models.values())).file
        file = folder / f"{number:03d}-{Path(first).stem.rsplit('-', 2)[0]}.png"
        temporary = file.with_suffix(".tmp")
        _grid(comparison, rows, out).save(temporary, format="PNG")
        temporary.replace(file)
        written.append(file)
    return written


def _grid(comparison: Comparison, rows: Sequence[Row], out: Path) -> Image.Image:
    names = [arm.name for arm in comparison.models]
    heads = [_wrapped(f"{arm.model}, {arm.steps} step{'s' * (arm.steps != 1)}", _LEAST) for arm in comparison.models]
    cells = [[read_picture(out, row.models[name].file) for name in names] for row in rows]
    side = _side([cell for line in cells for cell in line if cell is not None])
    width = _GAP + len(names) * (side + _GAP)
    title = _wrapped(rows[0].caption, width - 2 * _GAP)[:4]
    top = _GAP + _LINE * (len(title) + max(map(len, heads))) + _GAP
    grid = Image.new("RGB", (width, top + len(rows) * (side + _LINE + _GAP)), _PAPER)
    pen = ImageDraw.Draw(grid)
    _write(pen, title, _GAP, _GAP, _INK)
    for column, head in enumerate(heads):
        _write(pen, head, _GAP + column * (side + _GAP), top - _LINE * len(head) - 2, _INK)
    for line, (row, pictures) in enumerate(zip(rows, cells, strict=True)):
        y = top + line * (side + _LINE + _GAP)
        for column, picture in enumerate(pictures):
            if picture is not None:
                grid.paste(_fitted(picture, side), (_GAP + column * (side + _GAP), y))
        _write(pen, [f"seed {row.seed}"], _GAP, y + side, _SOFT)
    return grid


def _side(pictures: Sequence[Image.Image]) -> int:
    """Of a cell: small pictures by a whole factor, large ones as large as can be."""
    own = max((max(picture.size) for picture in pictures), default=_LEAST)
    return own * -(-_LEAST // own) if own < _LEAST else min(own, _MOST)


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    factor = side / max(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    how = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    return picture.resize(size, how)


def _wrapped(text: str, width: int) -> list[str]:
    """Text in lines of at most so many pixels; a word that is longer is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _FONT.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if _FONT.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _write(pen: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, ink: str) -> None:
    for number, line in enumerate(lines):
        pen.text((x, y + _LINE * number), line, fill=ink, font=_FONT)
