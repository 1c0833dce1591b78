"""How much memory a run's updates will hold, found by making two of them on tensors without numbers."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from decant.data.batch import Batch
from decant.train.method import Method
from decant.train.state import DTYPES, RunSettings, TrainState


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that live, from those made while it is entered: ``now``, and ``peak`` at most.

    Torch's own ``MemTracker`` counts the same and names modules beside it, but takes no second forward and no gradient
    that is freed in the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it gives."""
        found = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._hold, found)
        return found

    def _hold(self, tensor: Tensor) -> Tensor:
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


def peak_of_updates(
    make: Callable[[], Method], batch: Callable[[], Batch], run: RunSettings, device: torch.device, micro: int = 1
) -> int:
    """The most bytes held at once by two updates of ``micro`` batches each.

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
    """Two updates, the second of which meets the optimiser's moments; yields before every batch.

    Of an update's batches two are enough to hold gradients beside activations.
    """
    accelerator: Any = _Alone(device, run)
    state = TrainState(method, run, accelerator, {})
    for number in range(2):
        player = method.turn(number)
        state.focus(player)
        for _ in range(min(micro, 2)):
            yield
            _gradient(method, state, player, batch(), number)
        state.norm(player)
        if number == 0:  # which makes the moments; the second would hold no more
            state.advance(player)


def peak_of_calls(nets: Callable[[], list[nn.Module]], call: Callable[[nn.Module], object]) -> int:
    """The most bytes held at once by networks that live together and are called in turn, without gradients."""
    held = Held()
    with FakeTensorMode(allow_non_fake_inputs=True), held, torch.no_grad():
        together = nets()
        for net in together:
            call(net)
        return held.peak


def _gradient(method: Method, state: TrainState, player: str, batch: Batch, number: int) -> None:
    draw: Any = _Blank(batch.samples)
    with state.accelerator.autocast():
        terms = method.terms(player, state.nets, batch, draw, number)
    total = torch.stack([term.weighted.sum() for term in terms]).sum()
    total.backward()


def _parts(tensor: Tensor) -> list[Tensor]:
    """A tensor, or those that a wrapper such as a moment in 8 bits is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]
