"""One `.safetensors` file of Stable Diffusion 1.x, as people download it: recognised, opened offline, and written.

Such a file holds weights alone. The configs and the tokenizer of the published layout ship in `sd1_layout`; a file
that decant writes for another size carries its own in its metadata.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from decant.errors import UserError, refuse
from decant.models.families.sd1_keys import PREFIXES, ema_name, is_vae_attention, naming
from decant.models.guard import Header, read_header
from decant.models.layout import (
    SD,
    Component,
    Pipeline,
    as_refusal,
    check_config,
    check_layout,
    empty,
    quiet,
    tidy_configs,
)

ALLOWED = "one .safetensors file of Stable Diffusion 1.x: UNet, VAE and text encoder together"
_METADATA = "decant.layout"
_LAYOUT_FILES = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
)
# What says of which kind a file is, by the start or a part of one of its names; the first that fits counts.
_KINDS = (
    ("conditioner.embedders.1.", "SDXL"),
    ("conditioner.embedders.0.", "the SDXL refiner"),
    ("model.diffusion_model.label_emb.", "SDXL"),
    ("cond_stage_model.model.", "Stable Diffusion 2.x"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "Flux"),
    ("single_blocks.", "Flux"),
)
_PIECES = (
    ("control_model.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("lora_", "a LoRA"),
    (".lora", "a LoRA"),
    ("emb_params", "a textual inversion embedding"),
    ("down_blocks.", "one component of a diffusers folder"),
    ("encoder.", "a VAE or a text encoder alone"),
)


def check_kind(file: Path) -> Header:
    """The header of a file that may be a whole Stable Diffusion 1.x model.

    Raises:
        UserError: it is a pickle, is damaged, or is of another kind; the message names the kind.
    """
    if file.suffix in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
        raise refuse(
            "model",
            f"{file} is a pickle, which can run code when opened",
            allowed=ALLOWED,
            hint="take the same model as .safetensors; most are published in both forms",
        )
    if file.suffix != ".safetensors":
        hint = "give a pipeline folder, or one .safetensors file"
        raise refuse("model", file, allowed=ALLOWED, hint=f"{hint}, not a file of another kind")
    header = read_header(file)
    kind = _other_kind(header)
    if kind:
        raise refuse(f"model {file}", kind[0], allowed=ALLOWED, hint=kind[1])
    return header


def open_parts(header: Header, layout: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    """UNet, VAE and text encoder of one file, every tensor of them from it, in evaluation mode on the CPU.

    Names and shapes are compared with the layout's networks before a tensor is read.
    """
    plans = [(part, *_plan(header, layout, part)) for part in SD.components]
    _check_strangers(header, {name for _, _, sources in plans for name in sources.values()})
    models: dict[str, nn.Module] = {}
    with safe_open(header.file, framework="pt") as weights:
        for part, model, sources in plans:
            state = {
                name: _read(weights.get_tensor(source), model.get_parameter(name).shape, dtype)
                for name, source in sources.items()
            }
            model.load_state_dict(state, assign=True)
            models[part.name] = model.eval()
    return models


@contextmanager
def layout_of(header: Header) -> Iterator[Path]:
    """A folder with the configs, tokenizer and scheduler of a file: what it carries itself, or what ships."""
    carried = header.metadata.get(_METADATA)
    if carried is None:
        yield shipped_layout()
        return
    with tempfile.TemporaryDirectory(prefix="decant-layout-") as name:
        folder = Path(name)
        _unpack(carried, folder, header.file)
        check_layout(folder)
        yield folder


def shipped_layout() -> Path:
    """The configs, tokenizer and scheduler of Stable Diffusion 1.5: a pipeline folder without weights."""
    return Path(str(files("decant.models.families").joinpath("sd1_layout")))


def write_single_file(pipeline: Pipeline, file: Path) -> None:
    """Write a pipeline of Stable Diffusion 1.x layout as one file, in the dtypes that it has; whole or not at all.

    Raises:
        UserError: the UNet is of another layout, such as a student's with removed blocks.
    """
    _check_regular(dict(pipeline.unet.config))
    tensors: dict[str, Tensor] = {}
    for part in SD.components:
        network = getattr(pipeline, part.name)
        rename = naming(part.name, _config_of(network))
        for name, tensor in network.named_parameters():
            tensors[rename(name)] = _as_stored(name, tensor.detach())
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    save_file(tensors, temporary, metadata={"format": "pt", _METADATA: _carried(pipeline)})
    temporary.replace(file)


def _other_kind(header: Header) -> tuple[str, str] | None:
    """(what a file is, what to do), where it is not a whole SD 1.x text-to-image model."""
    names = header.shapes
    for mark, kind in _KINDS:
        if any(mark in name for name in names):
            return f"it is {kind}", "not yet: this version opens Stable Diffusion 1.x as one file"
    unet = PREFIXES["unet"]
    inside = any(name.startswith((unet, "model_ema.")) for name in names)
    if not inside:
        for mark, piece in _PIECES:
            if any(name.startswith(mark) or (mark[0] == "." and mark in name) for name in names):
                return f"it is {piece}", "give the file of the whole model, of which this is a part or an addition"
        return f"no tensor of a UNet ({', '.join(list(names)[:3])[:120]})", "is this the right file?"
    return _other_unet(names)


def _other_unet(names: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
    first = PREFIXES["unet"] + "input_blocks.0.0.weight"
    shape = names.get(first) or names.get(ema_name(first)) or ()
    channels = shape[1] if len(shape) == 4 else 4
    if channels == 9:
        return "it is an inpainting model: its UNet takes 9 channels", "give a text-to-image model of 4 channels"
    if channels == 8:
        return "its UNet takes 8 channels, as InstructPix2Pix and MuseTalk do", "give a text-to-image model of 4"
    text = names.get(PREFIXES["unet"] + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", ())
    if len(text) == 2 and text[1] == 1024:
        return "it is Stable Diffusion 2.x", "not yet: this version opens Stable Diffusion 1.x as one file"
    if len(text) == 2 and text[1] == 2048:
        return "it is SDXL", "not yet: this version opens Stable Diffusion 1.x as one file"
    for part in SD.components[1:]:
        if not any(name.startswith(PREFIXES[part.name].removesuffix("text_model.")) for name in names):
            return f"it has no {part.name.replace('_', ' ')}", "take the file that holds the whole model"
    return None


def _plan(header: Header, layout: Path, part: Component) -> tuple[nn.Module, dict[str, str]]:
    """The empty network of a component, and for each of its parameters the tensor of the file that fills it."""
    config = check_config(layout / part.name, part)
    with as_refusal(header.file, f"the layout of a {part.kind.__name__}", "the layout in its metadata is damaged"):
        model = empty(part, config)
        rename = naming(part.name, config)
        wanted = {name: rename(name) for name, _ in model.named_parameters()}
    wanted = {name: _present(header, source) for name, source in wanted.items()}
    lost = [source for source in wanted.values() if source not in header.shapes]
    if lost:
        raise _unfit(header, part, f"{len(lost)} of its tensors are missing, such as {lost[0]}")
    for name, source in wanted.items():
        need, have = tuple(model.get_parameter(name).shape), header.shapes[source]
        if have != need and not (is_vae_attention(name) and have == (*need, 1, 1)):
            raise _unfit(header, part, f"{source} is {list(have)}, and SD 1.x has {list(need)}")
    return model, wanted


def _present(header: Header, name: str) -> str:
    """The name under which a file has a tensor: its own, that of older text encoders, or of the average alone."""
    if name in header.shapes:
        return name
    if name.startswith(PREFIXES["text_encoder"]):
        older = name.replace(".transformer.text_model.", ".transformer.")
        return older if older in header.shapes else name
    return ema_name(name) if ema_name(name) in header.shapes else name


def _check_strangers(header: Header, used: set[str]) -> None:
    """Refuse tensors of the three networks that the layout has no place for: nothing is dropped in silence."""
    for part in SD.components:
        prefix = PREFIXES[part.name].removesuffix("text_model.")
        for name in header.shapes:
            if name.startswith(prefix) and name not in used and not _ignored(name):
                raise _unfit(header, part, f"{name[:120]} is not in SD 1.x")


def _ignored(name: str) -> bool:
    """Buffers and what only training had: the loss of the VAE, averages beside the weights."""
    return name.endswith("position_ids") or name.startswith(("first_stage_model.loss.", "first_stage_model.model_ema."))


def _unfit(header: Header, part: Component, why: str) -> UserError:
    return refuse(
        f"model {header.file}, {part.name.replace('_', ' ')}",
        why,
        allowed="the tensors of Stable Diffusion 1.x, every one",
        hint="it is a model of another layout, pruned by other means, or an incomplete copy",
    )


def _read(tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of its own memory: one that lies in the mapped file would change with it."""
    return tensor.reshape(shape).to(dtype, copy=True).contiguous()


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    return (tensor[:, :, None, None] if is_vae_attention(name) and tensor.ndim == 2 else tensor).contiguous()


