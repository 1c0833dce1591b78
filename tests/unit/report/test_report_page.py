"""The page is read back with the standard library's HTML parser, never compared with itself."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from decant.errors import UserError
from decant.report.page import write_report
from decant.report.plot import Observation, curve, scatter
from decant.report.words import big, duration

_EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


class _Page(HTMLParser):
    """Tags with their attributes, and all text outside of style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._style else data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _model(name: str, role: str, accuracy: float, ms: float, **more: Any) -> dict[str, Any]:
    scores = {
        "scene_accuracy": {"value": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05, "n": 128},
        "scene_accuracy/shape": {"value": accuracy + 0.01},
        "output_error": {"value": 0.0123, "unit": "number", "better": "lower"},
    }
    latency = {"picture": {"median": ms, "low": ms * 0.9, "high": ms * 1.2, "n": 5}}
    return {
        "name": name,
        "role": role,
        "parameters": 859_520_964,
        "scores": scores,
        "latency_ms": latency,
        **more,
    }


def _values() -> dict[str, Any]:
    return {
        "version": "0.1.0",
        "command": "decant quickstart",
        "machine": {"device": "cpu"},
        "models": [
            _model("T", "teacher", 0.8, 900.0),
            _model("small", "student", 0.5, 400.0),
            _model("best-one", "student", 0.72, 600.0),
            _model("raw", "control", 0.1, 600.0, control_of="best-one"),
        ],
        "seconds": {"distill": 192.0},
        "data": {"path": "pics", "used": 1000, "skipped": [{"name": "a.png", "reason": "torn"}]},
        "pictures": [
            {
                "caption": "a red ring",
                "seed": 7,
                "models": {
                    "T": {"file": "pictures/T/0.png", "correct": True},
                    "raw": {"file": "pictures/raw/0.png", "correct": False, "wrong": ["shape", "colour"]},
                    "small": {"file": "pictures/small/" + "0" * 300 + ".png", "correct": None},
                },
            }
        ],
        "training": {"small": [{"step": s, "losses": {"task": 1 / (s + 1)}} for s in range(9)]},
    }


def _write(run: Path, values: dict[str, Any]) -> _Page:
    for name, colour in (("T", "red"), ("raw", "blue")):
        file = run / "pictures" / name / "0.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (600, 300), colour).save(file)
    (run / "report.json").write_text(json.dumps(values))
    return _Page(write_report(run).read_text(encoding="utf-8"))


def test_the_verdict_names_the_best_student_and_its_figures(tmp_path: Path) -> None:
    text = " ".join(_write(tmp_path, _values()).text.split())
    # 0.72 / 0.8 = 90 %, 900 / 600 = 1.5, (0.72 - 0.1) * 100 = 62.
    sentence = "best-one keeps 90 % of its teacher’s scene accuracy (72.0 % against 80.0 %, n = 128), "
    assert sentence + "draws a picture 1.50 times as fast and stands 62.0 points above" in text


def test_the_page_holds_everything_and_needs_nothing(tmp_path: Path) -> None:
    page = _write(tmp_path, _values())
    assert not page.named("script") and not page.named("link") and not page.named("iframe")
    addresses = [value for _, a in page.tags for key, value in a.items() if key in ("src", "href", "xlink:href")]
    assert len(addresses) == 2 and all(str(a).startswith("data:image/png;base64,") for a in addresses)
    for words in (
        "859.5 M",
        "decant quickstart",
        "3 min 12 s",
        "1,000 pictures used",
        "1 skipped",
        "a.png: torn",
    ):
        assert words in " ".join(page.text.split()), words
    for words in ("a red ring", "seed 7", "✓", "✗ shape, colour", "not kept", "Shape", "0.0123", "task"):
        assert words in page.text, words


def test_pictures_are_inside_and_small(tmp_path: Path) -> None:
    page = _write(tmp_path, _values())
    uris = [str(image["src"]).partition(",")[2] for image in page.named("img")]
    images = [Image.open(io.BytesIO(base64.b64decode(uri))) for uri in uris]
    assert [image.size for image in images] == [(256, 128)] * 2
    assert [image.getpixel((3, 3)) for image in images] == [(255, 0, 0), (0, 0, 255)]


def test_each_control_stands_after_its_student(tmp_path: Path) -> None:
    values = _values()
    values["models"] = [values["models"][i] for i in (3, 1, 2, 0)]
    gallery = _write(tmp_path, values).text.split("Pictures side by side")[1].split("a red ring")[0]
    assert gallery.split("Caption")[1].split() == ["T", "small", "best-one", "raw"]


def test_what_is_optional_may_be_missing(tmp_path: Path) -> None:
    page = _write(tmp_path, {"models": [{"name": "T", "role": "teacher"}]})
    assert "No student has been scored yet." in page.text
    assert "Quality against latency" not in page.text and "Training" not in page.text


