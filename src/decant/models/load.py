"""The one loader: a pipeline folder, one file, a hub id or `scenes` becomes a pipeline, or one clear refusal.

Everything that a user can get wrong is looked at before any weight is read. Weights are safetensors; a pickle
is opened only when asked for by name, and then only as weights.
"""

import contextlib
import copy
import hashlib
import re
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import nn

from decant.errors import UserError, nearest, refuse
from decant.hub import why_away
from decant.maths.prediction import Prediction
from decant.models.families.family import Name
from decant.models.guard import first_line, read_header, read_json
from decant.models.layout import (
    INDEX,
    SD,
    UNET,
    Component,
    Layout,
    Pipeline,
    as_refusal,
    assemble,
    check_class,
    check_config,
    check_layout,
    check_numbers,
    components_of,
    quiet,
    rebuilt,
    tidy_configs,
)
from decant.models.shipped import NAMES, Shipped, shipped_folder
from decant.models.single_file import check_kind, layout_of, open_parts, shipped_layout

Architecture = Literal["sd15", "sd21", "sdxl", "musetalk"]

# A name as diffusers and transformers give to a shard; no path.
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_STRANGERS = "config.json and weights are of two different networks; take both from one folder"


def load(source: str | Path, *, dtype: torch.dtype = torch.float32, allow_pickle: bool = False) -> Pipeline:
    """Open a pipeline of Stable Diffusion 1.x, 2.x or SDXL, on the CPU and without a safety checker.

    Args:
        source: a pipeline folder or one `.safetensors` file of SD 1.x (nothing is fetched then), a hub id `owner/name`,
            or the name of a shipped teacher, `scenes` or `scenes-xl`.
        dtype: of all weights.
        allow_pickle: also read `.bin` weights, as weights alone; nothing in them is executed.

    Raises:
        UserError: when the source is missing, is of another kind, or its weights are pickled, truncated, not
            of its config, or do not fit each other.
    """
    place = place_of(source, allow_pickle=allow_pickle)
    if place.is_file():
        header = check_kind(place)
        with layout_of(header) as layout:
            return assemble(layout, open_parts(header, layout, dtype))
    check_layout(place)
    components = components_of(*check_class(place / INDEX))
    variants = {part.name: _check_weights(place / part.name, part, allow_pickle) for part in components}
    models: dict[str, nn.Module] = {}
    for part in components:
        models[part.name] = _load_component(place / part.name, part, dtype, allow_pickle, variants[part.name])
    return assemble(place, models)


def save(pipeline: Pipeline, folder: Path) -> None:
    """Write a pipeline folder of safetensors that plain diffusers opens. The pipeline stays as it is.

    Safetensors takes only contiguous tensors, so a component in another memory format is saved from a copy.
    """
    components = {name: _contiguous(part) for name, part in pipeline.components.items()}
    with quiet():
        rebuilt(pipeline, **components).save_pretrained(folder, safe_serialization=True)
    tidy_configs(folder)


def cast(pipeline: Pipeline, dtype: torch.dtype) -> Pipeline:
    """The same pipeline, its networks brought to the CPU and to a dtype in place."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component, device="cpu", dtype=dtype)
    return pipeline


def with_unet(pipeline: Pipeline, unet: nn.Module, prediction: Prediction | None = None) -> Pipeline:
    """The same pipeline around another UNet; all other components are shared, not copied.

    ``prediction``: what that UNet answers, where it is not what the pipeline's own does; the scheduler says it then.
    """
    scheduler = pipeline.scheduler
    if prediction is None or prediction == scheduler.config["prediction_type"]:
        return rebuilt(pipeline, unet=unet)
    return rebuilt(pipeline, unet=unet, scheduler=scheduler.from_config(scheduler.config, prediction_type=prediction))


def fingerprint(folder: Path) -> str:
    """SHA-256 of a pipeline folder, as hexadecimal: every file's relative name and content, in order of name. Of one
    file, that of its content.

    The record and the card (`decant.json`, `README.md`) are left out, since they speak about the model.

    Raises:
        UserError: when the folder is not there.
    """
    if folder.is_file():
        return _file_digest(folder).hex()
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

    `sd15` is Stable Diffusion 1.4 and 1.5, `sd21` is 2.0 and 2.1 base, `sdxl` is SDXL base 1.0,
    `musetalk` is MuseTalk 1.0 and 1.5.

    Raises:
        UserError: for an unknown name.
    """
    match name:
        case "sd15":
            special: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
        case "sd21":
            special = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "sample_size": 64}
            special["use_linear_projection"] = True
        case "sdxl":
            special = {
                "block_out_channels": [320, 640, 1280],
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": [1, 2, 10],
                "attention_head_dim": [5, 10, 20],
                "cross_attention_dim": 2048,
                "use_linear_projection": True,
                "sample_size": 128,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            }
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