def _config_of(network: nn.Module) -> dict[str, Any]:
    config: Any = network.config
    return dict(config) if isinstance(config, dict) else config.to_dict()


def _check_regular(config: dict[str, Any]) -> None:
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    if layers != 2 or levels != 4 or config["mid_block_type"] is None or config["use_linear_projection"]:
        raise refuse(
            "model",
            f"a UNet of {levels} levels with {layers} layers each",
            allowed="the layout of SD 1.x: four levels, two layers each, a middle block, projections by convolution",
            hint="students with removed blocks cannot be written as one file yet; diffusers opens their folder",
        )


def _carried(pipeline: Pipeline) -> str:
    """Configs and scheduler as one JSON text, and the tokenizer where it is not CLIP's own."""
    with tempfile.TemporaryDirectory(prefix="decant-layout-") as name, quiet():
        folder = Path(name)
        pipeline.save_config(folder)
        for part in SD.components:
            network = getattr(pipeline, part.name)
            save = network.config.save_pretrained if part.name == "text_encoder" else network.save_config
            save(folder / part.name)
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        tidy_configs(folder)
        if pipeline.tokenizer.get_vocab() != _clip_vocabulary():
            pipeline.tokenizer.save_pretrained(folder / "tokenizer")
        held = [name for name in _LAYOUT_FILES if (folder / name).is_file()]
        return json.dumps({name: (folder / name).read_text(encoding="utf-8") for name in held})


def _clip_vocabulary() -> dict[str, int]:
    return json.loads((shipped_layout() / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))


def _unpack(carried: str, folder: Path, file: Path) -> None:
    """Write the carried layout; only names of the list above ever become paths."""
    try:
        document = json.loads(carried)
        texts = {name: document[name] for name in _LAYOUT_FILES if name in document}
        for name, text in texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        if not (folder / "tokenizer").is_dir():
            shutil.copytree(shipped_layout() / "tokenizer", folder / "tokenizer")
    except (ValueError, TypeError, RecursionError) as error:
        raise refuse(
            f"model {file}", "its metadata is damaged", allowed="the layout as decant wrote it", hint="copy it again"
        ) from error
