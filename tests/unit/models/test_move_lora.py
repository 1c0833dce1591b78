"""A moved LoRA: merging it into the cut is cutting the merged teacher; judged by diffusers and peft."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft, logging
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from decant.cli.main import main
from decant.errors import UserError
from decant.models.families.keys import naming
from decant.models.load import save, with_unet
from decant.models.move.lora import Layer, move_lora
from decant.models.move.lora_keys import module_of, read_lora, to_kohya, to_peft
from decant.models.surgery.cut import cut
from decant.models.surgery.keep import Keep
from decant.models.surgery.presets import Student, published
from decant.models.surgery.surgery import Surgery, SurgeryMap, build, pick, skeleton

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [32, 64, 64, 64],
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
STUDENTS: tuple[Student, ...] = ("bk-base", "bk-small", "bk-tiny")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj"]
EVERYTHING += [
    "conv_shortcut",
    "conv_in",
    "conv_out",
    "linear_1",
    "linear_2",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
]


def teacher(**config: Any) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(**{**UNET, **config}).eval()


def adapted(unet: UNet2DConditionModel, targets: list[str], rank: int = 4, alpha: float = 8.0) -> dict[str, Tensor]:
    """peft's own state dict of a random LoRA on a network, which keeps the adapter."""
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return {f"unet.{name}": tensor.clone() for name, tensor in get_peft_model_state_dict(unet).items()}


def merged(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The weights of a network with its adapters merged, by peft; the network is spent."""
    unet.fuse_lora()
    unet.unload_lora()
    return {name: tensor.detach() for name, tensor in unet.state_dict().items()}


def with_alphas(peft: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """diffusers' kohya twin of a peft state dict, its alphas those that peft used."""
    kohya = convert_state_dict_to_kohya(dict(peft))
    return {name: torch.tensor(alpha) if name.endswith(".alpha") else tensor for name, tensor in kohya.items()}


def dropping(weights: dict[str, Tensor], config: dict[str, Any]) -> Surgery:
    """A cut by hand: every third channel inside each transformer's feed-forward, and half the rows of time_emb_proj.

    The network of these weights is none that diffusers builds; rows and columns are what is looked at.
    """
    kept: dict[str, dict[int, list[int]]] = {}
    for name, tensor in weights.items():
        if "ff.net.2.weight" in name or "attn2.to_k.weight" in name or "conv1.weight" in name:
            kept[name] = {1: [i for i in range(tensor.shape[1]) if i % 3]}
        if "to_q.weight" in name or "proj_in.weight" in name or "conv1.weight" in name:
            kept.setdefault(name, {})[0] = list(range(tensor.shape[0] - 1, -1, -2))
    cut = {name: pick(tensor, kept.get(name, {})) for name, tensor in weights.items()}
    return Surgery(config, cut, SurgeryMap({name: name for name in weights}, kept))


def cut_of(student: str, unet: UNet2DConditionModel, weights: dict[str, Tensor]) -> Surgery:
    if student == "narrowed":
        return dropping(weights, dict(unet.config))
    if student == "channels":
        return cut(dict(unet.config), weights, Keep(widths=(16, 32, 32, 32), mid="resnet"))
    return published(dict(unet.config), weights, student)  # type: ignore[arg-type]


def shapes(surgery: Surgery) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in surgery.weights.items()}


FORMATS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "peft": lambda peft: _scaled(peft, 2.0),
    "peft, adapter named": lambda peft: {
        name.replace(".weight", ".default.weight"): tensor for name, tensor in _scaled(peft, 2.0).items()
    },
    "peft, whole model": lambda peft: {
        name.replace("unet.", "base_model.model."): tensor for name, tensor in _scaled(peft, 2.0).items()
    },
    "diffusers, old": lambda peft: convert_state_dict_to_diffusers(_scaled(peft, 2.0)),
    "diffusers, oldest": lambda peft: {_processor(name): tensor for name, tensor in _scaled(peft, 2.0).items()},
    "kohya": lambda peft: with_alphas(peft, 8.0),
    "kohya, ldm names": lambda peft: _ldm(with_alphas(peft, 8.0)),
    "ComfyUI": lambda peft: {
        name.replace("unet.", "diffusion_model.").replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
        for name, tensor in _scaled(peft, 2.0).items()
    },
}


