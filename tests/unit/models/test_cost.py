"""Counts against closed forms; the published figures are in the parity tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from decant.errors import UserError
from decant.models.cost import macs, parameters, size_mb
from decant.models.load import condition_tokens, unet_config
from decant.models.surgery.surgery import skeleton


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


def counted_by_hand(config: dict[str, Any], latent: tuple[int, int, int], tokens: int) -> int:
    """Every convolution, linear layer and attention by its closed form, from the shapes that pass through it."""
    unet, total = skeleton(config), 0

    def layer(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        total += output.numel() * weight.numel() // weight.shape[0]

    def attention(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, Any], output: Tensor) -> None:
        nonlocal total
        words = named.get("encoder_hidden_states")
        queries, keys = given[0].shape[1], (given[0] if words is None else words).shape[1]
        total += 2 * queries * keys * module.to_q.out_features

    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(layer)
        elif isinstance(module, Attention):
            module.register_forward_hook(attention, with_kwargs=True)
    words = torch.empty(1, tokens, unet.config["cross_attention_dim"], device="meta")
    unet(torch.empty(1, *latent, device="meta"), torch.zeros(1, device="meta"), encoder_hidden_states=words)
    return total


@pytest.mark.parametrize(
    ("name", "latent", "tokens", "gmacs"),
    [("sd15", (4, 64, 64), 77, 401.6), ("musetalk", (8, 32, 32), 50, 88.9), ("scenes", (4, 8, 8), 32, 0.1376)],
)
def test_macs_are_the_sum_of_the_layers_closed_forms(
    name: str, latent: tuple[int, int, int], tokens: int, gmacs: float
) -> None:
    config = unet_config(name)
    assert condition_tokens(name) == tokens
    found = macs(skeleton(config), latent, tokens)
    assert found == counted_by_hand(config, latent, tokens)
    assert found / 1e9 == pytest.approx(gmacs, rel=3e-4)


def test_counting_does_not_touch_the_network() -> None:
    unet = tiny().to(torch.float64)
    before = unet.conv_in.weight.clone()
    macs(unet, (4, 8, 8), tokens=77)
    assert unet.dtype == torch.float64 and torch.equal(unet.conv_in.weight, before)


def test_wrong_channels_are_refused() -> None:
    with pytest.raises(UserError, match="4, height, width"):
        macs(tiny(), (8, 8, 8), tokens=77)


def test_size_is_of_all_files_in_millions_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(bytes(1_500_000))
    (tmp_path / "index").write_bytes(bytes(500_000))
    assert size_mb(tmp_path) == 2.0
    with pytest.raises(UserError):
        size_mb(tmp_path / "nothing")
