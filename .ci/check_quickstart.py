"""Hold the quickstart's figures: fails on a regression, and says how far the aims still are.

python .ci/check_quickstart.py RUN
"""

import json
import sys
from pathlib import Path
from typing import Any

AIM_POINTS, AIM_OF_TEACHER, AIM_TEACHER = 0.20, 0.85, 0.75


def accuracy(model: dict[str, Any]) -> dict[str, float]:
    """Scene accuracy with its interval."""
    return model["scores"]["scene_accuracy"]


def main(run: Path) -> None:
    """Every student must have learned: far closer to its teacher than its cut, and better beyond chance."""
    models = {model["name"]: model for model in json.loads((run / "report.json").read_text())["models"]}
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
    print(f"teacher {accuracy(teacher)['value']:.1%} (aim {AIM_TEACHER:.0%})")
    print(f"best student {best['name']} {accuracy(best)['value']:.1%}")
    print(f"{points:.1%} above its cut (aim {AIM_POINTS:.0%})")
    print(f"{part:.1%} of its teacher's (aim {AIM_OF_TEACHER:.0%})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
