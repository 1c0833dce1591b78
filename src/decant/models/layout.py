"""A pipeline folder without its weights: what `model_index.json` and the configs say, and whether it can be opened.

Every check of this module reads JSON alone. Classes are looked up in a fixed list, never imported by a name that a
file gives.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from decant.errors import UserError, refuse
from decant.models.families.keys import Part
from decant.models.families.unet import pooled_width
from decant.models.guard import check_inside, first_line, read_json

Pipeline = StableDiffusionPipeline | StableDiffusionXLPipeline

INDEX = "model_index.json"
_STRANGERS = "config.json and weights are of two different networks; take both from one folder"
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_VOCABULARY_BYTES = 16 * 10**6
# Far above every published network, and small enough that its names can be listed in seconds.
_MOST = {
    "num_hidden_layers": 100,
    "layers_per_block": 8,
    "transformer_layers_per_block": 16,
    "num_encoder_blocks": 16,
    "num_decoder_blocks": 16,
    "num_train_timesteps": 100_000,
}
_MOST_NUMBER = 10**7
_MOST_LEVELS = 8


@dataclass(frozen=True)
class Component:
    """A component that has weights: its folder, its class, and the stem of its weight files."""

    name: Part
    kind: Any
    stem: str


@dataclass(frozen=True)
class Layout:
    """A kind of pipeline: its class in diffusers, its components that have weights, and a tokenizer for each text
    encoder, in one order.

    marks: what model_index.json says besides the components.
    """

    pipeline: Any
    components: tuple[Component, ...]
    tokenizers: tuple[str, ...]
    marks: tuple[str, ...] = ()

    @property
    def folders(self) -> tuple[str, ...]:
        """What a whole pipeline folder holds."""
        return (*(part.name for part in self.components), *self.tokenizers, "scheduler")

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        """One for each tokenizer."""
        return tuple(part for part in self.components if part.name.startswith("text_encoder"))


UNET = Component("unet", UNet2DConditionModel, "diffusion_pytorch_model")
_VAE = Component("vae", AutoencoderKL, "diffusion_pytorch_model")
_SMALL_VAE = Component("vae", AutoencoderTiny, "diffusion_pytorch_model")
_TEXT = Component("text_encoder", CLIPTextModel, "model")
_TEXT_2 = Component("text_encoder_2", CLIPTextModelWithProjection, "model")
SD = Layout(StableDiffusionPipeline, (UNET, _VAE, _TEXT), ("tokenizer",))
SDXL = Layout(
    StableDiffusionXLPipeline,
    (UNET, _VAE, _TEXT, _TEXT_2),
    ("tokenizer", "tokenizer_2"),
    ("force_zeros_for_empty_prompt",),
)
LAYOUTS = (SD, SDXL)


def kind_of(pipeline: Pipeline) -> Layout:
    """The kind that an open pipeline is of."""
    return next(layout for layout in LAYOUTS if isinstance(pipeline, layout.pipeline))


def components_of(document: Mapping[str, Any], layout: Layout) -> tuple[Component, ...]:
    """The components of a layout as a folder's index has them: a small autoencoder may stand in the VAE's place."""
    small = document["vae"][1] == AutoencoderTiny.__name__
    return tuple(_SMALL_VAE if small and part is _VAE else part for part in layout.components)


def networks(pipeline: Pipeline) -> dict[str, nn.Module]:
    """The components of a pipeline that have weights, by name."""
    return {part.name: getattr(pipeline, part.name) for part in kind_of(pipeline).components}


def rebuilt(pipeline: Pipeline, **changed: Any) -> Pipeline:
    """The same pipeline around other components; all others are shared, not copied. It warns and marks nothing."""
    marks = {name: pipeline.config[name] for name in kind_of(pipeline).marks}
    return _new(kind_of(pipeline), {**pipeline.components, **marks, **changed})


def _new(layout: Layout, parts: Mapping[str, Any]) -> Pipeline:
    # A watermark of the sampler would be measured as a difference between two models.
    silent = {"add_watermarker": False} if layout is SDXL else {"requires_safety_checker": False}
    with quiet():
        return layout.pipeline(**parts, **silent)


def check_layout(folder: Path) -> Layout:
    """Refuse a folder that is not a whole pipeline of a known kind, or whose configs do not fit each other."""
    document, layout = check_class(folder / INDEX)
    for name in layout.folders:
        if name not in document or not (folder / name).is_dir():
            allowed = f"a {layout.pipeline.__name__} folder: {INDEX}, {', '.join(layout.folders)}"
            hint = f"the folder {name} is missing; copy the whole pipeline"
            raise refuse("model", folder / name, allowed=allowed, hint=hint)
        check_inside(folder, [folder / name, *(folder / name).glob("*")])
    _check_scheduler(folder, document)
    for name in layout.tokenizers:
        _check_tokenizer(folder, document, name)
    for part in components_of(document, layout):
        config = check_config(folder / part.name, part)
        if part is _SMALL_VAE:
            _check_small(folder / part.name, config)
    _check_fit(folder, layout)
    return layout


def check_class(index: Path) -> tuple[dict[str, Any], Layout]:
    """Refuse a pipeline of another kind by its model_index.json, and give that document and its kind back."""
    check_inside(index.parent, [index])
    document = read_json(index)
    kind = document.get("_class_name")
    layout = next((layout for layout in LAYOUTS if layout.pipeline.__name__ == kind), None)
    if layout is None:
        raise refuse(
            f"model {index.parent}, _class_name",
            str(kind)[:200],
            allowed=", ".join(layout.pipeline.__name__ for layout in LAYOUTS),
            hint="this version knows text to image with Stable Diffusion 1.x, 2.x and SDXL",
        )
    for part in layout.components:
        library = "transformers" if part in layout.text_encoders else "diffusers"
        kinds = (part, _SMALL_VAE) if part is _VAE else (part,)
        _check_entry(index, document, part.name, library, tuple(each.kind.__name__ for each in kinds))
    for name in layout.marks:
        if not isinstance(document.get(name, True), bool):
            raise refuse(
                f"model {index.parent}, {name}",
                str(document[name])[:200],
                allowed="true or false",
                hint="copy model_index.json again from where the model came",
            )
    return document, layout


def check_config(where: Path, part: Component) -> dict[str, Any]:
    """A component's config, refused when it is of another class, brings code, is quantised, or is beyond any size."""
    file = where / "config.json"
    config = read_json(file)
    _check_plain(file, config)
    named = config.get("_class_name", part.kind.__name__)
    architectures = config.get("architectures") or [part.kind.__name__]
    text = part in (_TEXT, _TEXT_2)
    if named != part.kind.__name__ or (text and config.get("model_type") not in _CLIP):
        said = named if named != part.kind.__name__ else f"{architectures}, model_type {config.get('model_type')!r}"
        raise refuse(
            f"model {file}", str(said)[:200], allowed=part.kind.__name__, hint="the config is of another network"
        )
    return config


