"""Block removal: the student opens in plain diffusers, and every value of it is its teacher's."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from decant.errors import UserError
from decant.models.load import architecture, save, with_unet
from decant.models.surgery.features import feature_pairs
from decant.models.surgery.presets import Student, published
from decant.models.surgery.surgery import Surgery, SurgeryMap, build, layer_map, pick, skeleton

STUDENTS: tuple[Student, ...] = ("bk-base", "bk-small", "bk-tiny")
TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [32, 64, 64, 64],
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}


def teacher(**config: Any) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(**{**TINY, **config}).eval()


def forward(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x_t = torch.randn(1, unet.config.in_channels, 16, 16, generator=generator)
    width = unet.config.cross_attention_dim
    text = torch.randn(1, 5, width if isinstance(width, int) else width[0], generator=generator)
    with torch.no_grad():
        return unet(x_t, torch.tensor([7]), encoder_hidden_states=text).sample


def assert_sound(unet: UNet2DConditionModel, surgery: Surgery) -> None:
    """Key sets match exactly, values are the teacher's, and nothing is shared with it."""
    weights = unet.state_dict()
    assert surgery.surgery_map.parameters.keys() == surgery.weights.keys()
    assert surgery.weights.keys() == skeleton(surgery.config).state_dict().keys()
    for name, source in surgery.surgery_map.parameters.items():
        expected = weights[source]
        for axis, kept in surgery.surgery_map.kept.get(name, {}).items():
            expected = torch.from_numpy(np.take(expected.numpy(), kept, axis=axis))
        assert torch.equal(surgery.weights[name], expected), name
        assert surgery.weights[name].data_ptr() != weights[source].data_ptr()
        assert surgery.weights[name].is_contiguous()


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "three layers": {"layers_per_block": 3},
    "layers by level": {"layers_per_block": [2, 3, 2, 4]},
    "five levels": {
        "block_out_channels": [32, 32, 64, 64, 64],
        "down_block_types": ["CrossAttnDownBlock2D"] * 4 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 4,
    },
    "linear projection, heads by level": {
        "use_linear_projection": True,
        "attention_head_dim": [2, 4, 8, 8],
        "cross_attention_dim": [16, 16, 16, 16],
    },
    "MuseTalk's channels": {"in_channels": 8},
    "inpainting's channels": {"in_channels": 9},
    "depths by level": {"transformer_layers_per_block": [2, 1, 3, 1]},
    "depths by attention": {
        "transformer_layers_per_block": [[2, 1], [1, 2], [3, 1], 1],
        "reverse_transformer_layers_per_block": [1, [1, 2, 3], [2, 1, 1], [1, 1, 2]],
    },
    "no mid block": {"mid_block_type": None},
    "mid block without attention": {"mid_block_type": "UNetMidBlock2D"},
    "four widths": {"block_out_channels": [32, 64, 96, 128]},
}


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_student_reopens_in_plain_diffusers(config: dict[str, Any], student: Student, tmp_path: Path) -> None:
    unet = teacher(**config)
    surgery = published(unet.config, unet.state_dict(), student)
    assert_sound(unet, surgery)
    cut = build(surgery)
    cut.save_pretrained(tmp_path)
    again, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == surgery.weights.keys()
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in cut.state_dict().items())
    # Weights mapped from a file lie at odd addresses, for which CPU kernels round differently.
    torch.testing.assert_close(forward(cut), forward(again), atol=1e-5, rtol=1e-5)
    assert forward(cut).shape == (1, 4, 16, 16)


def test_layer_counts_after_the_cut() -> None:
    unet = teacher(layers_per_block=[2, 3, 2, 4])
    base = build(published(unet.config, unet.state_dict(), "bk-base"))
    assert [len(block.resnets) for block in base.down_blocks] == [1, 1, 1, 1]
    assert [len(block.resnets) for block in base.up_blocks] == [2, 2, 2, 2]
    assert base.mid_block is not None
    tiny = build(published(unet.config, unet.state_dict(), "bk-tiny"))
    assert tiny.mid_block is None
    assert len(tiny.down_blocks) == len(tiny.up_blocks) == 3
    assert tiny.down_blocks[-1].downsamplers is None


def test_up_blocks_take_the_last_pair_not_the_second() -> None:
    unet = teacher()
    layers = layer_map(published(unet.config, unet.state_dict(), "bk-base").surgery_map)
    assert layers["up_blocks.0.resnets.1"] == "up_blocks.0.resnets.2"
    assert layers["up_blocks.3.attentions.1"] == "up_blocks.3.attentions.2"
    assert layers["mid_block.attentions.0"] == "mid_block.attentions.0"
    tiny = layer_map(published(unet.config, unet.state_dict(), "bk-tiny").surgery_map)
    assert tiny["up_blocks.0.resnets.1"] == "up_blocks.1.resnets.2"
    assert tiny["up_blocks.1.upsamplers.0"] == "up_blocks.2.upsamplers.0"
    assert tiny["conv_in"] == "conv_in"
    assert not any(name.startswith(("mid_block", "down_blocks.3")) for name in tiny.values())


