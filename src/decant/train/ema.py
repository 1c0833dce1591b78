"""Exponential moving average of weights, kept in float32."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The moving average of some parameters of a module.

    ``decay`` warms up as min(decay, (1 + k) / (10 + k)) with k the updates before this one, so that a short
    run is not an average of its beginning. ``weights`` maps the parameter's name to its average, float32, on
    its device: views into one tensor, which is looked over in one call.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        assert 0.0 <= decay < 1.0, f"a decay is in [0, 1), not {decay}"
        self.decay = decay
        sizes = [p.numel() for p in parameters.values()]
        self._all = torch.cat([p.detach().float().reshape(-1) for p in parameters.values()])
        parts = zip(parameters.items(), self._all.split(sizes), strict=True)
        self.weights: dict[str, Tensor] = {name: part.view(p.shape) for (name, p), part in parts}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter], updates: int) -> None:
        """Move towards ``parameters``; ``updates`` is how many updates went before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        current = [parameters[name].float() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)

    def sum(self) -> Tensor:
        """The sum of all averages: not finite once a parameter was not, at any update."""
        return self._all.sum()

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the average into ``module``, which names its parameters as the averaged one does."""
        parameters = dict(module.named_parameters())
        for name, average in self.weights.items():
            parameters[name].copy_(average)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """``module`` with the averaged weights inside the ``with`` block, its own again after it."""
        own = {k: p.detach().clone() for k, p in module.named_parameters() if k in self.weights}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                parameters = dict(module.named_parameters())
                for name, tensor in own.items():
                    parameters[name].copy_(tensor)
