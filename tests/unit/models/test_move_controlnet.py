"""A moved ControlNet: the surgery's cut of the teacher's, plain diffusers' own class, and a pipeline that runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from decant.cli.main import main
from decant.errors import UserError
from decant.models.load import save, with_unet
from decant.models.move.controlnet import MovedControlNet, move_controlnet, skeleton
from decant.models.surgery.cut import cut
from decant.models.surgery.keep import Keep
from decant.models.surgery.presets import Student, published
from decant.models.surgery.surgery import Surgery, SurgeryMap, build, pick

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [32, 64, 64, 64],
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
STUDENTS: tuple[Student, ...] = ("bk-base", "bk-small", "bk-tiny")


def teacher(**config: Any) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(**{**UNET, **config}).eval()


def controlled(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet as after some training: every tensor moved a little, its zero convolutions too."""
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16, 32)).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network.requires_grad_(False)


def loaded(moved: MovedControlNet) -> ControlNetModel:
    network = ControlNetModel.from_config(moved.config).eval()
    network.load_state_dict(moved.weights, strict=True)
    return network.requires_grad_(False)


def asked(batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([7, 700])[:batch],
        "encoder_hidden_states": torch.randn(batch, 5, 32, generator=generator),
        "controlnet_cond": torch.rand(batch, 3, 64, 64, generator=generator),
    }


def whole_map(unet: UNet2DConditionModel) -> SurgeryMap:
    return SurgeryMap({name: name for name in unet.state_dict()})


def surgery_of(unet: UNet2DConditionModel, student: Student) -> Surgery:
    return published(dict(unet.config), unet.state_dict(), student)


def test_an_untouched_map_gives_bit_equal_residuals() -> None:
    unet = teacher()
    before = controlled(unet)
    moved = move_controlnet(before.config, before.state_dict(), whole_map(unet), unet.config)
    expected, found = before(**asked()), loaded(moved)(**asked())
    assert moved.dropped == ()
    assert torch.equal(found.mid_block_res_sample, expected.mid_block_res_sample)
    for one, other in zip(found.down_block_res_samples, expected.down_block_res_samples, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("student", STUDENTS)
def test_residuals_fit_the_students_and_are_the_teachers_where_nothing_was_cut_before(student: Student) -> None:
    unet = teacher()
    surgery = surgery_of(unet, student)
    before = controlled(unet)
    moved = move_controlnet(before.config, before.state_dict(), surgery.surgery_map, surgery.config)
    given = asked()
    theirs, mine = before(**given), loaded(moved)(**given)
    cut = build(surgery)
    added = {
        "down_block_additional_residuals": mine.down_block_res_samples,
        "mid_block_additional_residual": mine.mid_block_res_sample,
    }
    unet_given = {key: value for key, value in given.items() if key != "controlnet_cond"}
    with torch.no_grad():
        controlled_output, plain = cut(**unet_given, **added).sample, cut(**unet_given).sample
    assert not torch.allclose(controlled_output, plain)
    # Up to the first layer that was cut the two compute the same: conv_in, and the first pair.
    for number in (0, 1):
        assert torch.equal(mine.down_block_res_samples[number], theirs.down_block_res_samples[number])
    levels = len(surgery.config["block_out_channels"])
    assert len(mine.down_block_res_samples) == 2 * levels


@pytest.mark.parametrize("student", ["bk-small", "bk-tiny"])
def test_without_a_mid_block_exactly_nothing_is_added_in_its_place(student: Student) -> None:
    unet = teacher()
    surgery = surgery_of(unet, student)
    before = controlled(unet)
    moved = move_controlnet(before.config, before.state_dict(), surgery.surgery_map, surgery.config)
    assert torch.count_nonzero(loaded(moved)(**asked()).mid_block_res_sample) == 0
    lost = {part.part: part.parameters for part in moved.dropped}
    assert lost["mid_block"] == sum(p.numel() for p in before.mid_block.parameters())
    assert "controlnet_mid_block" in lost


def test_every_parameter_is_moved_or_told() -> None:
    unet = teacher()
    surgery = surgery_of(unet, "bk-base")
    before = controlled(unet)
    moved = move_controlnet(before.config, before.state_dict(), surgery.surgery_map, surgery.config)
    total = sum(tensor.numel() for tensor in before.state_dict().values())
    assert sum(t.numel() for t in moved.weights.values()) + sum(part.parameters for part in moved.dropped) == total
    assert {part.part for part in moved.dropped} >= {"down_blocks.0.resnets.1", "controlnet_down_blocks.2"}


def narrowed(config: dict[str, Any], weights: dict[str, Tensor]) -> Surgery:
    """Every level to every other of its channels, by hand."""
    small = {**config, "block_out_channels": [32, 64, 64, 64], "attention_head_dim": 4}
    own = build_shapes(small)
    kept = {name: _axes(shape, tuple(weights[name].shape)) for name, shape in own.items()}
    cut = {name: pick(weights[name], kept[name]) for name in own}
    return Surgery(small, cut, SurgeryMap({name: name for name in own}, {n: a for n, a in kept.items() if a}))


def _axes(small: tuple[int, ...], large: tuple[int, ...]) -> dict[int, list[int]]:
    """Where an axis has twice the student's channels, every other one."""
    return {
        axis: list(range(1, there, 2))
        for axis, (here, there) in enumerate(zip(small, large, strict=True))
        if here != there
    }


def build_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in teacher(**config).state_dict().items()}


