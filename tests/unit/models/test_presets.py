"""Every published student of small teachers of its layout: saved, and opened by plain diffusers."""

from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from decant.errors import UserError
from decant.models.load import architecture
from decant.models.surgery.presets import Student, published
from decant.models.surgery.structure import Structure
from decant.models.surgery.surgery import build

SMALL: dict[str, Any] = {"sample_size": 8, "cross_attention_dim": 16, "norm_num_groups": 4}
TEACHERS: dict[str, dict[str, Any]] = {
    "sd15": SMALL | {"block_out_channels": [8, 16, 24, 24], "attention_head_dim": 4},
    "sd21": SMALL
    | {"block_out_channels": [8, 16, 24, 24], "attention_head_dim": [2, 4, 8, 8], "use_linear_projection": True},
    "sdxl": SMALL
    | {
        "block_out_channels": [8, 16, 32],
        "attention_head_dim": [2, 4, 8],
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    },
}
SDXL = ("ssd-1b", "vega", "koala-1b", "koala-700m")


@cache
def teacher(name: str) -> UNet2DConditionModel:
    """The published layout at a few channels."""
    torch.manual_seed(1)
    return UNet2DConditionModel.from_config(architecture(name) | TEACHERS[name]).eval()


def forward(unet: UNet2DConditionModel) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x_t, text = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 5, 16, generator=generator)
    added = {"text_embeds": torch.randn(1, 8, generator=generator), "time_ids": torch.arange(6.0)[None]}
    with torch.no_grad():
        output: Tensor = unet(x_t, torch.tensor([7]), encoder_hidden_states=text, added_cond_kwargs=added).sample
    return output


def own_teacher(student: str) -> str:
    return "sdxl" if student in SDXL else "sd21" if student.startswith("bk-sdm-v2") else "sd15"


@pytest.mark.parametrize("rule", ["first", "even"])
@pytest.mark.parametrize("student", [name for name in get_args(Student) if name != "slim-65m"])
def test_every_published_student_opens_in_plain_diffusers(student: str, rule: Any, tmp_path: Path) -> None:
    unet = teacher(own_teacher(student))
    surgery = published(unet.config, unet.state_dict(), student, rule)
    cut = build(surgery)
    cut.save_pretrained(tmp_path)
    again, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(forward(again), forward(cut), atol=1e-5, rtol=1e-5)
    assert all(
        torch.equal(surgery.weights[name], unet.state_dict()[source])
        for name, source in surgery.surgery_map.parameters.items()
        if name not in surgery.surgery_map.kept
    )


# Transformer depths by attention, down, mid and up, as the students' published configs have them.
DEPTHS = {
    "ssd-1b": ([(), (2, 2), (4, 4)], (), [(4, 4, 10), (2, 1, 1), ()]),
    "vega": ([(), (1, 1), (2, 2)], (), [(2, 2, 2), (1, 1, 1), ()]),
    "koala-1b": ([(), (2,), (6,)], (6,), [(6, 6), (2, 2), ()]),
    "koala-700m": ([(), (2,), (5,)], None, [(5, 5), (2, 2), ()]),
}


@pytest.mark.parametrize("student", SDXL)
def test_depths_are_the_published_ones(student: str) -> None:
    unet = teacher("sdxl")
    found = Structure.of(published(unet.config, unet.state_dict(), student).config)
    down, mid, up = DEPTHS[student]
    assert [block.depths for block in found.down] == down and [block.depths for block in found.up] == up
    assert (None if found.mid is None else found.mid.depths) == mid


@pytest.mark.parametrize(
    ("name", "student", "says"),
    [
        ("sd15", "ssd-1b", "SDXL's layout"),
        ("sdxl", "bk-tiny", "addition_embed_type"),
        ("sdxl", "slim-65m", "addition_embed_type"),
        ("sd15", "bk-sdm-v2-tiny", "Stable Diffusion 2.x"),
        ("sd15", "ssd1b", "did you mean 'ssd-1b'"),
        ("sd15", "slim-65m", "width of level 0: 128"),
    ],
)
def test_a_student_of_another_family_is_refused(name: str, student: str, says: str) -> None:
    unet = teacher(name)
    with pytest.raises(UserError, match=says):
        published(unet.config, unet.state_dict(), student)
