"""A LoRA of a teacher, for a student that was cut from it.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685. A layer adds
``alpha / r * up @ down`` to a weight. What a cut keeps of the weight, rows and columns, it keeps of the product: rows
of ``up``, columns of ``down``. So cutting the merged teacher gives what merging the moved LoRA into the cut gives.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from decant.errors import UserError, refuse
from decant.models.surgery.surgery import SurgeryMap, pick

Part = Literal["unet", "text_encoder", "text_encoder_2"]
Shapes = Mapping[str, tuple[int, ...]]

_BLOCK = re.compile(r"(?:down|up)_blocks\.\d+|mid_block|\w+")
_LAYER = re.compile(r"(?:down|up)_blocks\.\d+\.\w+\.\d+|mid_block(?:\.\w+\.\d+)?|\w+")
# Widths of the text that published families read.
_TEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}


@dataclass(frozen=True, eq=False)
class Layer:
    """What a LoRA adds to one weight.

    Attributes:
        down: (r, in), of a convolution (r, in, kh, kw).
        up: (out, r), of a convolution (out, r, 1, 1).
        alpha: the product is scaled by ``alpha / r``.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is for."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """What is added to the weight, in its shape, in single precision."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.scale * product).reshape(self.shape)

    def energy(self) -> float:
        """The squared norm of `delta`, from two (r, r) products."""
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        return self.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())


# Of every part of a pipeline, module -> layer.
Lora = Mapping[Part, Mapping[str, Layer]]


@dataclass(frozen=True)
class Dropped:
    """Modules of a LoRA that have no place in a student, by part of the network.

    ``share``: their part of the squared norm of all that the LoRA adds to the teacher's UNet.
    """

    part: str
    modules: int
    share: float
    why: str


@dataclass(frozen=True)
class Moved:
    """A LoRA for a student, and what became of the teacher's.

    Attributes:
        lora: student modules -> layers.
        modules: of the teacher's UNet that the LoRA changes, and that have a place in the student.
        dropped: those that have none.
        narrowed: student modules that keep a part of their rows or columns.
        narrowed_share: what these lost, as a part of the LoRA's squared norm.
    """

    lora: Lora
    modules: int
    dropped: tuple[Dropped, ...]
    narrowed: int
    narrowed_share: float


def move_lora(lora: Lora, surgery_map: SurgeryMap, shapes: Shapes) -> Moved:
    """The LoRA of a teacher for its student; text encoders pass as they are, since a student keeps its teacher's.

    Args:
        lora: of the teacher, modules named as in diffusers.
        surgery_map: from the student to the teacher.
        shapes: of the student's UNet weights, by name.

    Raises:
        UserError: the LoRA is of another family, or nothing of it has a place in the student.
    """
    teacher = lora.get("unet", {})
    weights = {
        name.removesuffix(".weight"): source.removesuffix(".weight")
        for name, source in surgery_map.parameters.items()
        if name.endswith(".weight") and source.removesuffix(".weight") in teacher
    }
    moved = {}
    for module, source in weights.items():
        axes, shape = surgery_map.kept.get(f"{module}.weight", {}), shapes[f"{module}.weight"]
        moved[module] = _cut(as_wide_as(teacher[source], shape), axes)
        if moved[module].shape != shape or not _inside(teacher[source], axes):
            raise _foreign(source, teacher[source], module, shape, axes)
    lost = sorted(set(teacher) - set(weights.values()))
    if teacher and not moved:
        raise _nothing_left(teacher)
    energy = {source: layer.energy() for source, layer in teacher.items()}
    whole = sum(energy.values()) or 1.0
    narrowed = [module for module in moved if surgery_map.kept.get(f"{module}.weight")]
    sources = sum(energy[weights[module]] for module in narrowed)
    return Moved(
        lora={**{part: dict(layers) for part, layers in lora.items() if part != "unet"}, "unet": moved},
        modules=len(set(weights.values())),
        dropped=_dropped(lost, {source: value / whole for source, value in energy.items()}, surgery_map),
        narrowed=len(narrowed),
        narrowed_share=(sources - sum(moved[module].energy() for module in narrowed)) / whole,
    )


