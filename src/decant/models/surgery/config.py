"""The diffusers config of a planned student."""

from collections.abc import Mapping, Sequence
from typing import Any

from decant.models.surgery.plan import Kept, Plan
from decant.models.surgery.structure import Structure, with_defaults

_PER_LEVEL = ("cross_attention_dim", "only_cross_attention")


def student_config(teacher_config: Mapping[str, Any], made: Plan) -> dict[str, Any]:
    """What plain diffusers builds the student from; everything that the plan does not speak of is the teacher's."""
    teacher, config = Structure.of(teacher_config), with_defaults(teacher_config)
    levels = len(made.widths)
    gone = teacher.levels - levels
    for key in _PER_LEVEL:
        if isinstance(config[key], list):
            config[key] = config[key][:levels]
    config["block_out_channels"] = list(made.widths)
    config |= _kinds(config, made, gone)
    config["layers_per_block"] = _short([len(kept.resnets) for kept in made.down])
    config |= _depths(made)
    key = "num_attention_heads" if config["num_attention_heads"] else "attention_head_dim"
    same = made.heads == teacher.heads[:levels] and not isinstance(config[key], list)
    config[key] = config[key] if same else list(made.heads)
    return config


def _kinds(config: Mapping[str, Any], made: Plan, gone: int) -> dict[str, Any]:
    mid = config["mid_block_type"]
    if made.mid is None:
        mid = None
    elif not made.mid.attentions:
        mid = "UNetMidBlock2D"
    return {
        "down_block_types": ["CrossAttnDownBlock2D" if kept.attentions else "DownBlock2D" for kept in made.down],
        "mid_block_type": mid,
        "up_block_types": ["CrossAttnUpBlock2D" if kept.attentions else "UpBlock2D" for kept in made.up],
    }


def _depths(made: Plan) -> dict[str, Any]:
    """Transformer depths, as short as they can be said: one number, one a level, or one an attention."""
    down: list[Any] = [_depth(kept, 1) for kept in made.down]
    up: list[Any] = [_depth(kept, 1) for kept in made.up]
    if made.mid is not None and made.mid.attentions and not made.down[-1].attentions:
        down[-1] = len(made.mid.blocks[0])
    mirrored = all(
        not kept.attentions or depth == other for kept, depth, other in zip(made.up, up, down[::-1], strict=True)
    )
    plain = mirrored and not any(isinstance(depth, list) for depth in down)
    return {
        "transformer_layers_per_block": _short(down) if plain else down,
        "reverse_transformer_layers_per_block": None if plain else up,
    }


def _depth(kept: Kept, without: int) -> Any:
    return _short([len(blocks) for blocks in kept.blocks]) if kept.attentions else without


def _short(values: Sequence[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else list(values)
