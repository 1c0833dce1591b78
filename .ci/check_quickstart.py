"""Hold the quickstart's figures: fails where a student, or the teacher, falls below what is promised.

python .ci/check_quickstart.py RUN
"""

import json
import sys
from pathlib import Path
from typing import Any

# BEST and EVERY are parts of the teacher's accuracy. 92 % is promised and 92.9 % was measured; another processor rounds
# another training, and the standard error of 128 captions is 2.4 points: BEST is two of them below.
POINTS_ABOVE_CUT, BEST, EVERY, TEACHER = 0.20, 0.88, 0.75, 0.90
STUDENTS = ("base", "small", "tiny")
MOST_SECONDS, MOST_MB = 8 * 60, 4 * 1024
# Of `quickstart --full`: 86.6 % and 21 times were measured, and the standard error of 256 captions is 2 points.
FULL_SECONDS, COMPOSED, TIMES = 25 * 60, 0.82, 18


def accuracy(model: dict[str, Any]) -> dict[str, float]:
    """Scene accuracy with its interval."""
    return model["scores"]["scene_accuracy"]


def main(run: Path) -> None:
    """Every student must have learned: far closer to its teacher than its cut, and better beyond chance."""
    report = json.loads((run / "report.json").read_text())
    models = {model["name"]: model for model in report["models"]}
    full = "composed" in models
    expected = {*STUDENTS, *(("swift", "composed") if full else ())}
    assert {name for name, model in models.items() if model["role"] == "student"} == expected, list(models)
    students = [models[name] for name in STUDENTS]
    held = {
        name: json.loads(next(run.glob(f"[0-9][0-9]-{name}/decant.json")).read_text())["held_out"] for name in STUDENTS
    }
    for name in STUDENTS:
        assert held[name]["output_error_after"] <= 0.1 * held["base"]["output_error_before"], (name, held)
    best = max(students, key=lambda model: accuracy(model)["value"])
    control, teacher = models[f"{best['name']}-cut"], models["teacher"]
    assert accuracy(best)["low"] > accuracy(control)["high"], "the best student is not clearly above its own cut"
    points = accuracy(best)["value"] - accuracy(control)["value"]
    parts = {student["name"]: accuracy(student)["value"] / accuracy(teacher)["value"] for student in students}
    print(f"teacher {accuracy(teacher)['value']:.1%} (at least {TEACHER:.0%})")
    print(f"best student {best['name']} {accuracy(best)['value']:.1%}")
    print(f"{points:.1%} above its cut (at least {POINTS_ABOVE_CUT:.0%})")
    told = ", ".join(f"{name} {part:.1%}" for name, part in parts.items())
    print(f"of its teacher's: {told} (each at least {EVERY:.0%}, the best at least {BEST:.0%})")
    most = FULL_SECONDS if full else MOST_SECONDS
    seconds, memory = sum(report["seconds"].values()), report["peak_memory_mb"]
    print(f"{seconds:.0f} s in its stages (at most {most}), {memory:.0f} MB at most (at most {MOST_MB})")
    assert accuracy(teacher)["value"] >= TEACHER, "the teacher is worse than promised"
    assert points >= POINTS_ABOVE_CUT, "the best student is too near its own cut"
    assert min(parts.values()) >= EVERY and max(parts.values()) >= BEST, "the students are too far from their teacher"
    if full:
        check_composed(models["composed"], models["teacher"])
    assert seconds <= most and memory <= MOST_MB, "the quickstart is too slow or too large"


def check_composed(composed: dict[str, Any], teacher: dict[str, Any]) -> None:
    """As right as is promised, in a small part of the teacher's time, both measured in the run."""
    part = accuracy(composed)["value"] / accuracy(teacher)["value"]
    times = teacher["latency_ms"]["picture"]["median"] / composed["latency_ms"]["picture"]["median"]
    print(f"composed {part:.1%} of its teacher's (at least {COMPOSED:.0%})")
    print(f"in {1 / times:.1%} of its time, {times:.1f} times as fast (at least {TIMES})")
    assert part >= COMPOSED and times >= TIMES, "the composed student is less right or slower than promised"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
