"""One `.safetensors` file of SD 1.x: names against diffusers' own converter, round trips, variants, refusals."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from decant.errors import UserError
from decant.models.families.sd1_keys import ema_name, naming
from decant.models.layout import SD, check_config, check_layout, empty
from decant.models.load import fingerprint, load, save, stored_dtype, unet_config
from decant.models.single_file import shipped_layout, write_single_file

UNET = "model.diffusion_model."
CONV_IN = UNET + "input_blocks.0.0.weight"
TEXT = "cond_stage_model.transformer."
METADATA = "decant.layout"


@pytest.fixture
def file(tmp_path: Path, pipeline: StableDiffusionPipeline) -> Path:
    where = tmp_path / "model.safetensors"
    write_single_file(pipeline, where)
    return where


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """The same file with other tensors, its metadata kept."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(change(load_file(file)), file, metadata=metadata)


def same_weights(a: StableDiffusionPipeline, b: StableDiffusionPipeline) -> bool:
    pairs = ((dict(getattr(p, part.name).state_dict()) for p in (a, b)) for part in SD.components)
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in pairs)


def full_size() -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """(component, config, diffusers name -> name in one file) of Stable Diffusion 1.5."""
    for part in SD.components:
        config = check_config(shipped_layout() / part.name, part)
        rename = naming(part.name, config)
        yield part.name, config, {name: rename(name) for name, _ in empty(part, config).named_parameters()}


def test_full_size_names_are_those_that_diffusers_reads() -> None:
    """Every tensor of SD 1.5, marked by a number, comes out of diffusers' converter under the name it came from."""
    counts = {}
    for name, config, names in full_size():
        assert len(set(names.values())) == len(names)
        marked = {target: torch.tensor([float(index)]) for index, target in enumerate(names.values())}
        match name:
            case "unet":
                read = convert_ldm_unet_checkpoint(marked, config)
            case "vae":
                read = convert_ldm_vae_checkpoint(marked, config)
            case _:
                read = convert_ldm_clip_checkpoint(marked)
                read = {key.removeprefix("text_model."): value for key, value in read.items()}
        assert {key: int(value) for key, value in read.items()} == {key: i for i, key in enumerate(names)}
        counts[name] = len(names)
    assert counts == {"unet": 686, "vae": 248, "text_encoder": 196}


def test_the_shipped_layout_is_whole_and_reads_as_clip_does() -> None:
    from transformers import CLIPTokenizer

    check_layout(shipped_layout())
    tokenizer = CLIPTokenizer.from_pretrained(shipped_layout() / "tokenizer")
    published = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    assert tokenizer("a photo of an astronaut riding a horse on mars").input_ids == published
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77


def test_folder_to_file_to_folder_is_bit_equal(
    tmp_path: Path, folder: Path, file: Path, pipeline: StableDiffusionPipeline
) -> None:
    opened = load(file)
    assert same_weights(opened, pipeline)
    prompt = "a small red circle, ünïcode & all"
    assert opened.tokenizer(prompt).input_ids == pipeline.tokenizer(prompt).input_ids
    assert opened.scheduler.config == load(folder).scheduler.config
    save(load(folder), tmp_path / "one")
    save(opened, tmp_path / "two")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    write_single_file(opened, tmp_path / "again.safetensors")
    assert load_file(tmp_path / "again.safetensors").keys() == load_file(file).keys()
    assert unet_config(file)["block_out_channels"] == [32, 64, 64, 64]


def test_diffusers_opens_the_file_alike(folder: Path, file: Path, pipeline: StableDiffusionPipeline) -> None:
    theirs = StableDiffusionPipeline.from_single_file(file, config=str(folder), local_files_only=True)
    assert same_weights(theirs, pipeline)


def test_a_v_prediction_pipeline_stays_one(tmp_path: Path, make_pipeline: Callable[..., Any]) -> None:
    write_single_file(make_pipeline("v_prediction"), tmp_path / "v.safetensors")
    assert load(tmp_path / "v.safetensors").scheduler.config.prediction_type == "v_prediction"


