"""Students of few steps on scenes, by every method, in one table: docs/few_steps.md.

    python examples/few_steps_table.py --out runs/few-steps

Each method learns from the same pictures for as many updates of its student; each student is then drawn in 8, 4, 2 and
1 steps by the sampler that is best for it on captions of a validation split, and compared with the teacher in 25 steps
with guidance, beside the teacher itself in as few steps. The run goes on where it was stopped.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from decant.data.prompt_file import PromptList
from decant.models.generate import generate
from decant.models.load import load
from decant.models.samplers import Sampler
from decant.recipe.runner import run_recipe
from decant.recipe.schema import Recipe
from decant.scenes.captions import parse
from decant.scenes.checker import read, score
from decant.scenes.folder import captions_of, draw_folder
from decant.stages.all import STAGES
from decant.stages.compare import Compare, compare

ROOT = Path(__file__).parents[1]
PICTURES = 2000
STEPS = (8, 4, 2, 1)
SAMPLERS: tuple[Sampler, ...] = ("ddim-trailing", "euler-trailing", "lcm")
GUIDANCE = 4.0
VALIDATION_SEED, TEST_SEED = 3_000_000, 1_000_000
COMMON: dict[str, Any] = {
    "batch_size": 16, "schedule": "one_cycle", "warmup": 20, "held_out": 0.05, "checkpoint_every": 100,
}  # fmt: skip
GUIDED = {**COMMON, "task": 0, "feature": 0, "teacher_guidance_scale": GUIDANCE, "min_snr_gamma": 5, "sampler": "lcm"}
CONSISTENCY = {**COMMON, "teacher_guidance_scale": GUIDANCE, "learning_rate": 5e-4}
PHASED = {**CONSISTENCY, "phases": 2, "solver_steps": 40}
BY_OUTPUTS = {  # of a student of two steps, at the timesteps of these
    **COMMON, "task": 0, "feature": 0.03, "output_distance": "huber", "prediction": "v_prediction",
    "timesteps": {"kind": "trailing", "count": 2}, "learning_rate": 1.5e-3, "ema": 0.98,
}  # fmt: skip
DMD = {
    **COMMON, "teacher_guidance_scale": GUIDANCE, "fake_updates": 2, "learning_rate": 1e-4,
    "fake_learning_rate": 3e-4, "ema": 0.95, "sample_steps": 2,
}  # fmt: skip
LORA = {"rank": 16}
KD = {
    **COMMON, "task": 0, "feature": 0.3, "min_snr_gamma": 5, "caption_dropout": 0.15, "ema": 0.98,
    "learning_rate": 1.5e-3,
}  # fmt: skip
COLUMNS = (
    "method",
    "steps",
    "sampler",
    "accuracy, %",
    "of the teacher's, %",
    "diversity, % of its",
    "ms",
    "times faster",
)
ALONE = {  # the method's words -> its only stage
    "guided LoRA, rank 4": ("distill", {**GUIDED, "lora": {"rank": 4}, "learning_rate": 2e-3}),
    "consistency": ("consistency", CONSISTENCY),
    "consistency LoRA, rank 16": (
        "consistency",
        {**CONSISTENCY, "lora": LORA, "learning_rate": 2e-3, "ema": None, "solver_steps": 20},
    ),
    "distribution matching": ("dmd", DMD),
    "distribution matching, one network": (
        "dmd",
        {**DMD, "lora": LORA, "roles": "shared", "learning_rate": 5e-4, "fake_learning_rate": 1e-3},
    ),
}


def stage(kind: str, name: str, start: str, *, teacher: str | None = None, **settings: Any) -> dict[str, Any]:
    """One stage of a recipe."""
    return {"stage": kind, "name": name, "from": start, "teacher": teacher, "settings": settings}


Method = tuple[list[dict[str, Any]], dict[str, str]]


def methods(updates: int) -> list[Method]:
    """The stages of each method, and in words the students among them, by their stages' names."""
    found = [
        ([stage(kind, "student", "teacher", steps=updates, **settings)], {"student": words})
        for words, (kind, settings) in ALONE.items()
    ]
    return [*found, *orders(updates), *phased(updates)]


