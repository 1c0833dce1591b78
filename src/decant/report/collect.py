"""Gather the records of a run into ``report.json``, the report's only source."""

import json
from pathlib import Path
from typing import Any

import yaml

from decant import __version__
from decant.errors import refuse


def collect(run: Path) -> Path:
    """Write ``RUN/report.json`` from the newest evaluation and the records of the other stages; returns its path.

    ``run`` is a run's folder, or the folder of an evaluation made by itself.

    Raises:
        UserError: nothing in the folder was evaluated.
    """
    records = {folder: _record(folder) for folder in [run, *_stage_folders(run)]}
    evaluated = [folder for folder, record in records.items() if record.get("stage") == "evaluate"]
    if not evaluated:
        raise refuse(
            "report",
            f"no evaluation in {run}",
            allowed="a run that was evaluated",
            hint="decant evaluate MODEL --teacher T --out DIR",
        )
    last = evaluated[-1]
    report = _report(run, last, records)
    path, temporary = run / "report.json", run / "report.json.tmp"
    temporary.write_text(json.dumps(report, indent=1), encoding="utf-8")
    temporary.replace(path)
    return path


def _stage_folders(run: Path) -> list[Path]:
    return sorted(folder for folder in run.glob("[0-9][0-9]-*") if folder.is_dir()) if run.is_dir() else []


def _record(folder: Path) -> dict[str, Any]:
    file = folder / "decant.json"
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refuse(str(file), f"unreadable: {error}", allowed="a record", hint="make that stage again") from None
    return record if isinstance(record, dict) else {}


def _report(run: Path, last: Path, records: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    evaluation = records[last]
    prefix = "" if last == run else f"{last.name}/"
    named = {record["name"]: record for record in records.values() if "name" in record}
    trained = {name: record["training"] for name, record in named.items() if record.get("training")}
    data = next((record["data"] for record in named.values() if record.get("data")), None)
    title = _title(run)
    return {
        "version": __version__,
        **({"title": title} if title else {}),
        "command": evaluation.get("command", ""),
        "machine": evaluation.get("machine", {}),
        "versions": evaluation.get("versions", {}),
        "models": evaluation["models"],
        **{key: evaluation[key] for key in ("left_out", "peak_memory_mb") if key in evaluation},
        "seconds": {name: record["seconds"] for name, record in named.items() if "seconds" in record},
        **({"data": data} if data else {}),
        "pictures": [_row(row, prefix) for row in evaluation["pictures"]],
        "training": trained,
        # Of a UNet: a decoder's own figures stand in its record.
        "held_out": {
            name: record["held_out"]
            for name, record in named.items()
            if "output_error_after" in record.get("held_out", {})
        },
    }


def _title(run: Path) -> str | None:
    file = run / "recipe.yaml"
    if not file.is_file():
        return None
    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    return str(recipe["name"]) if isinstance(recipe, dict) and recipe.get("name") else None


def _row(row: dict[str, Any], prefix: str) -> dict[str, Any]:
    models = {name: {**cell, "file": prefix + cell["file"]} for name, cell in row["models"].items()}
    return {**row, "models": models}
