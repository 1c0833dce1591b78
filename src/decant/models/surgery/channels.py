"""Which channels of a space stay when it is narrowed."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from decant.models.surgery.keep import ChannelRule
from decant.models.surgery.spaces import Space, Spaces

Scores = Mapping[Space, Tensor]


@dataclass(frozen=True)
class Narrowing:
    """From one network's spaces to another's.

    scores: what the best channels are chosen by, (channels of the space,); empty: the first ones are, as the published
    channel projections do. groups: of the norms.
    """

    teacher: Spaces
    student: Spaces
    scores: Scores
    groups: int

    def kept(self, space: Space) -> list[int]:
        """The teacher's channels that stay in a space, in order.

        Channels that a group norm sees come in equal numbers from every group, so that each group of the student's norm
        is a part of one of the teacher's. Heads stay whole in their order, or give up the same number of channels each.
        """
        whole, size = self.teacher.size(space), self.student.size(space)
        if space.kind in ("qk", "v"):
            return self._of_heads(space)
        if size == whole:
            return list(range(whole))
        if (space not in self.scores and space.kind != "sinus") or not self.scores:
            return list(range(size))
        if space.kind == "sinus":
            return _frequencies(whole, size)
        pieces = self.groups if space.kind in ("level", "inner") else 1
        return _best(self.scores[space], pieces, size // pieces)

    def _of_heads(self, space: Space) -> list[int]:
        width, whole = self.student.size(space), self.teacher.size(space)
        heads, before = (spaces.structure.heads[space.level] for spaces in (self.student, self.teacher))
        if (width, heads) == (whole, before):
            return list(range(whole))
        dim = whole // before
        chosen = list(range(heads))
        if heads < before and self.scores:
            # Queries, keys and values of a head go together.
            both = sum(self.scores[Space(kind, space.name, space.level)] for kind in ("qk", "v"))
            assert isinstance(both, Tensor)
            chosen = _top(both.view(before, dim).sum(1), heads)
        inside = [list(range(width // heads))] * before
        if self.scores:
            inside = [_top(head, width // heads) for head in self.scores[space].view(before, dim)]
        return [head * dim + index for head in chosen for index in inside[head]]


def totals(values: Mapping[str, Tensor], spaces: Spaces) -> dict[Space, Tensor]:
    """For every space the sums of ``values`` (parameter -> a tensor of its shape) over all that belongs to a channel.

    With squared weights this is the magnitude of a channel (Li et al. 2017, arXiv 1608.08710, over both sides of
    it); with weight times gradient its first-order Taylor importance before squaring (Molchanov et al. 2019, arXiv
    1906.10771, eq. 8).
    """
    found: dict[Space, Tensor] = {}
    for name, value in values.items():
        for axis, parts in enumerate(spaces.axes(name) or ()):
            if not parts:
                continue
            others = [each for each in range(value.ndim) if each != axis]
            sums = value.sum(others) if others else value
            for space, piece in zip(parts, sums.split([spaces.size(each) for each in parts]), strict=True):
                found[space] = found[space] + piece if space in found else piece.clone()
    return found


def magnitudes(weights: Mapping[str, Tensor], spaces: Spaces) -> dict[Space, Tensor]:
    """The sum of squares of every channel's weights."""
    return totals({name: weight.detach().double().square() for name, weight in weights.items()}, spaces)


def needs_measuring(rule: ChannelRule) -> bool:
    """Whether a rule needs scores from calibration data."""
    return rule in ("activation", "taylor")


def _best(scores: Tensor, pieces: int, each: int) -> list[int]:
    """The best ``each`` of every piece."""
    split = scores.view(pieces, -1)
    size = split.shape[1]
    return [number * size + index for number, piece in enumerate(split) for index in _top(piece, each)]


def _top(scores: Tensor, count: int) -> list[int]:
    """Indices of the largest, in order of index; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    return sorted(order[:count].tolist())


def _frequencies(whole: int, size: int) -> list[int]:
    """Of the sinusoids that a timestep is told as, those nearest to the ones of a narrower network.

    The first half are cosines, the second sines (or the other way round), each from the fastest to the slowest, and a
    narrower network spreads fewer over the same range (Vaswani et al. 2017, section 3.5).
    """
    half, fewer = whole // 2, size // 2
    near = [min(half - 1, round(index * half / fewer)) for index in range(fewer)]
    return near + [half + index for index in near]
