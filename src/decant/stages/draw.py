"""Pictures on demand, and what a model is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decant.models.cost import parameters, size_mb
from decant.models.device import Device, pick
from decant.models.families.latents import has_encoder
from decant.models.families.of import family_of
from decant.models.generate import generate
from decant.models.layout import networks
from decant.models.load import architecture, condition_tokens, known_architectures, load, place_of, stored_dtype
from decant.models.samplers import Drawing, Sampler
from decant.models.surgery.surgery import layer_map, skeleton
from decant.stages.pictures import save_picture
from decant.stages.record import drawing_of, figures_of, read_record, surgery_map_of


def draw_to(  # noqa: PLR0913 (the options of a picture)
    model: str,
    prompts: Sequence[str],
    steps: Sequence[int],
    seed: int,
    out: Path,
    device: Device,
    *,
    guidance_scale: float | None = None,
    sampler: Sampler | None = None,
    size: int | None = None,
) -> list[dict[str, Any]]:
    """Draw every prompt with every number of steps; prompt i has seed ``seed + i``. Gives what was written.

    What is not said is as the model's record says, or as a teacher is drawn; no steps: those.
    """
    usual = drawing_of(model) or Drawing()
    guidance_scale = usual.guidance_scale if guidance_scale is None else guidance_scale
    pipeline = load(model).to(pick(device))
    seeds = [seed + index for index in range(len(prompts))]
    written = []
    for n in steps or [usual.steps]:
        drawn = generate(
            pipeline,
            prompts,
            seeds,
            steps=n,
            guidance_scale=guidance_scale,
            sampler=sampler or usual.sampler,
            size=size,
            batch_size=1,
        )
        for index, picture in enumerate(drawn):
            file = out / f"{index:03d}-seed{seeds[index]}-steps{n}.png"
            save_picture(picture, file)
            written.append({"file": str(file), "prompt": prompts[index], "seed": seeds[index], "steps": n})
    return written


def describe(model: str) -> dict[str, Any]:
    """What a model is: family, parameters, MACs, parts, size on disk, what a surgery took, and its record.

    The name of an architecture (`sd15`) has counts alone.
    """
    if model in known_architectures():
        unet = skeleton(architecture(model))
        return {
            "family": {"sd15": "sd1", "sd21": "sd2"}.get(model, model),
            **figures_of(unet, condition_tokens(model)),
            "parts": {"unet": parameters(unet)},
            "record": {},
        }
    pipeline, place = load(model), place_of(model)
    record = read_record(place)
    family = family_of(pipeline)
    return {
        "family": family.name,
        **figures_of(pipeline.unet, family.tokens),
        "parts": {name: parameters(network) for name, network in networks(pipeline).items()},
        "vae": type(pipeline.vae).__name__ + ("" if has_encoder(pipeline.vae) else ", without an encoder"),
        "dtype": str(stored_dtype(model)).removeprefix("torch."),
        "size_mb": round(size_mb(place), 3),
        "prediction": family.prediction,
        "surgery": _surgery(place),
        "record": record,
    }


def _surgery(place: Path) -> dict[str, Any] | None:
    """A surgery map in numbers, and by layer; None where nothing was cut."""
    cut = surgery_map_of(place)
    if cut is None:
        return None
    layers = layer_map(cut)
    return {
        "parameters_inherited": len(cut.parameters),
        "parameters_cut_by_channel": len(cut.kept),
        "layers": len(layers),
        "layers_moved": {student: teacher for student, teacher in layers.items() if student != teacher},
        "feature_pairs": len(cut.features),
    }


def described(document: dict[str, Any]) -> str:
    """The same for people, a line each."""
    lines = [
        f"{document['family']}: {document['parameters']:,} parameters, {document['macs'] / 1e9:.3f} GMACs a forward"
    ]
    kinds = {"vae": f", {document['vae']}"} if "vae" in document else {}
    lines += [f"  {name}: {count:,} parameters{kinds.get(name, '')}" for name, count in document["parts"].items()]
    if "size_mb" in document:
        lines.append(f"stored: {document['dtype']}, {document['size_mb']:.1f} MB; predicts {document['prediction']}")
    record, surgery = document["record"], document.get("surgery")
    if surgery:
        lines.append(
            f"cut: {surgery['layers']} layers kept, {len(surgery['layers_moved'])} under another name, "
            f"{surgery['parameters_cut_by_channel']} tensors narrowed, {surgery['feature_pairs']} feature pairs"
        )
        lines += [f"  {line}" for line in record.get("changes", [])]
    if "base_model" in record:
        licence = record.get("licence") or {}
        lines.append(f"base model: {record['base_model']}, licence {licence.get('license', 'unknown')}")
    if "safety_checker" in record:
        lines.append(f"safety checker: {record['safety_checker'].get('state')}, {record['safety_checker'].get('why')}")
    if record.get("stage"):
        steps = [step.get("stage", "?") for step in record.get("lineage", [])]
        lines.append(f"made by: {' -> '.join([*steps, record['stage']])}")
    return "\n".join(lines)
