"""The published students, as descriptions."""

from collections.abc import Mapping
from typing import Any, Literal, assert_never, get_args

from torch import Tensor

from decant.errors import UserError, nearest, refuse
from decant.models.surgery.cut import cut
from decant.models.surgery.keep import BlockRule, ChannelRule, Keep, Part
from decant.models.surgery.structure import Structure, with_defaults
from decant.models.surgery.surgery import Surgery

Student = Literal[
    "bk-base",
    "bk-small",
    "bk-tiny",
    "bk-sdm-base",
    "bk-sdm-small",
    "bk-sdm-tiny",
    "bk-sdm-v2-base",
    "bk-sdm-v2-small",
    "bk-sdm-v2-tiny",
    "sd-small",
    "sd-tiny",
    "ssd-1b",
    "vega",
    "koala-1b",
    "koala-700m",
    "slim-65m",
]

_SD = "a UNet2DConditionModel of the Stable Diffusion 1.x layout with at least two layers in every block"
_SDXL = "a UNet2DConditionModel of SDXL's layout: three levels of two layers, attention in the inner two"
_SLIM = (128, 192, 320, 320)


def preset(  # noqa: PLR0911 (a return for every student)
    name: str, config: Mapping[str, Any], rule: BlockRule = "first", channels: ChannelRule = "first"
) -> Keep:
    """The description of a published student of the teacher that ``config`` builds.

    `bk-*` (also `bk-sdm-*`; `bk-sdm-v2-*` of Stable Diffusion 2.x alone): Kim et al. 2023, arXiv 2305.15798.
    `sd-small` and `sd-tiny`: Segmind's names of Base and Tiny. `ssd-1b`, `vega`: Gupta et al. 2024, arXiv 2401.02677.
    `koala-*`: Lee et al. 2023, arXiv 2312.04005. `slim-65m`: Stable Diffusion 1.x at widths 128, 192, 320, 320.

    Which of SDXL's ten transformer blocks in a row its students kept was never published: ``rule`` chooses.

    Raises:
        UserError: for an unknown name, and for a teacher of another layout, or one already cut.
    """
    if name not in get_args(Student):
        raise refuse(
            "student",
            repr(name),
            allowed=", ".join(get_args(Student)),
            hint=nearest(name, get_args(Student)),
        )
    student: Student = name  # type: ignore[assignment]
    config = with_defaults(config)
    if student.startswith("bk-sdm-v2-"):
        _check_sd2(config)
    match student:
        case "bk-base" | "bk-sdm-base" | "bk-sdm-v2-base" | "sd-small":
            return _bk(config, "base")
        case "bk-small" | "bk-sdm-small" | "bk-sdm-v2-small":
            return _bk(config, "small")
        case "bk-tiny" | "bk-sdm-tiny" | "bk-sdm-v2-tiny" | "sd-tiny":
            return _bk(config, "tiny")
        case "ssd-1b":
            return _segmind(config, down=(2, 4), up=((4, 4, 10), (2, 1, 1)), rule=rule)
        case "vega":
            return _segmind(config, down=(1, 2), up=((2, 2, 2), (1, 1, 1)), rule=rule)
        case "koala-1b":
            return _koala(config, 6, whole_mid=True, rule=rule)
        case "koala-700m":
            return _koala(config, 5, whole_mid=False, rule=rule)
        case "slim-65m":
            _check_sd(config)
            return Keep(widths=_SLIM, channels=channels)
        case _:
            assert_never(student)


def published(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    student: str,
    rule: BlockRule = "first",
    channels: ChannelRule = "first",
) -> Surgery:
    """A published student, cut: `cut` with its `preset`."""
    return cut(config, weights, preset(student, config, rule, channels))


def _bk(config: Mapping[str, Any], student: Literal["base", "small", "tiny"]) -> Keep:
    """One layer in every block: the first pair of a down block, the first and the last of an up block.

    The last resnet of an up block alone takes the skip of the level outside, so no other fits. The paper cuts two
    layers to one; here any number is cut to one. A Base may be cut on to Small, and both to Tiny.
    """
    _check_sd(config)
    structure = Structure.of(config)
    _check_bk_cut(config, structure, student)
    levels = structure.levels - (student == "tiny")
    gone = structure.levels - levels
    return Keep(
        levels=levels,
        down={level: Part(resnets=(0,)) for level in range(levels)},
        up={index: Part(resnets=(0, structure.up[index].resnets - 1)) for index in range(gone, structure.levels)},
        mid="whole" if student == "base" else "none",
    )