def _scaled(peft: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """peft's file has no alpha: diffusers takes the scale as 1, so it must be in the weights."""
    return {name: tensor * scale if "lora_B" in name else tensor for name, tensor in peft.items()}


def _processor(name: str) -> str:
    """Attention processors held their own LoRA: `attn1.processor.to_out_lora.down.weight`."""
    name = re.sub(r"(attn[12])\.(to_[qkv]|to_out)(\.0)?\.lora_", r"\1.processor.\2_lora.", name)
    return name.replace("lora.A", "lora.down").replace("lora.B", "lora.up")


def _ldm(kohya: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of one file, by the table that writes those."""
    to_ldm = naming(
        "sd1", "unet", {**UNET, "layers_per_block": 2, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
    )
    modules = {name.rpartition(".")[0] for name in skeleton(UNET).state_dict()}
    names = {}
    for module in modules:
        ldm = to_ldm(f"{module}.weight").name.removeprefix("model.diffusion_model.").removesuffix(".weight")
        names["lora_unet_" + module.replace(".", "_")] = "lora_unet_" + ldm.replace(".", "_")
    return {names[key.split(".")[0]] + "." + key.split(".", 1)[1]: tensor for key, tensor in kohya.items()}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("student", [*STUDENTS, "narrowed", "channels"])
def test_moving_then_merging_is_merging_then_cutting(student: str, form: str) -> None:
    """The judge is peft's own merge of the teacher, and the surgery itself."""
    unet = teacher()
    plain = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    file = FORMATS[form](adapted(unet, EVERYTHING))
    whole = merged(unet)
    before, after = cut_of(student, unet, plain), cut_of(student, unet, whole)
    moved = move_lora(read_lora(file), before.surgery_map, shapes(before))
    layers = moved.lora["unet"]
    assert len(layers) > 40
    for name, expected in after.weights.items():
        layer = layers.get(name.removesuffix(".weight"))
        found = before.weights[name] + (layer.delta() if layer and name.endswith(".weight") else 0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)
    changed = {name for name in after.weights if not torch.equal(after.weights[name], before.weights[name])}
    assert {name.removesuffix(".weight") for name in changed} == set(layers)


def test_an_untouched_map_gives_the_lora_back() -> None:
    lora = read_lora(adapted(teacher(), EVERYTHING))
    weights = teacher().state_dict()
    moved = move_lora(
        lora, SurgeryMap({name: name for name in weights}), {n: tuple(t.shape) for n, t in weights.items()}
    )
    assert moved.dropped == () and moved.narrowed == 0 and moved.modules == len(lora["unet"])
    for module, layer in lora["unet"].items():
        assert torch.equal(moved.lora["unet"][module].up, layer.up)
        assert torch.equal(moved.lora["unet"][module].down, layer.down)


def test_what_is_dropped_is_told_with_its_part_of_the_norm() -> None:
    unet = teacher()
    lora = read_lora(adapted(unet, ATTENTION))
    surgery = published(dict(unet.config), teacher().state_dict(), "bk-tiny")
    moved = move_lora(lora, surgery.surgery_map, shapes(surgery))
    lost = {part.part: part for part in moved.dropped}
    assert {"mid_block", "down_blocks.0.attentions.1", "up_blocks.1.attentions.1"} <= set(lost)
    assert "no block" in lost["mid_block"].why and lost["mid_block"].modules == 8
    assert moved.modules + sum(part.modules for part in moved.dropped) == len(lora["unet"])
    energy = {module: float(layer.delta().double().square().sum()) for module, layer in lora["unet"].items()}
    mid = sum(value for module, value in energy.items() if module.startswith("mid_block."))
    assert lost["mid_block"].share == pytest.approx(mid / sum(energy.values()), rel=1e-5)


def test_one_teacher_layer_may_serve_two_of_the_student() -> None:
    lora = {"unet": {"a": Layer(torch.randn(2, 5), torch.randn(3, 2), 2.0)}}
    cut = SurgeryMap({"x.weight": "a.weight", "y.weight": "a.weight"}, {"y.weight": {0: [2]}})
    moved = move_lora(lora, cut, {"x.weight": (3, 5), "y.weight": (1, 5)})  # type: ignore[arg-type]
    assert set(moved.lora["unet"]) == {"x", "y"} and moved.modules == 1 and moved.narrowed == 1
    assert torch.equal(moved.lora["unet"]["y"].delta(), lora["unet"]["a"].delta()[2:])


SDXL: dict[str, Any] = {
    "block_out_channels": [32, 64, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "cross_attention_dim": 64,
}


def test_sdxl_names_of_kohya_are_read_as_diffusers_reads_them() -> None:
    """kohya trains SDXL under the one-file names; diffusers' own converters are the judge."""
    unet = skeleton(SDXL)
    modules = {name.removesuffix(".weight") for name, tensor in unet.state_dict().items() if tensor.ndim > 1}
    names = {f"lora_unet_{_sdxl(module)}" for module in modules}
    keys = {f"{name}.lora_down.weight": torch.zeros(1) for name in names}
    keys |= {f"{name}.lora_up.weight": torch.zeros(1) for name in names}
    theirs = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(keys, unet.config))[0]
    peft = convert_unet_state_dict_to_peft(theirs)
    expected = {name.removeprefix("unet.").split(".lora_")[0] for name in peft}
    ours = {module_of(name.removeprefix("lora_unet_")) for name in names}
    assert ours == modules == expected


def _sdxl(module: str) -> str:
    """A module's name in SDXL's one file, flattened: its down blocks are counted from 1 and by three."""
    number = r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)"

    def numbered(found: re.Match[str]) -> str:
        side, level, kind, index = found.groups()
        at = 3 * int(level) + (2 if "samplers" in kind else int(index)) + (side == "down")
        inner = {"resnets": 0, "attentions": 1, "downsamplers": 0}.get(kind, 2)
        return f"{'input' if side == 'down' else 'output'}_blocks.{at}.{inner}"

    name = re.sub(number, numbered, module)
    name = re.sub(r"mid_block\.(\w+)\.(\d)", lambda m: f"middle_block.{2 * int(m[2]) + (m[1] == 'attentions')}", name)
    swaps = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0"}
    swaps |= {"time_embedding.linear_2": "time_embed.2", ".time_emb_proj": ".emb_layers.1", ".conv1": ".in_layers.2"}
    swaps |= {".conv2": ".out_layers.3", ".conv_shortcut": ".skip_connection"}
    for own, theirs in swaps.items():
        name = name.replace(own, theirs) if name == own or own.startswith(".") else name
    if module.startswith("down_blocks") and name.endswith(".conv"):
        name = name.removesuffix("conv") + "op"
    return name.replace(".", "_")


def test_the_middle_factor_of_locon_is_taken_in() -> None:
    down, mid, up = torch.randn(3, 5, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(7, 3, 1, 1)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    factors = {"lora_down": down, "lora_mid": mid, "lora_up": up}
    file = {f"{name}.{kind}.weight": tensor for kind, tensor in factors.items()}
    layer = read_lora(file | {f"{name}.alpha": torch.tensor(6)})["unet"]["down_blocks.0.resnets.0.conv1"]
    x = torch.randn(1, 5, 8, 8)
    conv = torch.nn.functional.conv2d
    expected = 2.0 * conv(conv(conv(x, down), mid, padding=1), up)
    torch.testing.assert_close(conv(x, layer.delta(), padding=1), expected)


@pytest.fixture
def student(tmp_path: Path, pipeline: StableDiffusionPipeline) -> Path:
    """A bk-tiny of the tiny pipeline, with its record."""
    return _student(tmp_path / "student", pipeline, "bk-tiny")


def _student(folder: Path, pipeline: StableDiffusionPipeline, name: Student) -> Path:
    surgery = published(dict(pipeline.unet.config), pipeline.unet.state_dict(), name)
    save(with_unet(pipeline, build(surgery)), folder)
    (folder / "decant.json").write_text(json.dumps({"surgery_map": surgery.surgery_map.to_json()}))
    return folder


def _move(capsys: pytest.CaptureFixture[str], *words: object, status: int = 0) -> str:
    """What `decant move` says: its JSON, or its refusal."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["move", *map(str, words), "--json"])
    said = capsys.readouterr()
    assert left.value.code in ((0, None) if status == 0 else (status,)), said.err
    assert status == 0 or (said.out == "" and "Traceback" not in said.err and "hint: " in said.err)
    return said.err if status else said.out


def _text_lora(pipeline: StableDiffusionPipeline, unet: dict[str, Tensor]) -> dict[str, Tensor]:
    encoder = pipeline.text_encoder
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    encoder.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    text = {f"text_encoder.text_model.{name}": t for name, t in encoder.state_dict().items() if "lora_" in name}
    encoder.delete_adapter("default")
    return unet | {
        name.replace(".default", "").replace("text_model.text_model", "text_model"): t for name, t in text.items()
    }


@pytest.mark.parametrize("source", ["peft", "kohya", "kohya, mixed"])
@pytest.mark.parametrize("name", ["bk-tiny", "bk-base"])
def test_moved_files_open_in_plain_diffusers_with_no_unmatched_key(
    name: Student, source: str, tmp_path: Path, make_pipeline: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every key matches, and the network gives what the merged weights give; mixed ranks and alphas too."""
    pipeline = make_pipeline()
    folder = _student(tmp_path / "student", pipeline, name)
    file = _text_lora(pipeline, adapted(pipeline.unet, EVERYTHING, alpha=4.0))
    if source != "peft":
        file = with_alphas(file, 3.0)
    if source == "kohya, mixed":
        file |= {key: torch.tensor(1.0) for key in file if key.endswith(".alpha") and "attn1" in key}
        for kind, axis in (("lora_down", 0), ("lora_up", 1)):
            names = [key for key in file if kind in key and "attn2" in key]
            file |= {key: file[key].narrow(axis, 0, 2).contiguous() for key in names}
    save_file({key: tensor.contiguous() for key, tensor in file.items()}, tmp_path / "lora.safetensors")
    told = json.loads(
        _move(
            capsys, "--lora", tmp_path / "lora.safetensors", "--to", folder, "--out", tmp_path / "out" / "m.safetensors"
        )
    )
    assert told["moved"] + sum(part["modules"] for part in told["dropped"]) == told["modules"]
    assert told["text_modules"] == 12
    moved = move_lora(read_lora(file), _map(folder), _unet_shapes(folder)).lora
    for written in told["files"].values():
        plain = StableDiffusionPipeline.from_pretrained(folder)
        expected = {key: tensor.clone() for key, tensor in plain.unet.state_dict().items()}
        for module, layer in moved["unet"].items():
            expected[f"{module}.weight"] += layer.delta()
        assert _warnings(lambda plain=plain, written=written: plain.load_lora_weights(written)) == ""
        text = plain.text_encoder.state_dict()
        assert sum("lora_A" in key for key in text) == 12
        found = merged(plain.unet)
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5, msg=key)


def _map(folder: Path) -> SurgeryMap:
    return SurgeryMap.from_json(json.loads((folder / "decant.json").read_text())["surgery_map"])


def _unet_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _warnings(action: Callable[[], object]) -> str:
    """All that diffusers and peft have to say while something is done."""
    import io
    import logging as plain
    import warnings

    said = io.StringIO()
    handler = plain.StreamHandler(said)
    loggers = [plain.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    level = logging.get_verbosity()
    logging.set_verbosity_warning()
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            action()
    finally:
        logging.set_verbosity(level)
        for logger in loggers:
            logger.removeHandler(handler)
    return said.getvalue() + "".join(str(item.message) for item in caught if item.category is UserWarning)


def test_the_listener_hears_an_unmatched_key(student: Path, tmp_path: Path) -> None:
    """The check of the check: the teacher's own LoRA does not fit the student in silence."""
    pipeline = StableDiffusionPipeline.from_pretrained(student)
    module = "unet.mid_block.attentions.0.proj_in"
    kept = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    file = {f"{module}.lora_A.weight": torch.zeros(2, 64, 1, 1), f"{module}.lora_B.weight": torch.zeros(64, 2, 1, 1)}
    file |= {f"{kept}.lora_A.weight": torch.zeros(2, 32), f"{kept}.lora_B.weight": torch.zeros(32, 2)}
    assert "mid_block" in _warnings(lambda: pipeline.load_lora_weights(file))


def test_half_precision_keeps_its_numbers() -> None:
    """A scale that half precision cannot hold exactly is not multiplied into half precision."""
    up, down = torch.linspace(0.1, 0.9, 8, dtype=torch.float16).reshape(4, 2), torch.ones(2, 4, dtype=torch.float16)
    thirds = {"unet": {"conv_in": Layer(down, up, 2 / 3)}}
    halves = {"unet": {"conv_in": Layer(down, up, 1.0)}}
    assert to_peft(thirds)[0]["unet.conv_in.lora_B.weight"].dtype == torch.float32
    assert to_peft(halves)[0]["unet.conv_in.lora_B.weight"].dtype == torch.float16
    assert to_kohya(thirds, {})[0]["lora_unet_conv_in.lora_up.weight"].dtype == torch.float16


def test_kohya_keeps_its_own_notes_and_no_stale_hash() -> None:
    lora = {"unet": {"conv_in": Layer(torch.ones(2, 4), torch.ones(4, 2), 1.0)}}
    notes = {"ss_tag_frequency": "{}", "modelspec.title": "t", "modelspec.hash_sha256": "0x1", "sshs_model_hash": "1"}
    kept = to_kohya(lora, {**notes, "ss_network_dim": "64"})[1]
    assert kept == {
        "format": "pt",
        "ss_tag_frequency": "{}",
        "modelspec.title": "t",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "1.0",
    }


A = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
FOREIGN: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]] = {
    "another text width": (
        {f"{A}.lora_down.weight": torch.ones(2, 768), f"{A}.lora_up.weight": torch.ones(32, 2)},
        ("attn2.to_k: made for a weight of 32 x 768", "allowed: 32 x 32", "Stable Diffusion 1.x"),
    ),
    "Flux": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 2)},
        ("double_blocks", "Stable Diffusion 1.x, 2.x or SDXL", "Flux"),
    ),
    "only what was cut": (
        {
            "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 64),
            "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(64, 2),
        },
        ("none of its 1 UNet modules", "mid_block.attentions.0.proj_in", "decant show"),
    ),
    "DoRA": ({f"{A}.dora_scale": torch.ones(1, 2)}, ("DoRA", "plain LoRA")),
    "LoHa": ({f"{A}.hada_w1_a": torch.ones(1, 2)}, ("LoHa", "extract")),
    "LoKr": ({f"{A}.lokr_w1": torch.ones(1, 2)}, ("LoKr", "extract")),
    "half": ({f"{A}.lora_down.weight": torch.ones(2, 32)}, ("has down alone", "damaged")),
    "ranks": (
        {f"{A}.lora_down.weight": torch.ones(2, 32), f"{A}.lora_up.weight": torch.ones(32, 3)},
        ("down (2, 32), up (32, 3)",),
    ),
    "not finite": (
        {f"{A}.lora_down.weight": torch.full((2, 32), torch.nan), f"{A}.lora_up.weight": torch.ones(32, 2)},
        ("not finite",),
    ),
    "a whole model": ({"unet.conv_in.weight": torch.ones(2, 2)}, ("no key of a LoRA", "whole model")),
    "a second text encoder": (
        {
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 32),
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(64, 2),
        },
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "another family"),
    ),
    "nothing": ({}, ("no tensors",)),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_cannot_be_moved_is_refused_with_its_place(
    kind: str, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, words = FOREIGN[kind]
    save_file(tensors, tmp_path / "lora.safetensors")
    said = _move(
        capsys, "--lora", tmp_path / "lora.safetensors", "--to", student, "--out", tmp_path / "m.safetensors", status=2
    )
    assert all(word in said for word in words), said
    assert not list(tmp_path.glob("m*"))


def test_files_and_folders_that_are_not_asked_for_are_refused(
    student: Path, tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {f"{A}.lora_down.weight": torch.ones(2, 32), f"{A}.lora_up.weight": torch.ones(32, 2)}
    save_file(good, tmp_path / "lora.safetensors")
    whole = (tmp_path / "lora.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-9])
    (tmp_path / "lora.pt").write_bytes(b"x")
    (tmp_path / "there.safetensors").write_bytes(b"x")
    out = tmp_path / "m.safetensors"
    cases = {
        "truncated": ("cut.safetensors", student, out),
        "pickle": ("lora.pt", student, out),
        "missing": ("none.safetensors", student, out),
        "no surgery map": ("lora.safetensors", saved, out),
        "exists": ("lora.safetensors", student, tmp_path / "there.safetensors"),
        "ends in .safetensors": ("lora.safetensors", student, tmp_path / "m.bin"),
    }
    for word, (file, to, target) in cases.items():
        assert word in _move(capsys, "--lora", tmp_path / file, "--to", to, "--out", target, status=2)
    assert not out.exists()


def test_text_says_what_was_dropped(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = {name: tensor.contiguous() for name, tensor in adapted(teacher(), ATTENTION).items()}
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(SystemExit):
        main(
            [
                "move",
                "--lora",
                str(tmp_path / "lora.safetensors"),
                "--to",
                str(student),
                "--out",
                str(tmp_path / "m.safetensors"),
            ]
        )
    said = capsys.readouterr().out
    assert re.search(r"72 of 128 UNet modules moved", said), said
    assert re.search(r"dropped: mid_block, 8 modules with \d+\.\d % .*: the student has no block", said), said


def test_a_lora_of_unfit_shape_is_refused() -> None:
    lora = {"unet": {"a": Layer(torch.randn(2, 5), torch.randn(3, 2), 2.0)}}
    cut = SurgeryMap({"a.weight": "a.weight"}, {"a.weight": {0: [7]}})
    with pytest.raises(UserError, match="narrowed from at least"):
        move_lora(lora, cut, {"a.weight": (1, 5)})  # type: ignore[arg-type]