def test_narrowed_channels_are_cut_in_zero_convolutions_and_in_the_pictures_embedding() -> None:
    large = {**UNET, "block_out_channels": [64, 128, 128, 128]}
    unet = teacher(**large)
    surgery = narrowed(large, unet.state_dict())
    before = controlled(unet)
    moved = move_controlnet(before.config, before.state_dict(), surgery.surgery_map, build(surgery).config)
    weights = before.state_dict()
    first = weights["controlnet_down_blocks.0.weight"]
    assert torch.equal(moved.weights["controlnet_down_blocks.0.weight"], first[1::2, 1::2])
    assert torch.equal(moved.weights["controlnet_mid_block.bias"], weights["controlnet_mid_block.bias"][1::2])
    last = weights["controlnet_cond_embedding.conv_out.weight"]
    assert torch.equal(moved.weights["controlnet_cond_embedding.conv_out.weight"], last[1::2])
    mine = loaded(moved)(**asked())
    with torch.no_grad():
        build(surgery)(
            **{key: value for key, value in asked().items() if key != "controlnet_cond"},
            down_block_additional_residuals=mine.down_block_res_samples,
            mid_block_additional_residual=mine.mid_block_res_sample,
        )


@pytest.mark.parametrize(
    "keep", [Keep(widths=(16, 32, 32, 32)), Keep(mid="resnet"), Keep(levels=3, widths=(16, 32, 32))], ids=str
)
def test_described_students_run_with_theirs(keep: Keep) -> None:
    """Narrowed levels by decant's own surgery, a mid block of one resnet, a level less: residuals fit and count."""
    unet = teacher()
    surgery = cut(dict(unet.config), unet.state_dict(), keep)
    before = controlled(unet)
    moved = move_controlnet(before.config, before.state_dict(), surgery.surgery_map, surgery.config)
    given = {key: value for key, value in asked().items() if key != "controlnet_cond"}
    mine, student = loaded(moved)(**asked()), build(surgery)
    with torch.no_grad():
        plain = student(**given).sample
        added = student(
            **given,
            down_block_additional_residuals=mine.down_block_res_samples,
            mid_block_additional_residual=mine.mid_block_res_sample,
        ).sample
    assert added.shape == plain.shape and not torch.allclose(added, plain)


def test_a_sdxl_controlnet_follows_too() -> None:
    """Other levels, depths and embeddings: nothing of the map is SD 1.x's alone."""
    config: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": [32, 64, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 3],
        "attention_head_dim": [2, 4, 4],
        "use_linear_projection": True,
        "cross_attention_dim": 32,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    }
    unet = UNet2DConditionModel(**config)
    student = UNet2DConditionModel(**{**config, "transformer_layers_per_block": [1, 1, 2], "mid_block_type": None})
    before = controlled(unet)
    surgery_map = SurgeryMap({name: name for name in student.state_dict()})
    moved = move_controlnet(before.config, before.state_dict(), surgery_map, student.config)
    assert {part.part for part in moved.dropped} >= {"mid_block", "down_blocks.2.attentions.1.transformer_blocks.2"}
    assert any(name.startswith("add_embedding.") for name in moved.weights)
    loaded(moved)


