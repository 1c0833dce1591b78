"""What each part of a distillation buys on scenes, one change at a time, in one table: docs/terms.md.

    python examples/terms_table.py --out runs/terms

Terms, a sequence of teachers against one, rounds against one shot, real pictures against prompts alone and against
random latents, a teacher of v_prediction: BK-Tiny of the scenes teacher every time, the same number of steps and
pictures. Then the terms again on SSD-1B's and Vega's cuts of the teacher of SDXL's layout. The run goes on where it was
stopped.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decant.recipe.runner import run_recipe, run_stage
from decant.recipe.schema import Recipe
from decant.scenes.folder import captions_of, draw_folder
from decant.stages import evaluate
from decant.stages.all import STAGES

ROOT = Path(__file__).parents[1]
PICTURES = 2000
COMMON: dict[str, Any] = {
    "batch_size": 16, "min_snr_gamma": 5, "caption_dropout": 0.15, "learning_rate": 1.5e-3, "schedule": "one_cycle",
    "warmup": 20, "ema": 0.98, "held_out": 0.05, "checkpoint_every": 500, "task": 0, "output": 0, "feature": 0,
}  # fmt: skip
TERMS: dict[str, dict[str, Any]] = {
    "task": {"task": 1},
    "task + output": {"task": 1, "output": 1},
    "task + output + block features": {"task": 1, "output": 1, "feature": 0.3},
    "task + output + layer features": {"task": 1, "output": 1, "feature": 0.3, "features": ["layer"]},
    "output": {"output": 1},
    "output + block features": {"output": 1, "feature": 0.3},
    "output + layer features": {"output": 1, "feature": 0.3, "features": ["layer"]},
}
XL_STUDENTS = {"ssd-1b": "SSD-1B", "vega": "Vega"}
XL_TERMS = ("output", "output + block features", "output + layer features")
BEST = TERMS["output + block features"]
ROUNDS = ("bk-base", "bk-small", "bk-tiny")
PROMPTS = {"the teacher's samples of prompts": "samples", "random latents": "random"}


def recipe(name: str, stages: Sequence[dict[str, Any]]) -> Recipe:
    """One of this table's runs."""
    return Recipe.model_validate({"name": name, "stages": list(stages)})


def distilled(name: str, start: str, steps: int, **settings: Any) -> dict[str, Any]:
    """A distillation as a stage."""
    return {"stage": "distill", "name": name, "from": start, "settings": {**COMMON, "steps": steps, **settings}}


def cut(name: str, start: str, **settings: Any) -> dict[str, Any]:
    """A cut as a stage."""
    return {"stage": "prune", "name": name, "from": start, "settings": {"student": "bk-tiny", **settings}}