def test_feature_pairs_are_bk_sdm_s() -> None:
    unet = teacher()
    blocks = {f"{side}_blocks.{level}" for side in ("down", "up") for level in range(4)}
    for student in ("bk-base", "bk-small"):
        pairs = published(unet.config, unet.state_dict(), student).surgery_map.features
        assert pairs == {block: block for block in blocks}
    assert published(unet.config, unet.state_dict(), "bk-tiny").surgery_map.features == {
        "down_blocks.0": "down_blocks.0",
        "down_blocks.1": "down_blocks.1",
        "down_blocks.2.attentions.0.proj_out": "down_blocks.2.attentions.1.proj_out",
        "up_blocks.0": "up_blocks.1",
        "up_blocks.1": "up_blocks.2",
        "up_blocks.2": "up_blocks.3",
    }


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_paired_features_have_one_shape(config: dict[str, Any], student: Student) -> None:
    unet = teacher(**config)
    surgery = published(unet.config, unet.state_dict(), student)
    mine = output_shapes(build(surgery), list(surgery.surgery_map.features))
    theirs = output_shapes(unet, list(surgery.surgery_map.features.values()))
    assert list(mine.values()) == list(theirs.values())


def output_shapes(unet: UNet2DConditionModel, names: list[str]) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}
    for name in names:
        unet.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: shapes.update(
                {name: (out[0] if isinstance(out, tuple) else out).shape}
            )
        )
    forward(unet)
    return {name: shapes[name] for name in names}


def test_map_survives_json() -> None:
    unet = teacher(block_out_channels=[32, 64, 96, 128])
    surgery_map = published(unet.config, unet.state_dict(), "bk-tiny").surgery_map
    assert surgery_map.kept
    assert SurgeryMap.from_json(json.loads(json.dumps(surgery_map.to_json()))) == surgery_map


def test_narrower_neighbour_keeps_its_skip_channels() -> None:
    unet = teacher(block_out_channels=[32, 64, 96, 128])
    surgery = published(unet.config, unet.state_dict(), "bk-tiny")
    kept = surgery.surgery_map.kept["up_blocks.0.resnets.0.conv1.weight"]
    assert kept == {1: [*range(96), *range(128, 224)]}


def test_config_may_leave_out_every_default_key() -> None:
    unet = teacher()
    surgery = published(TINY, unet.state_dict(), "bk-small")
    assert_sound(unet, surgery)
    assert surgery.config["mid_block_type"] is None
    json.dumps(surgery.config)


def test_surgery_leaves_the_teacher_alone() -> None:
    unet = teacher()
    before, config = forward(unet), json.dumps(dict(unet.config), default=str)
    cut = build(published(unet.config, unet.state_dict(), "bk-base"))
    with torch.no_grad():
        for parameter in cut.parameters():
            parameter.zero_()
    assert torch.equal(forward(unet), before)
    assert json.dumps(dict(unet.config), default=str) == config


REFUSED: dict[str, tuple[dict[str, Any], Student, str]] = {
    "three levels": (
        {
            "block_out_channels": [32, 64, 64],
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        },
        "bk-tiny",
        "four or more levels",
    ),
    "attention below": ({"down_block_types": ["CrossAttnDownBlock2D"] * 4}, "bk-base", "down_block_types"),
    "no attention above": ({"up_block_types": ["UpBlock2D"] * 4}, "bk-base", "up_block_types"),
    "already cut": ({"layers_per_block": 1}, "bk-base", "already cut"),
    "one level already cut": ({"layers_per_block": [2, 1, 2, 2]}, "bk-base", "already cut"),
    "narrow innermost level": ({"block_out_channels": [32, 64, 96, 64]}, "bk-tiny", "bk-small"),
    "SDXL": ({"addition_embed_type": "text_time"}, "bk-base", "addition_embed_type"),
    "another class": ({"_class_name": "UNet2DModel"}, "bk-base", "UNet2DModel"),
}


