"""`decant compare` from the command line to its pages, on the shipped teacher and a cut of it."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from decant.cli.work import one_stage
from decant.errors import UserError
from decant.models.generate import generate
from decant.models.load import load
from decant.models.shipped import shipped_folder
from decant.stages.blind import preferences
from processes import Begun, here

PROMPTS = ["a large red circle on a white background", "a small blue star, black background"]
FEW = ["--images", "2", "--steps", "1", "2", "--teacher-steps", "3", "--guidance-scale", "4", "--latency-repeats", "1"]
FEW += ["--batch-size", "3"]  # of four pictures an arm: one is in a batch of its own


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the teacher, and its BK-Tiny cut."""
    where = tmp_path_factory.mktemp("made")
    one_stage(
        "prune", {"student": "bk-tiny"}, teacher="scenes", models={"teacher": "scenes"}, out=where / "tiny", talk=print
    )
    pipeline = StableDiffusionPipeline.from_pretrained(shipped_folder("scenes"))
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(where, layers, weight_name="style.safetensors")
    return where


@pytest.fixture(scope="module")
def compared(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished comparison, and its command."""
    out = tmp_path_factory.mktemp("compared") / "out"
    (made / "prompts.txt").write_text("\n".join([PROMPTS[0], "", PROMPTS[1], PROMPTS[0]]))
    students = ["--student", str(made / "tiny"), f"styled=teacher+{made / 'style.safetensors'}"]
    words = ["compare", "--teacher", "scenes", *students, "--prompts-file", str(made / "prompts.txt"), *FEW]
    words += ["--set", "styled.guidance_scale=1", "--set", "styled.steps=[2]", "--blind", "--out", str(out)]
    assert here(*words).returncode == 0
    return out, words


def document(out: Path) -> dict[str, Any]:
    return json.loads((out / "compare.json").read_text())


def test_every_arm_is_drawn_scored_and_timed(compared: tuple[Path, list[str]]) -> None:
    out, _ = compared
    found = document(out)
    assert [entry["name"] for entry in found["models"]] == [
        *("teacher at 3 steps", "teacher at 2 steps", "teacher at 1 step"),
        *("tiny at 2 steps", "tiny at 1 step", "styled at 2 steps"),
    ]
    teacher, *others = found["models"]
    assert teacher["scores"]["distance_to_teacher"]["value"] == 0 and teacher["speedup"]["value"] == 1
    for entry in others:
        assert {"scene_accuracy", "distance_to_teacher", "diversity"} <= entry["scores"].keys()
        assert entry["scores"]["distance_to_teacher"]["value"] > 0 and entry["scores"]["diversity"]["n"] == 2
        assert {"picture", "text", "unet", "decode"} == entry["latency_ms"].keys()
        ratio = teacher["latency_ms"]["picture"]["median"] / entry["latency_ms"]["picture"]["median"]
        assert entry["speedup"]["value"] == pytest.approx(ratio)
    assert {entry["guidance_scale"] for entry in found["models"] if entry["model"] == "styled"} == {1}
    assert found["skipped"] == {"blank": 1, "said before": 1} and [p["prompt"] for p in found["prompts"]] == PROMPTS
    assert {item["score"] for item in found["left_out"]} >= {"clip_score"}


def test_pictures_are_those_that_generate_draws_of_the_seed_that_is_told(
    compared: tuple[Path, list[str]], made: Path
) -> None:
    """Every picture can be had again by hand; the LoRA is one that diffusers loads."""
    out, _ = compared
    row = document(out)["pictures"][1]
    plain, styled = load(shipped_folder("scenes")), load(shipped_folder("scenes"))
    styled.load_lora_weights(str(made), weight_name="style.safetensors")
    for name, pipeline, guidance_scale in (("teacher at 2 steps", plain, 4.0), ("styled at 2 steps", styled, 1.0)):
        (own,) = generate(pipeline, [row["caption"]], [row["seed"]], steps=2, guidance_scale=guidance_scale)
        kept = np.asarray(Image.open(out / row["models"][name]["file"]))
        assert np.abs(own.astype(int) - kept).max() <= 1, name


def test_the_tables_say_what_was_not_measured(compared: tuple[Path, list[str]]) -> None:
    out, _ = compared
    with (out / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and all(row["clip_score"].startswith("not measured: ") for row in rows)
    assert float(rows[0]["scene_accuracy_high"]) <= 1
    with (out / "pictures.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 6 * 4


def test_the_page_is_one_file_that_needs_nothing(compared: tuple[Path, list[str]]) -> None:
    out, _ = compared
    page = (out / "compare.html").read_text()
    (out / "compare.html").unlink()
    assert here("report", out).returncode == 0 and (out / "compare.html").read_text() == page, "made again from JSON"
    heads = [head.strip() for head in re.findall(r'<th scope="col">([^<]+)', page)]
    assert heads[3:7] == ["Scene accuracy", "Of teacher’s", "Diversity", "Of teacher’s"]
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "not measured" in page
    assert page.count("<img") == 2 * 6 + 2 * 6 * 2
    grids = sorted((out / "grids").iterdir())
    assert len(grids) == 2
    grid = Image.open(grids[0])
    assert grid.width > 6 * 128 and grid.height > 2 * 128


def test_a_second_call_draws_nothing_and_says_the_same(
    compared: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = compared
    before, page = document(out), (out / "blind.html").read_text()
    monkeypatch.setattr("decant.stages.drawn_once.generate", lambda *args, **named: pytest.fail("drawn again"))
    done = here(*words)
    assert done.returncode == 0 and "24 of 24 pictures were there" in done.stderr
    assert "not measured" in done.stdout and "tiny" in done.stdout
    assert document(out) == before and (out / "blind.html").read_text() == page, "latencies stand as well"


def test_what_changed_is_drawn_anew_and_nothing_else(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged picture, another guidance, more images: each costs its own pictures."""
    drawn: list[int] = []

    def counted(pipeline: Any, prompts: list[str], *args: Any, **named: Any) -> Any:
        drawn.append(len(prompts))
        return generate(pipeline, prompts, *args, **named)

    monkeypatch.setattr("decant.stages.drawn_once.generate", counted)
    words = ["compare", "--teacher", "scenes", "--student", str(made / "tiny"), "--steps", "1"]
    words += ["--teacher-steps", "2", "--no-teacher-at-steps", "--latency-repeats", "0", "--out", str(tmp_path / "out")]

    def again(*more: str, prompts: Sequence[str] = PROMPTS) -> int:
        drawn.clear()
        more = (*more, "--prompt", *prompts)
        assert here(*words, "--batch-size", "1", *more).returncode == 0
        return sum(drawn)

    assert again("--images", "1") == 4
    file = next((tmp_path / "out" / "pictures" / "tiny-1").iterdir())
    whole = file.read_bytes()
    file.write_bytes(whole[:-200])
    assert again("--images", "1") == 1 and file.read_bytes() == whole
    assert again("--images", "1", "--set", "tiny.guidance_scale=1") == 2
    assert again("--images", "2", "--set", "tiny.guidance_scale=1") == 4
    assert again("--images", "2", "--set", "tiny.guidance_scale=1", prompts=PROMPTS[::-1]) == 0


def votes_of(page: str, choose: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """What a voter who sees the page alone hands in."""
    shown = re.search(r'<script type="application/json" id="pairs">(.*?)</script>', page, re.DOTALL)
    assert shown is not None
    data = json.loads(shown.group(1))
    votes = [{"pair": at, "choice": choose(pair)} for at, pair in enumerate(data["pairs"])]
    return {"page": data["page"], "votes": votes}


def test_blind_votes_come_back_as_preferences(compared: tuple[Path, list[str]], tmp_path: Path) -> None:
    """A voter who always finds the picture that the teacher drew: seen by its pixels, since nothing else tells."""
    out, _ = compared
    page = (out / "blind.html").read_text()
    key = json.loads((out / "blind-key.json").read_text())
    content = re.sub(r"<style>.*?</style>|data:[^\"]*", "", page, flags=re.DOTALL)
    for word in ("teacher", "tiny", "styled", "steps", "pictures/", ".png", "seed"):
        assert word not in content, "no names"
    sides = [(pair["arm"], pair["side"]) for pair in key["pairs"]]
    assert len(sides) == 12 and all(sides.count((arm, side)) == 2 for arm, side in sides)
    teachers = [{"left": "right", "right": "left"}[pair["side"]] for pair in key["pairs"]]
    order = iter(teachers)
    (tmp_path / "votes.json").write_text(json.dumps(votes_of(page, lambda pair: next(order))))
    done = here("compare", "--out", out, "--votes", tmp_path / "votes.json", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["reference"] == "teacher at 3 steps" and found["pairs"] == 12
    for arm in found["arms"]:
        assert (arm["wins"], arm["losses"], arm["ties"]) == (0, 4, 0)
        assert arm["preference"]["value"] == 0 < arm["preference"]["high"] < 0.6
    ties = votes_of(page, lambda pair: "tie")
    (tmp_path / "ties.json").write_text(json.dumps({**ties, "votes": ties["votes"][:3]}))
    both = preferences(out, [tmp_path / "votes.json", tmp_path / "ties.json"])
    assert both["voters"] == 2 and both["votes"] == 15 and sum(arm["losses"] for arm in both["arms"]) == 12
    alone = preferences(out, [tmp_path / "ties.json"])
    assert all(arm["preference"] is None for arm in alone["arms"]) and sum(arm["ties"] for arm in alone["arms"]) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"page": "0123456789abcdef"}, "is of page '0123456789abcdef'"),
        ({"votes": [{"pair": 99, "choice": "left"}]}, "of pair 99"),
        ({"votes": [{"pair": 0, "choice": "teacher"}]}, "'teacher' of pair 0"),
        ({"votes": [{"pair": 0, "choice": "left"}, {"pair": 0, "choice": "right"}]}, "a pair twice"),
        ({"votes": 3}, "TypeError"),
    ],
)
def test_votes_of_another_page_or_none_are_refused(
    compared: tuple[Path, list[str]], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    out, _ = compared
    good = votes_of((out / "blind.html").read_text(), lambda pair: "left")
    (tmp_path / "votes.json").write_text(json.dumps({**good, **change}))
    with pytest.raises(UserError, match=re.escape(says)):
        preferences(out, [tmp_path / "votes.json"])
    with pytest.raises(UserError, match="blind-key"):
        preferences(tmp_path, [tmp_path / "votes.json"])


REFUSED = {
    "no steps": (["--steps", "0"], "steps"),
    "steps above the schedule": (["--steps", "1001"], "1 to 1000"),
    "teacher's steps above the schedule": (["--teacher-steps", "1001"], "1 to 1000"),
    "steps above LCM's": (["--steps", "51", "--set", "scenes.sampler=lcm"], "1 to 50"),
    "no images": (["--images", "0"], "images"),
    "a model that is not compared": (["--set", "scene.steps=[1]"], "did you mean 'scenes'"),
    "an unknown key": (["--set", "scenes.guidance=1"], "did you mean 'guidance_scale'"),
    "an unknown sampler": (["--set", "scenes.sampler=eular"], "did you mean 'euler'"),
    "no such file": (["--prompts-file", "absent.txt"], "absent.txt"),
    "no key": (["--set", "sampler=ddim"], "MODEL.key=value"),
    "no pairs": (["--blind", "--blind-pairs", "0"], "blind-pairs"),
    "no such student": (["--student", "runs/nothing"], "runs/nothing"),
}


@pytest.mark.parametrize(("words", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_mistakes_are_told_before_anything_is_drawn(tmp_path: Path, words: list[str], says: str) -> None:
    out = tmp_path / "out"
    command = ["compare", "--teacher", "scenes", "--student", "scenes", "--prompt", "a cat", "--out", out, *words]
    done = here(*command)
    assert done.returncode == 2 and says in done.stderr and "hint:" in done.stderr and not (out / "pictures").exists()


def test_a_teacher_is_needed_and_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    done = here("compare", "--out", tmp_path / "out")
    assert done.returncode == 2 and "--teacher" in done.stderr
    (tmp_path / "mine.txt").write_text("mine")
    done = here("compare", "--teacher", "scenes", "--prompt", "a cat", "--out", tmp_path)
    assert (
        done.returncode == 2
        and "no comparison" in done.stderr
        and [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    )


def test_a_lora_of_another_model_is_refused_by_its_first_module(made: Path, tmp_path: Path) -> None:
    student = f"{made / 'tiny'}+{made / 'style.safetensors'}"
    words = ["compare", "--teacher", "scenes", "--student", student, "--prompt", "a cat", "--out", tmp_path / "out"]
    done = here(*words)
    assert done.returncode == 2 and "no such module" in done.stderr and "decant move" in done.stderr


def test_prompts_that_are_too_long_say_what_is_not_read(tmp_path: Path) -> None:
    long = "a small red circle on a white background " * 4 + "with a purple dragon"
    words = [
        "compare",
        "--teacher",
        "scenes",
        "--prompt",
        long,
        "--images",
        "2",
        "--steps",
        "1",
        "--teacher-steps",
        "1",
    ]
    done = here(*words, "--latency-repeats", "0", "--out", tmp_path / "out")
    assert done.returncode == 0 and "dragon" in done.stderr and "dragon" in done.stdout
    (prompt,) = document(tmp_path / "out")["prompts"]
    assert (
        prompt["unread"].endswith("purple dragon") and prompt["unread"] in (tmp_path / "out/compare.html").read_text()
    )


def without_times(out: Path) -> dict[str, Any]:
    found = document(out)
    for entry in found["models"]:
        for key in ("latency_ms", "speedup", "measured", "measured_as"):
            entry.pop(key, None)
    return {key: value for key, value in found.items() if key != "command"}


def files_of(out: Path) -> dict[str, bytes]:
    folders = (out / "pictures", out / "grids")
    found = [file for folder in folders for file in folder.rglob("*") if file.is_file() and file.suffix != ".tmp"]
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in (*found, out / "blind.html")}


def test_killed_at_any_moment_it_ends_in_the_same_figures(compared: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Killed in the teacher's pictures, between two arms, in a student's, and while it is timing."""
    whole, words = compared
    out = tmp_path / "out"
    again = [*words[:-1], str(out)]
    moments = [
        lambda: list(out.glob("pictures/teacher-3/*.png")),
        (out / "pictures" / "teacher-1").exists,
        lambda: len(list(out.glob("pictures/tiny-1/*.png"))) >= 2,
        lambda: "styled at 2 steps: scene" in begun.said,
    ]
    for number, moment in enumerate(moments):
        begun = Begun(again, tmp_path / f"said-{number}")
        begun.wait_for(moment)
        begun.kill()
        assert not (out / "compare.json").exists()
    assert here(*again).returncode == 0
    assert without_times(out) == without_times(whole)
    assert files_of(out) == files_of(whole)
