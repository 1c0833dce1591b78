"""What everyone needs of the page: contrast, alternatives in words, order, keys, paper. Computed, not looked at."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from decant.report.page import write_report

_VOID = {"meta", "img", "br", "input", "link", "hr"}
_STYLE = files("decant.report").joinpath("style.css").read_text(encoding="utf-8")


def _palette(after: str) -> dict[str, str]:
    """The custom colours of the first ``:root`` behind a place in the style sheet, over the light ones."""
    blocks = [_STYLE, _STYLE[_STYLE.index(after) :]]
    roots = [re.search(r":root\{(.*?)\}", block, re.DOTALL) for block in blocks]
    return {name: value for root in roots if root for name, value in re.findall(r"--(\w+):(#\w+)", root.group(1))}


PALETTES = {
    "light": _palette(":root"),
    "dark": _palette("@media(prefers-color-scheme:dark)"),
    "paper": _palette("@media print"),
}


def _luminance(colour: str) -> float:
    """Relative luminance of sRGB, WCAG 2.2."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_computed_as_wcag_says() -> None:
    assert _contrast("#000", "#fff") == pytest.approx(21)
    assert _contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("name", PALETTES)
def test_every_text_colour_has_contrast_aa_on_every_ground(name: str) -> None:
    palette = PALETTES[name]
    for ink in ("ink", "soft", "teacher", "student", "control", "right", "wrong"):
        for ground in ("paper", "wash"):
            assert _contrast(palette[ink], palette[ground]) >= 4.5, (ink, ground)


def test_dark_and_paper_change_every_colour_they_must() -> None:
    light, dark, paper = PALETTES.values()
    assert all(dark[name] != light[name] for name in light)
    assert _luminance(dark["paper"]) < 0.05 and paper["paper"] == "#fff" and paper["ink"] == "#000"


def test_every_colour_of_the_style_is_one_of_the_palette() -> None:
    used = re.findall(r"(?:fill|stroke|color|background|border[\w-]*):[^;}]*?(#[0-9a-fA-F]{3,8})", _STYLE)
    assert used == []


class _Outline(HTMLParser):
    """Elements with their attributes, and whether every tag is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} stands twice"
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, *tags: str) -> list[tuple[str, dict[str, str | None]]]:
        return [(tag, attributes) for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it."""
    run = tmp_path_factory.mktemp("run")
    names = {"teacher": "teacher", "small": "student", "small-cut": "control"}
    for name in names:
        (run / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), "teal").save(run / "pictures" / name / "0.png")
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 90, "relative_to_teacher": 1.0}
    models = [
        {
            "name": name,
            "role": role,
            "path": f"runs/{name}",
            "parameters": 10**7 + (role == "teacher"),
            "scores": dict.fromkeys(("scene_accuracy", "scene_accuracy/shape", "other"), score),
            "latency_ms": {key: {"median": 9.0, "low": 8, "high": 12} for key in ("picture", "unet")},
        }
        for name, role in names.items()
    ]
    judged = {"teacher": True, "small": False, "small-cut": None}
    cells = {name: {"file": f"pictures/{name}/0.png", "correct": judged[name], "wrong": ["size"]} for name in names}
    values = {
        "command": "decant run x",
        "machine": {"cores": 2},
        "models": models,
        "seconds": {"cut": 1.0},
        "versions": {"torch": "2.15"},
        "data": {"path": "p", "used": 9, "skipped": [{"name": "a", "reason": "b"}]},
        "pictures": [{"caption": "a ring", "seed": 3, "models": cells}],
        "training": {"small": [{"step": s, "losses": {"task": 1 / (1 + s), "output": 2.0}} for s in range(4)]},
        "held_out": {"small": {"n": 4, "output_error_before": 1, "output_error_after": 0.1}},
    }
    (run / "report.json").write_text(json.dumps(values))
    return write_report(run)


@pytest.fixture(scope="module")
def outline(page: Path) -> _Outline:
    return _Outline(page.read_text(encoding="utf-8"))


def test_headings_go_down_one_level_at_a_time(outline: _Outline) -> None:
    levels = [int(tag[1]) for tag, _ in outline.named("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_pictures_and_drawings_have_words(outline: _Outline) -> None:
    alts = [attributes["alt"] for _, attributes in outline.named("img")]
    assert alts[:2] == ["teacher’s picture of “a ring”, right", "small’s picture of “a ring”, wrong: size"]
    for _, attributes in outline.named("svg"):
        assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and attributes["aria-label"])
    told = next(a["aria-label"] for _, a in outline.named("svg") if "plot" in str(a.get("class")))
    assert "small (student): 50.0\u202f% at 9 ms" in str(told)


def test_what_scrolls_or_is_copied_can_be_reached_with_keys(outline: _Outline) -> None:
    scrolled = [a for _, a in outline.elements if "scroll" in str(a.get("class", "")).split()]
    assert len(scrolled) == 4
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in scrolled)
    assert all(attributes["tabindex"] == "0" for _, attributes in outline.named("pre"))


def test_references_inside_the_page_hold(outline: _Outline) -> None:
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = [str(a["href"])[1:] for _, a in outline.named("a")]
    wanted += [str(a["aria-labelledby"]) for _, a in outline.elements if "aria-labelledby" in a]
    assert set(wanted) <= set(ids) and len(wanted) >= 10


def test_roles_differ_without_colour(page: Path, outline: _Outline) -> None:
    marks = {str(a["class"]).split()[-1]: tag for tag, a in outline.elements if str(a.get("class")).startswith("mark ")}
    assert marks == {"teacher": "circle", "student": "path", "control": "rect"}
    assert re.search(r"\.bar\.control\{[^}]*stroke-dasharray", _STYLE)
    text = page.read_text(encoding="utf-8")
    assert "✓ right" in text and "✗ size" in text


def test_the_policy_admits_this_style_and_nothing_else(page: Path, outline: _Outline) -> None:
    policy = next(str(a["content"]) for _, a in outline.named("meta") if "http-equiv" in a)
    style = re.search(r"<style>(.*?)</style>", page.read_text(encoding="utf-8"), re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    wanted = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert policy == wanted
    assert "url(" not in style.group(1) and "@import" not in style.group(1)


def test_columns_of_every_table_row_are_as_many_as_its_head_has(page: Path) -> None:
    tables = re.findall(r"<table>.*?</table>", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(tables) == 4
    for table in tables:
        rows = [len(re.findall(r"<t[hd]\b", row)) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)]
        assert len(rows) == 4 and len(set(rows)) == 1


@pytest.mark.skipif(shutil.which("tidy") is None, reason="tidy is not installed; the outline above is checked anyway")
def test_tidy_finds_nothing(page: Path) -> None:
    done = subprocess.run(["tidy", "-q", "-e", str(page)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
