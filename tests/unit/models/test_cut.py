"""Any description: a clear refusal, or a student that runs and whose every value is its teacher's."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from decant.errors import UserError
from decant.models.surgery.channels import magnitudes
from decant.models.surgery.cut import cut
from decant.models.surgery.keep import Keep, Part
from decant.models.surgery.plan import plan
from decant.models.surgery.spaces import Space, Spaces
from decant.models.surgery.surgery import Surgery, build, pick

SMALL: dict[str, Any] = {"sample_size": 8, "cross_attention_dim": 16, "norm_num_groups": 4}
SD = SMALL | {"block_out_channels": [8, 16, 24, 24], "attention_head_dim": 4}
DEEP = SMALL | {
    "block_out_channels": [16, 32, 64],
    "attention_head_dim": [2, 4, 8],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
UNEVEN = SMALL | {
    "block_out_channels": [8, 16, 16, 32],
    "attention_head_dim": [2, 2, 4, 4],
    "layers_per_block": [2, 3, 1, 2],
    "transformer_layers_per_block": [[1, 2], [2, 1, 3], [2], 1],
    "reverse_transformer_layers_per_block": [1, [2, 1], [1, 1, 2, 3], [1, 2, 1]],
}
TEACHERS = {"sd": SD, "deep": DEEP, "uneven": UNEVEN}


@cache
def teacher(name: str) -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(**TEACHERS[name]).eval()


def forward(unet: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x_t, text = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 5, 16, generator=generator)
    added = None
    if unet.config.addition_embed_type:
        added = {"text_embeds": torch.randn(1, 8, generator=generator), "time_ids": torch.arange(6.0)[None]}
    with torch.no_grad():
        output: Tensor = unet(x_t, torch.tensor([7]), encoder_hidden_states=text, added_cond_kwargs=added).sample
    return output


def of(name: str, keep: Keep, **more: Any) -> Surgery:
    unet = teacher(name)
    return cut(unet.config, unet.state_dict(), keep, **more)


def assert_sound(surgery: Surgery, weights: dict[str, Tensor]) -> UNet2DConditionModel:
    """It builds, it runs, and the map leads every value to the teacher's."""
    student = build(surgery)
    assert forward(student).shape == (1, 4, 16, 16)
    assert surgery.surgery_map.parameters.keys() == surgery.weights.keys()
    for name, source in surgery.surgery_map.parameters.items():
        assert torch.equal(surgery.weights[name], pick(weights[source], surgery.surgery_map.kept.get(name, {}))), name
    for mine, theirs in surgery.surgery_map.features.items():
        assert student.get_submodule(mine) is not None and theirs
    return student