class Table:
    """Runs, their folders by the words of the table's rows, and what was measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.models: dict[str, dict[str, Path]] = {"scenes": {}, "scenes-xl": {}}

    def run(self, made: Recipe, rows: Mapping[str, str], data: Path, teacher: str = "scenes") -> None:
        """Run a recipe; ``rows``: words -> name of the stage whose student they stand for."""
        out = self.args.out / made.name
        run_recipe(made, teacher=teacher, data=data, out=out, stages=STAGES, talk=talk, cache=self.args.out / "cache")
        folders = {step.name: out / f"{number:02d}-{step.name}" for number, step in enumerate(made.stages, start=1)}
        self.models["scenes-xl" if teacher == "scenes-xl" else "scenes"] |= {
            w: folders[name] for w, name in rows.items()
        }

    def terms(self, data: Path) -> None:
        """Which terms; with a cut, and random weights, as floors."""
        stages = [cut("cut", "teacher"), cut("random-cut", "teacher", weights="random")]
        names = {words: f"terms-{number}" for number, words in enumerate(TERMS)}
        stages += [distilled(names[words], "cut", self.args.steps, **terms) for words, terms in TERMS.items()]
        no_map = {**BEST, "feature": 0}  # random weights have no layers to pair
        stages.append(distilled("random", "random-cut", self.args.steps, **no_map))
        floors = {"the cut, undistilled": "cut", "random weights, output": "random"}
        self.run(recipe("terms", stages), {**floors, **names}, data)

    def teachers(self, data: Path) -> None:
        """The shipped teacher, then two of it that were trained on; against itself alone all the time."""
        tuned = [distilled(f"tuned-{n}", "teacher", self.args.tune_steps, task=1, learning_rate=2e-4) for n in (1, 2)]
        tuned[1]["from"] = "tuned-1"
        made = recipe("tuned", tuned)
        self.run(made, {}, data)
        folders = [self.args.out / "tuned" / f"{n:02d}-tuned-{n}" for n in (1, 2)]
        others = [{"teacher": str(folder), "at": at} for folder, at in zip(folders, (1 / 3, 2 / 3), strict=True)]
        stages = [cut("cut", "teacher"), distilled("three", "cut", self.args.steps, **BEST, next_teachers=others)]
        self.run(recipe("teachers", stages), {"three teachers in turn": "three"}, data)

    def velocity(self, data: Path) -> None:
        """A teacher of v_prediction, made of the shipped one by output matching; and its student."""
        made = recipe("v", [distilled("v", "teacher", self.args.tune_steps, output=1, prediction="v_prediction")])
        words = "teacher of v_prediction, made of the first by its outputs"
        self.run(made, {words: "v"}, data)
        stages = [cut("cut", "teacher"), distilled("student", "cut", self.args.steps, **BEST)]
        rows = {"student of the teacher of v_prediction": "student"}
        self.run(recipe("v-student", stages), rows, data, str(self.models["scenes"][words]))

    def rounds(self, data: Path) -> None:
        """Base, Small, Tiny, a third of the steps each."""
        stages: list[dict[str, Any]] = []
        before = "teacher"
        for student in ROUNDS:
            stages.append(cut(f"{student}-cut", before, student=student))
            stages.append(distilled(student, f"{student}-cut", self.args.steps // len(ROUNDS), **BEST))
            before = student
        self.run(recipe("rounds", stages), {"three rounds of cut and distil": before}, data)

    def prompts(self, captions: Path) -> None:
        """No pictures: what the teacher draws for the same captions, or normal numbers."""
        stages = [cut("cut", "teacher")]
        for how in PROMPTS.values():
            guided = {"prompts": how, "prompt_guidance_scale": 4.0}
            stages.append(distilled(how, "cut", self.args.steps, **BEST, **guided))
        self.run(recipe("prompts", stages), PROMPTS, captions)

    def sdxl(self, data: Path) -> None:
        """Block against layer features where a cut takes transformer blocks out of every layer."""
        stages, rows = [], {}
        for student, words in XL_STUDENTS.items():
            stages.append(cut(f"{student}-cut", "teacher", student=student))
            rows[f"{words}, the cut, undistilled"] = f"{student}-cut"
            for number, terms in enumerate(XL_TERMS):
                stages.append(distilled(f"{student}-{number}", f"{student}-cut", self.args.steps, **TERMS[terms]))
                rows[f"{words}, {terms}"] = f"{student}-{number}"
        self.run(recipe("sdxl", stages), rows, data, "scenes-xl")

    def table(self, teacher: str) -> list[str]:
        """The rows of a teacher's students, all evaluated together."""
        models = self.models[teacher]
        safe = {f"model-{number}": folder for number, folder in enumerate(models.values())}
        how = {"captions": "scenes", "images": self.args.images, "steps": 25, "guidance_scale": 4.0, "batch_size": 32}
        how["latency_repeats"] = 0
        asked: dict[str, Any] = {"teacher": teacher, "models": safe, "data": None, "seed": 0, "talk": talk}
        record = run_stage("evaluate", evaluate.STAGE, how, **asked, out=self.args.out / f"evaluated-{teacher}")
        names = {"teacher": "teacher", **dict(zip(safe, models, strict=True))}
        head = ["| what | accuracy, % | agreement with the teacher, % |", "|---|---|---|"]
        return [*head, *(row(names[model["name"]], model["scores"]) for model in record["models"]), ""]

    def page(self) -> str:
        """docs/terms.md."""
        lines = [
            "# What each part of a distillation buys",
            "",
            f"Written by `python examples/terms_table.py --steps {self.args.steps} --images {self.args.images}`.",
            "",
            f"BK-Tiny of the scenes teacher, {self.args.steps} steps of 16 in all, one change at a time. Where a row "
            "names no terms, they are output + block features, on real pictures, in one shot, from one teacher. "
            f"Percent of {self.args.images} captions of held-out scenes, DDIM 25 steps, guidance 4, 95 % intervals.",
            "",
            *self.table("scenes"),
            "## Cuts of SDXL's layout",
            "",
            f"SSD-1B and Vega of `scenes-xl`, {self.args.steps} steps of 16, the same settings but for the features.",
            "",
            *self.table("scenes-xl"),
        ]
        return "\n".join(lines)


def row(words: str, scores: Mapping[str, Mapping[str, float]]) -> str:
    """One line of the table."""
    shares = (scores["scene_accuracy"], scores["agreement_with_teacher"])
    told = (f"{100 * s['value']:.1f} ({100 * s['low']:.1f}-{100 * s['high']:.1f})" for s in shares)
    return f"| {words} | {' | '.join(told)} |"


def main(words: Sequence[str] | None = None) -> None:
    """Draw, train, evaluate, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/terms"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tune-steps", type=int, default=1200)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "terms.md")
    args = parser.parse_args(words)
    data, captions = args.out / "data", args.out / "captions.json"
    if not (data / "metadata.jsonl").is_file():
        draw_folder(data, PICTURES, "train")
    told = [{"text": caption} for _, caption in captions_of(PICTURES, "train", 0)]
    captions.write_text(json.dumps(told), encoding="utf-8")
    table = Table(args)
    table.terms(data)
    table.rounds(data)
    table.prompts(captions)
    table.sdxl(data)
    table.velocity(data)
    table.teachers(data)
    args.page.write_text(table.page(), encoding="utf-8")


def talk(line: str) -> None:
    """For people."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
