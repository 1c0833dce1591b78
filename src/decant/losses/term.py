"""What a method hands to the loop."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Term:
    """A named loss of every sample, and its weight.

    name: ``loss/<name>`` in every log. value: ``(B,)``, not yet weighted. weight: one number, or one per
    sample ``(B,)``.
    """

    name: str
    value: Tensor
    weight: float | Tensor = 1.0

    def __post_init__(self) -> None:
        assert self.value.ndim == 1, f"term {self.name}: a value is (B,), not {tuple(self.value.shape)}"
        if isinstance(self.weight, Tensor):
            assert self.weight.ndim == 0 or self.weight.shape == self.value.shape, f"term {self.name}: weight is (B,)"

    @property
    def weighted(self) -> Tensor:
        """weight * value, ``(B,)``."""
        return self.weight * self.value