def orders(updates: int) -> list[Method]:
    """Two methods one after the other."""
    part = updates // 4
    matched = [
        stage("consistency", "first", "teacher", steps=updates - part, **CONSISTENCY),
        stage("dmd", "student", "first", steps=part, **DMD),
    ]
    smaller = [*tiny(updates, "teacher"), stage("consistency", "student", "tiny", steps=updates, **CONSISTENCY)]
    fewer = [
        stage("consistency", "few", "teacher", steps=updates, **CONSISTENCY),
        stage("prune", "cut", "few", student="bk-tiny"),
        stage("consistency", "student", "cut", steps=3 * updates, **CONSISTENCY),
    ]
    return [
        (matched, {"student": "consistency, then distribution matching"}),
        (smaller, {"student": "BK-Tiny, then consistency"}),
        (fewer, {"student": "consistency, then BK-Tiny"}),
    ]


def phased(updates: int) -> list[Method]:
    """Two steps to begin with, with as many updates as the others and with three times as many, and its students."""
    long = [
        stage("consistency", "few", "teacher", steps=3 * updates, **PHASED),
        stage("prune", "base-cut", "few", student="bk-base"),
        stage("distill", "base", "base-cut", teacher="few", steps=2 * updates, **BY_OUTPUTS),
        stage("prune", "tiny-cut", "base", student="bk-tiny"),
        stage("distill", "tiny", "tiny-cut", teacher="few", steps=2 * updates, **BY_OUTPUTS),
    ]
    words = "consistency in two phases"
    return [
        ([stage("consistency", "student", "teacher", steps=updates, **PHASED)], {"student": words}),
        (long, {"few": f"{words}, {3 * updates} updates", "base": "that, then BK-Base", "tiny": "that, then BK-Tiny"}),
    ]


def tiny(updates: int, start: str) -> list[dict[str, Any]]:
    """BK-Tiny by way of BK-Base, three times as many updates altogether as one method has."""
    return [
        stage("prune", "base-cut", start, student="bk-base"),
        stage("distill", "base", "base-cut", steps=2 * updates, **KD),
        stage("prune", "tiny-cut", "base", student="bk-tiny"),
        stage("distill", "tiny", "tiny-cut", steps=updates, **KD | {"learning_rate": 1e-3}),
    ]


def trained(args: argparse.Namespace) -> dict[str, Path]:
    """Every method's students."""
    found = {}
    for number, (stages, students) in enumerate(methods(args.updates)):
        if args.methods and number not in args.methods:
            continue
        out = args.out / f"method-{number}"
        recipe = Recipe.model_validate({"name": f"method-{number}", "stages": stages})
        cache = args.out / "cache"
        run_recipe(recipe, teacher="scenes", data=args.out / "data", out=out, stages=STAGES, talk=talk, cache=cache)
        places = {each["name"]: out / f"{place:02d}-{each['name']}" for place, each in enumerate(stages, 1)}
        found |= {words: places[name] for name, words in students.items()}
    return found


def best_samplers(source: str | Path, guidance_scale: float, images: int) -> dict[int, Sampler]:
    """By steps, the sampler most right on the validation split; the first of equals."""
    seeds, captions = zip(*captions_of(images, "held-out", VALIDATION_SEED), strict=True)
    pipeline, found = load(source), {}
    for steps in STEPS:
        right = {
            sampler: sum(
                score(read(picture), parse(caption)).exact
                for picture, caption in zip(
                    generate(
                        pipeline, captions, seeds, steps=steps, guidance_scale=guidance_scale, sampler=sampler,
                        batch_size=32,
                    ),
                    captions,
                    strict=True,
                )
            )
            for sampler in SAMPLERS
        }  # fmt: skip
        found[steps] = max(SAMPLERS, key=lambda sampler: right[sampler])
    return found


def chosen(students: Mapping[str, Path], args: argparse.Namespace) -> dict[str, dict[int, Sampler]]:
    """By method, with the teacher's own two: what is drawn with which sampler; kept, as it takes minutes."""
    file = args.out / "samplers.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    for words, source in {"teacher, guided": "scenes", "teacher, unguided": "scenes", **students}.items():
        if words not in kept:
            kept[words] = best_samplers(source, GUIDANCE if words == "teacher, guided" else 1.0, args.validation)
            talk(f"{words}: {kept[words]}")
            file.write_text(json.dumps(kept))
    return {words: {int(steps): sampler for steps, sampler in each.items()} for words, each in kept.items()}


