"""The losses of a training by step: kept while it runs, thinned for its record."""

import json
from pathlib import Path
from statistics import mean, median
from typing import Any, TextIO

from decant.train.loop import Step


class Curve:
    """The losses of every step as JSON lines: a resumed run keeps those before it; the report draws their means.

    Without a path nothing is kept.
    """

    def __init__(self, path: Path | None, done: int, steps: int) -> None:
        self.path, self.every = path, max(1, steps // 200)
        self._rates: list[float] = []
        self.file: TextIO | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_lines(path, done)

    def __enter__(self) -> "Curve":
        self.file = self.path.open("a") if self.path else None
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, step: Step) -> None:
        """One line, at once: a killed run leaves at most half of one."""
        self._rates.append(step.images_per_second)
        if self.file is None:
            return
        self.file.write(json.dumps({"step": step.step, "losses": step.losses}) + "\n")
        self.file.flush()

    @property
    def images_per_second(self) -> float:
        """The median over the steps of this process; 0 before the first."""
        return median(self._rates) if self._rates else 0.0

    def thinned(self) -> list[dict[str, Any]]:
        """About two hundred points, each the mean over its stretch of steps: ``{"step", "losses"}``."""
        points: list[dict[str, Any]] = []
        values: dict[str, list[float]] = {}
        for text in self.path.read_text().splitlines() if self.path else ():
            line = json.loads(text)
            for name, value in line["losses"].items():
                values.setdefault(name, []).append(value)
            if line["step"] % self.every == 0:
                points.append({"step": line["step"], "losses": {name: mean(each) for name, each in values.items()}})
                values = {}
        return points


def _cut_lines(path: Path, done: int) -> None:
    """Keep the lines of the first ``done`` steps: those after the checkpoint are made again, the last may be half."""
    kept = 0
    with path.open("ab+") as file:
        file.seek(0)
        for _ in range(done):
            line = file.readline()
            if not line.endswith(b"\n"):
                break
            kept = file.tell()
        file.truncate(kept)