def indices(there: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Some of 0 to there, now and then one too many."""
    return st.sets(st.integers(0, there), max_size=there).map(lambda chosen: tuple(sorted(chosen)))


@st.composite
def part(draw: st.DrawFn, count: int | None = None) -> Part:
    resnets = tuple(range(count)) if count is not None else draw(st.none() | indices(3))
    attentions = draw(st.none() | st.just(()) | st.just(resnets))
    depth = draw(st.none() | st.integers(0, 3) | st.lists(st.integers(0, 2), max_size=3).map(tuple))
    blocks = draw(st.none() | st.lists(indices(2), max_size=3).map(tuple)) if depth is None else None
    return Part(resnets, attentions, depth, blocks)


@st.composite
def keep(draw: st.DrawFn, levels: int) -> Keep:
    """A description that is often sound: up blocks have one resnet more than the down block of their level."""
    stay = draw(st.none() | st.integers(1, levels))
    down, up = {}, {}
    for level in draw(st.sets(st.integers(0, levels - 1), max_size=2)):
        count = draw(st.none() | st.integers(1, 2))
        down[level] = draw(part(count))
        made = draw(part(None if count is None else count + 1))
        up[levels - 1 - level] = made
    return Keep(
        levels=stay,
        down=down,
        up=up,
        mid=draw(st.sampled_from(["whole", "resnet", "none"])),
        mid_part=draw(st.just(Part()) | st.integers(0, 3).map(lambda depth: Part(depth=depth))),
        widths=draw(
            st.none() | st.lists(st.sampled_from([4, 8, 12, 16, 32]), min_size=levels, max_size=levels).map(tuple)
        ),
        heads=draw(st.none() | st.lists(st.sampled_from([1, 2, 4]), min_size=levels, max_size=levels).map(tuple)),
        rule=draw(st.sampled_from(["first", "even"])),
        channels=draw(st.sampled_from(["first", "magnitude"])),
    )


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(sorted(TEACHERS)))
def test_any_description_is_refused_or_gives_a_student(data: st.DataObject, name: str) -> None:
    unet = teacher(name)
    description = data.draw(keep(len(unet.config.block_out_channels)))
    try:
        surgery = of(name, description)
    except UserError as error:
        assert "allowed:" in str(error) and "hint:" in str(error)
        return
    assert_sound(surgery, unet.state_dict())
    # A second cut, of the student, is one cut of the teacher.
    again = data.draw(keep(len(surgery.config["block_out_channels"])))
    try:
        second = cut(surgery.config, surgery.weights, again)
    except UserError:
        return
    composed = second.surgery_map.after(surgery.surgery_map, {})
    for parameter, source in composed.parameters.items():
        expected = pick(unet.state_dict()[source], composed.kept.get(parameter, {}))
        assert torch.equal(second.weights[parameter], expected), parameter


@pytest.mark.parametrize("name", TEACHERS)
def test_keeping_everything_changes_nothing(name: str) -> None:
    surgery = of(name, Keep())
    assert not surgery.surgery_map.kept
    assert torch.equal(forward(assert_sound(surgery, teacher(name).state_dict())), forward(teacher(name)))


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_reopens_in_plain_diffusers(name: str, tmp_path: Path) -> None:
    description = {
        "sd": Keep(levels=3, mid="none", widths=(8, 12, 20), channels="magnitude"),
        "deep": Keep(down={2: Part(depth=(2, 3))}, up={0: Part(blocks=((0, 3), (1,), ()))}, mid="resnet"),
        "uneven": Keep(down={1: Part(attentions=())}, widths=(4, 8, 8, 16), channels="magnitude"),
    }[name]
    student = build(of(name, description))
    student.save_pretrained(tmp_path)
    again, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(forward(student), forward(again), atol=1e-5, rtol=1e-5)


def widened(narrow: UNet2DConditionModel, config: dict[str, Any]) -> dict[str, Tensor]:
    """A network of twice the width whose every second channel is empty.

    Made by shapes alone: an axis that is twice as long has zeros between its entries. That a cut finds the narrow
    network again says that it knows every axis: joined inputs, heads, gates and all.
    """
    wide = UNet2DConditionModel(**config).state_dict()
    made = {}
    for name, weight in narrow.state_dict().items():
        value = weight.clone()
        for axis, (size, whole) in enumerate(zip(weight.shape, wide[name].shape, strict=True)):
            assert whole in (size, 2 * size), name
            if whole == 2 * size:
                value = value.repeat_interleave(2, axis).index_fill_(axis, torch.arange(1, whole, 2), 0.0)
        made[name] = value
    return made


@pytest.mark.parametrize("name", ["sd", "uneven"])
def test_the_channels_that_matter_are_found_again(name: str) -> None:
    narrow = teacher(name)
    widths = list(narrow.config.block_out_channels)
    config = {**TEACHERS[name], "block_out_channels": [2 * width for width in widths]}
    surgery = cut(config, widened(narrow, config), Keep(widths=tuple(widths), channels="magnitude"))
    for parameter, weight in narrow.state_dict().items():
        assert torch.equal(surgery.weights[parameter], weight), parameter
    assert torch.equal(forward(build(surgery)), forward(narrow))


def test_the_first_channels_are_the_first_of_everything_that_is_joined() -> None:
    kept = of("sd", Keep(widths=(4, 8, 12, 12))).surgery_map.kept
    # Below: level 2 of 24 channels; the skip: level 1 of 16.
    assert kept["up_blocks.1.resnets.2.conv1.weight"] == {0: [*range(12)], 1: [*range(12), *range(24, 32)]}
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    assert kept[f"{block}.ff.net.0.proj.weight"][0] == [*range(32), *range(64, 96)]
    # Four heads of four channels become four heads of two.
    assert kept[f"{block}.attn1.to_q.weight"][0] == [0, 1, 4, 5, 8, 9, 12, 13]
    assert kept["time_embedding.linear_1.weight"] == {0: [*range(16)], 1: [*range(4)]}


def test_heads_go_whole_and_together() -> None:
    surgery = of("deep", Keep(widths=(8, 16, 32), heads=(1, 2, 4), channels="magnitude"))
    kept = surgery.surgery_map.kept
    assert_sound(surgery, teacher("deep").state_dict())
    attention = "down_blocks.2.attentions.1.transformer_blocks.3.attn2"
    rows = kept[f"{attention}.to_q.weight"][0]
    assert rows == kept[f"{attention}.to_k.weight"][0] == kept[f"{attention}.to_v.weight"][0]
    heads = {row // 8 for row in rows}
    assert len(heads) == 4 and len(rows) == 32
    weights = teacher("deep").state_dict()
    norms = sum(
        weights[f"{attention}.{to}.weight"].double().square().sum(1).view(8, 8).sum(1)
        for to in ("to_q", "to_k", "to_v")
    ) + weights[f"{attention}.to_out.0.weight"].double().square().sum(0).view(8, 8).sum(1)
    assert heads == set(torch.as_tensor(norms).topk(4).indices.tolist())


def test_groups_of_a_norm_give_equally() -> None:
    surgery = of("sd", Keep(widths=(4, 8, 12, 12), channels="magnitude"))
    for name, axes in surgery.surgery_map.kept.items():
        if name.endswith("attentions.0.norm.weight") and name.startswith("down_blocks.2"):
            assert [sum(index // 6 == group for index in axes[0]) for group in range(4)] == [3, 3, 3, 3]
            break
    else:
        pytest.fail("no such norm")


def test_magnitude_counts_what_makes_and_what_reads_a_channel() -> None:
    unet = copy.deepcopy(teacher("sd"))
    inner = unet.down_blocks[0].resnets[0]
    space = Space("inner", "down_blocks.0.resnets.0", 0)
    found = magnitudes(unet.state_dict(), Spaces.of(unet.config))[space]
    by_hand = (
        inner.conv1.weight.double().square().sum((1, 2, 3))
        + inner.conv1.bias.double().square()
        + inner.time_emb_proj.weight.double().square().sum(1)
        + inner.time_emb_proj.bias.double().square()
        + inner.norm2.weight.double().square()
        + inner.norm2.bias.double().square()
        + inner.conv2.weight.double().square().sum((0, 2, 3))
    )
    torch.testing.assert_close(found, by_hand.detach())


@pytest.mark.parametrize("name", TEACHERS)
def test_every_axis_has_its_space(name: str) -> None:
    """The sizes of an axis's spaces add up to it, over every parameter of every layout."""
    unet = teacher(name)
    spaces = Spaces.of(unet.config)
    for parameter, weight in unet.state_dict().items():
        axes = spaces.axes(parameter)
        assert axes is not None, parameter
        for size, parts in zip(weight.shape, axes, strict=False):
            assert not parts or sum(spaces.size(each) for each in parts) == size, parameter


@pytest.mark.parametrize(("count", "expected"), [(1, (0,)), (2, (0, 3)), (3, (0, 2, 3)), (4, (0, 1, 2, 3)), (0, ())])
def test_evenly_spaced_blocks_reach_from_first_to_last(count: int, expected: tuple[int, ...]) -> None:
    made = plan(DEEP, Keep(down={2: Part(depth=count)}, mid="none", rule="even"))
    assert made.down[2].blocks == (expected, expected)


def test_sensitive_blocks_are_those_that_hurt_most() -> None:
    name = "down_blocks.2.attentions.{}.transformer_blocks.{}"
    damage = {name.format(a, b): value for a in (0, 1) for b, value in enumerate((0.1, 0.4, 0.2, 0.3)[:: 1 - 2 * a])}
    made = plan(DEEP, Keep(down={2: Part(depth=2)}, mid="none", rule="sensitive"), damage)
    assert made.down[2].blocks == ((1, 3), (0, 2))
    with pytest.raises(UserError, match="decant importance"):
        plan(DEEP, Keep(down={2: Part(depth=2)}, mid="none", rule="sensitive"))


REFUSED: dict[str, tuple[str, Keep, str]] = {
    "a level too many": ("sd", Keep(levels=5), r"levels: 5\s+allowed: 1 to 4"),
    "no such block": ("sd", Keep(down={7: Part()}), r"down\.7: .*no such block\s+allowed: down 0 to 3"),
    "a block that goes with its level": ("sd", Keep(levels=3, down={3: Part()}), "goes with its level"),
    "no such resnet": ("sd", Keep(down={1: Part(resnets=(2,))}), r"down_blocks\.1\.resnets: \[2\]\s+allowed: .*0 to 1"),
    "twice the same": ("sd", Keep(down={1: Part(resnets=(0, 0))}), "each once"),
    "nothing of a level": ("sd", Keep(down={1: Part(resnets=())}), "at least one"),
    "skips do not come out": ("sd", Keep(down={1: Part(resnets=(0,))}), r"up_blocks\.2\.resnets: .*\n.*one more than"),
    "an attention where there is none": ("sd", Keep(down={3: Part(attentions=(0,))}), "the teacher has none"),
    "some attentions": ("sd", Keep(down={0: Part(attentions=(0,))}), "after every resnet, or after none"),
    "no such transformer block": ("deep", Keep(down={2: Part(blocks=((4,), (0,)))}), "0 to 3"),
    "too deep": ("deep", Keep(down={2: Part(depth=5)}), "0 to 4"),
    "depths for other attentions": ("deep", Keep(down={2: Part(depth=(1, 1, 1))}), "each of the 2 that stay"),
    "depth and blocks": ("deep", Keep(down={2: Part(depth=1, blocks=((0,), (0,)))}), "one of them"),
    "a mid block of another depth": ("deep", Keep(down={2: Part(depth=2)}), r"mid\.depth: 4\s+allowed: 2"),
    "the first resnet lost": (
        "sd",
        Keep(down={1: Part(resnets=(1,))}, up={2: Part(resnets=(0, 2))}),
        "only the first reads",
    ),
    "the last resnet lost": (
        "sd",
        Keep(down={1: Part(resnets=(0,))}, up={2: Part(resnets=(0, 1))}),
        "only the last of an up block",
    ),
    "widths that break groups": ("sd", Keep(widths=(6, 16, 24, 24)), r"width of level 0: 6\s+allowed: 4, 8"),
    "widths that break heads": (
        "uneven",
        Keep(widths=(8, 16, 16, 32), heads=(2, 2, 3, 4)),
        r"width of level 2: 16\s+allowed: 12: multiples of 4 groups and 3 heads",
    ),
    "wider than the teacher": ("sd", Keep(widths=(8, 32, 24, 24)), "at most 16"),
    "too few widths": ("sd", Keep(widths=(8, 16)), "4 numbers, one a level"),
    "too few heads": ("sd", Keep(heads=(4, 4)), "4 numbers, one a level"),
    "a width in place of two": ("sd", Keep(widths=(8, 8, 12, 12)), "two different ones"),
    "two widths in place of one": ("sd", Keep(widths=(8, 16, 24, 12)), "the same"),
    "wider heads": ("sd", Keep(widths=(8, 16, 24, 24), heads=(2, 2, 2, 2)), "heads of at most 2 channels"),
    "not measured": ("sd", Keep(widths=(4, 8, 12, 12), channels="taylor"), "without a measurement"),
}


@pytest.mark.parametrize(("name", "description", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_built_is_refused_with_the_reason(name: str, description: Keep, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        of(name, description)
    assert "allowed:" in str(caught.value) and "hint:" in str(caught.value)