def _check_small(where: Path, config: Mapping[str, Any]) -> None:
    """Refuse a small autoencoder whose halves are not of one factor, or of another than its number of levels says."""
    levels = {key: len(config.get(key) or (0,) * 4) for key in ("num_encoder_blocks", "num_decoder_blocks")}
    twice = config.get("upsampling_scaling_factor", 2)
    if len(set(levels.values())) > 1 or twice != 2:
        said = f"{', '.join(f'{key} of {n} levels' for key, n in levels.items())}, each level {twice} times as large"
        hint = "its config is of another kind of autoencoder than pipelines of diffusers take"
        raise refuse(f"model {where}", said, allowed="as many levels in both, each twice as large", hint=hint)


_CLIP = ("clip_text_model", "clip", None)


def empty(part: Component, config: Mapping[str, Any]) -> nn.Module:
    """The network that a config builds, its parameters on the meta device: names and shapes, and no memory."""
    with quiet(), init_empty_weights(include_buffers=False):
        if part in (_TEXT, _TEXT_2):
            return part.kind(part.kind.config_class.from_dict(dict(config)))
        return part.kind.from_config(dict(config))


def assemble(folder: Path, models: Mapping[str, nn.Module]) -> Pipeline:
    """The pipeline of networks and a layout's tokenizers and scheduler; without a safety checker.

    Raises:
        UserError: a tokenizer or the scheduler cannot be opened, or knows more words than its text encoder.
    """
    document, layout = check_class(folder / INDEX)
    scheduler = scheduler_of(folder)
    tokenizers = {name: _tokenizer(folder / name) for name in layout.tokenizers}
    none = {"safety_checker": None, "feature_extractor": None} if layout is SD else {}
    marks = {name: document[name] for name in layout.marks if name in document}
    with as_refusal(folder, "components that fit", "copy the whole pipeline again"):
        pipeline = _new(layout, {**models, **tokenizers, "scheduler": scheduler, **none, **marks})
    for name, part in zip(layout.tokenizers, layout.text_encoders, strict=True):
        _check_vocabulary(folder / name, tokenizers[name], models[part.name])
    return pipeline


