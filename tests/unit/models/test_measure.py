"""Scores of channels and parts taken out, against sums by hand and the cut itself."""

from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel

from decant.errors import UserError
from decant.models.surgery.cut import cut
from decant.models.surgery.keep import Keep, Part
from decant.models.surgery.measure import activations, taylor
from decant.models.surgery.parts import passed_by, removable
from decant.models.surgery.spaces import Space, Spaces
from decant.models.surgery.surgery import build

CONFIG = {
    "sample_size": 8,
    "block_out_channels": [8, 16, 24],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 2],
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
X_T, TEXT = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0)), torch.randn(2, 5, 16)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(**CONFIG).eval()


def run(unet: UNet2DConditionModel, t: int) -> torch.Tensor:
    output: torch.Tensor = unet(X_T, t, encoder_hidden_states=TEXT).sample
    return output


def test_activations_are_mean_squares_of_what_is_read(unet: UNet2DConditionModel) -> None:
    seen: list[torch.Tensor] = []
    resnet = unet.down_blocks[1].resnets[0]
    handle = resnet.conv2.register_forward_hook(lambda module, args, out: seen.append(args[0].double()))
    found = activations(unet, Spaces.of(CONFIG), [partial(run, unet, 3), partial(run, unet, 700)])
    handle.remove()
    by_hand = sum(each.square().mean((0, 2, 3)) for each in seen)
    assert len(seen) == 2
    torch.testing.assert_close(found[Space("inner", "down_blocks.1.resnets.0", 1)], by_hand)
    assert all(score.shape == (Spaces.of(CONFIG).size(space),) for space, score in found.items())
    assert {space.kind for space in found} == {"level", "inner", "tokens", "qk", "v", "ff", "time", "sinus"}


def test_taylor_is_the_square_of_the_sum_over_a_channel(unet: UNet2DConditionModel) -> None:
    spaces = Spaces.of(CONFIG)
    found = taylor(unet, spaces, (run(unet, t).square().mean() for t in (3, 700)))
    space = Space("inner", "up_blocks.1.resnets.2", 1)
    expected = torch.zeros(16, dtype=torch.float64)
    for t in (3, 700):
        unet.zero_grad()
        run(unet, t).square().mean().backward()
        resnet = unet.up_blocks[1].resnets[2]
        made = (resnet.conv1, resnet.time_emb_proj, resnet.norm2)
        sums = [(p.detach() * p.grad).double().flatten(1 if p.ndim > 1 else 0) for m in made for p in m.parameters()]
        by_channel = sum(each.sum(1) if each.ndim > 1 else each for each in sums)
        by_channel += (resnet.conv2.weight.detach() * resnet.conv2.weight.grad).double().sum((0, 2, 3))
        expected += by_channel.square()
    torch.testing.assert_close(found[space], expected)


def test_a_block_passed_by_is_a_block_taken_out(unet: UNet2DConditionModel) -> None:
    with torch.no_grad(), passed_by(unet, "up_blocks.0.attentions.1.transformer_blocks.0"):
        around = run(unet, 5)
    keep = Keep(up={0: Part(blocks=((0, 1), (1,), (0, 1)))})
    student = build(cut(unet.config, unet.state_dict(), keep))
    with torch.no_grad():
        assert torch.equal(run(student, 5), around)
        assert not torch.equal(run(unet, 5), around)


def test_every_part_can_be_taken_out_or_says_why_not(unet: UNet2DConditionModel) -> None:
    parts = removable(CONFIG)
    assert {part.kind for part in parts} == {
        "transformer block", "attentions", "layers", "mid attention", "mid block", "level"
    }  # fmt: skip
    assert len({part.name for part in parts}) == len(parts)
    names = dict(unet.named_modules())
    for part in parts:
        assert all(module in names for module in part.modules), part
        if part.keep is None:
            continue
        try:
            student = build(cut(unet.config, unet.state_dict(), part.keep))
        except UserError as error:
            assert "hint:" in str(error)
            continue
        gone = sum(parameter.numel() for module in part.modules for parameter in names[module].parameters())
        # The innermost level takes with it what its neighbour read of it.
        assert unet.num_parameters() - student.num_parameters() >= gone - (part.kind == "level")
