"""One forward of a `UNet2DConditionModel`, whatever it is told besides the noisy latent and the time."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from decant.models.taps import first_tensor

_ADDED = ("text_embeds", "time_ids")  # told beside the text: SDXL's pooled text, and size and crop of the picture
_SIZES = 6  # original height and width, crop top and left, target height and width


def forward(net: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Any:
    """The raw output (B, 4, h, w), or (output, features) when the network is tapped.

    Args:
        net: a UNet, which may be tapped, wrapped or compiled.
        x_t: (B, C, h, w).
        t: (B,).
        condition: `encoder_hidden_states` (B, L, D), and of SDXL `text_embeds` (B, P) and `time_ids` (B, 6) as well;
            `timestep_cond` (B, W) of a network that is told its guidance.
    """
    added = {key: condition[key] for key in _ADDED if key in condition}
    more: dict[str, Any] = {"added_cond_kwargs": added} if added else {}
    if "timestep_cond" in condition:
        more["timestep_cond"] = condition["timestep_cond"]
    output = net(x_t, t, encoder_hidden_states=condition["encoder_hidden_states"], **more)
    # A tapped network may be wrapped or compiled by now, so what it gives tells, not its class.
    tapped = isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], dict)
    return output if tapped else first_tensor(output)


def blank(config: Mapping[str, Any], batch: int, tokens: int, device: torch.device | str) -> dict[str, Tensor]:
    """A condition of zeros that the network of a config takes: enough to count and to time, not to draw."""
    width = config["encoder_hid_dim"] or config["cross_attention_dim"]
    width = width if isinstance(width, int) else width[0]
    told = {"encoder_hidden_states": torch.zeros(batch, tokens, width, device=device)}
    if config["addition_embed_type"] == "text_time":
        told["text_embeds"] = torch.zeros(batch, pooled_width(config), device=device)
        told["time_ids"] = torch.zeros(batch, _SIZES, device=device)
    return told


def told_guidance(net: UNet2DConditionModel, width: int) -> UNet2DConditionModel:
    """The same network with a place for a guidance scale, which it does not heed yet: ``timestep_cond`` (B, width).

    Luo et al. 2023, "Latent Consistency Models", section 4.2: a projection of it, begun at zero, joins the time's.
    """
    if net.config["time_cond_proj_dim"]:
        return net
    # Names beginning with _ are diffusers' notes on the config, one of which undoes what is not a default.
    config = {name: value for name, value in net.config.items() if not name.startswith("_")}
    told: Any = UNet2DConditionModel(**{**config, "time_cond_proj_dim": width})
    missing = told.load_state_dict(net.state_dict(), strict=False).missing_keys
    assert missing == ["time_embedding.cond_proj.weight"], missing
    torch.nn.init.zeros_(told.time_embedding.cond_proj.weight)
    return cast(UNet2DConditionModel, told.eval())


def pooled_width(config: Mapping[str, Any]) -> int:
    """P, how wide the pooled text is that a UNet of SDXL is told."""
    return int(config["projection_class_embeddings_input_dim"] - _SIZES * config["addition_time_embed_dim"])