def averages(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {ema_name(name): value + 1 for name, value in weights.items() if name.startswith(UNET)}


def only_averages(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: value for name, value in weights.items() if not name.startswith(UNET)}
    return kept | {ema_name(name): value for name, value in weights.items() if name.startswith(UNET)}


def older_text(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("transformer.text_model.", "transformer."): value for name, value in weights.items()}


# What published files have beside the weights, or instead of them.
VARIANTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "position ids": lambda w: {**w, TEXT + "text_model.embeddings.position_ids": torch.arange(77)[None]},
    "buffers of training": lambda w: {**w, "betas": torch.rand(9), "alphas_cumprod": torch.rand(9)},
    "averages beside": lambda w: w | averages(w) | {"model_ema.decay": torch.tensor(0.99)},
    "averages alone": only_averages,
    "older text encoder": older_text,
    "matrices in the VAE": lambda w: {n: v[:, :, 0, 0] if ".attn_1." in n and v.ndim == 4 else v for n, v in w.items()},
    "VAE in double": lambda w: {n: v.double() if n.startswith("first_stage") else v for n, v in w.items()},
}


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_open(file: Path, pipeline: StableDiffusionPipeline, change: Callable[..., Any]) -> None:
    rewrite(file, change)
    assert same_weights(load(file), pipeline)


def test_half_precision_opens_in_what_is_asked(file: Path, pipeline: StableDiffusionPipeline) -> None:
    rewrite(file, lambda weights: {name: value.half() for name, value in weights.items()})
    assert stored_dtype(file) == torch.float16
    assert load(file, dtype=torch.float16).unet.dtype == torch.float16
    assert same_weights(load(file), pipeline.to(dtype=torch.float16).to(dtype=torch.float32))


def wide(weights: dict[str, Tensor], channels: int) -> dict[str, Tensor]:
    return {**weights, CONV_IN: torch.zeros(32, channels, 3, 3)}


def text_of_width(width: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    name = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    return lambda weights: {**weights, name: torch.zeros(32, width)}


def only(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name: value for name, value in weights.items() if name.startswith(prefix)}


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {key: value for key, value in weights.items() if key != name}


REFUSED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "inpainting": (lambda w: wide(w, 9), "inpainting"),
    "InstructPix2Pix": (lambda w: wide(w, 8), "8 channels"),
    "SD 2 by its text encoder": (renamed(TEXT, "cond_stage_model.model."), "Stable Diffusion 2.x"),
    "SD 2 by its width": (text_of_width(1024), "Stable Diffusion 2.x"),
    "SDXL": (renamed(TEXT, "conditioner.embedders.1.model."), "SDXL"),
    "SDXL UNet": (text_of_width(2048), "SDXL"),
    "SD 3": (lambda w: {UNET + "joint_blocks.0.x": torch.zeros(1)}, "Stable Diffusion 3"),
    "Flux": (lambda w: {"double_blocks.0.x": torch.zeros(1)}, "Flux"),
    "LoRA": (lambda w: {"lora_unet_x.lora_down.weight": torch.zeros(1)}, "a LoRA"),
    "peft LoRA": (lambda w: {"unet.x.lora_A.weight": torch.zeros(1)}, "a LoRA"),
    "ControlNet": (lambda w: {"control_model.x": torch.zeros(1)}, "a ControlNet"),
    "embedding": (lambda w: {"emb_params": torch.zeros(1)}, "textual inversion"),
    "UNet alone": (only(UNET), "it has no vae"),
    "no text encoder": (lambda w: only(UNET)(w) | only("first_stage_model.")(w), "it has no text encoder"),
    "something else": (lambda w: {"x": torch.zeros(1)}, "no tensor of a UNet"),
    "a lost tensor": (without(UNET + "out.2.bias"), "out.2.bias"),
    "a stranger": (lambda w: {**w, UNET + "extra.weight": torch.zeros(1)}, "extra.weight is not in SD 1.x"),
    "another shape": (lambda w: wide(w, 4) | {UNET + "out.2.bias": torch.zeros(5)}, r"\[5\]"),
    "8 bits": (lambda w: {**w, UNET + "out.2.bias": torch.zeros(4, dtype=torch.float8_e4m3fn)}, "F8_E4M3"),
    "integers": (lambda w: {**w, UNET + "out.2.bias": torch.zeros(4, dtype=torch.int32)}, "I32"),
}


