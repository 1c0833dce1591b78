"""How much memory a run's updates will hold, found by making one of them on tensors without numbers."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from decant.data.batch import Batch
from decant.train.method import Method
from decant.train.one_by_one import OneByOne
from decant.train.state import DTYPES, RunSettings, TrainState


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that live, from those made while it is entered: ``now``, and ``peak`` at most.

    Torch's own ``MemTracker`` counts the same and names modules beside it, but takes no second forward and no gradient
    that is freed in the backward pass.
    """

    def __init__(self, *there: Tensor) -> None:
        """``there``: made before, and not counted."""
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary({part.untyped_storage(): 0 for each in there for part in _parts(each)})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it gives; one on a wrapper, such as a moment in 8 bits, by its parts."""
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented
        found = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.hold, found)
        return found

    def hold(self, tensor: Tensor) -> Tensor:
        """Count a tensor from here on; gives it back."""
        for part in _parts(tensor):
            storage = part.untyped_storage()
            if storage not in self._known:
                size = storage.size()
                self._known[storage] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, size)
        return tensor

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class _Blank:
    """Draws of zeros: a draw's numbers do not change what is held."""

    samples: tuple[int, ...]

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(len(self.samples), *shape)

    def uniform(self, purpose: str) -> Tensor:
        return torch.zeros(len(self.samples))

    def integers(self, purpose: str, high: int) -> Tensor:
        return torch.zeros(len(self.samples), dtype=torch.int64)


class _Alone:
    """What a training state asks of Accelerate, for one process that computes nothing."""

    num_processes, is_main_process, scaler = 1, True, None

    def __init__(self, device: torch.device, run: RunSettings) -> None:
        self.device, self.dtype = device, DTYPES[run.precision]

    def prepare(self, thing: Any, device_placement: object = None) -> Any:
        return (
            SimpleNamespace(
                optimizer=thing, param_groups=thing.param_groups, zero_grad=thing.zero_grad, state=thing.state
            )
            if isinstance(thing, torch.optim.Optimizer)
            else thing
        )

    def autocast(self) -> AbstractContextManager[Any]:
        wanted = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype) if wanted else nullcontext()


class _Quick:
    """Updates one by one, of which only the first of every size is made; the others hold what that one held.

    A step in 8 bits is a hundred operations, and on a tensor without numbers each takes as long as on a million: most
    of a rehearsal.
    """

    def __init__(self, lean: OneByOne) -> None:
        self.lean, self.update = lean, lean._update
        self.known: dict[int, tuple[str, int]] = {}  # how many numbers -> the first such parameter, bytes in passing

    def __call__(self, name: str, shrink: Tensor | None) -> None:
        parameter = self.lean.parameters[name]
        if parameter.grad is None:
            return
        first, passing = self.known.get(parameter.numel(), ("", 0))
        if not first:
            with Held(parameter, *self._rate(name)) as held:
                held.hold(parameter.grad)
                self.update(name, shrink)
                self.known[parameter.numel()] = name, held.peak - held.now
            return
        parameter.grad = None
        state = self.lean.optimizers[name].state
        if not state:
            ((_, moments),) = self.lean.optimizers[first].state.items()
            state[parameter] = {kind: _alike(value) for kind, value in moments.items()}
        torch.empty(passing, dtype=torch.uint8, device=parameter.device)

    def _rate(self, name: str) -> list[Tensor]:
        groups = self.lean.optimizers[name].param_groups
        return [value for group in groups for value in group.values() if isinstance(value, Tensor)]


def peak_of_updates(
    make: Callable[[], Method], batch: Callable[[], Batch], run: RunSettings, device: torch.device, micro: int = 1
) -> int:
    """The most bytes held at once by updates of ``micro`` batches each.

    ``make`` and ``batch`` build the method, with its networks, and a batch, of whatever numbers: nothing is computed.
    """
    held = Held()
    # The tables of a schedule and the like exist already, with numbers.
    with FakeTensorMode(allow_non_fake_inputs=True), held:
        for _ in rehearsed(make(), batch, run, device, micro):
            pass
        return held.peak


def rehearsed(
    method: Method, batch: Callable[[], Batch], run: RunSettings, device: torch.device, micro: int = 1
) -> Iterator[None]:
    """The last batch of an update that meets what all before have left; yields before it.

    That is the optimiser's moments, and the gradients of the update's other batches if any. Both are there as soon as
    any gradient is: no network is run for them.
    """
    accelerator: Any = _Alone(device, run)
    state = TrainState(method, run, accelerator, {})
    for lean in state.lean.values():
        lean._update = _Quick(lean)  # type: ignore[method-assign]
    player = method.turn(0)
    state.focus(player)
    _any_gradient(state, player)
    _advance(state, player)
    state.focus(player)
    if micro > 1:
        _any_gradient(state, player)
    yield
    _gradient(method, state, player, batch())
    _advance(state, player)


def peak_of_calls(nets: Callable[[], list[nn.Module]], call: Callable[[nn.Module], object]) -> int:
    """The most bytes held at once by networks that live together and are called in turn, without gradients."""
    held = Held()
    with FakeTensorMode(allow_non_fake_inputs=True), held, torch.no_grad():
        together = nets()
        for net in together:
            call(net)
        return held.peak


def _any_gradient(state: TrainState, player: str) -> None:
    torch.stack([parameter.sum() for parameter in state.parameters[player].values()]).sum().backward()


def _gradient(method: Method, state: TrainState, player: str, batch: Batch) -> None:
    draw: Any = _Blank(batch.samples)
    with state.accelerator.autocast():
        terms = method.terms(player, state.nets, batch, draw, 0)
    total = torch.stack([term.weighted.sum() for term in terms]).sum()
    total.backward()


def _advance(state: TrainState, player: str) -> None:
    norm = state.norm(player)
    if state.run.clip is not None:
        state.shrink(player, norm)
    state.advance(player)


def _alike(tensor: Tensor) -> Tensor:
    """Another of the kind and size."""
    if not is_traceable_wrapper_subclass(tensor):
        return torch.empty_like(tensor)
    names, made = tensor.__tensor_flatten__()
    parts = {name: _alike(getattr(tensor, name)) for name in names}
    return type(tensor).__tensor_unflatten__(parts, made, tensor.shape, tensor.stride())


def _parts(tensor: Tensor) -> list[Tensor]:
    """A tensor, or those that a wrapper such as a moment in 8 bits is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]