def known_architectures() -> tuple[str, ...]:
    """The names that `architecture` takes."""
    return get_args(Architecture)


def unet_config(source: str | Path) -> dict[str, Any]:
    """The UNet config of a source of `load`, or of a known architecture; no weights are read.

    Raises:
        UserError: when the source is missing or of another kind.
    """
    if isinstance(source, str) and source in get_args(Architecture):
        return architecture(source)
    place = place_of(source)
    if place.is_file():
        with layout_of(check_kind(place)) as layout:
            return check_config(layout / UNET.name, UNET)
    check_class(place / INDEX)
    return check_config(place / UNET.name, UNET)


def vae_config(source: str | Path) -> dict[str, Any]:
    """The autoencoder's config of a source of `load`, or of a known architecture; no weights are read.

    Raises:
        UserError: when the source is missing or of another kind.
    """
    if isinstance(source, str) and source in get_args(Architecture):
        kinds: dict[str, Name] = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl", "musetalk": "sd1"}
        with shipped_layout(kinds[source]) as layout:
            return _vae_config(layout)
    place = place_of(source)
    if place.is_file():
        with layout_of(check_kind(place)) as layout:
            return _vae_config(layout)
    return _vae_config(place)


def _vae_config(layout: Path) -> dict[str, Any]:
    part = next(part for part in components_of(*check_class(layout / INDEX)) if part.name == "vae")
    return check_config(layout / part.name, part)


def condition_tokens(source: str | Path) -> int:
    """How many tokens the network of a source of `unet_config` is told; no weights are read.

    Raises:
        UserError: when the source is missing or of another kind.
    """
    if isinstance(source, str) and source in get_args(Architecture):
        return 50 if source == "musetalk" else 77
    place = place_of(source)
    if place.is_file():
        with layout_of(check_kind(place)) as layout:
            return _tokens(layout)
    return _tokens(place)


def _tokens(layout: Path) -> int:
    """What a tokenizer does not say is the published models' 77."""
    return int(read_json(layout / "tokenizer" / "tokenizer_config.json").get("model_max_length", 77))


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


def place_of(source: str | Path, *, allow_pickle: bool = False) -> Path:
    """The local folder or file that a source of `load` stands for, after a download if it is a hub id.

    Raises:
        UserError: when there is none.
    """
    for name in NAMES:
        if source == name:
            return _shipped(name)
    if source in get_args(Architecture):
        raise refuse(
            "model",
            repr(source),
            allowed="a model with weights",
            hint=f"{source} has no weights, only counts: decant prune --teacher {source} --dry-run",
        )
    path = Path(source)
    if path.exists():
        return path
    # `runs/techer` is a misspelt folder when `runs` is there, else `owner/name` on the hub.
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and not path.parent.is_dir():
        return _download(source, allow_pickle)
    raise _missing_folder(path)


def _shipped(name: Shipped) -> Path:
    folder = shipped_folder(name)
    if not (folder / INDEX).is_file():
        allowed, hint = "a shipped teacher, when it is installed", "decant scenes train"
        raise refuse("model", repr(name), allowed=allowed, hint=hint if name == "scenes" else f"{hint} --xl")
    return folder


def _missing_folder(path: Path) -> UserError:
    parent = path.parent
    siblings = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
    names = [*NAMES, *known_architectures()] if parent == Path() else []
    shown = [name for name in siblings if not name.startswith(".")] + names
    hint = nearest(path.name, shown) if shown else f"the folder {parent} holds no folders, or is not there"
    return refuse("model", path, allowed="a pipeline folder, a hub id owner/name, scenes, or scenes-xl", hint=hint)


