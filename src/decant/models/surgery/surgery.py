"""What every surgery gives back: a new network as (config, weights) and the map to the one it came from."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

_LAYER = re.compile(r"(?:down|up)_blocks\.\d+\.\w+\.\d+|mid_block\.\w+\.\d+|\w+")


@dataclass(frozen=True)
class SurgeryMap:
    """Where every part of a student comes from in its teacher.

    Attributes:
        parameters: student parameter -> teacher parameter.
        kept: student parameter -> axis -> the teacher's indices kept along it, in order. A parameter that
            takes its teacher's tensor whole is absent, so a cut of whole blocks leaves this empty.
        features: student module -> teacher module, the pairs whose outputs feature losses compare.
    """

    parameters: dict[str, str]
    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    features: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The map as a document that `json.dumps` takes; axes become strings, the only keys JSON has.

        Indices stand once for all axes that share them, under ``groups``, where ``kept`` points to.
        """
        numbers: dict[tuple[int, ...], int] = {}
        kept = {
            name: {str(axis): numbers.setdefault(tuple(axes[axis]), len(numbers)) for axis in axes}
            for name, axes in self.kept.items()
        }
        groups = [list(indices) for indices in numbers]
        return {"parameters": dict(self.parameters), "groups": groups, "kept": kept, "features": dict(self.features)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`, also after a trip through a file."""
        groups = document.get("groups", [])
        kept = {
            # Maps written before there were groups have the indices themselves.
            name: {int(axis): list(each if isinstance(each, list) else groups[each]) for axis, each in axes.items()}
            for name, axes in document["kept"].items()
        }
        return cls(dict(document["parameters"]), kept, dict(document["features"]))

    def paired(self, features: Mapping[str, str]) -> Self:
        """The same map with other pairs for feature losses."""
        return replace(self, features=dict(features))

    def after(self, earlier: "SurgeryMap", features: Mapping[str, str]) -> "SurgeryMap":
        """This cut of a student as one cut of that student's teacher, to which ``earlier`` leads.

        ``features`` pairs with the teacher's modules: what a loss compares is the method's choice and does not follow
        from two maps.
        """
        parameters = {name: earlier.parameters[source] for name, source in self.parameters.items()}
        kept = {name: self._kept_after(name, earlier) for name in parameters}
        return SurgeryMap(parameters, {name: axes for name, axes in kept.items() if axes}, dict(features))

    def _kept_after(self, name: str, earlier: "SurgeryMap") -> dict[int, list[int]]:
        """Indices of indices, axis by axis."""
        own, before = self.kept.get(name, {}), earlier.kept.get(self.parameters[name], {})
        axes = {axis: list(indices) for axis, indices in before.items() if axis not in own}
        for axis, indices in own.items():
            axes[axis] = [before[axis][index] for index in indices] if axis in before else list(indices)
        return axes


@dataclass(frozen=True)
class Surgery:
    """A student: the diffusers config that builds it, every weight of it, and its map to the teacher."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    surgery_map: SurgeryMap


def skeleton(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """The network that a config builds, on the meta device: names and shapes, and no memory."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config)).eval()


def frozen(config: Mapping[str, Any]) -> str:
    """A config as text, without where it was read: what is counted on a `skeleton` can be remembered by it."""
    return json.dumps({key: value for key, value in config.items() if key != "_name_or_path"}, sort_keys=True)


def build(surgery: Surgery) -> UNet2DConditionModel:
    """The student as a plain diffusers network in evaluation mode, on its weights' device and in their dtype.

    The network owns the surgery's tensors from here on: training it changes `surgery.weights`.
    """
    unet = skeleton(surgery.config)
    unet.load_state_dict(surgery.weights, strict=True, assign=True)
    return unet


def layer_map(surgery_map: SurgeryMap) -> dict[str, str]:
    """The map by layer, as people speak of it: `up_blocks.0.resnets.1` -> `up_blocks.0.resnets.2`."""
    return {_layer(student): _layer(teacher) for student, teacher in surgery_map.parameters.items()}


def pick(weight: Tensor, axes: Mapping[int, list[int]]) -> Tensor:
    """The kept part of a teacher's tensor: contiguous, on the same device, and never a view."""
    for axis, indices in axes.items():
        weight = weight.index_select(axis, torch.tensor(indices, device=weight.device))
    return weight.detach().clone(memory_format=torch.contiguous_format)


def _layer(parameter: str) -> str:
    match = _LAYER.match(parameter)
    assert match is not None, parameter
    return match.group()
