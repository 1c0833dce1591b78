"""What composing gives: accuracy from a run of the full quickstart, speed measured here; writes docs/composed.md.

    python examples/composed_table.py RUN

One picture at a time, teacher and students in turns: as they are, and as torch.compile makes them.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from decant.bench.machine import machine
from decant.stages.bench import How, bench, drawn_as
from decant.stages.record import drawing_of

ROOT = Path(__file__).parents[1]
SHOWN = ("teacher", "tiny", "swift", "composed")
COMPILED = ("teacher", "composed")
TEACHER = How(steps=25, guidance_scale=4.0, warmup=2, device="cpu")
HEADS = (
    "model", "steps", "guidance", "UNet parameters", "accuracy, %", "of the teacher's, %", "text, ms", "UNet call, ms",
    "decoder, ms", "picture, ms", "times faster",
)  # fmt: skip


def measured(run: Path, names: Sequence[str], how: How) -> dict[str, Any]:
    """Times of models in turns, each drawn as its record says."""
    places = {name: next(run.glob(f"[0-9][0-9]-{name}"), None) for name in names}
    models: dict[str, str | Path] = {name: place or "scenes" for name, place in places.items()}
    own = {name: drawn_as(how, said) for name, model in models.items() if (said := drawing_of(model))}
    return bench(models, how, talk, own)


def row(name: str, found: Mapping[str, Any], scores: Mapping[str, Any] | None) -> str:
    """One model of one measurement; ``scores`` as the run has them."""
    entry, times = found[name], found[name]["latency_ms"]
    picture, teacher = times["picture"], found["teacher"]["latency_ms"]["picture"]
    accuracy = scores["scene_accuracy"] if scores else {}
    cells = (
        name,
        str(entry["steps"]),
        f"{entry['guidance_scale']:g}" if entry["guidance_scale"] > 1 else "none",
        f"{entry['parameters']:,}",
        share(accuracy, "value", "low", "high"),
        share(accuracy, "relative_to_teacher", "relative_low", "relative_high"),
        *(f"{times[part]['median']:.1f}" for part in ("text", "unet", "decode")),
        f"{picture['median']:.1f} ({picture['low']:.1f}-{picture['high']:.1f})",
        f"{teacher['median'] / picture['median']:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def share(score: Mapping[str, Any], middle: str, low: str, high: str) -> str:
    """A share in percent, with its interval where it has one."""
    if score.get(middle) is None:
        return "-"
    ends = f" ({100 * score[low]:.1f}-{100 * score[high]:.1f})" if score.get(low) is not None else ""
    return f"{100 * score[middle]:.1f}{ends}"


def table(found: Mapping[str, Any], scores: Mapping[str, Any]) -> list[str]:
    """A line a model."""
    return [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS), *(row(n, found, scores.get(n)) for n in found)]


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, help="of `decant quickstart --full`")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "composed.md")
    args = parser.parse_args(words)
    report = json.loads((args.run / "report.json").read_text(encoding="utf-8"))
    scores = {model["name"]: model["scores"] for model in report["models"]}
    eager = replace(TEACHER, repeats=args.repeats)
    found = measured(args.run, SHOWN, eager)
    compiled = measured(args.run, COMPILED, replace(eager, compile=True)) if COMPILED else {}
    conditions, here = found["teacher"]["measured"], machine()
    n = scores["teacher"]["scene_accuracy"]["n"]
    lines = [
        "# The composed student",
        "",
        "Written by `python examples/composed_table.py RUN` after `decant quickstart --full --out RUN`, which took "
        f"{sum(report['seconds'].values()):.0f} s in its stages.",
        "",
        "tiny: BK-Tiny, distilled. swift: a small UNet of few steps without guidance. composed: swift with the small "
        "decoder. Accuracy: pictures that are right by the "
        f"checker, of {n} held-out captions; of the teacher's: paired; with 95 % intervals. Times: one picture at "
        f"batch 1, median (range) of {args.repeats} in turns after {TEACHER.warmup} untimed, float32, "
        f"{conditions['threads']} threads of {here['processor']}, torch {here['torch']}.",
        "",
        *table(found, scores),
        "",
        "Compiled against compiled (`decant bench --compile`):",
        "",
        *table(compiled, scores),
        "",
        f"Seconds: {', '.join(f'{name} {seconds:.0f}' for name, seconds in report['seconds'].items())}.",
        "",
    ]
    args.page.write_text("\n".join(lines), encoding="utf-8")


def talk(line: str) -> None:
    """For people."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
