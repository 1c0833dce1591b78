"""Scores of channels, measured on calibration data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from decant.models.surgery.channels import totals
from decant.models.surgery.spaces import Space, Spaces


@torch.no_grad()
def activations(unet: nn.Module, spaces: Spaces, calls: Iterable[Callable[[], object]]) -> dict[Space, Tensor]:
    """How strongly every channel is used: the mean square of what flows through it while ``calls`` run the network.

    Measured where channels are read, so behind norms and activations; queries and keys, which nothing reads, where they
    are made.
    """
    found: dict[Space, Tensor] = {}
    with _hooked(unet, spaces, found):
        for call in calls:
            call()
    return found


def taylor(unet: nn.Module, spaces: Spaces, losses: Iterable[Tensor]) -> dict[Space, Tensor]:
    """First-order Taylor importance: for every loss the square of the sum of weight times gradient over all weights of
    a channel, which estimates the loss's change if it went; summed over the losses.

    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv 1906.10771, eq. 8.
    """
    found: dict[Space, Tensor] = {}
    weights = dict(unet.named_parameters())
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        products = {
            name: (weight.detach() * gradient).double()
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            if gradient is not None
        }
        for space, total in totals(products, spaces).items():
            found[space] = found.get(space, torch.zeros_like(total)) + total.square()
    return found


@contextmanager
def _hooked(unet: nn.Module, spaces: Spaces, found: dict[Space, Tensor]) -> Iterator[None]:
    handles = []
    for name, module in unet.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        axes = spaces.axes(f"{name}.weight")
        if axes is None:
            continue
        made, read = axes
        if read:
            handles.append(module.register_forward_hook(_add(found, spaces, read, made=False)))
        if made and made[0].kind == "qk":
            handles.append(module.register_forward_hook(_add(found, spaces, made, made=True)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(
    found: dict[Space, Tensor], spaces: Spaces, parts: tuple[Space, ...], *, made: bool
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    """A hook that adds what its module reads, or makes, to the spaces it consists of."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        value = (output if made else inputs[0]).double()
        channels = 1 if isinstance(module, nn.Conv2d) else value.ndim - 1
        means = value.square().mean([axis for axis in range(value.ndim) if axis != channels])
        for space, piece in zip(parts, means.split([spaces.size(each) for each in parts]), strict=True):
            found[space] = found.get(space, torch.zeros_like(piece)) + piece

    return hook
