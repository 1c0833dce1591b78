"""The page is read back with the standard library's HTML parser, never compared with itself."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from decant.errors import UserError
from decant.report.page import write_report
from decant.report.pictures import picture_uri
from decant.report.plot import Observation, curve, scatter
from decant.report.words import big, duration

_EVIL = "javascript:alert(1)</style></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{7*7}}"


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
            _model("best-one", "student", 0.72, 600.0, path="runs/2/best-one"),
            _model("raw", "control", 0.1, 600.0, control_of="best-one"),
        ],
        "seconds": {"distill": 192.0},
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "held_out": {"small": {"n": 40, "output_error_before": 0.5, "output_error_after": 0.02}},
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
    # 0.72 / 0.8 = 90 %, 600 / 900 = 0.67, (0.72 - 0.1) * 100 = 62.
    sentence = (
        "best-one kept 90 % of its teacher’s scene accuracy (72.0 % against 80.0 %, n = 128) at 0.67× the latency, "
    )
    assert sentence + "and stands 62.0 points above the same cut left undistilled (10.0 %)." in text


def test_the_verdict_has_the_paired_interval(tmp_path: Path) -> None:
    values = _values()
    score = values["models"][2]["scores"]["scene_accuracy"]
    score |= {"relative_to_teacher": 0.9, "relative_low": 0.841, "relative_high": 0.949}
    text = " ".join(_write(tmp_path, values).text.split())
    assert "best-one kept 90 % (84–95) of its teacher’s scene accuracy" in text and "do not show" not in text
    score["relative_high"] = 1.02
    assert "do not show the student to differ from its teacher" in _write(tmp_path, values).text
    score["n"] = 12
    assert "Only 12 pictures a model" in _write(tmp_path, values).text


def test_any_score_is_drawn_by_its_unit(tmp_path: Path) -> None:
    values = _values()
    fid = {"value": 3.14159, "low": 2.9, "high": 3.4, "unit": "number", "better": "lower", "floor": 0.41}
    fid |= {"features": "of a small network", "reference": "90 renders", "difference": 0.5}
    fid |= {"difference_low": 0.2, "difference_high": 0.8}
    values["models"][1]["scores"] |= {"fid_small": fid, "sharpness": {"value": 7.5, "unit": "dB"}}
    values["left_out"] = [{"score": "kid_inception", "reason": "no weights", "hint": "put them there"}]
    text = " ".join(_write(tmp_path, values).text.split())
    for words in (
        "FID small", "lower is better", "features: of a small network", "against 90 renders", "real pictures: 0.41",
        "3.14", "2.9–3.4", "+0.5 (+0.2 to +0.8) to teacher’s", "Sharpness", "dB", "7.5",
        "KID inception was left out: no weights",
    ):  # fmt: skip
        assert words in text, words


def test_conditions_of_times_stand_beside_them(tmp_path: Path) -> None:
    values = _values()
    for model in values["models"]:
        model |= {"steps": 25, "sampler": "ddim", "guidance_scale": 4.0, "dtype": "float32", "device": "cpu"}
        model["measured"] = {"size": [64, 48], "steps": 9, "warmup": 1, "repeats": 5, "threads": 2, "interleaved": True}
        model["latency_ms"]["unet"] = {"median": 12.3}
        model["images_per_second"] = {"median": 3.21, "batch_size": 16}
        model["peak_memory_mb"] = 1234.5
    text = " ".join(_write(tmp_path, values).text.split())
    for words in (
        "25 ddim steps, guidance 4, float32 on cpu", "9 steps, 64 × 48 px, 2 threads, 5 repeats after 1 to warm up",
        "models in turn", "One UNet call", "12.3", "3.21", "batch 16", "1,234",
    ):  # fmt: skip
        assert words in text, words


def test_the_page_holds_everything_and_needs_nothing(tmp_path: Path) -> None:
    page = _write(tmp_path, _values())
    assert not page.named("script") and not page.named("link") and not page.named("iframe")
    addresses = [value for _, a in page.tags for key, value in a.items() if key in ("src", "xlink:href")]
    assert len(addresses) == 2 and all(str(a).startswith("data:image/png;base64,") for a in addresses)
    ids = {a["id"] for _, a in page.tags if "id" in a}
    assert all(str(a["href"]).startswith("#") and str(a["href"])[1:] in ids for a in page.named("a"))
    for words in (
        "859.5 M",
        "decant quickstart",
        "3 min 12 s",
        "1,000 pictures used",
        "1 skipped",
        "a.png: torn",
        "torch==2.15.0",
        "# Python 3.11.7",
        'from_pretrained("runs/2/best-one")',
        "On 40 pictures that training never saw",
        "from 0.5 as cut to 0.02 distilled",
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


def test_photographs_and_noise_stay_light(tmp_path: Path) -> None:
    """What an untrained network draws at 512 pixels packs worst; 100 such pictures must fit in a few MB."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    run = tmp_path / "run"
    (run / "pictures").mkdir(parents=True)
    Image.fromarray(noise).save(run / "pictures" / "n.png")
    uri = picture_uri(run, "pictures/n.png")
    kind, _, content = uri.partition(";base64,")
    assert kind == "data:image/webp" and len(uri) < 45_000
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (256, 256)


