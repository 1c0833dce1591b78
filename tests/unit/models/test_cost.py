"""Counts against closed forms; the published figures are in the parity tests."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from decant.errors import UserError
from decant.models.cost import macs, parameters, size_mb


def tiny(**config: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=16, **config)


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(3, 5)
    assert parameters(nn.Sequential(layer, layer)) == 3 * 5 + 5


def test_each_more_token_costs_its_keys_values_and_products() -> None:
    unet = tiny(attention_head_dim=4)
    # Per token and attention of width c over n positions: c * 16 for keys and for values, c * n twice in products.
    layers = [(32, 64)] * 2 + [(64, 16)] * 2 + [(64, 4)] * 2 + [(64, 1)] + [(64, 4)] * 3 + [(64, 16)] * 3
    layers += [(32, 64)] * 3
    expected = sum(2 * c * 16 + 2 * c * n for c, n in layers)
    assert macs(unet, (4, 8, 8), tokens=11) - macs(unet, (4, 8, 8), tokens=10) == expected


def test_counting_does_not_touch_the_network() -> None:
    unet = tiny().to(torch.float64)
    before = unet.conv_in.weight.clone()
    macs(unet, (4, 8, 8))
    assert unet.dtype == torch.float64 and torch.equal(unet.conv_in.weight, before)


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(UserError, match="4, height, width"):
        macs(tiny(), (8, 8, 8))


def test_size_is_of_all_files_in_millions_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(bytes(1_500_000))
    (tmp_path / "index").write_bytes(bytes(500_000))
    assert size_mb(tmp_path) == 2.0
    with pytest.raises(UserError):
        size_mb(tmp_path / "nothing")