def test_a_score_where_lower_is_better_is_the_main_one_without_scenes(tmp_path: Path) -> None:
    values = _values()
    for model, error in zip(values["models"], (0.0, 0.4, 0.2, 0.9), strict=True):
        score = {"value": error, "unit": "number", "better": "lower"}
        model["scores"] = {"output_error": score}
    text = " ".join(_write(tmp_path, values).text.split())
    assert "best-one has output error 0.2 against 0 for its teacher" in text
    assert "is 0.7 better than the same cut left undistilled (0.9)" in text


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    values = _values()
    values |= {"title": _EVIL, "command": _EVIL, "machine": {_EVIL: _EVIL}, "seconds": {_EVIL: 1}}
    values["versions"] = {_EVIL: _EVIL}
    values["training"] = {_EVIL: [{"step": 0, "losses": {_EVIL: 1.0}}]}
    values["data"] = {"path": _EVIL, "skipped": [{"name": _EVIL, "reason": _EVIL}]}
    values["models"][1]["name"] = _EVIL
    values["models"][1]["scores"][_EVIL] = {"value": 1}
    values["models"][1]["scores"]["scene_accuracy/" + _EVIL] = {"value": 1}
    values["pictures"][0]["caption"] = _EVIL
    cell = {"file": "pictures/T/0.png", "correct": False, "wrong": [_EVIL]}
    values["pictures"][0]["models"] = {_EVIL: cell}
    page = _write(tmp_path, values)
    assert not page.named("script") and page.text.count(_EVIL) >= 12
    assert all(not key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert {str(image["src"])[:15] for image in page.named("img")} == {"data:image/png;"}


@pytest.mark.parametrize("file", ["../secret.png", "/etc/hostname", "pictures/../../secret.png", "link.png", "a\0b"])
def test_pictures_outside_the_run_are_refused(tmp_path: Path, file: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    run = tmp_path / "run"
    run.mkdir()
    (run / "link.png").symlink_to(tmp_path / "secret.png")
    values = _values()
    values["pictures"][0]["models"]["T"]["file"] = file
    with pytest.raises(UserError, match="leaves the run"):
        _write(run, values)
    assert not (run / "report.html").exists()


def test_a_picture_that_is_no_png_is_refused(tmp_path: Path) -> None:
    values = _values()
    values["pictures"][0]["models"]["T"]["file"] = "report.json"
    with pytest.raises(UserError, match="does not decode"):
        _write(tmp_path, values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "report.json"),
        ("{}", "models: missing"),
        ('{"models": []}', "at least 1 item"),
        ('{"models": [{"name": "a", "role": "pupil"}]}', "models.0.role: 'pupil'"),
        ('{"models": [{"name": "a", "role": "student", "size_mb": NaN}]}', "size_mb"),
        ('{"models": [{"name": "a", "role": "student"}, {"name": "a", "role": "control"}]}', "stands twice"),
        (
            '{"models": [{"name": "a", "role": "student", "latency_ms": {"picture": {"median": 0}}}]}',
            "median",
        ),
    ],
)
def test_a_malformed_report_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError) as refused:
        write_report(tmp_path)
    assert words in str(refused.value) and "hint:" in str(refused.value)


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        write_report(tmp_path / "absent")


def _observation(name: str, x: float, y: float) -> Observation:
    return Observation(name, "student", (x, 0.9 * x, 1.1 * x), (y, max(0.0, y - 0.1), min(1.0, y + 0.1)))


_POINTS = st.lists(st.tuples(st.floats(0.01, 1e6), st.floats(0, 1)), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(points=_POINTS)
def test_marks_keep_their_order_and_stay_in_the_frame(points: list[tuple[float, float]]) -> None:
    plot = scatter([_observation(f"m{i}", x, y) for i, (x, y) in enumerate(points)], 760, 400, True)
    where = {mark.label: mark for mark in plot.marks}
    marks = [where[f"m{i}"] for i in range(len(points))]
    for mark, (_, y) in zip(marks, points, strict=True):
        assert plot.frame.left - 1e-6 <= mark.bar_x[0] <= mark.x <= mark.bar_x[1] <= plot.frame.right + 1e-6
        assert abs(mark.y - (plot.frame.bottom + y * (plot.frame.top - plot.frame.bottom))) < 1e-6
    order = sorted(range(len(points)), key=lambda i: points[i][0])
    places = [marks[i].x for i in order]
    assert places == sorted(places)


def test_labels_of_close_marks_do_not_cover_each_other() -> None:
    plot = scatter([_observation(f"student-{i}", 500 + 12 * i, 0.7 + 0.03 * i) for i in range(4)], 760, 400, True)
    lines = sorted((mark.label_y, mark.label_x, mark.anchor) for mark in plot.marks)
    same_side = [(a, b) for a in lines for b in lines if a < b and a[2] == b[2] and abs(a[1] - b[1]) < 60]
    assert all(b[0] - a[0] >= 11 for a, b in same_side)


def test_a_control_is_tied_to_its_student_and_has_no_label() -> None:
    control = Observation("raw", "control", (500.0, 500.0, 500.0), (0.1, 0.1, 0.1), twin="m")
    student, tied = scatter([_observation("m", 500, 0.8), control], 760, 400, True).marks[::-1]
    assert (student.label, tied.label, tied.tie) == ("m", "", (student.x, student.y))


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=700))
def test_a_curve_stays_in_its_box_and_ends_with_its_last_value(values: list[float]) -> None:
    drawn = curve(list(range(len(values))), values, 180, 48)
    points = [tuple(map(float, point.split(","))) for point in drawn.points.split()]
    assert len(points) == min(len(values), 160) and points[-1] == drawn.end
    assert all(0 <= x <= 180 and 0 <= y <= 48 for x, y in points)
    if values[-1] > values[0]:
        assert points[-1][1] <= points[0][1]


def test_numbers_are_written_in_the_units_of_the_field() -> None:
    assert [big(859_520_964), big(401.6e9), big(4096), big(None)] == [
        "859.5\u202fM",
        "401.6\u202fG",
        "4,096",
        "–",
    ]
    assert [duration(41.2), duration(192), duration(7500)] == [
        "41.2\u202fs",
        "3\u202fmin 12\u202fs",
        "2\u202fh 5\u202fmin",
    ]
