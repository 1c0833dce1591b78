"""Writes a checkpoint over a good one under every fault given, in a process of its own; prints what became of it.

python faulty_writer.py FOLDER < faults.json; a fault is [kind, at]. ``faulty_disk.c`` is preloaded; the kind ``limit``
is the kernel's own limit on the size of a file.
"""

import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decant.errors import UserError
from decant.train import checkpoint


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    """A few kilobytes that tell the steps apart."""
    made = torch.Generator().manual_seed(step)
    group = {name: torch.randn(size, generator=made) for name, size in (("a", 3), ("b", 400), ("c", 1000))}
    return {"weights": group, "ema": {"a": torch.full((7,), float(step))}, "optimizer": {"a/step": torch.tensor(1.0)}}


def held(work: Path) -> int | None:
    """The step of the newest checkpoint, whose tensors must be that step's own."""
    found = checkpoint.latest(work)
    if found is None:
        return None
    for group, named in tensors(found.step).items():
        stored = found.tensors(group)
        assert stored.keys() == named.keys() and all(torch.equal(stored[k], named[k]) for k in named), found.folder
    return found.step


def limit(soft: int) -> None:
    """Bytes that a file may have."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def under(fault: str, at: int, work: Path) -> dict[str, Any]:
    """Steps 1 and 2 on a good disk, 3 under the fault, 3 again on a good disk."""
    shutil.rmtree(work, ignore_errors=True)
    for step in (1, 2):
        checkpoint.write(work, step, tensors(step), {})
    os.environ |= {"FAULT": fault, "FAULT_AT": str(at), "FAULT_UNDER": str(work)}
    said = None
    try:
        if fault == "limit":
            limit(at)
        checkpoint.write(work, 3, tensors(3), {})
    except UserError as error:
        said = str(error)
    finally:
        limit(resource.RLIM_INFINITY)
        os.environ["FAULT"] = ""
        os.write(1, b"")  # the disk forgets what it counted
    before = checkpoint._read(work / "step-00000002").step
    after, litter = held(work), [path.name for path in work.glob(".tmp-*")]
    checkpoint.write(work, 3, tensors(3), {})
    return {"said": said, "held": after, "before": before, "litter": litter, "again": held(work)}


if __name__ == "__main__":
    for kind, at in json.load(sys.stdin):
        print(json.dumps({"fault": [kind, at], **under(kind, at, Path(sys.argv[1]))}), flush=True)
