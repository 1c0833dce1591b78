"""Checkpoints that are whole or not there: safetensors and JSON in a folder that appears by one rename.

Each holds ``<group>.safetensors`` files and ``state.json`` with the sha256 of each of them and of itself. No
pickle.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from decant.errors import UserError, disk_full, refuse

_LOG = logging.getLogger(__name__)
_STATE = "state.json"
_FOLDERS = "step-[0-9]*"
_DAMAGE = (OSError, ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk. step: updates made so far. scalars: what was written beside the tensors.

    files: its tensor files, whose checksums were right.
    """

    folder: Path
    step: int
    scalars: dict[str, Any]
    files: frozenset[str]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group, on the CPU; empty if there are none."""
        name = f"{group}.safetensors"
        return load_file(self.folder / name) if name in self.files else {}


def write(
    work: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    scalars: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of ``step`` into ``work``, whole or not at all; only the newest ``keep`` stay.

    Raises UserError where ``work`` holds a whole checkpoint of a later step (it is another run's, or was not resumed),
    where a number is not finite, and where the disk refuses (full, failing): those before are then untouched.
    """
    assert keep >= 1, "the checkpoint just written is kept"
    _refuse_later(work, step)
    _refuse_not_finite(step, tensors)
    temporary = work / f".tmp-{step:08d}"
    try:
        work.mkdir(parents=True, exist_ok=True)
        _clean(work)  # after a run that was killed while it wrote
        temporary.mkdir()
        _fill(temporary, step, tensors, scalars)
        final = _put(temporary, work / f"step-{step:08d}")
        _sync(work)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _not_written(work, step, tensors, error) from error
    _drop(work, step, keep)
    return final


def latest(work: Path) -> Checkpoint | None:
    """The newest whole checkpoint in ``work``, or None. A damaged one is skipped with a warning."""
    for folder in reversed(_folders(work)):
        try:
            return _read(folder)
        except _DAMAGE as damage:
            _LOG.warning("checkpoint %s is damaged (%s) and is skipped for the one before", folder, damage)
    return None


def _fill(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], scalars: Mapping[str, Any]) -> None:
    files: dict[str, str] = {}
    for group, named in tensors.items():
        if named:
            path = folder / f"{group}.safetensors"
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
            save_file(held, path)
            _sync(path)
            _compare(path, held)
            files[path.name] = _sha256(path)
    body = {"step": step, "files": files, "scalars": dict(scalars)}
    path = folder / _STATE
    text = json.dumps({"body": body, "sha256": _digest(body)}, indent=1)
    path.write_text(text)
    _sync(path)
    if path.read_text() != text:
        raise _lost(path)
    _sync(folder)


def _compare(path: Path, held: Mapping[str, Tensor]) -> None:
    """A checksum of what the disk gives back proves nothing if the disk has lost some of it already."""
    with safe_open(path, "pt") as file:
        if not all(torch.equal(file.get_tensor(name), tensor) for name, tensor in held.items()):
            raise _lost(path)


def _lost(path: Path) -> OSError:
    return OSError(errno.EIO, "what was written is not what can be read", str(path))


def _put(temporary: Path, final: Path) -> Path:
    """Rename a filled folder into place; one of the same step that is no worse stays instead."""
    if not final.exists():
        return temporary.rename(final)
    if _same(temporary, final):
        return final
    old = temporary.with_name(f"{temporary.name}-old")
    final.rename(old)
    try:
        return temporary.rename(final)
    except OSError:
        old.rename(final)
        raise


def _same(one: Path, other: Path) -> bool:
    try:
        _read(other)
    except _DAMAGE:
        return False
    return _text(one) == _text(other)


def _text(folder: Path) -> str:
    return (folder / _STATE).read_text()


def _read(folder: Path) -> Checkpoint:
    state = json.loads(_text(folder))
    body = state["body"]
    if _digest(body) != state["sha256"]:
        raise ValueError(f"{_STATE}: wrong checksum")
    if body["step"] != _step_of(folder):
        raise ValueError(f"{_STATE}: of step {body['step']}")
    for name, sha256 in body["files"].items():
        if _sha256(folder / name) != sha256:
            raise ValueError(f"{name}: wrong checksum")
    return Checkpoint(folder, body["step"], body["scalars"], frozenset(body["files"]))


def _refuse_later(work: Path, step: int) -> None:
    newest = latest(work) if any(_step_of(folder) > step for folder in _folders(work)) else None
    if newest is not None and newest.step > step:
        raise refuse(
            f"checkpoints in {work}",
            f"step {step} after step {newest.step}",
            allowed="steps beyond the newest checkpoint",
            hint="resume that run, or give this one a folder of its own",
        )


def _refuse_not_finite(step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    for group, named in tensors.items():
        for name, tensor in named.items():
            if not bool(tensor.isfinite().all()):
                raise refuse(
                    f"checkpoint of step {step}: {group} {name}",
                    "not finite",
                    allowed="finite numbers; nothing was written",
                    hint="go on from the checkpoint before with a lower learning rate",
                )


def _not_written(work: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], error: Exception) -> UserError:
    size_mb = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values()) / 1e6
    hint = f"make room: a checkpoint takes {size_mb:.1f} MB" if disk_full(error) else "check the disk"
    return refuse(
        f"checkpoint of step {step} in {work}",
        f"not written: {error}",
        allowed="a folder that can be written; the checkpoints before are untouched",
        hint=f"{hint}; then the same command goes on from the newest checkpoint",
    )


def _drop(work: Path, step: int, keep: int) -> None:
    """Drop all but the newest ``keep`` up to ``step``; what lies beyond is damaged."""
    folders = _folders(work)
    past = [folder for folder in folders if _step_of(folder) <= step]
    for folder in set(folders) - set(past[-keep:]):
        try:
            # Renamed first: half a deleted folder must not look like a damaged checkpoint.
            folder.rename(work / f".tmp-{folder.name}")
        except OSError as error:
            _LOG.warning("checkpoint %s could not be removed: %s", folder, error)
    _clean(work)


def _clean(work: Path) -> None:
    for rest in work.glob(".tmp-*"):
        shutil.rmtree(rest, ignore_errors=True)
        with suppress(OSError):
            rest.unlink()  # what is no folder


def _folders(work: Path) -> list[Path]:
    """Checkpoints by step, oldest first, whole or not."""
    named = [path for path in work.glob(_FOLDERS) if path.name.removeprefix("step-").isdecimal()]
    return sorted(named, key=_step_of)


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