def _segmind(
    config: Mapping[str, Any], down: tuple[int, int], up: tuple[tuple[int, ...], tuple[int, ...]], rule: BlockRule
) -> Keep:
    """SSD-1B and Vega: all resnets but one stay, and fewer transformer blocks."""
    _check_sdxl(config)
    return Keep(
        down={1: Part(depth=down[0]), 2: Part(depth=down[1])},
        up={0: Part(depth=up[0]), 1: Part(depth=up[1])},
        mid="resnet",
        rule=rule,
    )


def _koala(config: Mapping[str, Any], depth: int, *, whole_mid: bool, rule: BlockRule) -> Keep:
    """One layer in every block, and fewer of the innermost transformer blocks."""
    _check_sdxl(config)
    return Keep(
        down={
            0: Part(resnets=(0,)),
            1: Part(resnets=(0,), depth=2),
            2: Part(resnets=(0,), depth=depth),
        },
        up={
            0: Part(resnets=(0, 2), depth=depth),
            1: Part(resnets=(0, 2), depth=2),
            2: Part(resnets=(0, 2)),
        },
        mid="whole" if whole_mid else "none",
        mid_part=Part(depth=depth) if whole_mid else Part(),
        rule=rule,
    )


def _check_sd(config: Mapping[str, Any]) -> None:
    """Refuse what is not of the SD 1.x layout, naming the key of the config that shows it."""
    levels = len(config["block_out_channels"])
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise _foreign("_class_name", config, _SD)
    if config["addition_embed_type"] is not None:
        raise _foreign("addition_embed_type", config, _SD)
    if levels < 4:
        raise refuse(
            "unet.block_out_channels",
            config["block_out_channels"],
            allowed="four or more levels",
            hint="three levels are what bk-tiny leaves: cut the teacher it came from",
        )
    if config["down_block_types"] != ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]:
        raise _foreign("down_block_types", config, _SD)
    if config["up_block_types"] != ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1):
        raise _foreign("up_block_types", config, _SD)
    if config["mid_block_type"] not in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None):
        raise _foreign("mid_block_type", config, _SD)


def _check_sd2(config: Mapping[str, Any]) -> None:
    if not config["use_linear_projection"] or config["addition_embed_type"] is not None:
        raise refuse(
            "unet.use_linear_projection",
            config["use_linear_projection"],
            allowed="a teacher of Stable Diffusion 2.x, with linear projections, for a bk-sdm-v2 student",
            hint="of Stable Diffusion 1.x, cut bk-sdm-base, bk-sdm-small or bk-sdm-tiny",
        )


def _check_sdxl(config: Mapping[str, Any]) -> None:
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise _foreign("_class_name", config, _SDXL)
    for key, expected in (
        ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]),
        ("up_block_types", ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]),
        ("mid_block_type", "UNetMidBlock2DCrossAttn"),
    ):
        if config[key] != expected:
            raise _foreign(key, config, _SDXL)
    if any(block.resnets != 2 for block in Structure.of(config).down):
        raise _foreign("layers_per_block", config, _SDXL)


def _foreign(key: str, config: Mapping[str, Any], allowed: str) -> UserError:
    return refuse(
        f"unet.{key}",
        config[key],
        allowed=allowed,
        hint="bk-* and slim-65m are students of Stable Diffusion and MuseTalk; ssd-1b, vega, koala-* of SDXL",
    )


def _check_bk_cut(config: Mapping[str, Any], structure: Structure, student: str) -> None:
    """Refuse a teacher with nothing left to cut, or whose widths give Tiny channels without a source."""
    layers, widths = [block.resnets for block in structure.down], structure.widths
    if min(layers) < 2 and not _cuts_on(layers, structure, student):
        raise refuse(
            "unet.layers_per_block",
            config["layers_per_block"],
            allowed="2 or more in every block, or a bk-base cut on to bk-small or bk-tiny, or a bk-small to bk-tiny",
            hint="this network is already cut: use the teacher it came from",
        )
    if student == "tiny" and widths[-1] < widths[-2]:
        raise refuse(
            "unet.block_out_channels",
            list(widths),
            allowed="for bk-tiny, a last level at least as wide as the one before",
            hint="use bk-small, which keeps the last level",
        )


def _cuts_on(layers: list[int], structure: Structure, student: str) -> bool:
    """Whether a network with one layer in every block has something left that ``student`` goes without."""
    if set(layers) != {1}:
        return False
    return student == "tiny" or (student == "small" and structure.mid is not None)