def lacking(module: str, sources: set[str]) -> tuple[str, str]:
    """The largest part around a module of which a student has nothing, and that said in words."""
    for pattern, what in ((_BLOCK, "block"), (_LAYER, "layer")):
        found = pattern.match(module)
        part = found.group() if found else module
        if not any(source.startswith(f"{part}.") for source in sources):
            return part, f"the student has no {what} that comes from it"
    block = re.match(r".*transformer_blocks\.\d+", module)
    part = block.group() if block else module
    return part, "the student has no module that comes from it"


def as_wide_as(layer: Layer, shape: tuple[int, ...]) -> Layer:
    """A layer as matrices or as convolutions of one pixel, as the weight is: tools write either for either."""
    if len(shape) == layer.down.ndim:
        return layer
    if len(shape) == 4 and layer.down.ndim == 2:
        return Layer(layer.down[..., None, None], layer.up[..., None, None], layer.alpha)
    if len(shape) == 2 and layer.shape[2:] == (1, 1):
        return Layer(layer.down.flatten(1), layer.up.flatten(1), layer.alpha)
    return layer


def _inside(layer: Layer, axes: Mapping[int, list[int]]) -> bool:
    return all(max(indices, default=-1) < layer.shape[axis] for axis, indices in axes.items())


def _cut(layer: Layer, axes: Mapping[int, list[int]]) -> Layer:
    """Rows of ``up``, columns of ``down``; a weight that is cut beyond the layer's size is left to the caller."""
    assert set(axes) <= {0, 1}, "kernels are never cut"
    if not _inside(layer, axes):
        return layer
    down, up = ({axis: axes[axis]} if axis in axes else {} for axis in (1, 0))
    return Layer(pick(layer.down, down), pick(layer.up, up), layer.alpha)


def _dropped(lost: Iterable[str], share: Mapping[str, float], surgery_map: SurgeryMap) -> tuple[Dropped, ...]:
    """What found no place, a line for each level, layer or transformer block that the student lacks."""
    sources = set(surgery_map.parameters.values())
    parts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in lost:
        parts[lacking(module, sources)].append(module)
    return tuple(
        Dropped(part, len(modules), sum(share[module] for module in modules), why)
        for (part, why), modules in parts.items()
    )


def _nothing_left(teacher: Mapping[str, Layer]) -> UserError:
    first = next(iter(teacher))
    return refuse(
        "LoRA",
        f"none of its {len(teacher)} UNet modules has a place in the student, such as {first}",
        allowed="modules of the student's teacher that the student kept",
        hint="it is of another family, or it changes only what was cut: decant show STUDENT says what was kept",
    )


def _foreign(
    source: str, layer: Layer, module: str, shape: tuple[int, ...], axes: Mapping[int, list[int]]
) -> UserError:
    narrowed = f" (narrowed from at least {[max(axes[axis]) + 1 for axis in axes]})" if axes else ""
    return refuse(
        f"LoRA, {source}",
        f"made for a weight of {told_shape(layer.shape)}",
        allowed=f"{told_shape(shape)}{narrowed}, as {module} of the student has it",
        hint=whose(source, layer.shape, shape),
    )


def whose(source: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """A hint: which family a layer is of that does not fit, where its width of text says it."""
    if re.search(r"attn2\.to_[kv]$", source):
        theirs, ours = _TEXT_WIDTHS.get(found[1]), _TEXT_WIDTHS.get(wanted[1])
        if theirs and theirs != ours:
            return f"it is a LoRA of {theirs}; this student's teacher is {ours or 'of another family'}"
    return "it is a LoRA of another family; move one that was made for this student's teacher"


def told_shape(shape: tuple[int, ...]) -> str:
    """A shape as people write it."""
    return " x ".join(map(str, shape))
