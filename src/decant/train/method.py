"""What a training algorithm is to the loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from decant.data.batch import Batch
from decant.losses.term import Term
from decant.train.draw import Draw


@dataclass(frozen=True, eq=False)
class Player:
    """Someone who learns. Players may share a module (LoRA roles do), never a parameter.

    parameters: the names, as ``module.named_parameters()`` gives them, of what this player trains.
    ema: decay of the exponential moving average of those, or None for none. run_average: the average is a network too,
    by the name that ``average_of`` gives. updates_each: updates of this player for one of the student's, over which its
    learning rate goes. lr_scale: its learning rate by the run's.
    """

    module: nn.Module
    parameters: frozenset[str]
    ema: float | None = None
    run_average: bool = False
    updates_each: int = 1
    lr_scale: float = 1.0


def average_of(player: str) -> str:
    """Among the networks of a run, the name of a player's average."""
    return f"{player}, averaged"


class Method(Protocol):
    """A training algorithm: batches in, terms out; it owns no optimiser, device or gradient switch."""

    @property
    def players(self) -> Mapping[str, Player]:
        """Who learns; the first is the student, on whose count of updates the run ends."""

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        """The teacher and the like: placed and cast by the trainer, never prepared, saved or trained."""

    def turn(self, step: int) -> str:
        """The player whose update this is; ``step`` counts the updates of all players from 0."""

    def terms(self, player: str, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw, step: int) -> Sequence[Term]:
        """The losses of a micro-batch in ``player``'s turn.

        ``nets`` holds every player's and frozen network by name, and averages that are run, placed and wrapped: call
        these alone.
        """
