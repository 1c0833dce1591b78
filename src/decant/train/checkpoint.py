"""Checkpoints that are whole or not there: safetensors and JSON in a folder that appears by one rename.

Each holds ``<group>.safetensors`` files and ``state.json`` with the sha256 of each of them and of itself. No
pickle.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from decant.errors import refuse

_LOG = logging.getLogger(__name__)
_STATE = "state.json"
_FOLDERS = "step-[0-9]*[0-9]"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk. step: updates made so far. scalars: what was written beside the tensors."""

    folder: Path
    step: int
    scalars: dict[str, Any]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group, on the CPU; empty if there are none."""
        path = self.folder / f"{group}.safetensors"
        return load_file(path) if path.exists() else {}


def write(
    work: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    scalars: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of ``step`` into ``work``, whole or not at all; only the newest ``keep`` stay.

    Raises UserError where ``work`` holds a whole checkpoint of a later step: it is another run's, or was not
    resumed.
    """
    assert keep >= 1, "the checkpoint just written is kept"
    work.mkdir(parents=True, exist_ok=True)
    _refuse_later(work, step)
    for rest in work.glob(".tmp-*"):  # of a run that was killed while it wrote
        shutil.rmtree(rest)
    temporary = work / f".tmp-{step:08d}"
    temporary.mkdir()
    _fill(temporary, step, tensors, scalars)
    final = work / f"step-{step:08d}"
    if final.exists():
        final.rename(work / f".tmp-{step:08d}-old")
    temporary.rename(final)
    _sync(work)
    _drop(work, step, keep)
    return final


def latest(work: Path) -> Checkpoint | None:
    """The newest whole checkpoint in ``work``, or None. A damaged one is skipped with a warning."""
    for folder in sorted(work.glob(_FOLDERS), key=_step_of, reverse=True):
        try:
            return _read(folder)
        except (OSError, ValueError, KeyError, TypeError) as damage:
            _LOG.warning("checkpoint %s is damaged (%s) and is skipped", folder, damage)
    return None


def _fill(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], scalars: Mapping[str, Any]) -> None:
    files: dict[str, str] = {}
    for group, named in tensors.items():
        if named:
            path = folder / f"{group}.safetensors"
            save_file({k: t.detach().cpu().contiguous() for k, t in named.items()}, path)
            _sync(path)
            files[path.name] = _sha256(path)
    body = {"step": step, "files": files, "scalars": dict(scalars)}
    path = folder / _STATE
    path.write_text(json.dumps({"body": body, "sha256": _digest(body)}, indent=1))
    _sync(path)
    _sync(folder)


def _read(folder: Path) -> Checkpoint:
    state = json.loads((folder / _STATE).read_text())
    body = state["body"]
    if _digest(body) != state["sha256"]:
        raise ValueError(f"{_STATE}: wrong checksum")
    for name, sha256 in body["files"].items():
        if _sha256(folder / name) != sha256:
            raise ValueError(f"{name}: wrong checksum")
    return Checkpoint(folder, body["step"], body["scalars"])


def _refuse_later(work: Path, step: int) -> None:
    newest = latest(work) if any(_step_of(folder) > step for folder in work.glob(_FOLDERS)) else None
    if newest is not None and newest.step > step:
        raise refuse(
            f"checkpoints in {work}",
            f"step {step} after step {newest.step}",
            allowed="steps beyond the newest checkpoint",
            hint="resume that run, or give this one a folder of its own",
        )


def _drop(work: Path, step: int, keep: int) -> None:
    """Drop all but the newest ``keep`` up to ``step``; what lies beyond is damaged."""
    folders = sorted(work.glob(_FOLDERS), key=_step_of)
    past = [folder for folder in folders if _step_of(folder) <= step]
    for folder in set(folders) - set(past[-keep:]):
        # Renamed first: half a deleted folder must not look like a damaged checkpoint.
        shutil.rmtree(folder.rename(work / f".tmp-{folder.name}"))
    for rest in work.glob(".tmp-*"):
        shutil.rmtree(rest)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Push a file's bytes, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders, and needs not
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
