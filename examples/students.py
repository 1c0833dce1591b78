"""Every kind of student of the scenes teacher after the same short distillation, in one table: docs/students.md.

    python examples/students.py --out runs/students

Blocks taken out (BK-SDM), levels narrowed to three widths by each rule, and transformer blocks taken out by three rules
at equal latency: the part of the attentions' time that stays is the same. The run goes on where it was stopped.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from decant.cli.work import measure_importance, run_and_report
from decant.scenes.folder import draw_folder

ROOT = Path(__file__).parents[1]
PICTURES = 1500
CALIBRATION, REPEATS = 32, 9  # pictures and timings of `decant importance`
WIDTHS = {"wide": [64, 96, 64, 64], "middle": [64, 32, 64, 64], "narrow": [32, 64, 96, 96]}
CHANNEL_RULES = ("first", "magnitude", "activation", "taylor")
BLOCK_RULES = ("first", "even", "sensitive")
SHARE = 0.5  # of the time of all transformer blocks, which stays
DISTILL = {
    "batch_size": 16, "task": 0, "feature": 0.3, "min_snr_gamma": 5, "caption_dropout": 0.15, "learning_rate": 1.5e-3,
    "schedule": "one_cycle", "warmup": 20, "ema": 0.98, "held_out": 0.05, "checkpoint_every": 500,
}  # fmt: skip


def blocks_kept(parts: Sequence[dict[str, Any]], rule: str) -> list[str]:
    """The transformer blocks that stay under a rule, as many as fit into the share of their time.

    ``parts``: those of `decant importance`, in the order of a forward. They are taken in the rule's order: from the
    first on, evenly over the network, or those of the greatest damage for their time.
    """
    blocks = [part for part in parts if part["kind"] == "transformer block"]
    room = SHARE * sum(part["latency_ms"]["median"] for part in blocks)
    match rule:
        case "first":
            order = blocks
        case "even":
            # Halves, quarters, eighths: what comes first is spread over the whole, however many fit.
            order = [blocks[i] for i in spread(len(blocks))]
        case _:
            order = sorted(blocks, key=lambda part: -part["damage"] / part["latency_ms"]["median"])
    stay: list[str] = []
    for part in order:
        if part["latency_ms"]["median"] <= room:
            room -= part["latency_ms"]["median"]
            stay.append(part["name"])
    return stay


def spread(count: int) -> list[int]:
    """0 to count - 1, each as far as can be from those before it."""
    order = [0, count - 1]
    while len(order) < count:
        left = [i for i in range(count) if i not in order]
        order.append(max(left, key=lambda i: (min(abs(i - j) for j in order), -i)))
    return order[:count]


def described(parts: Sequence[dict[str, Any]], stay: Sequence[str]) -> dict[str, Any]:
    """The description that keeps these transformer blocks and no others."""
    keep: dict[str, Any] = {"down": {}, "up": {}}
    blocks: dict[str, dict[int, list[int]]] = {}
    for part in parts:
        if part["kind"] == "transformer block":
            block, _, rest = part["name"].partition(".attentions.")
            attention, number = (int(each) for each in rest.split(".transformer_blocks."))
            kept = blocks.setdefault(block, {}).setdefault(attention, [])
            kept.extend([number] if part["name"] in stay else [])
    for block, attentions in blocks.items():
        if block == "mid_block":
            keep["mid"] = {"blocks": attentions[0]}
        else:
            side, _, index = block.partition("_blocks.")
            keep[side][int(index)] = {"blocks": [attentions[each] for each in sorted(attentions)]}
    return keep


def recipe(parts: Sequence[dict[str, Any]], steps: int, images: int) -> dict[str, Any]:
    """Every student: cut, distilled, all evaluated together."""
    cuts: dict[str, dict[str, Any]] = {name: {"student": name} for name in ("bk-base", "bk-small", "bk-tiny")}
    cuts |= {
        f"{width}-{rule}": {"keep": {"widths": WIDTHS[width]}, "channels": rule}
        for width in WIDTHS
        for rule in CHANNEL_RULES
    }
    cuts |= {f"blocks-{rule}": {"keep": described(parts, blocks_kept(parts, rule))} for rule in BLOCK_RULES}
    stages: list[dict[str, Any]] = []
    for name, settings in cuts.items():
        # No level of narrow has the teacher's width: it has no features to compare.
        how = {**DISTILL, "steps": steps, **({"feature": 0} if name.startswith("narrow") else {})}
        stages += [
            {"stage": "prune", "name": f"{name}-cut", "from": "teacher", "settings": settings},
            {"stage": "distill", "name": name, "from": f"{name}-cut", "settings": how},
        ]
    looks = {"captions": "scenes", "images": images, "steps": 25, "guidance_scale": 4.0, "batch_size": 32}
    stages.append({"stage": "evaluate", "of": ["teacher", *cuts], "settings": looks})
    return {"name": "students", "summary": "every kind of student", "stages": stages}


def page(report: dict[str, Any], importance: dict[str, Any], command: str, steps: int) -> str:
    """docs/students.md."""
    models = {model["name"]: model for model in report["models"]}
    first = report["models"][0]
    accuracy, latency = first["scores"]["scene_accuracy"], first["latency_ms"]["unet"]
    parts = importance["parts"]
    kept = {rule: blocks_kept(parts, rule) for rule in BLOCK_RULES}
    lines = [
        "# Students of the scenes teacher",
        "",
        f"Written by `{command}`.",
        "",
        f"Each student was cut from the teacher and distilled for the same {steps} steps of {DISTILL['batch_size']} "
        f"pictures. Accuracy: {accuracy['n']} captions of held-out scenes, one seed a picture, {first['sampler']} "
        f"{first['steps']} steps, guidance {first['guidance_scale']:g}, percent with 95 % intervals. UNet: one call at "
        f"batch 1, {first['dtype']}, median and range of {latency['n']}, on {report['machine']['cores']} cores of "
        f"{report['machine']['processor']}. Output error: mean square of the difference to the teacher's output on "
        "pictures kept from training, of the cut and of the student.",
        "",
    ]
    groups = {
        "Blocks taken out": ["teacher", "bk-base", "bk-small", "bk-tiny"],
        "Levels narrowed": [f"{width}-{rule}" for width in WIDTHS for rule in CHANNEL_RULES],
        "Transformer blocks taken out, at equal latency": [f"blocks-{rule}" for rule in BLOCK_RULES],
    }
    for title, names in groups.items():
        head = "| student | parameters | UNet, ms | accuracy, % | output error, cut | output error |"
        lines += [f"## {title}", "", *notes(title, kept), head, "|" + "---|" * 6]
        lines += [*(row(models[name]) for name in names), ""]
    return "\n".join(lines)


def notes(title: str, kept: dict[str, list[str]]) -> list[str]:
    """What the names in a table mean."""
    if title.startswith("Levels"):
        told = ", ".join(f"{name} {'/'.join(map(str, widths))}" for name, widths in WIDTHS.items())
        widths = (
            f"The teacher's widths are 64/96/128/128; {told}. The rule says which channels stay. Features are compared"
        )
        return [f"{widths} where a level has the teacher's width, so for narrow nowhere.", ""]
    if title.startswith("Transformer"):
        lines = [f"Those stay that fit into {SHARE:.0%} of the time of all, by `decant importance`:", ""]
        for rule, names in kept.items():
            short = ", ".join(f"`{name.replace('.transformer_blocks.0', '')}`" for name in sorted(names))
            lines += [f"- {rule}: {short}"]
        return [*lines, ""]
    return []


def row(model: dict[str, Any]) -> str:
    """One student."""
    accuracy, unet = model["scores"]["scene_accuracy"], model["latency_ms"]["unet"]
    share = f"{100 * accuracy['value']:.1f} ({100 * accuracy['low']:.1f}-{100 * accuracy['high']:.1f})"
    time = f"{unet['median']:.1f} ({unet['low']:.1f}-{unet['high']:.1f})"
    held = (
        json.loads((Path(model["path"]) / "decant.json").read_text())["held_out"] if model["role"] != "teacher" else {}
    )
    errors = [f"{held[key]:.4f}" if held else "-" for key in ("output_error_before", "output_error_after")]
    return f"| {model['name']} | {model['parameters']:,} | {time} | {share} | {' | '.join(errors)} |"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, run, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/students"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "students.md")
    args = parser.parse_args(words)
    data, measured = args.out / "data", args.out / "importance"
    if not (data / "metadata.jsonl").is_file():
        draw_folder(data, PICTURES, "train")
    if not (measured / "importance.json").is_file():
        how: dict[str, Any] = {"pictures": CALIBRATION, "repeats": REPEATS, "seed": 0, "device": "cpu"}
        measure_importance("scenes", data=data, out=measured, **how, talk=talk)
    importance = json.loads((measured / "importance.json").read_text(encoding="utf-8"))
    file = args.out / "students.yaml"
    file.write_text(yaml.safe_dump(recipe(importance["parts"], args.steps, args.images), sort_keys=False))
    run_and_report(str(file), teacher="scenes", data=data, out=args.out / "run", sets=(), talk=talk)
    report = json.loads((args.out / "run" / "report.json").read_text(encoding="utf-8"))
    command = f"python examples/students.py --steps {args.steps} --images {args.images}"
    args.page.write_text(page(report, importance, command, args.steps), encoding="utf-8")


def talk(line: str) -> None:
    """For people."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
