"""What was made for a teacher, for a student that was cut from it: files in, files out, and what was dropped."""

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers.models.controlnets.controlnet import ControlNetModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from decant.errors import refuse
from decant.models.guard import check_inside, read_header, read_json
from decant.models.layout import Component, check_config, check_numbers, quiet
from decant.models.load import place_of, unet_config
from decant.models.move.controlnet import move_controlnet
from decant.models.move.controlnet import skeleton as controlnet_skeleton
from decant.models.move.lora import Lora, Moved, Part, Shapes, move_lora
from decant.models.move.lora_file import lora_header
from decant.models.move.lora_keys import read_lora, to_kohya, to_peft
from decant.models.surgery.surgery import SurgeryMap, skeleton
from decant.stages.record import surgery_map_of

_ENCODERS: tuple[Part, ...] = ("text_encoder", "text_encoder_2")
# A ControlNet is a UNet's way down, and is looked at as a UNet is.
_CONTROLNET = Component("unet", ControlNetModel, "diffusion_pytorch_model")
_UP_RESNET = re.compile(r"up_blocks\.\d+\.resnets\.(\d+)\.")


def move_lora_file(file: Path, student: str, out: Path) -> dict[str, Any]:
    """Move a LoRA to a student and write it twice: for peft and diffusers as ``out``, for kohya's readers beside it.

    Args:
        file: a .safetensors LoRA of the student's teacher.
        student: a pipeline folder that decant cut.
        out: a new file, ending in .safetensors.

    Returns:
        ``{"lora", "student", "files": {"peft", "kohya"}, "modules", "moved", "text_modules", "dropped": [{"part",
        "modules", "share", "why"}], "narrowed", "narrowed_share"}``.

    Raises:
        UserError: a file is damaged or no LoRA, of another family, or the student has no surgery map.
    """
    files = {"peft": out, "kohya": out.with_name(f"{out.stem}-kohya.safetensors")}
    _check_new(out, files.values())
    place, surgery_map = _cut(student)
    header = lora_header(file)
    lora = read_lora(load_file(header.file), _layers(surgery_map))
    _check_text(lora, place)
    moved = move_lora(lora, surgery_map, _shapes(place))
    out.parent.mkdir(parents=True, exist_ok=True)
    encoders = sum((place / name).is_dir() for name in _ENCODERS)
    _write(files["peft"], *to_peft(moved.lora))
    _write(files["kohya"], *to_kohya(moved.lora, header.metadata, encoders))
    return {
        "lora": str(file),
        "student": student,
        "files": {kind: str(path) for kind, path in files.items()},
        **_summary(lora, moved),
    }


def lora_told(document: Mapping[str, Any]) -> str:
    """The same for people."""
    lines = [f"{document['moved']} of {document['modules']} UNet modules moved"]
    if document["text_modules"]:
        lines[0] += f", {document['text_modules']} of the text encoder as they are"
    if document["narrowed"]:
        share = 100 * document["narrowed_share"]
        lines.append(f"narrowed: {document['narrowed']} modules, with {share:.1f} % of the LoRA's squared norm")
    lines += [
        f"dropped: {part['part']}, {part['modules']} modules with {100 * part['share']:.1f} % of the LoRA's squared "
        f"norm: {part['why']}"
        for part in document["dropped"]
    ]
    return "\n".join([*lines, *(f"{kind}: {path}" for kind, path in document["files"].items())])


def move_controlnet_folder(folder: Path, student: str, out: Path) -> dict[str, Any]:
    """Move a ControlNet to a student, as a folder that plain diffusers opens.

    Args:
        folder: a ControlNet of the student's teacher as diffusers writes it.
        student: a pipeline folder that decant cut.
        out: a new folder.

    Returns:
        ``{"controlnet", "student", "folder", "parameters_before", "parameters", "dropped": [{"part", "parameters",
        "why"}]}``.

    Raises:
        UserError: a file is damaged or no ControlNet, of another family, or the student has no surgery map or one that
            diffusers' ControlNet has no twin of.
    """
    if out.exists():
        raise refuse("--out", f"{out} exists", allowed="a new folder", hint="name another, or remove this one")
    place, surgery_map = _cut(student)
    config, weights = _controlnet(folder)
    moved = move_controlnet(config, weights, surgery_map, dict(skeleton(unet_config(place)).config))
    network = controlnet_skeleton(moved.config)
    network.load_state_dict(moved.weights, strict=True, assign=True)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with quiet():
            network.save_pretrained(temporary, safe_serialization=True)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {
        "controlnet": str(folder),
        "student": student,
        "folder": str(out),
        "parameters_before": sum(tensor.numel() for tensor in weights.values()),
        "parameters": sum(tensor.numel() for tensor in moved.weights.values()),
        "dropped": [asdict(part) for part in moved.dropped],
    }


