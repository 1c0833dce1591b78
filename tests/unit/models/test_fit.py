"""A finished network of another origin that is made to fit its teacher."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from decant.errors import UserError
from decant.models.load import architecture, unet_config
from decant.models.surgery.fit import fit, published_map
from decant.models.surgery.presets import published
from decant.models.surgery.surgery import Surgery, SurgeryMap, build, skeleton

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}


def unet(**other: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**SMALL, **other}).eval()


def answer(net: UNet2DConditionModel, x_t: Tensor, width: int) -> Tensor:
    words = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return net(x_t, 300, words).sample


def fitted(student: UNet2DConditionModel, teacher: UNet2DConditionModel, seed: int = 0) -> UNet2DConditionModel:
    made = fit(dict(student.config), student.state_dict(), dict(teacher.config), seed)
    return build(Surgery(made.config, made.weights, SurgeryMap({})))


def test_what_fits_stays_as_it_is() -> None:
    student = unet()
    made = fit(dict(student.config), student.state_dict(), dict(unet(layers_per_block=2).config), 0)
    assert made.changes == ["nothing changed"]
    assert all(torch.equal(made.weights[name], value) for name, value in student.state_dict().items())


def test_new_input_channels_change_nothing_until_they_are_trained() -> None:
    student, teacher = unet(), unet(in_channels=8)
    wide = fitted(student, teacher)
    x_t = torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(answer(wide, x_t, 16), answer(student, x_t[:, :4], 16))
    assert wide.config["in_channels"] == 8


def test_keys_and_values_of_another_text_begin_anew_and_alike() -> None:
    student, teacher = unet(), unet(cross_attention_dim=24)
    first, again, other = (fitted(student, teacher, seed) for seed in (0, 0, 1))
    own, new = student.state_dict(), first.state_dict()
    renewed = {name for name in own if own[name].shape != new[name].shape}
    assert renewed == {name for name in own if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert all(torch.equal(own[name], new[name]) for name in own.keys() - renewed)
    assert all(torch.equal(new[name], again.state_dict()[name]) for name in new)
    assert not any(torch.equal(new[name], other.state_dict()[name]) for name in renewed)
    assert all(new[name].std() > 0.01 for name in renewed)
    assert answer(first, torch.randn(1, 4, 8, 8), 24).isfinite().all()


def test_a_network_of_another_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"addition_embed_type(.|\n)*hint"):
        fit(architecture("sd15"), {}, architecture("sdxl"), 0)


@pytest.mark.parametrize("student", ["bk-base", "bk-small", "bk-tiny"])
def test_a_published_student_is_known_by_its_layout(student: str) -> None:
    teacher = unet_config("scenes")
    cut = published(teacher, skeleton(teacher).state_dict(), student)
    found = published_map(cut.config, teacher)
    assert found == (student, cut.surgery_map)


def test_a_network_of_no_published_layout_has_no_map() -> None:
    assert published_map(unet(block_out_channels=(32, 64, 96, 128)).config, unet_config("scenes")) is None
