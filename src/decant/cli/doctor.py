"""What this machine can do, and what is missing."""

import os
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from decant.bench.machine import machine
from decant.models.load import known_architectures, place_of
from decant.models.shipped import NAMES, shipped_folder

# Optional: decant runs without them, and says here what they are for.
_OPTIONAL = {
    "torchvision": "diffusers' faster image processors, for safety checkers",
    "tensorboard": "trackers: [tensorboard]",
    "wandb": "trackers: [wandb]",
    "aim": "trackers: [aim]",
    "mlflow": "trackers: [mlflow]",
}
_LEAST_MEMORY_GB = 4.0
_LEAST_DISK_GB = 2.0
_EXTRA = re.compile(r";.*extra\s*==")


def _shipped() -> dict[str, Any]:
    """The teachers that are here."""
    return {name: str(place_of(name)) for name in NAMES if shipped_folder(name).is_dir()}


def examine(where: Path) -> dict[str, Any]:
    """Everything that a run depends on: ``{"machine", "devices", "memory_gb", "packages", "missing", ...}``.

    Args:
        where: the folder whose disk is asked for its free space.
    """
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(where)
    document = {
        "machine": machine(),
        "devices": _devices(),
        "memory_gb": {"total": round(memory.total / 1e9, 1), "available": round(memory.available / 1e9, 1)},
        "disk_gb": {"folder": str(where.resolve()), "free": round(disk.free / 1e9, 1)},
        "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "compiler": shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
        "packages": _packages(),
        "optional": {name: {"version": _version(name), "for": use} for name, use in _OPTIONAL.items()},
        "hub": _hub(),
        "models": {**_shipped(), "architectures": list(known_architectures())},
    }
    return {**document, "missing": _missing(document)}


def told(document: dict[str, Any]) -> str:
    """The same for people."""
    here, memory, threads = document["machine"], document["memory_gb"], document["threads"]
    lines = [
        f"processor  {here['processor']}, {here['cores']} cores, {threads['torch']} threads",
        f"memory     {memory['available']} of {memory['total']} GB available",
        f"disk       {document['disk_gb']['free']} GB free in {document['disk_gb']['folder']}",
        f"python     {here['python']}, torch {here['torch']}, {here['system']}",
        *(f"device     {device['name']}: {device['what']}" for device in document["devices"]),
        f"compiler   {document['compiler'] or 'none'}",
        f"hub        {document['hub']['endpoint']}, "
        + ("offline" if document["hub"]["offline"] else "to be asked when a model is fetched")
        + (", token present" if document["hub"]["token"] else ", no token"),
        "packages   " + ", ".join(f"{name} {found['version']}" for name, found in document["packages"].items()),
        "optional   " + ", ".join(f"{n} {o['version'] or 'absent'}" for n, o in document["optional"].items()),
    ]
    lines += [f"missing    {item['what']}\n  hint: {item['hint']}" for item in document["missing"]]
    return "\n".join(lines if document["missing"] else [*lines, "nothing is missing"])


def _devices() -> list[dict[str, Any]]:
    """The devices that ``--device`` takes here."""
    found: list[dict[str, Any]] = [{"name": "cpu", "what": f"{os.cpu_count()} cores", "memory_gb": None}]
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found.append({"name": "cuda", "what": card.name, "memory_gb": round(card.total_memory / 1e9, 1)})
    if torch.backends.mps.is_available():
        found.append({"name": "mps", "what": "Apple's GPU", "memory_gb": None})
    return found


def _packages() -> dict[str, dict[str, Any]]:
    """What decant requires: the version that is here, and the range that is asked for."""
    wanted = [line for line in metadata.requires("decant") or [] if not _EXTRA.search(line)]
    split = [re.fullmatch(r"([\w.-]+)\s*(.*)", line) for line in wanted]
    return {found[1]: {"version": _version(found[1]), "asked": found[2]} for found in split if found}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants, get_token

    offline = constants.is_offline_mode()
    return {
        "endpoint": constants.ENDPOINT,
        "offline": offline,
        "token": get_token() is not None,
        "cache": str(constants.HF_HUB_CACHE),
    }


def _missing(document: dict[str, Any]) -> list[dict[str, str]]:
    """What would stop a run, or slow it, and what to do about it."""
    found = [
        {"what": f"the package {name} {package['asked']}", "hint": f"pip install '{name}{package['asked']}'"}
        for name, package in document["packages"].items()
        if package["version"] is None
    ]
    if document["memory_gb"]["available"] < _LEAST_MEMORY_GB:
        what = f"memory: {document['memory_gb']['available']} GB available, the quickstart wants {_LEAST_MEMORY_GB:.0f}"
        found.append({"what": what, "hint": "close other programs"})
    if document["disk_gb"]["free"] < _LEAST_DISK_GB:
        what = f"disk: {document['disk_gb']['free']} GB free, the quickstart wants {_LEAST_DISK_GB:.0f}"
        found.append({"what": what, "hint": "run in a folder on another disk"})
    if len(document["devices"]) == 1:
        hint = "full-size models train on a CUDA GPU; the scenes teacher, counts and plans need none"
        found.append({"what": "an accelerator", "hint": hint})
    if document["compiler"] is None:
        found.append({"what": "a C++ compiler, for compile: true on a CPU", "hint": "install g++ or clang"})
    return found
