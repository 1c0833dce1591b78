"""The card of a student: `README.md` of its folder, as the hub shows it, and what it takes over from its teacher's.

Nothing here is made up: what is not known is said to be unknown.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from decant.models.guard import read_json
from decant.models.layout import INDEX
from decant.models.shipped import NAMES

_LICENCE_KEYS = ("license", "license_name", "license_link")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NOT_A_NAME = re.compile(r"[^\w./-]+")
_MOST_CARD_BYTES = 10**6
_SD, _SDXL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
_KIND_TAGS = {
    _SD: ("stable-diffusion", "stable-diffusion-diffusers"),
    _SDXL: ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
}
_BASE_TAGS = ("text-to-image", "diffusers", "decant")


def inherited_facts(source: str | Path, place: Path) -> dict[str, Any]:
    """``base_model`` and ``licence`` of what is made from a model: from its record, else its card, else its name.

    A student of a student has its first teacher as base. The licence is `{}` where nobody states one.

    Args:
        source: the model as it was named: a folder, a file, a hub id or `scenes`.
        place: the folder or file that this stands for here.
    """
    card = _front_matter(place / "README.md") if place.is_dir() else {}
    record = _record(place)
    stated = record.get("licence") or card
    licence = {key: stated[key] for key in _LICENCE_KEYS if isinstance(stated.get(key), str)}
    return {"base_model": record.get("base_model") or _name(source, place), "licence": licence}


def write_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the card of a finished pipeline folder from its record, and its class from its index."""
    index = folder / INDEX
    kind = str(read_json(index).get("_class_name", _SD)) if index.is_file() else _SD
    data = ModelCardData(
        base_model=record["base_model"],
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*_KIND_TAGS.get(kind, ()), *_BASE_TAGS, *_made_by(record)],
        **record["licence"],
    )
    text = f"---\n{data.to_yaml()}\n---\n{_body(record, kind)}"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _body(record: Mapping[str, Any], kind: str) -> str:
    name = record["name"]
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A student of `{record['base_model']}`, made by decant: "
            "an ordinary diffusers pipeline that opens without it.",
            "",
            "## Use",
            "",
            "```python",
            f"from diffusers import {kind}",
            "",
            f'pipeline = {kind}.from_pretrained("path/or/id/of/this/model")',
            f'picture = pipeline("a prompt", {_asked(record)}).images[0]',
            "```",
            "",
            "## How it was made",
            "",
            *(_step(step) for step in [*record.get("lineage", []), record]),
            "",
            "Every setting, the seeds, the surgery map and the versions are in `decant.json`.",
            "",
            "## Measured",
            "",
            *_measured(record),
            "",
            "## Licence",
            "",
            _licence(record),
            "",
            "## Safety checker",
            "",
            _safety(record["safety_checker"]),
            "",
        ]
    )


def _asked(record: Mapping[str, Any]) -> str:
    """What a pipeline is told besides the prompt; its scheduler knows the rest."""
    how = record.get("sampling")
    if not how:
        return "num_inference_steps=25"
    return f"num_inference_steps={how['steps']}, guidance_scale={how['guidance_scale']}"


def _step(step: Mapping[str, Any]) -> str:
    settings = step.get("settings") or {}
    said = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
    return f"- **{step.get('stage', 'a stage')}** (seed {step.get('seed', 'unknown')}): {said or 'no settings'}"


def _measured(record: Mapping[str, Any]) -> list[str]:
    """The figures that the record holds, and that there are no others."""
    figures = record.get("figures") or {}
    rows = []
    if "parameters" in figures:
        rows.append(f"- UNet: {figures['parameters']:,} parameters")
    if "macs" in figures:
        rows.append(f"- {figures['macs'] / 1e9:.3f} G multiply-accumulates a forward, batch 1 at its own size")
    held = record.get("held_out") or {}
    if "output_error_after" in held:
        rows.append(
            f"- mean squared error to its teacher's output on {held['n']} held-out pictures: "
            f"{held['output_error_before']:.4g} before its distillation, {held['output_error_after']:.4g} after"
        )
    rows += _decoder(record.get("decoder"), held)
    rows.append(f"- {record['seconds']:.0f} s for its last stage")
    return [*rows, "", "Scores and latencies are measured by `decant evaluate` and stand in its report, not here."]


def _decoder(both: Mapping[str, Any] | None, held: Mapping[str, Any]) -> list[str]:
    """What a small autoencoder is beside the teacher's; it may be an earlier stage's."""
    if not both:
        return []
    student, teacher = both["student"], both["teacher"]
    rows = [
        f"- decoder: {student['parameters']:,} parameters and {student['macs'] / 1e9:.3f} G multiply-accumulates, "
        f"its teacher's {teacher['parameters']:,} and {teacher['macs'] / 1e9:.3f} G"
    ]
    if "psnr_student" in held:
        rows.append(
            f"- signal to noise of {held['n']} held-out pictures, decoded: {held['psnr_student']['value']:.1f} dB; "
            f"by its teacher's decoder {held['psnr_teacher']['value']:.1f} dB"
        )
    return rows


def _licence(record: Mapping[str, Any]) -> str:
    licence = record["licence"]
    if not licence:
        return (
            f"Unknown: neither a card nor a record of `{record['base_model']}` states one. A student inherits its "
            "teacher's licence; find it before you share this model."
        )
    named = licence.get("license_name") or licence.get("license")
    link = f" ({licence['license_link']})" if "license_link" in licence else ""
    return f"`{named}`{link}, inherited from `{record['base_model']}`."


def _safety(safety: Mapping[str, str]) -> str:
    match safety["state"]:
        case "kept":
            return (
                "Kept: the teacher's safety checker and feature extractor are in this folder, and diffusers runs them."
            )
        case "absent":
            return f"There is none: {safety['why']}. Check what the model draws before you show it."
        case _:
            return f"Dropped: {safety['why']}. Check what the model draws before you show it."


def _made_by(record: Mapping[str, Any]) -> list[str]:
    stages = [step.get("stage") for step in [*record.get("lineage", []), record]]
    tags = {"prune": "pruned", "distill": "distilled", "consistency": "few-step", "dmd": "few-step"}
    return list(dict.fromkeys(tag for stage, tag in tags.items() if stage in stages))


def _record(place: Path) -> dict[str, Any]:
    file = place / "decant.json"
    return read_json(file, most_bytes=10**8) if place.is_dir() and file.is_file() else {}


def _name(source: str | Path, place: Path) -> str:
    """The hub id of a model where it has one, else a plain name: never a path of this machine."""
    text = str(source)
    if not Path(text).exists() and _HUB_ID.fullmatch(text):
        return text
    if text in NAMES:
        return text
    index = place / INDEX
    noted = str(read_json(index).get("_name_or_path", "")) if index.is_file() else ""
    if _HUB_ID.fullmatch(noted) and not Path(noted).exists():
        return noted
    return _NOT_A_NAME.sub("-", place.resolve().name.removesuffix(".safetensors")) or "unknown"


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML between the first two lines of dashes; empty where it cannot be read."""
    if not card.is_file() or card.stat().st_size > _MOST_CARD_BYTES:
        return {}
    found = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        document = yaml.safe_load(found[1]) if found else {}
    except (yaml.YAMLError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
