"""The training loop: terms become steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import isfinite
from time import perf_counter

import torch
from torch import Tensor

from decant.data.batch import Batch
from decant.errors import UserError, refuse
from decant.losses.term import Term
from decant.maths.seeds import seed_of
from decant.train.draw import Draw
from decant.train.method import Method
from decant.train.norm import norm_of
from decant.train.state import TrainState

Batches = Callable[[int], Sequence[Batch]]
_NOT_SAVED = "nothing of this step was saved"


@dataclass(frozen=True)
class Step:
    """One update, already made.

    step: updates made so far by all players, this one included. losses: term -> its unweighted mean over the
    samples. total: the weighted sum that was descended. grad_norm: before clipping. seconds: of the whole
    update, data included.
    """

    player: str
    step: int
    losses: dict[str, float]
    total: float
    grad_norm: float
    lr: float
    seconds: float
    images_per_second: float


def loop(method: Method, batches: Batches, state: TrainState) -> Iterator[Step]:
    """Train from ``state`` to its run's end, yielding every step after its update.

    ``batches(step)`` gives the micro-batches of update ``step``, counted from 0: several are accumulated into
    one update that equals that of the one big batch. Between two steps the caller may save, sample, or stop
    for good. Raises UserError in the step in which a loss or a gradient (then before the update) or a parameter is not
    finite.
    """
    student = next(iter(method.players))
    while state.updates[student] < state.run.steps:
        step = _update(method, batches, state)
        if state.accelerator.trackers:
            losses = {f"loss/{name}": value for name, value in step.losses.items()}
            values = {"total": step.total, "grad_norm": step.grad_norm, f"lr/{step.player}": step.lr}
            state.accelerator.log(losses | values, step=step.step)
        yield step
    for tracker in state.accelerator.trackers:
        tracker.finish()


def _update(method: Method, batches: Batches, state: TrainState) -> Step:
    started, number = perf_counter(), state.step
    player = method.turn(number)
    micro = batches(number)
    assert micro, f"no batch at step {number}"
    assert len(micro) == 1 or not state.run.in_backward, "an update in the backward pass sees one batch"
    own = torch.tensor(sum(len(batch.samples) for batch in micro))
    tally = _Tally(own, int(_over_ranks(state, own)))
    state.focus(player)
    for index, batch in enumerate(micro):
        with _ranks_apart(state, player, index + 1 < len(micro)), state.products():
            terms = _terms(method, state, player, batch)
            _backward(terms, state, player, tally)
    grad_norm = _clip(method, state, player, micro, tally)
    lr = state.advance(player)
    losses, total = _finish(state, player, tally, number)
    seconds = perf_counter() - started
    return Step(player, state.step, losses, total, grad_norm, lr, seconds, tally.images / seconds)


@dataclass
class _Tally:
    """Sums over this rank's micro-batches: ``own`` samples of the update's ``images`` on all ranks."""

    own: Tensor
    images: int
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    weighted: float | Tensor = 0.0
    signs: list[tuple[str, Tensor]] = field(default_factory=list)

    def add(self, terms: Sequence[Term], weighted: Sequence[Tensor], total: Tensor) -> None:
        """``weighted``: the sum of each term. A sum is not finite where a sample is not."""
        for term, sum_weighted in zip(terms, weighted, strict=True):
            value = term.value.detach().sum()
            self.sums[term.name] = self.sums.get(term.name, 0.0) + value
            self.counts[term.name] = self.counts.get(term.name, 0) + len(term.value)
            self.signs.append((term.name, value + sum_weighted.detach()))
        self.weighted = self.weighted + total.detach()

    def means(self, state: TrainState) -> Tensor:
        """The unweighted mean of every term, and the weighted sum of all: ``(terms + 1,)``."""
        assert isinstance(self.weighted, Tensor)
        sums = torch.stack([*self.sums.values(), self.weighted])
        counts = torch.tensor(list(self.counts.values()))
        counts = _over_ranks(state, torch.cat([counts, self.own.view(1)]))
        return _over_ranks(state, sums) / counts.to(sums)


def _terms(method: Method, state: TrainState, player: str, batch: Batch) -> Sequence[Term]:
    draw = Draw(state.run.seed, state.step, batch.samples)
    with _seeded(draw, state.accelerator.device), state.accelerator.autocast():
        terms = method.terms(player, state.nets, batch.to(state.accelerator.device), draw, state.step)
    names = [term.name for term in terms]
    assert names and len(names) == len(set(names)), f"terms have names of their own, not {names}"
    assert all(len(term.value) == len(batch.samples) for term in terms), "a term has one value per sample"
    return terms


@contextmanager
def _seeded(draw: Draw, device: torch.device) -> Iterator[None]:
    """Dropout inside a network draws from torch's global generator: here it too depends on the step alone."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # torch.manual_seed looks for every kind of device, which takes a millisecond or two.
        seeded = torch.default_generator if device.type == "cpu" else torch
        seeded.manual_seed(seed_of(draw.seed, draw.step, draw.samples[0], "network"))
        yield


