"""One `.safetensors` file of SD 1.x, 2.x and SDXL: names against diffusers' own converter, round trips, refusals."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from decant.errors import UserError
from decant.models.families.family import Name
from decant.models.families.keys import Place, ema_name, naming
from decant.models.file_prediction import FilePrediction, prediction_of
from decant.models.guard import read_header
from decant.models.layout import INDEX, Pipeline, check_class, check_config, check_layout, empty, networks
from decant.models.load import architecture, fingerprint, load, save, stored_dtype, unet_config
from decant.models.single_file import (
    _check_strangers,
    _plan,
    check_kind,
    layout_of,
    shipped_layout,
    write_single_file,
)

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


def same_weights(a: Pipeline, b: Pipeline) -> bool:
    pairs = [(net.state_dict(), networks(b)[name].state_dict()) for name, net in networks(a).items()]
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in pairs)


def full_size(kind: Name) -> Iterator[tuple[str, dict[str, Any], dict[str, Place], dict[str, torch.Size]]]:
    """(component, config, diffusers name -> place in one file, -> shape) of the published models of a kind."""
    with shipped_layout(kind) as folder:
        for part in check_class(folder / INDEX)[1].components:
            config = check_config(folder / part.name, part)
            place_of = naming(kind, part.name, config)
            shapes = {name: parameter.shape for name, parameter in empty(part, config).named_parameters()}
            yield part.name, config, {name: place_of(name) for name in shapes}, shapes


def marked_file(places: dict[str, Place]) -> dict[str, Tensor]:
    """Every tensor as its number: a matrix of one number, so that rows can be joined and matrices turned."""
    parts: dict[str, dict[int, Tensor]] = {}
    for index, place in enumerate(places.values()):
        parts.setdefault(place.name, {})[place.third or 0] = torch.tensor([[float(index)]])
    return {name: torch.cat([thirds[third] for third in sorted(thirds)]) for name, thirds in parts.items()}


def read_by_diffusers(part: str, kind: Name, config: dict[str, Any], marked: dict[str, Tensor]) -> dict[str, Tensor]:
    text = SimpleNamespace(config=SimpleNamespace(hidden_size=1))
    match part, kind:
        case "unet", _:
            return convert_ldm_unet_checkpoint(marked, {"class_embed_type": None, **config})
        case "vae", _:
            return convert_ldm_vae_checkpoint(marked, config)
        case "text_encoder", "sd2":
            return convert_open_clip_checkpoint(text, marked)
        case "text_encoder_2", _:
            return convert_open_clip_checkpoint(text, marked, prefix="conditioner.embedders.1.model.")
        case _:
            return convert_ldm_clip_checkpoint(marked)


COUNTS: dict[Name, dict[str, int]] = {
    "sd1": {"unet": 686, "vae": 248, "text_encoder": 196},
    "sd2": {"unet": 686, "vae": 248, "text_encoder": 372},
    "sdxl": {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 517},
}


@pytest.mark.parametrize("kind", COUNTS)
def test_full_size_names_are_those_that_diffusers_reads(kind: Name) -> None:
    """Every tensor, marked by a number, comes out of diffusers' converter under the name it came from."""
    counts = {}
    for part, config, places, _ in full_size(kind):
        assert len({(place.name, place.third) for place in places.values()}) == len(places)
        read = read_by_diffusers(part, kind, config, marked_file(places))
        plain = {key.removeprefix("text_model."): int(value) for key, value in read.items()}
        assert plain == {key.removeprefix("text_model."): index for index, key in enumerate(places)}
        counts[part] = len(places)
    assert counts == COUNTS[kind]


