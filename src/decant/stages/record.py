"""What stages write into and read from the record, ``decant.json``, of a pipeline folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from decant.data.captioned import Skipped
from decant.data.source import Data
from decant.errors import refuse
from decant.models.cost import latent_of, macs, parameters
from decant.models.samplers import Drawing
from decant.models.surgery.surgery import SurgeryMap


def read_record(source: str | Path) -> dict[str, Any]:
    """The record of a pipeline folder; empty where the folder was not written by decant.

    Raises:
        UserError: there is a ``decant.json`` and it is not a JSON object.
    """
    file = Path(source) / "decant.json"
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise refuse(
            str(file),
            f"unreadable: {error}",
            allowed="the record as decant wrote it",
            hint="make the stage again",
        ) from None
    if not isinstance(record, dict):
        raise refuse(str(file), type(record).__name__, allowed="a JSON object", hint="make the stage again")
    return record


def inherited(source: str | Path) -> dict[str, Any]:
    """What a child's record takes over from its parent's: the lineage so far, oldest first."""
    parent = read_record(source)
    lineage = list(parent.get("lineage", []))
    if parent:
        lineage.append({key: parent[key] for key in ("stage", "name", "settings", "seed", "made") if key in parent})
    return {"lineage": lineage}


def drawn_alike(source: str | Path) -> dict[str, Any]:
    """What a child's record takes over where it keeps its parent's scheduler: how a student of few steps is drawn."""
    parent = read_record(source)
    return {"sampling": parent["sampling"]} if "sampling" in parent else {}


def carried(source: str | Path) -> dict[str, Any]:
    """What a child's record takes over where its UNet has the parent's layout: also how that was cut."""
    parent = read_record(source)
    return {key: parent[key] for key in ("student", "changes", "surgery_map") if key in parent} | inherited(source)


def data_of(
    data: Data | None, skipped: Sequence[Skipped], replaced: Sequence[Skipped], **counts: int
) -> dict[str, Any]:
    """What a training was made on: where that lies, how many of what, and what was left out, named."""
    lists = {"skipped": skipped, "replaced": replaced}
    named = {key: [{"name": item.name, "reason": item.reason} for item in items] for key, items in lists.items()}
    return {"path": str(data), **counts, **named}


def drawing_of(source: str | Path) -> Drawing | None:
    """How a student of few steps wants to be drawn, by its record; None for all others."""
    said = read_record(source).get("sampling")
    if not isinstance(said, dict):
        return None
    return Drawing(int(said["steps"]), float(said["guidance_scale"]), said["sampler"])


def surgery_map_of(source: str | Path) -> SurgeryMap | None:
    """The map from a student folder to its teacher, where its record holds one."""
    document = read_record(source).get("surgery_map")
    return SurgeryMap.from_json(document) if document else None


def figures_of(unet: UNet2DConditionModel, tokens: int) -> dict[str, int]:
    """Parameters and MACs of one forward: batch 1, the network's own size, a condition of that many tokens."""
    work = macs(unet, latent_of(unet.config), tokens)
    return {"parameters": parameters(unet), "macs": work, "tokens": tokens}
