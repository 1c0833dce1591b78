"""Write the table of a run's measured figures, with conditions: docs/results.md, and the README between its marks.

python examples/results_table.py RUN
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results, written by examples/results_table.py -->", "<!-- end of results -->"


def row(model: dict[str, Any]) -> str:
    """One model as a line of the table."""
    accuracy = model["scores"].get("scene_accuracy", {})
    agreement = model["scores"].get("agreement_with_teacher", {})
    latency = model["latency_ms"]["picture"]
    cells = (
        model["name"],
        model["role"],
        f"{model['parameters']:,}",
        f"{model['macs'] / 1e6:.1f}",
        f"{model['size_mb']:.1f}",
        share(accuracy, "value", "low", "high"),
        share(accuracy, "relative_to_teacher", "relative_low", "relative_high"),
        share(agreement, "value", "low", "high"),
        f"{latency['median']:.0f} ({latency['low']:.0f}-{latency['high']:.0f})",
    )
    return f"| {' | '.join(cells)} |"


def share(score: dict[str, Any], middle: str, low: str, high: str) -> str:
    """A share in percent, with its interval where it has one."""
    if score.get(middle) is None:
        return "-"
    ends = f" ({100 * score[low]:.1f}-{100 * score[high]:.1f})" if score.get(low) is not None else ""
    return f"{100 * score[middle]:.1f}{ends}"


def conditions(report: dict[str, Any]) -> str:
    """What the figures were measured with, in a paragraph."""
    first, machine = report["models"][0], report["machine"]
    n, latency = first["scores"]["scene_accuracy"]["n"], first["latency_ms"]["picture"]
    return (
        f"{n} captions of held-out scenes, one seed a picture, {first['sampler']} {first['steps']} steps, guidance "
        f"{first['guidance_scale']:g}; shares in percent with their 95 % intervals. Same as the teacher: both pictures "
        f"of a caption and seed show the same things within 6 pixels, right or wrong. Latency: one picture at batch 1, "
        f"{first['dtype']}, median and range of {latency['n']} after one warm-up, on {machine['cores']} cores of "
        f"{machine['processor']}, torch {machine['torch']}."
    )


def table(report: dict[str, Any]) -> list[str]:
    """One line a model."""
    heads = ("model", "role", "parameters", "MACs, M", "size, MB", "scene accuracy, %", "of the teacher's, %")
    heads = (*heads, "same as the teacher, %", "latency, ms")
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *map(row, report["models"])]


def page(report: dict[str, Any]) -> str:
    """docs/results.md."""
    seconds = ", ".join(f"{name} {seconds:.0f}" for name, seconds in report["seconds"].items())
    made = f"Written by `python examples/results_table.py RUN` from the `report.json` of `{report['command']}`."
    lines = ["# Results", "", made, "", conditions(report), "", *table(report), "", f"Seconds: {seconds}."]
    return "\n".join(lines) + "\n"


def readme(text: str, report: dict[str, Any]) -> str:
    """The README with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest and after, f"the README has no {BEGIN} and {END}"
    return "\n".join([before + BEGIN, "", *table(report), "", conditions(report), END]) + after


def main(run: Path) -> None:
    """Write both."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    file = ROOT / "README.md"
    file.write_text(readme(file.read_text(encoding="utf-8"), report), encoding="utf-8")
    (ROOT / "docs" / "results.md").write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