def scheduler_of(folder: Path) -> Any:
    """The scheduler of a pipeline folder.

    Raises:
        UserError: it cannot be opened, or is none of diffusers'.
    """
    document, _ = check_class(folder / INDEX)
    _check_scheduler(folder, document)
    where = as_refusal(folder / "scheduler", "a scheduler of diffusers", "copy the folder scheduler again")
    # Its tables are read, not computed with: on the CPU, wherever the networks are made.
    with quiet(), where, torch.device("cpu"):
        return getattr(diffusers, document["scheduler"][1]).from_config(_scheduler_settings(folder))


def _tokenizer(where: Path) -> CLIPTokenizer:
    with quiet(), as_refusal(where, "the tokenizer of CLIP", f"copy the folder {where.name} again"):
        return CLIPTokenizer.from_pretrained(where, local_files_only=True)


@contextmanager
def as_refusal(place: Path, allowed: str, hint: str) -> Iterator[None]:
    """What the libraries raise for a broken folder, as one refusal; they raise nearly everything."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        said = f"it cannot be opened ({first_line(error)})"
        raise refuse(f"model {place}", said, allowed=allowed, hint=hint) from error


def check_numbers(place: Path, part: Component, config: Mapping[str, Any], stored: int) -> None:
    """Refuse weights that are not as many numbers as the config's network has, before any memory is asked for."""
    with as_refusal(place, f"the config of a {part.kind.__name__}", _STRANGERS):
        wanted = _numbers(part, json.dumps(config, sort_keys=True))
    if wanted != stored:
        raise refuse(
            f"model {place}, weights",
            f"{stored:,} numbers, and the network of config.json has {wanted:,}",
            allowed="the weights that belong to config.json",
            hint=_STRANGERS,
        )


@lru_cache(maxsize=64)
def _numbers(part: Component, config: str) -> int:
    return sum(parameter.numel() for parameter in empty(part, json.loads(config)).parameters())


def _check_entry(index: Path, document: Mapping[str, Any], name: str, library: str, allowed: tuple[str, ...]) -> None:
    found = document.get(name)
    if not (isinstance(found, list) and len(found) == 2 and found[0] == library and found[1] in allowed):
        raise refuse(
            f"model {index.parent}, {name}",
            str(found)[:200],
            allowed=" or ".join(f"{library} {kind}" for kind in allowed),
            hint="model_index.json says what each component is; only classes of diffusers and transformers are opened",
        )


def _check_scheduler(folder: Path, document: Mapping[str, Any]) -> None:
    found = document.get("scheduler")
    name = found[-1] if isinstance(found, list) and found and isinstance(found[-1], str) else ""
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    known = (name,) if isinstance(kind, type) and issubclass(kind, SchedulerMixin) else ()
    _check_entry(folder / INDEX, document, "scheduler", "diffusers", known or ("DDIMScheduler", "PNDMScheduler"))
    _check_plain(folder / "scheduler" / "scheduler_config.json", _scheduler_settings(folder))


def _scheduler_settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / "scheduler" / "scheduler_config.json")