def controlnet_told(document: Mapping[str, Any]) -> str:
    """The same for people."""
    head = f"{document['parameters_before']:,} -> {document['parameters']:,} parameters"
    lines = [f"dropped: {part['part']}, {part['parameters']:,}: {part['why']}" for part in document["dropped"]]
    return "\n".join([head, *lines, document["folder"]])


def _controlnet(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of a ControlNet's folder, every tensor there and of its shape."""
    if folder.is_file():
        raise refuse(
            "--controlnet",
            f"{folder} is a file",
            allowed="a folder with config.json and diffusion_pytorch_model.safetensors",
            hint="diffusers makes one: ControlNetModel.from_single_file(FILE).save_pretrained(FOLDER)",
        )
    config = check_config(folder, _CONTROLNET)
    names = [f"{_CONTROLNET.stem}{variant}.safetensors" for variant in ("", ".fp16")]
    file = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    check_inside(folder, [folder / "config.json", file])
    header = read_header(file)
    check_numbers(folder, _CONTROLNET, config, header.numbers)
    network = controlnet_skeleton(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    wrong = sorted(name for name, shape in wanted.items() if header.shapes.get(name) != shape)
    if wrong:
        raise refuse(
            f"model {file}",
            f"{len(wrong)} tensors are missing or of another shape, such as {wrong[0]}",
            allowed="the weights that belong to config.json",
            hint="config.json and weights are of two different networks; take both from one folder",
        )
    return dict(network.config), load_file(file)


def _summary(lora: Lora, moved: Moved) -> dict[str, Any]:
    return {
        "modules": len(lora.get("unet", {})),
        "moved": moved.modules,
        "text_modules": sum(len(layers) for part, layers in lora.items() if part != "unet"),
        "dropped": [asdict(part) for part in moved.dropped],
        "narrowed": moved.narrowed,
        "narrowed_share": moved.narrowed_share,
    }


def _cut(student: str) -> tuple[Path, SurgeryMap]:
    """A student's folder and its map to the teacher."""
    place = place_of(student)
    surgery_map = surgery_map_of(place) if place.is_dir() else None
    if surgery_map is None:
        raise refuse(
            "--to",
            f"{student} has no surgery map",
            allowed="a pipeline folder that decant cut (decant.json holds its map)",
            hint="decant prune makes one; a LoRA or ControlNet of an uncut model needs no moving",
        )
    return place, surgery_map


def _check_new(out: Path, files: Iterable[Path]) -> None:
    if out.suffix != ".safetensors":
        raise refuse("--out", out, allowed="a file name that ends in .safetensors", hint=f"{out}.safetensors")
    for file in files:
        if file.exists():
            raise refuse("--out", f"{file} exists", allowed="a new file", hint="name another, or remove this one")


def _layers(surgery_map: SurgeryMap) -> int:
    """Layers of the teacher's blocks: an up block has one resnet more. Files with names by number count by it."""
    numbers = [int(found[1]) for source in surgery_map.parameters.values() if (found := _UP_RESNET.match(source))]
    return max([2, *numbers])


def _shapes(place: Path) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in skeleton(unet_config(place)).state_dict().items()}


def _check_text(lora: Lora, place: Path) -> None:
    """Refuse layers of a text encoder that the student does not have, or that is of another size."""
    for part in _ENCODERS:
        config = place / part / "config.json"
        sizes = _text_shapes(read_json(config)) if config.is_file() else {}
        for module, layer in lora.get(part, {}).items():
            own = sizes.get(re.sub(r"\.\d+\.", ".0.", module))
            number = re.search(r"layers\.(\d+)", module)
            deep = number is None or int(number[1]) < sizes["layers"][0] if sizes else False
            if own != layer.shape or not deep:
                found = " x ".join(map(str, layer.shape))
                raise refuse(
                    f"LoRA, {part}.{module}",
                    f"made for a weight of {found}",
                    allowed=" x ".join(map(str, own)) if own and deep else f"modules of {place.name}'s text encoders",
                    hint="it is a LoRA of another family; move one that was made for this student's teacher",
                )


def _text_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the weights of a CLIP text encoder's first layer; ``layers`` is how many there are. Defaults are CLIP's."""
    width, inner = config.get("hidden_size", 512), config.get("intermediate_size", 2048)
    layer = "text_model.encoder.layers.0"
    heads = {f"{layer}.self_attn.{way}_proj": (width, width) for way in ("q", "k", "v", "out")}
    feed = {f"{layer}.mlp.fc1": (inner, width), f"{layer}.mlp.fc2": (width, inner)}
    last = {"text_projection": (config.get("projection_dim", 512), width)}
    return {"layers": (config.get("num_hidden_layers", 12),), **heads, **feed, **last}


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A file whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