@pytest.mark.parametrize("kind", COUNTS)
def test_the_shipped_layouts_are_whole_and_read_as_clip_does(kind: Name) -> None:
    from transformers import CLIPTokenizer

    with shipped_layout(kind) as folder:
        layout = check_layout(folder)
        tokenizers = {name: CLIPTokenizer.from_pretrained(folder / name) for name in layout.tokenizers}
        unet = json.loads((folder / "unet/config.json").read_text())
    published = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    for tokenizer in tokenizers.values():
        assert tokenizer("a photo of an astronaut riding a horse on mars").input_ids == published
        assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    pads = {"sd1": [49407], "sd2": [0], "sdxl": [49407, 0]}
    assert [tokenizer.pad_token_id for tokenizer in tokenizers.values()] == pads[kind]
    known = architecture({"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}[kind])
    assert {key: unet[key] for key in known} == known


Make = Callable[..., Any]


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def any_pipeline(request: pytest.FixtureRequest, make_pipeline: Make, make_sdxl: Make) -> Any:
    match request.param:
        case "sd1":
            return make_pipeline()
        case "sd2":
            return make_pipeline("v_prediction", use_linear_projection=True, attention_head_dim=(2, 4, 4, 4))
        case _:
            return make_sdxl(zeros=False)


def test_folder_to_file_to_folder_is_bit_equal(tmp_path: Path, any_pipeline: Any) -> None:
    folder, file = tmp_path / "folder", tmp_path / "model.safetensors"
    any_pipeline.save_pretrained(folder)
    write_single_file(any_pipeline, file)
    opened = load(file)
    assert type(opened) is type(any_pipeline) and same_weights(opened, any_pipeline)
    assert opened.scheduler.config == load(folder).scheduler.config
    save(load(folder), tmp_path / "one")
    save(opened, tmp_path / "two")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    write_single_file(opened, tmp_path / "again.safetensors")
    again, once = load_file(tmp_path / "again.safetensors"), load_file(file)
    assert again.keys() == once.keys() and all(torch.equal(again[name], once[name]) for name in once)
    prompt = "a small red circle, ünïcode & all"
    for name in ("tokenizer", "tokenizer_2"):
        if hasattr(any_pipeline, name):
            mine, theirs = (getattr(p, name)([prompt], padding="max_length") for p in (opened, any_pipeline))
            assert mine.input_ids == theirs.input_ids
    assert unet_config(file)["block_out_channels"] == list(any_pipeline.unet.config.block_out_channels)


def test_diffusers_opens_the_file_alike(tmp_path: Path, any_pipeline: Any) -> None:
    """Its own reader of single files, offline, with the configs of the folder: equal weights, and one equal picture."""
    any_pipeline.save_pretrained(tmp_path / "folder")
    write_single_file(any_pipeline, tmp_path / "model.safetensors")
    theirs = type(any_pipeline).from_single_file(
        tmp_path / "model.safetensors", config=str(tmp_path / "folder"), local_files_only=True
    )
    assert same_weights(theirs, any_pipeline)
    theirs.scheduler = any_pipeline.scheduler
    pictures = []
    for pipeline in (theirs, load(tmp_path / "model.safetensors")):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        pictures.append(pipeline("a", num_inference_steps=2, generator=generator, output_type="np").images)
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-4


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
    "SD 2's text encoder": (renamed(TEXT, "cond_stage_model.model."), "cond_stage_model.model.token_embedding"),
    "SD 2's width": (text_of_width(1024), r"1024\], and SD 1.x has \[32, 32\]"),
    "SDXL's second encoder alone": (renamed(TEXT, "conditioner.embedders.1.model."), "it has no text encoder"),
    "the refiner": (renamed(TEXT, "conditioner.embedders.0.model."), "the SDXL refiner"),
    "depth": (lambda w: wide(w, 5), "depth-to-image"),
    "upscaler": (lambda w: wide(w, 7), "upscaler"),
    "Playground": (lambda w: {**w, "edm_mean": torch.zeros(4), "edm_std": torch.zeros(4)}, "EDM"),
    "CosXL": (lambda w: {**w, "edm_vpred.sigma_max": torch.zeros(1)}, "EDM"),
    "told of sizes": (lambda w: {**w, UNET + "label_emb.0.0.weight": torch.zeros(2, 2)}, "it has no text encoder"),
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
    with pytest.raises(UserError, match="layers_per_block"):
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


def sparse_full_size(file: Path, kind: Name, more: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A published model in fp16, gigabytes of zeros that take no disk, and one tensor of each network."""
    shapes: dict[str, tuple[int, ...]] = {}
    told: dict[str, Tensor] = dict(more or {})
    for part, _, places, own in full_size(kind):
        for name, place in places.items():
            ones = (1, 1) if ".attn_1." in place.name and len(own[name]) == 2 and part == "vae" else ()
            rows = (own[name][0] * (3 if place.third is not None else 1), *own[name][1:])
            shapes[place.name] = (*(rows[::-1] if place.turned else rows), *ones)
        last = next(place for name, place in places.items() if name.endswith(LAST[part]))
        told[last.name] = torch.randn(shapes[last.name]).half()
    header: dict[str, Any] = {}
    offset = 0
    for name in sorted(shapes | told):
        shape = told[name].shape if name in told else shapes[name]
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        begin = out.tell()
        out.truncate(begin + offset)
        for name, value in told.items():
            out.seek(begin + header[name]["data_offsets"][0])
            out.write(value.half().numpy().tobytes())
    return told


LAST = {
    "unet": "conv_in.weight",
    "vae": "quant_conv.bias",
    "text_encoder": "final_layer_norm.bias",
    "text_encoder_2": "text_projection.weight",
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("sd1", 859_520_964), ("sd2", 865_910_724)])
def test_a_full_size_file_opens_offline(kind: Name, count: int, tmp_path: Path) -> None:
    file = tmp_path / "published.safetensors"
    values = sparse_full_size(file, kind)
    assert unet_config(file)["cross_attention_dim"] == {"sd1": 768, "sd2": 1024}[kind]
    pipeline = load(file, dtype=torch.float16)
    assert sum(parameter.numel() for parameter in pipeline.unet.parameters()) == count
    assert torch.equal(pipeline.unet.conv_in.weight, values[CONV_IN])
    assert torch.equal(pipeline.vae.quant_conv.bias, values["first_stage_model.quant_conv.bias"])
    last = next(value for name, value in values.items() if name.startswith("cond_stage_model."))
    assert torch.equal(pipeline.text_encoder.final_layer_norm.bias, last)
    assert pipeline.scheduler.config.steps_offset == 1
    assert pipeline.vae.config.scaling_factor == 0.18215


def test_sdxl_at_full_size_is_recognised_and_planned(tmp_path: Path) -> None:
    """Every one of its 2,600 tensors has its place, by the header alone; 7 GB of memory are not for a test."""
    file = tmp_path / "sd_xl_base_1.0.safetensors"
    extra = {"conditioner.embedders.1.model.logit_scale": torch.zeros(())}
    sparse_full_size(file, "sdxl", extra)
    assert unet_config(file) == unet_config(file) | architecture("sdxl")
    header = check_kind(file)
    with layout_of(header) as folder:
        layout = check_class(folder / INDEX)[1]
        plans = [_plan(header, "sdxl", folder, part) for part in layout.components]
        _check_strangers(header, "sdxl", plans)
        assert (folder / "tokenizer_2/vocab.json").is_file()
    assert sum(p.numel() for p in plans[0].model.parameters()) == 2_567_463_684
    assert {plan.part.name for plan in plans} == {"unet", "vae", "text_encoder", "text_encoder_2"}


BIAS = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"


def stub(file: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file({"x": torch.zeros(1), **tensors}, file, metadata={"format": "pt", **metadata})
    return file


def test_who_says_what_a_file_predicts(tmp_path: Path) -> None:
    """The order: a .yaml beside, marker tensors, the metadata, and for SD 2.x the spread of one bias."""
    v = {BIAS: 0.2 * torch.randn(320, generator=torch.Generator().manual_seed(0))}
    base = {BIAS: 0.03 * torch.randn(320, generator=torch.Generator().manual_seed(0))}
    mark = {"v_pred": torch.zeros(0)}
    spec = {"modelspec.prediction_type": "epsilon"}
    cases: list[tuple[dict[str, Tensor], dict[str, str], str]] = [
        (v, {}, "v_prediction"),
        (base, {}, "epsilon"),
        ({}, {}, "epsilon"),
        (v, spec, "epsilon"),
        (base, {"modelspec.prediction_type": "v"}, "v_prediction"),
        (base | mark, spec, "v_prediction"),
    ]
    for index, (tensors, metadata, expected) in enumerate(cases):
        file = stub(tmp_path / f"{index}.safetensors", tensors, **metadata)
        assert prediction_of(read_header(file), "sd2").prediction == expected, index
        for word, meaning in (("v", "v_prediction"), ("eps", "epsilon")):
            file.with_suffix(".yaml").write_text(f"model:\n  params:\n    parameterization: {word!r}\n")
            assert prediction_of(read_header(file), "sd2").prediction == meaning
    file = stub(tmp_path / "xl.safetensors", v)
    assert prediction_of(read_header(file), "sdxl").prediction == "epsilon"  # the bias tells of SD 2.x alone
    file = stub(tmp_path / "zero.safetensors", mark | {"ztsnr": torch.zeros(0)})
    assert prediction_of(read_header(file), "sdxl").zero_snr


@pytest.mark.parametrize("text", ["", "model: 3", "[", "model: {params: {parameterization: x}}", "[" * 9999])
def test_a_yaml_that_says_nothing_is_refused(text: str, tmp_path: Path) -> None:
    file = stub(tmp_path / "a.safetensors", {})
    file.with_suffix(".yaml").write_text(text)
    with pytest.raises(UserError, match="parameterization"):
        prediction_of(read_header(file), "sd2")


@pytest.mark.parametrize(("kind", "zero"), [("sd1", True), ("sd2", False), ("sdxl", True)])
def test_v_prediction_of_a_file_becomes_the_schedulers(kind: Name, zero: bool) -> None:
    with shipped_layout(kind, FilePrediction("v_prediction", zero, "a test")) as folder:
        index = check_layout(folder)
        assert index.pipeline
        settings = json.loads((folder / "scheduler/scheduler_config.json").read_text())
        name = json.loads((folder / INDEX).read_text())["scheduler"][1]
        unet = json.loads((folder / "unet/config.json").read_text())
    scheduler = getattr(diffusers, name).from_config(settings)
    assert scheduler.config.prediction_type == "v_prediction" and settings["_class_name"] == name
    assert bool(scheduler.alphas_cumprod[-1] < 1e-6) is zero
    assert (unet["sample_size"] == 96 and unet["upcast_attention"]) == (kind == "sd2") or kind != "sd2"


def test_a_written_file_marks_v_prediction_for_other_tools(tmp_path: Path, make_sdxl: Callable[..., Any]) -> None:
    pipeline = make_sdxl("v_prediction")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    write_single_file(pipeline, tmp_path / "v.safetensors")
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "v.safetensors").keys()
    opened = load(tmp_path / "v.safetensors").scheduler.config
    assert opened.prediction_type == "v_prediction" and opened.rescale_betas_zero_snr