def _check_tokenizer(folder: Path, document: Mapping[str, Any], name: str) -> None:
    _check_entry(folder / INDEX, document, name, "transformers", _TOKENIZERS)
    where = folder / name
    # Of an empty folder transformers makes a tokenizer without words, and says nothing.
    if not any((where / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise refuse(
            f"model {where}",
            "no vocabulary",
            allowed="tokenizer.json, or vocab.json and merges.txt",
            hint=f"copy the folder {name} again",
        )
    for file in where.glob("*.json"):
        document = read_json(file, most_bytes=_VOCABULARY_BYTES)
        if file.name not in ("tokenizer.json", "vocab.json"):
            _check_plain(file, document)


def _check_plain(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config that asks for code or quantised weights, or for a network that nobody has."""
    for key in ("auto_map", "custom_pipelines", "trust_remote_code"):
        if config.get(key):
            raise refuse(
                f"model {file}",
                f"{key} names code of its own",
                allowed="classes of diffusers and transformers",
                hint="decant runs no code that comes with a model",
            )
    if config.get("quantization_config"):
        hint = "take the model in fp16 or fp32"
        raise refuse(f"model {file}", "quantised weights", allowed="weights in floating point", hint=hint)
    for key, value in config.items():
        _check_size(file, key, value)


def _check_size(file: Path, key: str, value: Any) -> None:
    most = _MOST.get(key, _MOST_NUMBER)
    values = value if isinstance(value, list) else [value]
    if key.endswith(("block_types", "_out_channels", "per_block")) and len(values) > _MOST_LEVELS:
        hint = "the config is damaged; copy it again"
        raise refuse(f"model {file}, {key}", f"{len(values)} levels", allowed=f"at most {_MOST_LEVELS}", hint=hint)
    for number in values:
        if isinstance(number, list):
            _check_size(file, key, number)
        elif isinstance(number, int | float) and key not in _FREE and not -most <= number <= most:
            raise refuse(
                f"model {file}, {key}",
                str(number)[:40],
                allowed=f"at most {most:,}",
                hint="the config is damaged; copy it again from where the model came",
            )


# A tokenizer without a limit writes 1e30; what counts is the text encoder's.
_FREE = ("model_max_length",)


def _check_fit(folder: Path, layout: Layout) -> None:
    """Refuse components that do not fit each other: latent channels, and what the network is told."""
    unet, vae, *texts = (read_json(folder / part.name / "config.json") for part in layout.components)
    latent, inputs, outputs = vae.get("latent_channels", 4), unet.get("in_channels", 4), unet.get("out_channels", 4)
    if (inputs, outputs) != (latent, latent):
        known = {8: "8 is MuseTalk or InstructPix2Pix", 9: "9 is inpainting"}.get(inputs)
        raise refuse(
            f"model {folder}, wrong latent channels",
            f"the UNet takes {inputs} and gives {outputs}, the VAE has {latent}",
            allowed="one number for all three",
            hint=f"{known}: known, but not text to image" if known else "pair the UNet with the VAE it was trained on",
        )
    _check_told(folder, layout, unet)
    named = "text encoder gives" if len(texts) == 1 else "text encoders together give"
    widths, cross = [text.get("hidden_size", 512) for text in texts], unet.get("cross_attention_dim", 1280)
    if unet.get("encoder_hid_dim") is None and isinstance(cross, int) and _misfits(cross, widths):
        raise refuse(
            f"model {folder}, cross_attention_dim",
            f"the UNet reads {cross}, the {named} {' + '.join(map(str, widths))}",
            allowed="one number for both",
            hint="pair the UNet with the text encoder it was trained on",
        )
    if layout is SDXL:
        _check_pooled(folder, unet, texts[-1])


def _misfits(wanted: Any, given: list[Any]) -> bool:
    """Whether numbers do not add up; what is no number is another check's."""
    return all(isinstance(number, int) for number in (wanted, *given)) and sum(given) != wanted


def _check_told(folder: Path, layout: Layout, unet: Mapping[str, Any]) -> None:
    """Refuse a UNet that is told other things than its kind of pipeline tells."""
    wanted = "text_time" if layout is SDXL else None
    found = unet.get("addition_embed_type")
    if found != wanted:
        raise refuse(
            f"model {folder}, addition_embed_type",
            str(found)[:200],
            allowed=f"{wanted or 'none'} in a {layout.pipeline.__name__}",
            hint="the UNet is of another kind than model_index.json says",
        )


def _check_pooled(folder: Path, unet: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    with as_refusal(folder / "unet", "the config of a UNet of SDXL", "copy the folder unet again"):
        wanted = pooled_width({"addition_time_embed_dim": None, **unet})
    if _misfits(wanted, [text.get("projection_dim", 512)]):
        raise refuse(
            f"model {folder}, projection_class_embeddings_input_dim",
            f"the UNet reads a pooled text of {wanted}, text_encoder_2 gives {text.get('projection_dim', 512)}",
            allowed="one number for both",
            hint="pair the UNet with the text encoders it was trained on",
        )


def _check_vocabulary(where: Path, tokenizer: CLIPTokenizer, encoder: Any) -> None:
    """Refuse a tokenizer that knows tokens for which its text encoder has no embedding."""
    words, rows = len(tokenizer), encoder.config.vocab_size
    if words > rows:
        raise refuse(
            f"model {where}",
            f"{words} tokens, the text encoder has {rows}",
            allowed="the text encoder's own tokenizer",
            hint=f"copy the folder {where.name} again, from where the text encoder came",
        )


@contextmanager
def quiet() -> Iterator[None]:
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


def tidy_configs(folder: Path) -> None:
    """Make configs say what holds on every machine.

    Diffusers notes the path that a component came from. Transformers notes the stored dtype and, unlike diffusers,
    opens in it when none is asked for: a text encoder in half precision beside a UNet in single does not run. And
    diffusers writes the widths of a small autoencoder twice, and warns of the second when it reads them.
    """
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        tidy = {key: value for key, value in config.items() if key != "_name_or_path"}
        if tidy.get("_class_name") == AutoencoderTiny.__name__:
            tidy.pop("block_out_channels", None)
        if "dtype" in tidy:
            tidy["dtype"] = "float32"
        if tidy != config:
            path.write_text(json.dumps(tidy, indent=2, sort_keys=True) + "\n", encoding="utf-8")
