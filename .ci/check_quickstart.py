"""Hold the quickstart's figures: fails where a student, or the teacher, falls below what is promised.

python .ci/check_quickstart.py RUN
"""

import json
import sys
from pathlib import Path
from typing import Any

POINTS_ABOVE_CUT, PART_OF_TEACHER, TEACHER = 0.20, 0.85, 0.75
MOST_SECONDS, MOST_MB = 8 * 60, 4 * 1024


def accuracy(model: dict[str, Any]) -> dict[str, float]:
    """Scene accuracy with its interval."""
    return model["scores"]["scene_accuracy"]


def main(run: Path) -> None:
    """Every student must have learned: far closer to its teacher than its cut, and better beyond chance."""
    report = json.loads((run / "report.json").read_text())
    models = {model["name"]: model for model in report["models"]}
    students = [model for model in models.values() if model["role"] == "student"]
    assert len(students) == 3, f"three students, not {len(students)}"
    for student in students:
        held = json.loads(next(run.glob(f"[0-9][0-9]-{student['name']}/decant.json")).read_text())["held_out"]
        assert held["output_error_after"] <= 0.1 * held["output_error_before"], (student["name"], held)
    best = max(students, key=lambda model: accuracy(model)["value"])
    control, teacher = models[f"{best['name']}-cut"], models["teacher"]
    assert accuracy(best)["low"] > accuracy(control)["high"], "the best student is not clearly above its own cut"
    points = accuracy(best)["value"] - accuracy(control)["value"]
    part = accuracy(best)["value"] / accuracy(teacher)["value"]
    print(f"teacher {accuracy(teacher)['value']:.1%} (at least {TEACHER:.0%})")
    print(f"best student {best['name']} {accuracy(best)['value']:.1%}")
    print(f"{points:.1%} above its cut (at least {POINTS_ABOVE_CUT:.0%})")
    print(f"{part:.1%} of its teacher's (at least {PART_OF_TEACHER:.0%})")
    seconds, memory = sum(report["seconds"].values()), max(model["peak_memory_mb"] for model in models.values())
    print(f"{seconds:.0f} s in its stages (at most {MOST_SECONDS}), {memory:.0f} MB at most (at most {MOST_MB})")
    assert accuracy(teacher)["value"] >= TEACHER, "the teacher is worse than promised"
    assert points >= POINTS_ABOVE_CUT, "the best student is too near its own cut"
    assert part >= PART_OF_TEACHER, "the best student is too far from its teacher"
    assert seconds <= MOST_SECONDS and memory <= MOST_MB, "the quickstart is too slow or too large"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