def test_each_control_stands_after_its_student(tmp_path: Path) -> None:
    values = _values()
    values["models"] = [values["models"][i] for i in (3, 1, 2, 0)]
    cells = _write(tmp_path, values).text.split("Pictures side by side")[1].split("seed 7")[1].split("Training")[0]
    assert [word for word in cells.split() if word in ("T", "small", "best-one", "raw")] == ["T", "small", "raw"]


def test_what_is_optional_may_be_missing(tmp_path: Path) -> None:
    page = _write(tmp_path, {"models": [{"name": "T", "role": "teacher"}]})
    assert "No student has been scored yet." in page.text
    assert "Quality against latency" not in page.text and "Training" not in page.text


def test_a_student_that_distillation_made_worse_is_not_praised(tmp_path: Path) -> None:
    values = _values()
    for model, error in zip(values["models"], (0.0, 0.4, 0.2, 0.1), strict=True):
        model["scores"] = {"output_error": {"value": error, "unit": "number", "better": "lower"}}
    assert "best-one is worse than the same cut left undistilled" in _write(tmp_path, values).text
    assert 'class="best"' not in (tmp_path / "report.html").read_text()
    values["models"][3]["scores"]["output_error"]["value"] = 0.3
    assert "is worse than" not in _write(tmp_path, values).text
    assert 'class="best"' in (tmp_path / "report.html").read_text()


def test_a_score_where_lower_is_better_is_the_main_one_without_scenes(tmp_path: Path) -> None:
    values = _values()
    for model, error in zip(values["models"], (0.0, 0.4, 0.2, 0.9), strict=True):
        score = {"value": error, "unit": "number", "better": "lower"}
        model["scores"] = {"output_error": score}
    text = " ".join(_write(tmp_path, values).text.split())
    assert "best-one has output error 0.2 (the same cut left undistilled: 0.9), at 0.67× the latency." in text
    assert "Output error lower is better" in text and "Output error, upwards; lower is better" in text
    assert text.count("Of teacher’s") == 1  # of the latency


def test_text_from_outside_stays_text(tmp_path: Path) -> None:
    values = _values()
    values |= {"title": _EVIL, "command": _EVIL, "machine": {_EVIL: _EVIL}, "seconds": {_EVIL: 1}}
    values["versions"] = {_EVIL: _EVIL}
    values["training"] = {_EVIL: [{"step": 0, "losses": {_EVIL: 1.0}}]}
    values["data"] = {"path": _EVIL, "skipped": [{"name": _EVIL, "reason": _EVIL}]}
    values["left_out"] = [{"score": _EVIL, "reason": _EVIL}]
    values["models"][1] |= {"name": _EVIL, "path": _EVIL, "sampler": _EVIL, "steps": 3}
    values["models"][1]["scores"]["odd"] = {"value": 1, "unit": _EVIL, "features": _EVIL}
    values["models"][1]["scores"][_EVIL] = {"value": 1}
    values["models"][1]["scores"]["scene_accuracy/" + _EVIL] = {"value": 1}
    values["pictures"][0]["caption"] = _EVIL
    cell = {"file": "pictures/T/0.png", "correct": False, "wrong": [_EVIL]}
    values["pictures"][0]["models"] = {_EVIL: cell}
    page = _write(tmp_path, values)
    assert not page.named("script") and len(page.named("style")) == 1 and page.text.count(_EVIL) >= 12
    assert all(not key.startswith("on") and key != "style" for _, attributes in page.tags for key in attributes)
    assert all(str(a["href"]).startswith("#") for a in page.named("a"))
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
    drawn = curve(list(range(len(values))), values, 210, 92)
    points = [tuple(map(float, point.split(","))) for point in drawn.points.split()]
    assert len(points) == min(len(values), 160) and points[-1] == drawn.end
    inside = drawn.frame
    assert all(inside.left <= x <= inside.right and inside.top <= y <= inside.bottom for x, y in points)
    assert drawn.y == (min(values), max(values)) and drawn.x == (0, len(values) - 1)
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