def compared(students: Mapping[str, Path], args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """The comparison, and the method's words by the names of its models."""
    samplers = chosen(students, args)
    sources: dict[str, str | Path] = {"teacher, guided": "scenes", "teacher, unguided": "scenes", **students}
    asked, own, names = [], {}, {"teacher": "teacher, guided"}
    for number, (words, source) in enumerate(sources.items()):
        scale = GUIDANCE if words == "teacher, guided" else 1.0
        more = (25,) if words in ("teacher, unguided", "guided LoRA, rank 4") else ()
        for steps in (*more, *STEPS):
            name = f"m{number}-{steps}"
            sampler = "ddim" if steps == 25 else samplers[words][steps]
            asked.append(f"{name}={source}")
            own[name] = {"sampler": sampler, "guidance_scale": scale, "steps": [steps]}
            names[name] = words
    settings = Compare.model_validate(
        {"images": args.images, "teacher_steps": 25, "teacher_at_steps": False, "guidance_scale": GUIDANCE,
         "batch_size": 32, "latency_repeats": args.repeats, "own": own, "seed": 0}
    )  # fmt: skip
    prompts = dict.fromkeys(caption for _, caption in captions_of(args.prompts, "held-out", TEST_SEED))
    given = PromptList(tuple(prompts), {}, "held-out scenes")
    return compare("scenes", asked, given, settings, args.out / "compared", talk), names


def row(entry: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """One model at one number of steps."""
    scores = entry["scores"]
    accuracy, diversity = scores["scene_accuracy"], scores.get("diversity_of_right", {})
    latency, speedup = entry["latency_ms"].get("picture"), entry.get("speedup")
    cells = (
        names[entry["model"]],
        str(entry["steps"]),
        entry["sampler"],
        percent(accuracy["value"], accuracy.get("low"), accuracy.get("high")),
        percent(*(accuracy.get(key) for key in ("relative_to_teacher", "relative_low", "relative_high"))),
        percent(*(diversity.get(key) for key in ("relative_to_teacher", "relative_low", "relative_high"))),
        f"{latency['median']:.0f}" if latency else "-",
        f"{speedup['value']:.1f}" if speedup else "-",
    )
    return f"| {' | '.join(cells)} |"


def percent(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A share with its interval, as far as there is one."""
    if value is None:
        return "-"
    interval = "" if low is None or high is None else f" ({100 * low:.1f}-{100 * high:.1f})"
    return f"{100 * value:.1f}{interval}"


def main(words: Sequence[str] | None = None) -> None:
    """Draw, train, choose, compare, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/few-steps"))
    parser.add_argument("--updates", type=int, default=600, help="of each method's student")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--images", type=int, default=4, help="of each prompt")
    parser.add_argument("--validation", type=int, default=96, help="captions that samplers are chosen on")
    parser.add_argument("--repeats", type=int, default=5, help="timed pictures; 0 for none")
    parser.add_argument("--methods", type=int, nargs="*", help="some of them, by number from 0")
    parser.add_argument("--train", action="store_true", help="and nothing else")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "few_steps.md")
    args = parser.parse_args(words)
    if not (args.out / "data" / "metadata.jsonl").is_file():
        draw_folder(args.out / "data", PICTURES, "train")
    students = trained(args)
    if args.train:
        return
    document, names = compared(students, args)
    threads = "one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    lines = [
        "# Few steps on scenes",
        "",
        f"Written by `python examples/few_steps_table.py --updates {args.updates} --prompts {args.prompts} "
        f"--images {args.images}{_some(args.methods)}`.",
        "",
        f"Every method: {args.updates} updates of the student with 16 pictures each, from the same {PICTURES}; "
        "distribution matching lets its fake score learn twice for each. Roads to a smaller network have more updates, "
        "those to BK-Tiny by way of BK-Base three times as many before or after. Accuracy: pictures that are right by "
        "the checker, "
        f"{args.images} of each of {args.prompts} held-out captions; of the teacher's: paired, beside its 25 steps of "
        f"DDIM at guidance {GUIDANCE:g}; diversity: how far apart things stand in one caption's right pictures, "
        "beside the teacher's. 95 % intervals over captions. Sampler: the most right of DDIM and Euler with trailing "
        f"timesteps and LCM's on {args.validation} other captions. ms: one picture, on {threads}.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(row(entry, names) for entry in document["models"]),
        "",
    ]
    args.page.write_text("\n".join(lines), encoding="utf-8")


def _some(methods: Sequence[int] | None) -> str:
    return f" --methods {' '.join(map(str, methods))}" if methods else ""


def talk(line: str) -> None:
    """For people."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
