"""A pipeline folder without its weights: what `model_index.json` and the configs say, and whether it can be opened.

Every check of this module reads JSON alone. Classes are looked up in a fixed list, never imported by a name that a
file gives.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from decant.errors import UserError, refuse
from decant.models.families.sd1_keys import Part
from decant.models.guard import check_inside, first_line, read_json

INDEX = "model_index.json"
ALLOWED = "a StableDiffusionPipeline folder: model_index.json, unet, vae, text_encoder, tokenizer, scheduler"
_STRANGERS = "config.json and weights are of two different networks; take both from one folder"
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_VOCABULARY_BYTES = 16 * 10**6
# Far above every published network, and small enough that its names can be listed in seconds.
_MOST = {
    "num_hidden_layers": 100,
    "layers_per_block": 8,
    "transformer_layers_per_block": 16,
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


COMPONENTS = (
    Component("unet", UNet2DConditionModel, "diffusion_pytorch_model"),
    Component("vae", AutoencoderKL, "diffusion_pytorch_model"),
    Component("text_encoder", CLIPTextModel, "model"),
)


def check_layout(folder: Path) -> None:
    """Refuse a folder that is not a whole pipeline of the known kind, or whose configs do not fit each other."""
    document = check_class(folder / INDEX)
    for name in (*(part.name for part in COMPONENTS), "tokenizer", "scheduler"):
        if name not in document or not (folder / name).is_dir():
            hint = f"the folder {name} is missing; copy the whole pipeline"
            raise refuse("model", folder / name, allowed=ALLOWED, hint=hint)
        check_inside(folder, [folder / name, *(folder / name).glob("*")])
    _check_scheduler(folder, document)
    _check_tokenizer(folder, document)
    for part in COMPONENTS:
        check_config(folder / part.name, part)
    _check_fit(folder)


def check_class(index: Path) -> dict[str, Any]:
    """Refuse a pipeline of another kind by its model_index.json, and give that document back."""
    check_inside(index.parent, [index])
    document = read_json(index)
    kind = document.get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise refuse(
            f"model {index.parent}, _class_name",
            kind,
            allowed="StableDiffusionPipeline",
            hint="this version knows the sd1 family alone (Stable Diffusion 1.x and 2.x, text to image)",
        )
    for part in COMPONENTS:
        library = "transformers" if part.name == "text_encoder" else "diffusers"
        _check_entry(index, document, part.name, library, (part.kind.__name__,))
    return document


def check_config(where: Path, part: Component) -> dict[str, Any]:
    """A component's config, refused when it is of another class, brings code, is quantised, or is beyond any size."""
    file = where / "config.json"
    config = read_json(file)
    _check_plain(file, config)
    named = config.get("_class_name", part.kind.__name__)
    architectures = config.get("architectures") or [part.kind.__name__]
    if named != part.kind.__name__ or (part.name == "text_encoder" and config.get("model_type") not in _CLIP):
        said = named if named != part.kind.__name__ else f"{architectures}, model_type {config.get('model_type')!r}"
        raise refuse(
            f"model {file}", str(said)[:200], allowed=part.kind.__name__, hint="the config is of another network"
        )
    return config


_CLIP = ("clip_text_model", "clip", None)


def empty(part: Component, config: Mapping[str, Any]) -> nn.Module:
    """The network that a config builds, its parameters on the meta device: names and shapes, and no memory."""
    with quiet(), init_empty_weights(include_buffers=False):
        if part.name == "text_encoder":
            return part.kind(part.kind.config_class.from_dict(dict(config)))
        return part.kind.from_config(dict(config))


def assemble(folder: Path, models: Mapping[str, nn.Module]) -> StableDiffusionPipeline:
    """The pipeline of networks and a layout's tokenizer and scheduler; without a safety checker.

    Raises:
        UserError: the tokenizer or the scheduler cannot be opened, or knows more words than the text encoder.
    """
    document = check_class(folder / INDEX)
    settings = _scheduler_settings(folder)
    kind = getattr(diffusers, document["scheduler"][1])
    with quiet(), as_refusal(folder / "scheduler", "a scheduler of diffusers", "copy the folder scheduler again"):
        scheduler = kind.from_config(settings)
    with quiet(), as_refusal(folder / "tokenizer", "the tokenizer of CLIP", "copy the folder tokenizer again"):
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    pipeline_of: Any = StableDiffusionPipeline  # its annotations forbid what it documents: no safety checker
    with quiet(), as_refusal(folder, "components that fit", "copy the whole pipeline again"):
        pipeline = pipeline_of(
            **models,
            tokenizer=tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    _check_vocabulary(pipeline, folder)
    return pipeline


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
        wanted = sum(parameter.numel() for parameter in empty(part, config).parameters())
    if wanted != stored:
        raise refuse(
            f"model {place}, weights",
            f"{stored:,} numbers, and the network of config.json has {wanted:,}",
            allowed="the weights that belong to config.json",
            hint=_STRANGERS,
        )


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


def _check_tokenizer(folder: Path, document: Mapping[str, Any]) -> None:
    _check_entry(folder / INDEX, document, "tokenizer", "transformers", _TOKENIZERS)
    where = folder / "tokenizer"
    # Of an empty folder transformers makes a tokenizer without words, and says nothing.
    if not any((where / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise refuse(
            f"model {where}",
            "no vocabulary",
            allowed="tokenizer.json, or vocab.json and merges.txt",
            hint="copy the folder tokenizer again",
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


def _check_fit(folder: Path) -> None:
    """Refuse components that do not fit each other: latent channels, and the width of the text."""
    unet, vae, text = (read_json(folder / part.name / "config.json") for part in COMPONENTS)
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
    opens in it when none is asked for: a text encoder in half precision beside a UNet in single does not run.
    """
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        tidy = {key: value for key, value in config.items() if key != "_name_or_path"}
        if "dtype" in tidy:
            tidy["dtype"] = "float32"
        if tidy != config:
            path.write_text(json.dumps(tidy, indent=2, sort_keys=True) + "\n", encoding="utf-8")