@pytest.mark.parametrize(("config", "student", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_of_the_layout_is_refused(config: dict[str, Any], student: Student, says: str) -> None:
    with pytest.raises(UserError, match=says):
        published({**TINY, **config}, {}, student)


def test_a_cut_network_is_not_cut_where_nothing_is_left_to_cut() -> None:
    unet = teacher()
    for number, student in enumerate(STUDENTS):
        surgery = published(unet.config, unet.state_dict(), student)
        for again in STUDENTS[: number + 1]:
            with pytest.raises(UserError):
                published(surgery.config, surgery.weights, again)


@pytest.mark.parametrize(
    ("first", "second"), [("bk-base", "bk-small"), ("bk-base", "bk-tiny"), ("bk-small", "bk-tiny")]
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_two_cuts_are_one(config: dict[str, Any], first: Student, second: Student) -> None:
    unet = teacher(**config)
    if first == "bk-base" and second == "bk-small" and unet.mid_block is None:
        pytest.skip("nothing is left to cut")
    once = published(unet.config, unet.state_dict(), second)
    before = published(unet.config, unet.state_dict(), first)
    twice = published(before.config, before.weights, second)
    assert twice.config == once.config
    assert all(torch.equal(weight, twice.weights[name]) for name, weight in once.weights.items())
    composed = twice.surgery_map.after(before.surgery_map, {})
    features = feature_pairs(twice.config, unet.config, composed)
    assert twice.surgery_map.after(before.surgery_map, features) == once.surgery_map


@given(st.data())
def test_indices_of_indices(data: st.DataObject) -> None:
    """A tensor cut twice is the tensor cut once by the composed map, whatever axes either cut narrows."""

    def narrowed(shape: tuple[int, ...]) -> dict[int, list[int]]:
        chosen = {axis: data.draw(st.lists(st.integers(0, size - 1), min_size=1)) for axis, size in enumerate(shape)}
        return {axis: chosen[axis] for axis in data.draw(st.sets(st.sampled_from(range(len(shape)))))}

    tensor = torch.arange(60).reshape(3, 4, 5)
    first = SurgeryMap({"b": "a"}, {"b": narrowed(tuple(tensor.shape))})
    middle = pick(tensor, first.kept["b"])
    second = SurgeryMap({"c": "b"}, {"c": narrowed(tuple(middle.shape))})
    composed = second.after(first, {})
    assert composed.parameters == {"c": "a"}
    assert torch.equal(pick(middle, second.kept["c"]), pick(tensor, composed.kept.get("c", {})))


def test_unknown_student_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'bk-tiny'"):
        published(TINY, {}, "bk-tinny")  # type: ignore[arg-type]


def test_weights_of_another_network_are_refused() -> None:
    weights = teacher().state_dict()
    with pytest.raises(UserError, match="two different networks"):
        published({**TINY, "block_out_channels": [32, 32, 64, 64]}, weights, "bk-base")
    with pytest.raises(UserError, match=r"conv_in\.weight: missing"):
        published(TINY, {name: w for name, w in weights.items() if name != "conv_in.weight"}, "bk-base")


@settings(max_examples=15, deadline=None)
@given(
    groups=st.lists(st.integers(1, 3), min_size=4, max_size=5),
    layers=st.integers(2, 4),
    linear=st.booleans(),
    student=st.sampled_from(STUDENTS),
)
def test_any_widths_and_depths_fit(groups: list[int], layers: int, linear: bool, student: Student) -> None:
    widths = [32 * group for group in groups]
    widths[-1] = max(widths[-2:])
    levels = len(widths)
    config = architecture("sd15") | {
        "block_out_channels": widths,
        "layers_per_block": layers,
        "use_linear_projection": linear,
        "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
    }
    surgery = published(config, skeleton(config).state_dict(), student)
    # Strict loading fails on any key too many, too few or of another shape.
    build(surgery)


STRANGER = """
import sys, numpy as np, torch
from pathlib import Path
from diffusers import StableDiffusionPipeline
for folder in map(Path, sys.argv[1:]):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="np")
    np.save(folder / "picture.npy", picture.images)
assert not any(name.split(".")[0] == "decant" for name in sys.modules), "decant was imported"
"""


def test_saved_folders_open_where_decant_is_never_imported(
    make_pipeline: Callable[..., StableDiffusionPipeline], tmp_path: Path
) -> None:
    pipeline, pictures = make_pipeline(), {}
    for student in STUDENTS:
        cut = with_unet(pipeline, build(published(pipeline.unet.config, pipeline.unet.state_dict(), student)))
        save(cut, tmp_path / student)
        cut.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        pictures[student] = cut("a red circle", num_inference_steps=2, generator=generator, output_type="np").images
    subprocess.run([sys.executable, "-c", STRANGER, *(str(tmp_path / student) for student in STUDENTS)], check=True)
    for student, mine in pictures.items():
        np.testing.assert_allclose(np.load(tmp_path / student / "picture.npy"), mine, atol=1e-5)