def _download(hub_id: str, allow_pickle: bool) -> Path:
    """Fetch a pipeline from the hub, or find it in the cache; its kind is checked before its weights come."""
    away = why_away(hub_id, INDEX, "model")
    try:
        _, layout = check_class(Path(hf_hub_download(hub_id, INDEX, local_files_only=bool(away))))
        return _fetch(hub_id, layout, None if allow_pickle else True, local=bool(away))
    except UserError:
        raise
    # The hub's client raises errors of several libraries, and all of them mean the same to the user.
    except Exception as error:
        why = f"{away}, and the cache does not hold this model" if away else first_line(error)
        raise refuse(
            "model",
            repr(hub_id),
            allowed="a local pipeline folder, or a diffusers model that the hub gives or the cache holds",
            hint=f"no such folder here, and of the hub: {why}. Where there is a network, "
            f"`hf download {hub_id} --local-dir DIR` fetches it (older: huggingface-cli download); then give DIR, "
            "here or on another machine",
        ) from error


def _fetch(hub_id: str, layout: Layout, use_safetensors: bool | None, *, local: bool) -> Path:
    """The model's files, with its safety checker where that is to be had as asked for, and its card."""
    asked: dict[str, Any] = {"use_safetensors": use_safetensors, "local_files_only": local}
    try:
        folder = layout.pipeline.download(hub_id, **asked)
    except OSError:  # the safety checker of some is a pickle alone
        if layout is not SD:
            raise
        folder = layout.pipeline.download(hub_id, **asked, safety_checker=None, feature_extractor=None)
    with contextlib.suppress(Exception):  # a model without a card is a model all the same
        hf_hub_download(hub_id, "README.md", local_files_only=local)
    return Path(folder)


def _load_component(
    where: Path, part: Component, dtype: torch.dtype, allow_pickle: bool, variant: str | None
) -> nn.Module:
    """One component in evaluation mode, every weight of it from its file."""
    with quiet(), as_refusal(where, f"the weights of a {part.kind.__name__}", _STRANGERS):
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


def _check_weights(where: Path, part: Component, allow_pickle: bool) -> Literal["fp16"] | None:
    """Refuse missing, pickled or damaged weights and those of another network; else say which variant is there."""
    variants: tuple[Literal["fp16"] | None, ...] = (None, "fp16")
    for variant in variants:
        weights = _safetensors(where, part.stem, variant)
        if weights:
            stored = sum(read_header(file).numbers for file in weights)
            check_numbers(where, part, check_config(where, part), stored)
            return variant
    pickled = sorted(path.name for path in where.iterdir() if path.suffix in (".bin", ".ckpt", ".pt", ".pth"))
    if pickled and allow_pickle:
        return None
    if pickled:
        raise refuse(
            f"model {where}, weights",
            f"{pickled[0]} is a pickle, which can run code when opened",
            allowed=f"{part.stem}.safetensors",
            hint="save it once with safe_serialization=True, or take the model as safetensors",
        )
    place, allowed = f"model {where}, weights", f"{part.stem}.safetensors"
    raise refuse(place, "none", allowed=allowed, hint="copy the weights file as well")


def _safetensors(where: Path, stem: str, variant: str | None) -> list[Path]:
    """The weight files of one variant: the single file, or the shards that its index names."""
    suffix = f".{variant}" if variant else ""
    single = where / f"{stem}{suffix}.safetensors"
    index = where / f"{stem}.safetensors.index{suffix}.json"
    if index.exists():
        return [where / name for name in _shards(index)]
    return [single] if single.exists() else []


def _shards(index: Path) -> list[str]:
    """The file names of an index: plain names beside it, whatever it says."""
    listed = read_json(index).get("weight_map")
    names: set[Any] = set(map(str, listed.values())) if isinstance(listed, dict) and listed else {""}
    for name in names:
        if not _SHARD.fullmatch(name):
            raise refuse(
                f"model {index}",
                f"names the file {name[:120]!r}",
                allowed="a weight_map of .safetensors files beside the index",
                hint="a path that leaves the folder is not followed; copy the folder again from where it came",
            )
    return sorted(names)


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
    place = place_of(source)
    if place.is_file():
        return _first_dtype(place, "model.diffusion_model.")
    for variant in (None, "fp16"):
        for file in _safetensors(place / "unet", UNET.stem, variant):
            return _first_dtype(file, "")
    return torch.float32


def _first_dtype(file: Path, prefix: str) -> torch.dtype:
    """The dtype of the first tensor whose name begins so."""
    read_header(file)
    with safe_open(file, framework="pt") as weights:
        names = [name for name in weights.keys() if name.startswith(prefix)]  # noqa: SIM118 (not a mapping)
        return weights.get_tensor(names[0]).dtype if names else torch.float32
