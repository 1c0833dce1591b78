"""Take the picture of a report that the README shows: its verdict and table, its plot, its first pictures.

    python examples/report_picture.py RUN [docs/images/report.png]

Needs Chromium or Chrome; nothing is fetched.
"""

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
WIDTH, HEIGHT, ROWS, MOST_BYTES = 1180, 3000, 3, 300_000


def shortened(page: str) -> str:
    """The page without what is below the fold of a README: fewer sections, and three rows of pictures."""
    for name in ("scores", "training", "made"):
        page = re.sub(rf'<section [^>]*aria-labelledby="{name}">.*?</section>', "", page, flags=re.DOTALL)
    page = re.sub(r"<nav.*?</nav>", "", page, flags=re.DOTALL)
    page = re.sub(r"<h3>Where the time.*?(?=</section>)", "", page, flags=re.DOTALL)
    rows = page.split('<li><p class="caption">')
    return '<li><p class="caption">'.join(rows[: ROWS + 1]) + ("</ol></section></main>" if len(rows) > ROWS + 1 else "")


def shot(browser: str, page: Path, file: Path) -> Image.Image:
    """What a window shows of a page, without the empty rest below it."""
    words = [
        *QUIET,
        "--hide-scrollbars",
        f"--user-data-dir={file.parent / 'profile'}",
        f"--window-size={WIDTH},{HEIGHT}",
    ]
    address = page.resolve().as_uri()
    subprocess.run([browser, *words, f"--screenshot={file}", address], check=True, capture_output=True, timeout=120)
    with Image.open(file) as image:
        whole = image.convert("RGB")
    empty = Image.new("RGB", whole.size, whole.getpixel((0, whole.height - 1)))
    left, _, right, bottom = ImageChops.difference(whole, empty).getbbox()
    return whole.crop((max(0, left - 24), 0, right + 24, bottom + 24))


def main(run: Path, out: Path) -> None:
    """Write the picture as a PNG of few colours."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit("no Chromium or Chrome is installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        page = Path(name) / "page.html"
        page.write_text(shortened((run / "report.html").read_text(encoding="utf-8")), encoding="utf-8")
        picture = shot(browser, page, Path(name) / "shot.png")
    buffer = io.BytesIO()
    picture.quantize(160, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    assert buffer.tell() <= MOST_BYTES, f"{buffer.tell()} bytes are more than {MOST_BYTES}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(buffer.getvalue())
    print(f"{out}: {picture.width} x {picture.height} pixels, {buffer.tell()} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path("docs/images/report.png"))
