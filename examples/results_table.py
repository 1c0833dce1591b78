"""Write the table of a run's measured figures, with their conditions, as Markdown.

python examples/results_table.py RUN > docs/results.md
"""

import json
import sys
from pathlib import Path
from typing import Any


def row(model: dict[str, Any]) -> str:
    """One model as a line of the table."""
    accuracy = model["scores"].get("scene_accuracy", {})
    agreement = model["scores"].get("agreement_with_teacher", {})
    latency = model["latency_ms"]["picture"]
    return (
        f"| {model['name']} | {model['role']} | {model['parameters']:,} | {model['macs'] / 1e6:.1f} "
        f"| {model['size_mb']:.1f} | {share(accuracy)} | {share(agreement)} "
        f"| {latency['median']:.0f} ({latency['low']:.0f}-{latency['high']:.0f}) |"
    )


def share(score: dict[str, Any]) -> str:
    """A share in percent with its interval."""
    if not score:
        return "-"
    return f"{100 * score['value']:.1f} ({100 * score['low']:.1f}-{100 * score['high']:.1f})"


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    first = report["models"][0]
    n = first["scores"]["scene_accuracy"]["n"]
    machine = report["machine"]
    lines = [
        "# Results",
        "",
        f"Written by `python examples/results_table.py RUN` from the `report.json` of `{report['command']}`.",
        "",
        f"{n} captions of held-out scenes, one seed a picture, {first['sampler']} {first['steps']} steps, guidance "
        f"{first['guidance_scale']}. Shares in percent with Wilson's 95 % interval. The same as "
        f"the teacher: both pictures of a caption and seed show the same things within 6 pixels, right or wrong. "
        f"Latency: one picture at batch 1, "
        f"{first['dtype']}, median and range of {first['latency_ms']['picture']['n']} after one warm-up, on "
        f"{machine['cores']} cores of {machine['processor']}, torch {machine['torch']}.",
        "",
        "| model | role | parameters | MACs, M | size, MB | scene accuracy, % | same as the teacher, % | latency, ms |",
        "|---|---|---|---|---|---|---|---|",
        *map(row, report["models"]),
        "",
        "Seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in report["seconds"].items()) + ".",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(json.loads((Path(sys.argv[1]) / "report.json").read_text())))
