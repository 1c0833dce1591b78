"""A student described in a recipe or a file, and what it becomes: models/surgery/keep.py at the door."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from decant.errors import refuse
from decant.models.surgery.keep import BlockRule, ChannelRule, Keep, Part
from decant.stages.stage import validate


class PartOfStudent(BaseModel):
    """What stays of one block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    resnets: tuple[int, ...] | None = Field(None, description="which resnets stay; all, unless given")
    attentions: tuple[int, ...] | None = Field(
        None, description="which attentions stay: one a resnet, or none ([]); those beside the resnets, unless given"
    )
    depth: int | tuple[int, ...] | None = Field(
        None, description="how many transformer blocks stay, in every attention or in each; rule says which"
    )
    blocks: tuple[tuple[int, ...], ...] | None = Field(
        None, description="which transformer blocks stay, for each attention that stays"
    )


class MidOfStudent(BaseModel):
    """What stays of the mid block."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: Literal["whole", "resnet", "none"] = Field(
        default="whole", description="all, its first resnet alone, or nothing"
    )
    depth: int | None = Field(default=None, description="how many of its transformer blocks stay")
    blocks: tuple[int, ...] | None = Field(default=None, description="which of its transformer blocks stay")


class Description(BaseModel):
    """Which parts of the teacher stay, by the teacher's indices, and how wide; everything else stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    levels: int | None = Field(None, description="how many stay, from the outermost")
    down: dict[int, PartOfStudent] = Field(default_factory=dict, description="down blocks that change")
    mid: MidOfStudent = Field(default_factory=MidOfStudent, description="the mid block")
    up: dict[int, PartOfStudent] = Field(default_factory=dict, description="up blocks that change")
    widths: tuple[int, ...] | None = Field(None, description="channels of each level that stays, the outermost first")
    heads: tuple[int, ...] | None = Field(None, description="attention heads of each level that stays")

    def keep(self, rule: BlockRule, channels: ChannelRule) -> Keep:
        """As surgery takes it."""
        mid = self.mid
        return Keep(
            levels=self.levels,
            down={index: _part(part) for index, part in self.down.items()},
            up={index: _part(part) for index, part in self.up.items()},
            mid=mid.keep,
            mid_part=Part(depth=mid.depth, blocks=(mid.blocks,) if mid.blocks is not None else None),
            widths=self.widths,
            heads=self.heads,
            rule=rule,
            channels=channels,
        )


def read_description(file: Path) -> dict[str, Any]:
    """A description in a YAML or JSON file, checked.

    Raises:
        UserError: the file cannot be read, or says what no description says.
    """
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        first = str(error).splitlines()[0]
        raise refuse("--student", f"{file}: {first}", allowed="a YAML file that describes a student", hint="") from None
    if not isinstance(document, dict):
        raise refuse(
            f"--student {file}",
            type(document).__name__,
            allowed=f"a mapping with some of {', '.join(Description.model_fields)}",
            hint="such as `mid: {keep: none}`",
        )
    return validate(Description, document, str(file)).model_dump(exclude_unset=True, mode="json")


def _part(part: PartOfStudent) -> Part:
    return Part(part.resnets, part.attentions, part.depth, part.blocks)
