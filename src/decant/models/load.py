"""The one loader: a pipeline folder, a hub id or `scenes` becomes a pipeline, or one clear refusal.

Everything that a user can get wrong is looked at before any weight is read. Weights are safetensors; a pickle
is opened only when asked for by name, and then only as weights.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from decant.errors import UserError, nearest, refuse

Architecture = Literal["sd15", "sd21", "musetalk"]

_INDEX = "model_index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_STRANGERS = "config.json and weights are of two different networks; take both from one folder"
_LAYOUT = "a StableDiffusionPipeline folder: model_index.json, unet, vae, text_encoder, tokenizer, scheduler"


@dataclass(frozen=True)
class _Component:
    """A component that has weights: its folder, its class, and the stem of its weight files."""

    name: str
    kind: Any
    stem: str


_COMPONENTS = (
    _Component("unet", UNet2DConditionModel, "diffusion_pytorch_model"),
    _Component("vae", AutoencoderKL, "diffusion_pytorch_model"),
    _Component("text_encoder", CLIPTextModel, "model"),
)


def load(
    source: str | Path, *, dtype: torch.dtype = torch.float32, allow_pickle: bool = False
) -> StableDiffusionPipeline:
    """Open a Stable Diffusion 1.x or 2.x pipeline, on the CPU and without a safety checker.

    Args:
        source: a pipeline folder (nothing is fetched then), a hub id `owner/name`, or `scenes`, the shipped teacher.
        dtype: of all weights.
        allow_pickle: also read `.bin` weights, as weights alone; nothing in them is executed.

    Raises:
        UserError: when the source is missing, is of another kind, or its weights are pickled, truncated, not
            of its config, or do not fit each other.
    """
    folder = folder_of(source, allow_pickle=allow_pickle)
    _check_index(folder)
    _check_fit(folder)
    models = {part.name: _load_component(folder, part, dtype, allow_pickle) for part in _COMPONENTS}
    with _quiet(), _as_refusal(folder, "a tokenizer and a scheduler", "copy the whole pipeline again"):
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, **models, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    _check_vocabulary(pipeline, folder)
    return pipeline


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write a pipeline folder of safetensors that plain diffusers opens. The pipeline stays as it is.

    Safetensors takes only contiguous tensors, so a component in another memory format is saved from a copy.
    """
    components = {name: _contiguous(part) for name, part in pipeline.components.items()}
    whole = StableDiffusionPipeline(**components, requires_safety_checker=False)
    with _quiet():
        whole.save_pretrained(folder, safe_serialization=True)
    _tidy_configs(folder)


def cast(pipeline: StableDiffusionPipeline, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The same pipeline, its networks brought to the CPU and to a dtype in place."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component, device="cpu", dtype=dtype)
    return pipeline


def with_unet(pipeline: StableDiffusionPipeline, unet: nn.Module) -> StableDiffusionPipeline:
    """The same pipeline around another UNet; all other components are shared, not copied."""
    return StableDiffusionPipeline(**{**pipeline.components, "unet": unet}, requires_safety_checker=False)


def fingerprint(folder: Path) -> str:
    """SHA-256 of a pipeline folder, as hexadecimal: every file's relative name and content, in order of name.

    The record and the card (`decant.json`, `README.md`) are left out, since they speak about the model.

    Raises:
        UserError: when the folder is not there.
    """
    if not folder.is_dir():
        raise _missing_folder(folder)
    digest = hashlib.sha256()
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        if name not in ("decant.json", "README.md"):
            digest.update(f"{name}\0{(folder / name).stat().st_size}\0".encode())
            digest.update(_file_digest(folder / name))
    return digest.hexdigest()


def architecture(name: str) -> dict[str, Any]:
    """The UNet config of a well-known architecture at full size: enough for counts, plans and speed.

    `sd15` is Stable Diffusion 1.4 and 1.5, `sd21` is 2.0 and 2.1 base, `musetalk` is MuseTalk 1.0 and 1.5.

    Raises:
        UserError: for an unknown name.
    """
    match name:
        case "sd15":
            special: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
        case "sd21":
            special = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "sample_size": 64}
            special["use_linear_projection"] = True
        case "musetalk":
            special = {
                "cross_attention_dim": 384,
                "attention_head_dim": 8,
                "sample_size": 32,
                "in_channels": 8,
            }
        case _:
            known = get_args(Architecture)
            raise refuse("architecture", repr(name), allowed=", ".join(known), hint=nearest(name, known))
    return _sd_layout() | special