def test_what_diffusers_cannot_build_is_refused_with_its_reason() -> None:
    unet = teacher()
    before = controlled(unet)
    for key, value in (("layers_per_block", [1, 2, 2, 2]), ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn")):
        with pytest.raises(UserError, match=rf"unet\.{key}(.|\n)*ControlNetModel builds no other(.|\n)*hint: "):
            move_controlnet(before.config, before.state_dict(), whole_map(unet), {**unet.config, key: value})


def test_a_controlnet_of_another_family_is_refused() -> None:
    unet, other = teacher(), teacher(cross_attention_dim=48)
    before = controlled(other)
    with pytest.raises(UserError, match=r"attn2.to_k.weight: of 32 x 48\n  allowed: .*32 x 32(.|\n)*another family"):
        move_controlnet(before.config, before.state_dict(), whole_map(unet), unet.config)


@pytest.fixture
def places(tmp_path: Path, pipeline: StableDiffusionPipeline) -> tuple[Path, Path]:
    """A ControlNet's folder, and a bk-tiny of the same teacher with its record."""
    surgery = surgery_of(pipeline.unet, "bk-tiny")
    save(with_unet(pipeline, build(surgery)), tmp_path / "student")
    (tmp_path / "student" / "decant.json").write_text(json.dumps({"surgery_map": surgery.surgery_map.to_json()}))
    controlled(pipeline.unet).save_pretrained(tmp_path / "controlnet")
    return tmp_path / "controlnet", tmp_path / "student"


def test_the_folder_opens_in_plain_diffusers_and_draws(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, student = places
    words = ["move", "--controlnet", str(folder), "--to", str(student), "--out", str(tmp_path / "moved"), "--json"]
    with pytest.raises(SystemExit):
        main(words)
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] < told["parameters_before"] and told["dropped"]
    network, info = ControlNetModel.from_pretrained(tmp_path / "moved", output_loading_info=True)
    assert info["missing_keys"] == [] or not info["missing_keys"]
    assert not info["unexpected_keys"]
    plain = StableDiffusionPipeline.from_pretrained(student, safety_checker=None)
    drawing = StableDiffusionControlNetPipeline(**plain.components, controlnet=network, requires_safety_checker=False)
    drawing.set_progress_bar_config(disable=True)

    def drawn(image: Image.Image) -> Tensor:
        seed = torch.Generator().manual_seed(0)
        return drawing("a", image=image, num_inference_steps=2, generator=seed, output_type="pt").images

    black, white = (drawn(Image.new("RGB", (64, 64), colour)) for colour in ("black", "white"))
    assert black.isfinite().all() and not torch.equal(black, white)


def test_bad_folders_are_refused(places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, student = places
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()

    def refused(*words: object) -> str:
        with pytest.raises(SystemExit) as left:
            main(["move", "--to", str(student), *map(str, words)])
        assert left.value.code == 2
        said = capsys.readouterr()
        assert said.out == "" and "hint: " in said.err
        return said.err

    out = tmp_path / "moved"
    assert "exactly one of them" in refused("--out", out)
    assert "exactly one of them" in refused("--out", out, "--lora", "a", "--controlnet", folder)
    assert "ControlNetModel" in refused("--out", out, "--controlnet", student / "unet")
    assert "from_single_file" in refused("--out", out, "--controlnet", weights)
    assert "exists" in refused("--out", student, "--controlnet", folder)
    weights.write_bytes(whole[:-50])
    assert "truncated" in refused("--out", out, "--controlnet", folder)
    config = json.loads((folder / "config.json").read_text())
    weights.write_bytes(whole)
    (folder / "config.json").write_text(json.dumps({**config, "block_out_channels": [32, 32, 64, 64]}))
    assert "two different networks" in refused("--out", out, "--controlnet", folder)
    assert not out.exists()


def test_skeleton_takes_no_memory() -> None:
    assert all(tensor.is_meta for tensor in skeleton(controlled(teacher()).config).state_dict().values())
