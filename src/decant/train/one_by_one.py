"""Every parameter updated by itself: in the backward pass, or with moments in 8 bits, or rounded to bfloat16."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from decant.maths.rounding import rounding_noise, stochastic_bfloat16
from decant.maths.seeds import seed_of

# The first moment has a sign, the second has none; torchao's code tables differ.
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class OneByOne:
    """An optimiser for every parameter of a player, made by ``make``.

    A parameter that is not float32 is copied to float32 for its own update and rounded back stochastically, with noise
    from (seed, update, parameter) alone. in_backward: a parameter is updated as soon as its gradient is complete, and
    the gradient is freed; of all gradients only one or two are ever held.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        seed: int,
        in_backward: bool,
    ) -> None:
        self.parameters, self.seed, self.in_backward = dict(parameters), seed, in_backward
        self._masters = {name: p if _plain(p) else nn.Parameter(p.new_empty(0)) for name, p in parameters.items()}
        self.optimizers = {name: make([master]) for name, master in self._masters.items()}
        self._norms: list[Tensor] = []
        self._lr, self._number = 0.0, 0
        if in_backward:
            for name, parameter in parameters.items():
                parameter.register_post_accumulate_grad_hook(partial(self._in_backward, name))

    def begin(self, lr: float, number: int) -> None:
        """Set the learning rate of the coming update, which is ``number``, counted from 0; forget all gradients."""
        self._lr, self._number, self._norms = lr, number, []
        for parameter in self.parameters.values():
            parameter.grad = None

    def norm(self) -> Tensor:
        """The 2-norm of all gradients of this update, those included that are freed by now."""
        norms = self._norms or [_norm(p.grad) for p in self.parameters.values() if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(norms))

    def step(self, shrink: Tensor | None = None) -> None:
        """Apply the gradients, divided by ``shrink``; in the backward pass they have been applied already."""
        if not self.in_backward:
            for name in self.parameters:
                self._update(name, shrink)

    def moments(self) -> dict[str, Tensor]:
        """What the optimisers remember: ``<parameter>/<kind>`` -> plain tensor; in 8 bits ``.codes`` and ``.scale``."""
        found: dict[str, Tensor] = {}
        for name, optimizer in self.optimizers.items():
            for kind, value in optimizer.state.get(self._masters[name], {}).items():
                if hasattr(value, "codes"):
                    found |= {f"{name}/{kind}.codes": value.codes, f"{name}/{kind}.scale": value.scale}
                else:
                    found[f"{name}/{kind}"] = value
        return found

    def load(self, moments: Mapping[str, Tensor]) -> None:
        """Remember what ``moments`` gave."""
        for name, optimizer in self.optimizers.items():
            prefix = f"{name}/"
            mine = {key.removeprefix(prefix): value for key, value in moments.items() if key.startswith(prefix)}
            device = self.parameters[name].device
            state: dict[str, Any] = {}
            for key, value in mine.items():
                kind, _, part = key.partition(".")
                if part == "codes":
                    state[kind] = _in_8_bits(kind, value.to(device), mine[f"{kind}.scale"].to(device))
                elif not part:
                    state[kind] = value if kind == "step" and _counts_on_cpu(optimizer) else value.to(device)
            if state:
                optimizer.state[self._masters[name]] = state

    def _in_backward(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None, "the hook comes after the gradient"
        self._norms.append(_norm(parameter.grad))
        self._update(name, None)

    @torch.no_grad()
    def _update(self, name: str, shrink: Tensor | None) -> None:
        parameter, master, optimizer = self.parameters[name], self._masters[name], self.optimizers[name]
        if parameter.grad is None:
            return
        gradient = parameter.grad.float().contiguous()
        parameter.grad = None
        if master is not parameter:
            master.data = parameter.detach().float().contiguous()
        master.grad = gradient if shrink is None else gradient.div_(shrink)
        _set_lr(optimizer, self._lr)
        with _eager_on_cpu(parameter.device):
            optimizer.step()
        master.grad = None
        if master is not parameter:
            parameter.copy_(self._rounded(name, master.detach()) if parameter.dtype == torch.bfloat16 else master)
            master.data = parameter.new_empty(0)

    def _rounded(self, name: str, exact: Tensor) -> Tensor:
        noise = torch.Generator(exact.device).manual_seed(seed_of(self.seed, self._number, name, "rounding"))
        return stochastic_bfloat16(exact, rounding_noise(tuple(exact.shape), noise))


def _plain(parameter: Tensor) -> bool:
    return parameter.dtype == torch.float32 and parameter.is_contiguous()


def _norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.float32)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's: a compiled step would be made anew for every number
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _counts_on_cpu(optimizer: torch.optim.Optimizer) -> bool:
    """torchao's does; a fused AdamW counts where its parameters are."""
    return any(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)


def _eager_on_cpu(device: torch.device) -> AbstractContextManager[Any]:
    """torchao compiles its step for every shape: seconds each on a CPU, and nothing won."""
    return torch.compiler.set_stance("force_eager") if device.type == "cpu" else nullcontext()


def _in_8_bits(kind: str, codes: Tensor, scale: Tensor) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    block = codes.numel() // scale.numel()
    empty = OptimState8bit.zeros(codes.shape, _SIGNED[kind], block, codes.device, dtype=torch.float32)
    return OptimState8bit(codes, scale, empty.qmap, _SIGNED[kind], dtype=torch.float32)