def unet_config(source: str | Path) -> dict[str, Any]:
    """The UNet config of a source of `load`, or of a known architecture; no weights are read.

    Raises:
        UserError: when the source is missing or of another kind.
    """
    if isinstance(source, str) and source in get_args(Architecture):
        return architecture(source)
    folder = folder_of(source)
    _check_class(folder / _INDEX)
    return _read_json(folder / "unet" / "config.json")


def _sd_layout() -> dict[str, Any]:
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "use_linear_projection": False,
    }


def folder_of(source: str | Path, *, allow_pickle: bool = False) -> Path:
    """The local folder that a source of `load` stands for, after a download if it is a hub id.

    Raises:
        UserError: when there is none.
    """
    if source == "scenes":
        return _scenes()
    if source in get_args(Architecture):
        raise refuse(
            "model",
            repr(source),
            allowed="a model with weights",
            hint=f"{source} has no weights, only counts: decant prune --teacher {source} --dry-run",
        )
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise refuse("model", path, allowed=_LAYOUT, hint="give the folder that holds model_index.json, not a file")
    # `runs/techer` is a misspelt folder when `runs` is there, else `owner/name` on the hub.
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and not path.parent.is_dir():
        return _download(source, allow_pickle)
    raise _missing_folder(path)


def _scenes() -> Path:
    folder = Path(str(files("decant.scenes").joinpath("teacher")))
    if not (folder / _INDEX).is_file():
        allowed = "the shipped teacher, when it is installed"
        raise refuse("model", "'scenes'", allowed=allowed, hint="decant scenes train")
    return folder


def _missing_folder(path: Path) -> UserError:
    parent = path.parent
    siblings = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
    hint = nearest(path.name, siblings) if siblings else f"the folder {parent} holds no folders, or is not there"
    return refuse("model", path, allowed="a pipeline folder, a hub id owner/name, or scenes", hint=hint)


