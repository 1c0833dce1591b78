"""One `.safetensors` file of Stable Diffusion 1.x, 2.x or SDXL, as people download it: recognised, opened offline,
and written.

Such a file holds weights alone. The configs of the published layouts and the tokenizer of CLIP ship in `families`; a
file that decant writes carries its own in its metadata.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from decant.errors import UserError, refuse
from decant.models.families.family import Name
from decant.models.families.keys import Part, Place, ema_name, is_vae_attention, naming, prefixes, unread
from decant.models.families.sd1 import sd_name
from decant.models.file_prediction import FilePrediction, prediction_of
from decant.models.guard import Header, read_header, read_json
from decant.models.layout import (
    INDEX,
    SD,
    SDXL,
    Component,
    Layout,
    Pipeline,
    as_refusal,
    check_class,
    check_config,
    check_layout,
    empty,
    kind_of,
    networks,
    quiet,
    tidy_configs,
)

ALLOWED = "one .safetensors file of Stable Diffusion 1.x, 2.x or SDXL: UNet, VAE and text encoders together"
_SHIPPED = Path(str(files("decant.models.families")))
_CLIP = _SHIPPED / "sd1_layout" / "tokenizer"
_TITLES: dict[Name, str] = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
_METADATA = "decant.layout"
_VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")
_LAYOUT_FILES = (
    INDEX,
    *(f"{part.name}/config.json" for part in SDXL.components),
    "scheduler/scheduler_config.json",
    *(
        f"{folder}/{name}"
        for folder in SDXL.tokenizers
        for name in (*_VOCABULARY, "tokenizer_config.json", "special_tokens_map.json")
    ),
)
# What says that a file is of another kind, by a part of one of its names; the first that fits counts.
_OTHERS = (
    ("conditioner.embedders.0.model.", "the SDXL refiner"),
    ("edm_mean", "Playground v2.5, trained with EDM's noise"),
    ("edm_vpred.", "of CosXL, trained with EDM's noise"),
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
    """The header of a file that may be a whole model.

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