@pytest.mark.parametrize(("change", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_other_files_are_refused_by_name(file: Path, change: Callable[..., Any], says: str) -> None:
    rewrite(file, change)
    with pytest.raises(UserError, match=says) as refusal:
        load(file)
    assert "hint: " in str(refusal.value) and "allowed: " in str(refusal.value)


def test_a_file_of_another_size_needs_its_own_layout(file: Path) -> None:
    save_file(load_file(file), file)
    with pytest.raises(UserError, match="tensors are missing"):
        load(file)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".txt", ""])
def test_a_file_of_another_kind_is_refused(file: Path, suffix: str) -> None:
    other = file.rename(file.with_suffix(suffix))
    with pytest.raises(UserError, match="pickle" if suffix not in (".txt", "") else "another kind"):
        load(other)


@pytest.mark.parametrize(
    "layout",
    [
        "nonsense",
        "[]",
        json.dumps({"model_index.json": 3}),
        json.dumps({"../../evil.json": "{}"}),
        json.dumps({"model_index.json": '{"_class_name": "Evil"}'}),
        "[" * 100_000,
    ],
)
def test_a_damaged_layout_in_the_metadata_is_refused(file: Path, layout: str, tmp_path: Path) -> None:
    save_file(load_file(file), file, metadata={METADATA: layout})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError):
        load(file)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_student_without_blocks_is_not_written(tmp_path: Path, make_pipeline: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="1 layers"):
        write_single_file(make_pipeline(layers_per_block=1), tmp_path / "student.safetensors")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_file_before(
    file: Path, pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("decant.models.single_file.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_single_file(pipeline, file)
    assert file.read_bytes() == before


def sparse_full_size(file: Path) -> dict[str, Tensor]:
    """SD 1.5 in fp16 as strangers publish it, 2.1 GB of zeros that take no disk, and one tensor of each network."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, config, names in full_size():
        part = next(part for part in SD.components if part.name == name)
        for own, parameter in empty(part, config).named_parameters():
            ones = (1, 1) if ".attn_1." in names[own] and parameter.ndim == 2 else ()
            shapes[names[own]] = (*parameter.shape, *ones)
    header: dict[str, Any] = {}
    offset = 0
    for name in sorted(shapes):
        size = 2 * int(torch.Size(shapes[name]).numel())
        header[name] = {"dtype": "F16", "shape": shapes[name], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    told = [CONV_IN, "first_stage_model.quant_conv.bias", TEXT + "text_model.final_layer_norm.bias"]
    values = {name: torch.randn(shapes[name]).half() for name in told}
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        begin = out.tell()
        out.truncate(begin + offset)
        for name, value in values.items():
            out.seek(begin + header[name]["data_offsets"][0])
            out.write(value.numpy().tobytes())
    return values


@pytest.mark.slow
def test_a_full_size_file_opens_offline(tmp_path: Path) -> None:
    file = tmp_path / "v1-5-pruned-emaonly.safetensors"
    values = sparse_full_size(file)
    assert unet_config(file)["cross_attention_dim"] == 768
    pipeline = load(file, dtype=torch.float16)
    assert sum(parameter.numel() for parameter in pipeline.unet.parameters()) == 859_520_964
    assert torch.equal(pipeline.unet.conv_in.weight, values[CONV_IN])
    assert torch.equal(pipeline.vae.quant_conv.bias, values["first_stage_model.quant_conv.bias"])
    assert torch.equal(pipeline.text_encoder.final_layer_norm.bias, values[TEXT + "text_model.final_layer_norm.bias"])
    assert pipeline.scheduler.config.steps_offset == 1
    assert pipeline.vae.config.scaling_factor == 0.18215