def _backward(terms: Sequence[Term], state: TrainState, player: str, tally: _Tally) -> None:
    weighted = [term.weighted.sum() for term in terms]
    total = torch.stack(weighted).sum()
    assert total.requires_grad, f"no term reaches a parameter of {player}"
    tally.add(terms, weighted, total)
    # Ranks are averaged, samples are not: so that any split of a batch gives the gradient of the whole.
    state.accelerator.backward(total * (state.accelerator.num_processes / tally.images))


def _clip(method: Method, state: TrainState, player: str, micro: Sequence[Batch], tally: _Tally) -> float:
    """Clip the gradient and give its norm before that; nothing is updated where it or a loss is not finite.

    Updates in the backward pass are made by then: they are not saved.
    """
    state.accelerator.unscale_gradients()
    norm = state.norm(player)
    done = (_NOT_SAVED,) if state.run.in_backward else ()
    names, sums = zip(*tally.signs, strict=True)
    # One look at the device for all of them: each would wait until it has caught up.
    *signs, grad_norm = torch.cat([_over_ranks(state, torch.stack(sums)), norm.to(sums[0]).view(1)]).tolist()
    for name, sign in zip(names, signs, strict=True):
        if not isfinite(sign):
            raise _diverged(f"loss/{name}", state.step, *done)
    scaler = state.accelerator.scaler
    # With fp16 an overflow is the scaler's business, until its scale has shrunk to where only a NaN can be
    # the cause.
    if not isfinite(grad_norm) and (scaler is None or scaler.get_scale() < 1):
        whose = "the sum of all terms" if state.run.in_backward else _blame(method, state, player, micro)
        raise _diverged(f"gradient of {whose}", state.step, *done)
    if state.run.clip is not None and grad_norm > state.run.clip:
        state.shrink(player, norm / state.run.clip)
    return grad_norm


@torch.no_grad()
def _finish(state: TrainState, player: str, tally: _Tally, number: int) -> tuple[dict[str, float], float]:
    """Losses and total of an update that was made; raises UserError where it left a parameter not finite."""
    trained = state.parameters[player]
    means = tally.means(state)
    # What is not finite in a parameter is not in its average either, which lies in one piece.
    sign = state.ema[player].sum() if player in state.ema else norm_of([p.detach() for p in trained.values()])
    *losses, total, whole = torch.cat([means, sign.to(means).view(1)]).tolist()
    if not isfinite(whole):
        for name, parameter in trained.items():
            if not parameter.isfinite().all():
                raise _diverged(f"parameter {name} of {player}", number, _NOT_SAVED)
    return dict(zip(tally.sums, losses, strict=True)), total


def _blame(method: Method, state: TrainState, player: str, micro: Sequence[Batch]) -> str:
    """The first term whose own gradient is not finite; draws repeat, so one can look again."""
    parameters = state.parameters[player].values()
    for batch in micro:
        with state.products():
            terms = _terms(method, state, player, batch)
        for term in terms:
            for parameter in parameters:
                parameter.grad = None
            if not term.weighted.requires_grad:
                continue
            with state.products():
                term.weighted.sum().backward(retain_graph=True)
            if any(p.grad is not None and not p.grad.isfinite().all() for p in parameters):
                return f"loss/{term.name}"
    return "the sum of all terms"


def _diverged(what: str, number: int, done: str = "the update was not made") -> UserError:
    return refuse(
        f"step {number + 1}: {what}",
        "not finite",
        allowed=f"finite numbers; {done}",
        hint="lower the learning rate or lengthen the warm-up; with fp16, try bf16",
    )


def _ranks_apart(state: TrainState, player: str, more: bool) -> AbstractContextManager[object]:
    """Ranks exchange gradients only after the last micro-batch."""
    return state.accelerator.no_sync(state.nets[player]) if more else nullcontext()


def _over_ranks(state: TrainState, tensor: Tensor) -> Tensor:
    if state.accelerator.num_processes == 1:
        return tensor
    return state.accelerator.reduce(tensor.to(state.accelerator.device), reduction="sum")