def _download(hub_id: str, allow_pickle: bool) -> Path:
    """Fetch a pipeline from the hub, or find it in the cache; its kind is checked before its weights come."""
    try:
        _check_class(Path(hf_hub_download(hub_id, _INDEX)))
        folder = StableDiffusionPipeline.download(
            hub_id,
            use_safetensors=None if allow_pickle else True,
            safety_checker=None,
            feature_extractor=None,
        )
    except UserError:
        raise
    # The hub's client raises errors of several libraries, and all of them mean the same to the user.
    except Exception as error:
        raise refuse(
            "model",
            repr(hub_id),
            allowed="a local pipeline folder, or a diffusers model that the hub gives or the cache holds",
            hint=f"no such folder here, and the hub said: {_first_line(error)}",
        ) from error
    return Path(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = f"{path.name} is missing; is this the right folder?"
        raise refuse("model", path, allowed=_LAYOUT, hint=hint) from None
    except (OSError, ValueError) as error:
        raise refuse("model", path, allowed="a JSON file", hint=f"it cannot be read: {_first_line(error)}") from error
    if not isinstance(document, dict):
        raise refuse("model", path, allowed="a JSON object", hint="copy the file again from where it came")
    return document


def _check_class(index: Path) -> dict[str, Any]:
    """Refuse a pipeline of another kind by its model_index.json, and give that document back."""
    document = _read_json(index)
    kind = document.get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise refuse(
            f"model {index.parent}, _class_name",
            kind,
            allowed="StableDiffusionPipeline",
            hint="this version knows the sd1 family alone (Stable Diffusion 1.x and 2.x, text to image)",
        )
    for part in _COMPONENTS:
        found = document.get(part.name)
        if not isinstance(found, list) or found[-1] != part.kind.__name__:
            place, allowed = f"model {index.parent}, {part.name}", part.kind.__name__
            raise refuse(place, found, allowed=allowed, hint="model_index.json says what each component is")
    return document


def _check_index(folder: Path) -> None:
    """Refuse a folder that is not a whole pipeline of the known kind."""
    document = _check_class(folder / _INDEX)
    for name in (*(part.name for part in _COMPONENTS), "tokenizer", "scheduler"):
        if name not in document or not (folder / name).is_dir():
            hint = f"the folder {name} is missing; copy the whole pipeline"
            raise refuse("model", folder / name, allowed=_LAYOUT, hint=hint)
    # Of an empty folder transformers makes a tokenizer without words, and says nothing.
    if not any((folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise refuse(
            f"model {folder / 'tokenizer'}",
            "no vocabulary",
            allowed="tokenizer.json, or vocab.json and merges.txt",
            hint="copy the folder tokenizer again",
        )


def _check_fit(folder: Path) -> None:
    """Refuse components that do not fit each other: latent channels, and the width of the text."""
    unet, vae, text = (_read_json(folder / part.name / "config.json") for part in _COMPONENTS)
    latent, inputs, outputs = vae.get("latent_channels", 4), unet.get("in_channels", 4), unet.get("out_channels", 4)
    if (inputs, outputs) != (latent, latent):
        known = {8: "8 is MuseTalk or InstructPix2Pix", 9: "9 is inpainting"}.get(inputs)
        raise refuse(
            f"model {folder}, wrong latent channels",
            f"the UNet takes {inputs} and gives {outputs}, the VAE has {latent}",
            allowed="one number for all three",
            hint=f"{known}: known, but not the sd1 family" if known else "pair the UNet with the VAE it was trained on",
        )
    width, cross = text.get("hidden_size", 512), unet.get("cross_attention_dim", 1280)
    if unet.get("encoder_hid_dim") is None and isinstance(cross, int) and cross != width:
        raise refuse(
            f"model {folder}, cross_attention_dim",
            f"the UNet reads {cross}, the text encoder gives {width}",
            allowed="one number for both",
            hint="pair the UNet with the text encoder it was trained on",
        )


def _check_vocabulary(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Refuse a tokenizer that knows tokens for which the text encoder has no embedding."""
    words, rows = len(pipeline.tokenizer), pipeline.text_encoder.config.vocab_size
    if words > rows:
        raise refuse(
            f"model {folder / 'tokenizer'}",
            f"{words} tokens, the text encoder has {rows}",
            allowed="the text encoder's own tokenizer",
            hint="copy the folder tokenizer again, from where the text encoder came",
        )


def _load_component(folder: Path, part: _Component, dtype: torch.dtype, allow_pickle: bool) -> nn.Module:
    """One component in evaluation mode, every weight of it from its file."""
    where = folder / part.name
    variant = _check_weights(where, part.stem, allow_pickle)
    with _quiet(), _as_refusal(where, f"the weights of a {part.kind.__name__}", _STRANGERS):
        model, info = part.kind.from_pretrained(
            where,
            dtype=dtype,
            variant=variant,
            use_safetensors=None if allow_pickle else True,
            local_files_only=True,
            output_loading_info=True,
        )
    absent = sorted(map(str, info["missing_keys"])) + sorted(map(str, info["mismatched_keys"]))
    if absent:
        raise refuse(
            f"model {where}, weights",
            f"{len(absent)} of the network's tensors are missing or of another shape, such as {absent[0]}",
            allowed="the weights that belong to config.json",
            hint=_STRANGERS,
        )
    return _aligned(model).eval()


def _aligned(model: nn.Module) -> nn.Module:
    """Tensors of the process's own memory. Mapped from a file they lie at odd addresses, for which CPU kernels
    round differently, and a reloaded model would not repeat a picture bit for bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return model


def _check_weights(where: Path, stem: str, allow_pickle: bool) -> Literal["fp16"] | None:
    """Refuse missing, pickled or damaged weights; else say which variant of them is there."""
    variants: tuple[Literal["fp16"] | None, ...] = (None, "fp16")
    for variant in variants:
        weights = _safetensors(where, stem, variant)
        if weights:
            for file in weights:
                _check_safetensors(file)
            return variant
    pickled = sorted(path.name for path in where.iterdir() if path.suffix in (".bin", ".ckpt", ".pt", ".pth"))
    if pickled and allow_pickle:
        return None
    if pickled:
        raise refuse(
            f"model {where}, weights",
            f"{pickled[0]} is a pickle, which can run code when opened",
            allowed=f"{stem}.safetensors",
            hint="save it once with safe_serialization=True, or allow pickles if you trust its source",
        )
    place, allowed = f"model {where}, weights", f"{stem}.safetensors"
    raise refuse(place, "none", allowed=allowed, hint="copy the weights file as well")


def _safetensors(where: Path, stem: str, variant: str | None) -> list[Path]:
    """The weight files of one variant: the single file, or the shards that its index names."""
    suffix = f".{variant}" if variant else ""
    single = where / f"{stem}{suffix}.safetensors"
    index = where / f"{stem}.safetensors.index{suffix}.json"
    if index.is_file():
        return [where / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    return [single] if single.is_file() else []


def _check_safetensors(file: Path) -> None:
    """Refuse a file whose header or length is wrong. Only the header is read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except (SafetensorError, OSError) as error:
        raise refuse(
            "weights file",
            file,
            allowed="a whole safetensors file",
            hint=f"truncated or damaged, copy it again ({_first_line(error)})",
        ) from error


@contextmanager
def _as_refusal(place: Path, allowed: str, hint: str) -> Iterator[None]:
    """What diffusers and transformers raise for a broken folder, as one refusal."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        said = f"it cannot be opened ({_first_line(error)})"
        raise refuse(f"model {place}", said, allowed=allowed, hint=hint) from error


def _first_line(error: BaseException) -> str:
    """The first sentence of a library's message: what is wrong, without the advice that follows."""
    text = str(error).strip() or type(error).__name__
    return re.split(r"\.\s|\n", text)[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no advice from the libraries for the second that a load or a save takes."""
    libraries = (diffusers_logging, transformers_logging)
    bars = [library.is_progress_bar_enabled() for library in libraries]
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, bar, level in zip(libraries, bars, levels, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()


def _tidy_configs(folder: Path) -> None:
    """Make configs say what holds on every machine.

    Diffusers notes the path that a component came from. Transformers notes the stored dtype and, unlike diffusers,
    opens in it when none is asked for: a text encoder in half precision beside a UNet in single does not run.
    """
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        tidy = {key: value for key, value in config.items() if key != "_name_or_path"}
        if "dtype" in tidy:
            tidy["dtype"] = "float32"
        if tidy != config:
            path.write_text(json.dumps(tidy, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _contiguous(component: Any) -> Any:
    if not isinstance(component, nn.Module):
        return component
    if all(tensor.is_contiguous() for tensor in component.state_dict().values()):
        return component
    component = copy.deepcopy(component)
    for tensor in (*component.parameters(), *component.buffers()):
        tensor.data = tensor.data.contiguous()
    return component


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def stored_dtype(source: str | Path) -> torch.dtype:
    """The dtype that a model's UNet is stored in: what is made from it is stored alike.

    Raises:
        UserError: as `load`.
    """
    where = folder_of(source) / "unet"
    for variant in (None, "fp16"):
        for file in _safetensors(where, "diffusion_pytorch_model", variant):
            with safe_open(file, framework="pt") as weights:
                return weights.get_tensor(next(iter(weights.keys()))).dtype
    return torch.float32
