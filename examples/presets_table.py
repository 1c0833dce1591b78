"""Every preset on scenes, after the same number of training pictures, in one table: docs/presets.md.

    python examples/presets_table.py --out runs/presets

Each is distilled in a process of its own, so that its memory is its own; then all are evaluated together, beside the
undistilled cut and a student begun from random weights. The run goes on where it was stopped.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from decant.recipe.runner import run_stage
from decant.recipe.schema import Recipe, Step, list_recipes, load_recipe, override, scaled
from decant.scenes.folder import draw_folder
from decant.stages import evaluate

ROOT = Path(__file__).parents[1]
PICTURES = 2000
TEACHERS = {"sd1": "scenes", "sd2": "scenes", "sdxl": "scenes-xl"}
CONTROL = {"sd1": "bk-sdm-tiny", "sdxl": "ssd-1b"}  # whose cut and whose random twin stand beside the students
PROTOCOL = {"steps": 25, "guidance_scale": 5.0, "sampler": "ddpm"}  # v2.2's own
FEW_STEPS = ("consistency", "dmd")  # see few_steps_table.py
COLUMNS = ("student", "parameters", "pictures/s", "memory, MB", "accuracy, %", "agreement, %", "FID")


def presets(family: str) -> dict[str, Recipe]:
    """The presets of teachers of a kind that can be scaled to scenes, and that take as many steps as their teacher."""
    known = [load_recipe(each["name"]) for each in list_recipes()]
    known = [each for each in known if not any(step.stage in FEW_STEPS or _guided(step) for step in each.stages)]
    return {each.name: scaled(each, "scenes") for each in known if each.scales and each.teacher_family == family}


def _guided(step: Step) -> bool:
    return "teacher_guidance_scale" in step.settings


def trained(name: str, recipe: Recipe, args: argparse.Namespace, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The stages of a preset without its evaluation, run in a child, in a folder of the preset's and changes' names."""
    steps = [f"distill.steps={args.steps}"]
    if name == "compress":  # as many pictures as the others
        steps += ["distilled.batch_size=16"]
    recipe = override(recipe, steps)
    stages = [step for step in recipe.stages if step.stage != "evaluate"]
    recipe = recipe.model_copy(update={"stages": tuple(stages)})
    recipe = override(recipe, list(changes))
    out = args.out / "-".join([name, *(change.partition("=")[2] for change in changes)])
    file = args.out / f"{out.name}.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    words = ["run", str(file), "--teacher", TEACHERS[recipe.teacher_family], "--data", str(args.out / "data")]
    words += ["--out", str(out), "--cache", str(args.out / "cache")]
    subprocess.run([sys.executable, "-m", "decant", *words], check=True, stdout=subprocess.DEVNULL)
    return {"folder": out, "stages": [f"{number:02d}-{step.name}" for number, step in enumerate(stages, start=1)]}


def evaluation(
    models: Mapping[str, Path], teacher: str, args: argparse.Namespace, name: str, **changed: Any
) -> dict[str, Any]:
    """All of them, one run."""
    how = {"captions": "scenes", "images": args.images, "steps": 25, "guidance_scale": 4.0, "batch_size": 32, **changed}
    out = args.out / f"evaluated-{name}"
    asked: dict[str, Any] = {"teacher": teacher, "models": models, "data": None, "seed": 0, "out": out, "talk": talk}
    return run_stage("evaluate", evaluate.STAGE, how, **asked)