def open_parts(header: Header, folder: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The networks of one file, every tensor of them from it, in evaluation mode on the CPU.

    Names and shapes are compared with the networks of the layout in ``folder`` before a tensor is read.
    """
    layout, kind = check_class(folder / INDEX)[1], _kind(header)
    _check_told(header, layout, kind)
    plans = [_plan(header, kind, folder, part) for part in layout.components]
    _check_strangers(header, kind, plans)
    models: dict[str, nn.Module] = {}
    with safe_open(header.file, framework="pt") as weights:
        for plan in plans:
            state = {
                name: _read(weights.get_tensor(source.name), source, plan.model.get_parameter(name).shape, dtype)
                for name, source in plan.sources.items()
            }
            plan.model.load_state_dict(state, assign=True)
            models[plan.part.name] = plan.model.eval()
    return models


@contextmanager
def layout_of(header: Header) -> Iterator[Path]:
    """A folder with the configs, tokenizers and scheduler of a file: what it carries itself, or what ships."""
    carried = header.metadata.get(_METADATA)
    if carried is None:
        kind = _kind(header)
        with shipped_layout(kind, prediction_of(header, kind)) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="decant-layout-") as name:
        _unpack(carried, Path(name), header.file)
        check_layout(Path(name))
        yield Path(name)


@contextmanager
def shipped_layout(kind: Name, said: FilePrediction | None = None) -> Iterator[Path]:
    """The configs, tokenizers and scheduler of the published models of a kind: a pipeline folder without weights.

    Of SD 2.x those of the 512 px models, or with v-prediction those of the 768 px ones.
    """
    with tempfile.TemporaryDirectory(prefix="decant-layout-") as name:
        folder = Path(name) / "layout"
        shutil.copytree(_SHIPPED / f"{kind}_layout", folder)
        _fill_tokenizers(folder)
        if said is not None and (said.prediction, said.zero_snr) != ("epsilon", False):
            _set_prediction(folder, kind, said)
        yield folder


def write_single_file(pipeline: Pipeline, file: Path) -> None:
    """Write a pipeline of a published layout as one file, in the dtypes that it has; whole or not at all.

    Raises:
        UserError: the UNet is of another layout, such as a student's with removed blocks.
    """
    kind: Name = "sdxl" if kind_of(pipeline) is SDXL else sd_name(pipeline.unet.config)
    _check_regular(dict(pipeline.unet.config), kind)
    if not isinstance(pipeline.vae, AutoencoderKL):
        hint = "diffusers opens its folder; or export the student from before it got its small decoder"
        allowed = "AutoencoderKL: the one-file layouts have no names for another"
        raise refuse("model, vae", type(pipeline.vae).__name__, allowed=allowed, hint=hint)
    placed: dict[str, dict[int | None, Tensor]] = {}
    for part, network in networks(pipeline).items():
        place_of = naming(kind, cast(Part, part), _config_of(network))
        for name, tensor in network.named_parameters():
            place = place_of(name)
            placed.setdefault(place.name, {})[place.third] = _as_stored(name, place, tensor.detach())
    tensors = {name: _joined(parts) for name, parts in placed.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    metadata = {"format": "pt", _METADATA: _carried(pipeline)}
    save_file(tensors | _marks(pipeline), temporary, metadata=metadata)
    temporary.replace(file)


def _kind(header: Header) -> Name:
    """The kind that a file's names speak of."""
    names = header.shapes
    if any(name.startswith(("conditioner.embedders.", "model.diffusion_model.label_emb.")) for name in names):
        return "sdxl"
    if any(name.startswith("cond_stage_model.model.") for name in names):
        return "sd2"
    return "sd1"


def _other_kind(header: Header) -> tuple[str, str] | None:
    """(what a file is, what to do), where it is not a whole text-to-image model of a known kind."""
    names = header.shapes
    for mark, other in _OTHERS:
        if any(mark in name for name in names):
            return f"it is {other}", "not yet: this version opens Stable Diffusion 1.x, 2.x and SDXL as one file"
    inside = any(name.startswith(("model.diffusion_model.", "model_ema.")) for name in names)
    if not inside:
        for mark, piece in _PIECES:
            if any(name.startswith(mark) or (mark[0] == "." and mark in name) for name in names):
                return f"it is {piece}", "give the file of the whole model, of which this is a part or an addition"
        return f"no tensor of a UNet ({', '.join(list(names)[:3])[:120]})", "is this the right file?"
    first = "model.diffusion_model.input_blocks.0.0.weight"
    shape = names.get(first) or names.get(ema_name(first)) or ()
    channels = shape[1] if len(shape) == 4 else 4
    if channels in _CHANNELS:
        return _CHANNELS[channels], "give a text-to-image model, whose UNet takes 4 channels"
    for part, prefix in prefixes(_kind(header)).items():
        if part != "unet" and not any(name.startswith(prefix.removesuffix("text_model.")) for name in names):
            return f"it has no {part.replace('_', ' ')}", "take the file that holds the whole model"
    return None


_CHANNELS = {
    5: "it is a depth-to-image model: its UNet takes 5 channels",
    7: "it is an upscaler: its UNet takes 7 channels",
    8: "its UNet takes 8 channels, as InstructPix2Pix and MuseTalk do",
    9: "it is an inpainting model: its UNet takes 9 channels",
}


def _check_told(header: Header, layout: Layout, kind: Name) -> None:
    """Refuse a file whose own layout is of another kind than its tensors."""
    if layout is not (SDXL if kind == "sdxl" else SD):
        raise refuse(
            f"model {header.file}",
            f"its metadata says {layout.pipeline.__name__}, its tensors {_TITLES[kind]}",
            allowed="the layout as decant wrote it",
            hint="copy it again",
        )


@dataclass(frozen=True)
class _Plan:
    """A component of a file: the empty network, and for each of its parameters the tensor that fills it."""

    part: Component
    model: nn.Module
    sources: dict[str, Place]
    unread: tuple[str, ...]


def _plan(header: Header, kind: Name, folder: Path, part: Component) -> _Plan:
    config = check_config(folder / part.name, part)
    with as_refusal(header.file, f"the layout of a {part.kind.__name__}", "the layout in its metadata is damaged"):
        model = empty(part, config)
        place_of = naming(kind, part.name, config)
        wanted = {name: place_of(name) for name, _ in model.named_parameters()}
        extra = unread(kind, part.name, config)
    sources = {name: replace(place, name=_present(header, place.name)) for name, place in wanted.items()}
    lost = [place.name for place in sources.values() if place.name not in header.shapes]
    if lost:
        raise _unfit(header, kind, part, f"{len(lost)} of its tensors are missing, such as {lost[0]}")
    for name, place in sources.items():
        need, have = _stored_shape(place, tuple(model.get_parameter(name).shape)), header.shapes[place.name]
        if have != need and not (is_vae_attention(name) and have == (*need, 1, 1)):
            raise _unfit(header, kind, part, f"{place.name} is {list(have)}, and {_TITLES[kind]} has {list(need)}")
    return _Plan(part, model, sources, extra)


def _stored_shape(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in one file of a parameter of a shape."""
    if place.turned:
        return shape[::-1]
    return shape if place.third is None else (3 * shape[0], *shape[1:])


def _present(header: Header, name: str) -> str:
    """The name under which a file has a tensor: its own, that of older text encoders, or of the average alone."""
    if name in header.shapes:
        return name
    older = name.replace(".transformer.text_model.", ".transformer.")
    return next((other for other in (older, ema_name(name)) if other in header.shapes), name)


def _check_strangers(header: Header, kind: Name, plans: Sequence[_Plan]) -> None:
    """Refuse tensors of the networks that the layout has no place for: nothing is dropped in silence."""
    used = {place.name for plan in plans for place in plan.sources.values()}
    for plan in plans:
        prefix = prefixes(kind)[plan.part.name].removesuffix("text_model.")
        for name in header.shapes:
            known = name in used or name.startswith((*_IGNORED, *plan.unread)) or name.endswith("position_ids")
            if name.startswith(prefix) and not known:
                raise _unfit(header, kind, plan.part, f"{name[:120]} is not in {_TITLES[kind]}")


# What only training had: the loss of the VAE, averages beside the weights.
_IGNORED = ("first_stage_model.loss.", "first_stage_model.model_ema.")


def _unfit(header: Header, kind: Name, part: Component, why: str) -> UserError:
    return refuse(
        f"model {header.file}, {part.name.replace('_', ' ')}",
        why,
        allowed=f"the tensors of {_TITLES[kind]}, every one",
        hint="it is a model of another layout, pruned by other means, or an incomplete copy",
    )


def _read(tensor: Tensor, place: Place, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor of its own memory: one that lies in the mapped file would change with it."""
    if place.turned:
        tensor = tensor.T
    if place.third is not None:
        tensor = tensor.chunk(3)[place.third]
    return tensor.reshape(shape).to(dtype, copy=True).contiguous()


def _as_stored(name: str, place: Place, tensor: Tensor) -> Tensor:
    if place.turned:
        tensor = tensor.T
    return (tensor[:, :, None, None] if is_vae_attention(name) and tensor.ndim == 2 else tensor).contiguous()


def _joined(parts: Mapping[int | None, Tensor]) -> Tensor:
    """A tensor of one file from the thirds of its rows, or as it is."""
    return parts[None] if None in parts else torch.cat([parts[third] for third in (0, 1, 2)])


def _marks(pipeline: Pipeline) -> dict[str, Tensor]:
    """Empty tensors that tell other tools what nothing else in a file does: v-prediction, zero terminal SNR."""
    config = pipeline.scheduler.config
    said = {
        "v_pred": config.get("prediction_type") == "v_prediction",
        "ztsnr": bool(config.get("rescale_betas_zero_snr")),
    }
    return {name: torch.zeros(0) for name, true in said.items() if true}


def _config_of(network: nn.Module) -> dict[str, Any]:
    config: Any = network.config
    return dict(config) if isinstance(config, dict) else config.to_dict()


_STRUCTURE = ("layers_per_block", "mid_block_type", "down_block_types", "up_block_types", "use_linear_projection")


def _check_regular(config: Mapping[str, Any], kind: Name) -> None:
    """Refuse a UNet of other blocks than the published one of its kind; widths and depths may differ."""
    published = read_json(_SHIPPED / f"{kind}_layout" / "unet" / "config.json")
    for key in _STRUCTURE:
        own = list(config[key]) if isinstance(config[key], tuple) else config[key]
        if own != published[key]:
            raise refuse(
                f"model, unet.{key}",
                own,
                allowed=f"{published[key]}, as {_TITLES[kind]} has it",
                hint="students with removed blocks cannot be written as one file yet; diffusers opens their folder",
            )


def _carried(pipeline: Pipeline) -> str:
    """Configs and scheduler as one JSON text, and of the tokenizers what is not CLIP's own vocabulary."""
    with tempfile.TemporaryDirectory(prefix="decant-layout-") as name, quiet():
        folder = Path(name)
        pipeline.save_config(folder)
        for part in networks(pipeline):
            network: Any = getattr(pipeline, part)
            save = network.config.save_pretrained if part.startswith("text_encoder") else network.save_config
            save(folder / part)
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        tidy_configs(folder)
        for part in kind_of(pipeline).tokenizers:
            tokenizer = getattr(pipeline, part)
            tokenizer.save_pretrained(folder / part)
            if tokenizer.get_vocab() == _clip_vocabulary():
                for vocabulary in _VOCABULARY:
                    (folder / part / vocabulary).unlink(missing_ok=True)
        held = [name for name in _LAYOUT_FILES if (folder / name).is_file()]
        return json.dumps({name: (folder / name).read_text(encoding="utf-8") for name in held})


def _clip_vocabulary() -> dict[str, int]:
    return json.loads((_CLIP / "vocab.json").read_text(encoding="utf-8"))


def _unpack(carried: str, folder: Path, file: Path) -> None:
    """Write the carried layout; only names of the list above ever become paths."""
    try:
        document = json.loads(carried)
        texts = {name: document[name] for name in _LAYOUT_FILES if name in document}
        for name, text in texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        raise refuse(
            f"model {file}", "its metadata is damaged", allowed="the layout as decant wrote it", hint="copy it again"
        ) from error
    if (folder / INDEX).is_file():
        _fill_tokenizers(folder)


def _fill_tokenizers(folder: Path) -> None:
    """Give every tokenizer of a layout that has no vocabulary of its own that of CLIP, which ships once."""
    for name in check_class(folder / INDEX)[1].tokenizers:
        where = folder / name
        if not any((where / file).is_file() for file in _VOCABULARY):
            where.mkdir(exist_ok=True)
            for file in _CLIP.iterdir():
                if not (where / file.name).exists():
                    shutil.copyfile(file, where / file.name)


def _set_prediction(folder: Path, kind: Name, said: FilePrediction) -> None:
    """Make a shipped layout one of another prediction."""
    changes: dict[str, Any] = {"prediction_type": said.prediction}
    index = read_json(folder / INDEX)
    if said.zero_snr:
        # PNDM knows no such schedule, and the first step must be the last noise level.
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if index["scheduler"][1] == "PNDMScheduler":
            _edit(folder / INDEX, scheduler=["diffusers", "DDIMScheduler"])
            changes["_class_name"] = "DDIMScheduler"
    _edit(folder / "scheduler" / "scheduler_config.json", **changes)
    if kind == "sd2":
        _edit(folder / "unet" / "config.json", sample_size=96, upcast_attention=True)


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**read_json(file), **changes}, indent=2) + "\n", encoding="utf-8")