def of_family(family: str, args: argparse.Namespace) -> list[str]:
    """The section of a kind of teacher."""
    known = {**presets(family), **(presets("sd2") if family == "sd1" else {})}
    models: dict[str, Path] = {}
    paces: dict[str, dict[str, float]] = {}
    for name, recipe in known.items():
        done = trained(name, recipe, args)
        models[name] = done["folder"] / done["stages"][-1]
        record = json.loads(
            (done["folder"] / next(s for s in done["stages"] if "cut" not in s) / "decant.json").read_text()
        )
        paces[name] = record["pace"]
        if name == CONTROL[family]:
            models[f"{name}, cut alone"] = done["folder"] / done["stages"][0]
            random = trained(name, recipe, args, ["cut.weights=random"])
            models[f"{name}, from random weights"] = random["folder"] / random["stages"][-1]
    teacher = TEACHERS[family]
    safe = {f"model-{number}": folder for number, folder in enumerate(models.values())}
    report = evaluation(safe, teacher, args, family)
    names = {"teacher": f"teacher, `{teacher}`", **dict(zip(safe, models, strict=True))}
    lines = [f"## Students of `{teacher}`", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return [*lines, *(row(names[each["name"]], each, paces) for each in report["models"]), ""]


def protocol(args: argparse.Namespace) -> list[str]:
    """The section of v2.2's own sampler, on its student and on one trained for longer."""
    recipe = presets("sd1")["v2.2"]
    lengths = {args.steps: (), args.longer: (f"distill.steps={args.longer}", "distill.evaluate_every=1000")}
    runs = {steps: trained("v2.2", recipe, args, changes) for steps, changes in lengths.items()}
    models = {f"student-{steps}": run["folder"] / run["stages"][-1] for steps, run in runs.items()}
    found = evaluation(models, "scenes", args, "protocol", **PROTOCOL)["models"]
    names = {f"student-{steps}": f"v2.2, {steps:,} steps" for steps in lengths}
    return [
        "## The protocol of v2.2: 64 px, DDPM 25 steps, guidance 5",
        "",
        "The source's student of 65 million parameters stood at FID about 310 on captions of COCO. Ours has its shape",
        "scaled to the teacher of scenes (widths 32/64/96/96) and stands at:",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(row(names.get(each["name"], "teacher, `scenes`"), each, {}) for each in found),
        "",
        "The two FIDs have no scale in common. FID is a distance between the features of two sets of pictures: the",
        "source's sets are photographs, its features those of Inception, trained on photographs; here the sets are",
        "renders, and the features those of a classifier of what scenes are made of. It also falls with the number of",
        "pictures, which the source does not state. What can be compared over worlds is how often a picture shows what",
        "its caption says, beside how often the teacher's does; the source has no such figure.",
        "",
    ]


def row(name: str, model: Mapping[str, Any], paces: Mapping[str, Mapping[str, float]]) -> str:
    """One student."""
    pace = paces.get(name)
    speed, memory = (f"{pace['images_per_second']:.0f}", f"{pace['peak_memory_mb']:.0f}") if pace else ("-", "-")
    found = model["scores"]
    fid = found.get("fid_scenes_classifier")  # left out where the pictures are too few
    cells = (name, f"{model['parameters']:,}", speed, memory, share(found["scene_accuracy"]))
    told = f"{fid['value']:.1f} ({fid['low']:.1f}-{fid['high']:.1f})" if fid else "-"
    return f"| {' | '.join((*cells, share(found['agreement_with_teacher']), told))} |"


def share(score: Mapping[str, float]) -> str:
    """A share in percent with its interval."""
    return f"{100 * score['value']:.1f} ({100 * score['low']:.1f}-{100 * score['high']:.1f})"


def main(words: Sequence[str] | None = None) -> None:
    """Draw, train, evaluate, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/presets"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--longer", type=int, default=2000, help="steps of v2.2 in the section on its protocol")
    parser.add_argument("--families", nargs="+", choices=["sd1", "sdxl"], default=["sd1", "sdxl"])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "presets.md")
    args = parser.parse_args(words)
    if not (args.out / "data" / "metadata.jsonl").is_file():
        draw_folder(args.out / "data", PICTURES, "train")
    threads = "one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    command = f"python examples/presets_table.py --steps {args.steps} --images {args.images}"
    lines = [
        "# The presets on scenes",
        "",
        f"Written by `{command}`.",
        "",
        f"Every preset with `--scale scenes`, {args.steps} steps of 16 pictures, its own terms and start; the scale "
        "sets one learning rate and schedule for all, which suit short runs and are not the published ones, and shows "
        "the empty caption in 15 % of the pictures: without that guidance multiplies what a short run forgets (see "
        "docs/log.md). Accuracy and agreement "
        f"with the teacher: percent of {args.images} captions of held-out scenes, DDIM 25 steps, guidance 4, 95 % "
        "intervals. FID: between features of the scenes classifier, to renders of other held-out scenes; not "
        f"comparable with FID on Inception. Pictures a second: median step, on {threads}; memory: peak of the "
        "training's process.",
        "",
    ]
    for family in args.families:
        lines += of_family(family, args)
    lines += protocol(args)
    args.page.write_text("\n".join(lines), encoding="utf-8")


def talk(line: str) -> None:
    """For people."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
