"""Settings for memory: moments in 8 bits, updates in the backward pass, weights in bfloat16, teachers in less."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decant.data.batch import Batch
from decant.data.order import stream
from decant.errors import UserError
from decant.losses.output import mse
from decant.losses.term import Term
from decant.models.taps import tap
from decant.train.draw import Draw
from decant.train.loop import Step, loop
from decant.train.method import Player
from decant.train.state import RunSettings, TrainState

RUN = RunSettings(steps=6, seed=7, lr=1e-2, clip=None)
LEAN = [
    {"optimizer": "adamw8bit"},
    {"optimizer": "adamw8bit", "clip": 1e-2},
    {"in_backward": True},
    {"in_backward": True, "optimizer": "adamw8bit"},
    {"weights": "bf16", "precision": "bf16"},
    {"weights": "bf16", "precision": "bf16", "in_backward": True, "optimizer": "adamw8bit", "channels_last": True},
    {"channels_last": True, "optimizer": "adamw8bit", "teacher_precision": "bf16"},
]


class Net(nn.Module):
    """Large enough that its middle is kept in 8 bits: 64 x 64 x 3 x 3 numbers."""

    def __init__(self, seed: int, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 4, 3, padding=1)
        self.middle = nn.Sequential(nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1), nn.SiLU())
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = checkpoint(self.middle, x, use_reentrant=False) if self.recompute and self.training else self.middle(x)
        return self.last(x)


@dataclass(frozen=True, eq=False)
class Imitation:
    """A student learns its teacher's answers and what goes on inside."""

    student: nn.Module
    teacher: nn.Module
    ema: float | None = 0.9

    @property
    def players(self) -> Mapping[str, Player]:
        return {
            "student": Player(self.student, frozenset(name for name, _ in self.student.named_parameters()), self.ema)
        }

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher}

    def turn(self, step: int) -> str:
        return "student"

    def terms(self, player: str, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw, step: int) -> Sequence[Term]:
        x = batch.latents(draw.normal("latent", tuple(batch.mean.shape[1:])))
        answer, inside = nets["student"](x)
        with torch.inference_mode():
            taught, teacher_inside = nets["teacher"](x)
        feature = mse(inside["middle.1"].float(), teacher_inside["middle.1"].float().clone())
        return [Term("output", mse(answer.float(), taught.float().clone())), Term("feature", feature)]


def imitation(seed: int = 0, recompute: bool = False) -> Imitation:
    return Imitation(tap(Net(seed, recompute), ["middle.1"]), tap(Net(1), ["middle.1"]))


def batches(step: int) -> Sequence[Batch]:
    made = torch.Generator().manual_seed(3)
    mean, std = torch.randn(20, 4, 8, 8, generator=made), torch.rand(20, 4, 8, 8, generator=made)
    samples = stream(7, step, 4, 20)
    at = [p % 20 for p in samples]
    return [Batch(samples, mean[at], std[at], {}, {})]


def train(method: Imitation, run: RunSettings) -> tuple[TrainState, list[Step]]:
    state = TrainState.start(method, run, device="cpu")
    return state, list(loop(method, batches, state))


def weights(state: TrainState) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in state.parameters["student"].items()}


@pytest.mark.parametrize("changes", [{"channels_last": True}, *LEAN], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = replace(RUN, schedule="one_cycle", warmup=2, **changes)
    whole, whole_steps = train(imitation(), run)
    first = imitation()
    state = TrainState.start(first, run, device="cpu")
    for step in loop(first, batches, state):
        if step.step == 3:
            state.save(tmp_path)
            break
    again = imitation(seed=5)
    resumed = TrainState.start(again, run, device="cpu")
    assert resumed.resume(tmp_path) and resumed.step == 3
    rest = list(loop(again, batches, resumed))
    assert [s.losses for s in rest] == [s.losses for s in whole_steps[3:]]
    one, other = whole._moments(), resumed._moments()
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert all(weights(whole)[name].equal(tensor) for name, tensor in weights(resumed).items())
    assert all(whole.ema["student"].weights[k].equal(v) for k, v in resumed.ema["student"].weights.items())


@pytest.mark.parametrize("changes", LEAN, ids=str)
def test_training_goes_the_way_of_plain_adamw(changes: dict[str, Any]) -> None:
    _, plain = train(imitation(), replace(RUN, clip=changes.get("clip"), steps=14))
    _, lean = train(imitation(), replace(RUN, steps=14, **changes))
    near = 0.2 if "weights" in changes else 0.03  # rounding bfloat16 weights is noise, at this learning rate a lot
    assert [s.total for s in lean] == pytest.approx([s.total for s in plain], rel=near)
    assert lean[0].grad_norm == pytest.approx(plain[0].grad_norm, rel=near)
    assert plain[-1].total < 0.5 * plain[0].total


def test_an_update_in_the_backward_pass_is_the_one_after_it_and_holds_no_gradients() -> None:
    after, one = train(imitation(), RUN)
    within, two = train(imitation(), replace(RUN, in_backward=True))
    assert [s.losses for s in one] == [s.losses for s in two]
    assert all(p.grad is None for p in within.parameters["student"].values())
    torch.testing.assert_close(weights(within), weights(after), rtol=1e-5, atol=1e-7)


def test_moments_in_8_bits_take_a_quarter() -> None:
    bytes_of = {}
    for optimizer in ("adamw", "adamw8bit"):
        state, _ = train(imitation(), replace(RUN, steps=1, optimizer=optimizer))
        bytes_of[optimizer] = sum(t.numel() * t.element_size() for t in state._moments().values())
    assert bytes_of["adamw8bit"] < 0.4 * bytes_of["adamw"], "the two small convolutions stay in float32"


def test_weights_in_bfloat16_stay_so_and_frozen_networks_take_the_precision_they_were_given() -> None:
    state, _ = train(imitation(), replace(RUN, weights="bf16", precision="bf16", teacher_precision="no"))
    assert {p.dtype for p in state.parameters["student"].values()} == {torch.bfloat16}
    assert {p.dtype for p in state.nets["teacher"].parameters()} == {torch.float32}
    state, _ = train(imitation(), replace(RUN, teacher_precision="bf16"))
    assert {p.dtype for p in state.parameters["student"].values()} == {torch.float32}
    assert {p.dtype for p in state.nets["teacher"].parameters()} == {torch.bfloat16}


def test_channels_last_reaches_both_networks_and_changes_the_last_digits_alone() -> None:
    _, one = train(imitation(), RUN)
    state, two = train(imitation(), replace(RUN, channels_last=True))
    for net in state.nets.values():
        kernels = [p for p in net.parameters() if p.ndim == 4]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert [s.total for s in two] == pytest.approx([s.total for s in one], rel=1e-3)


@pytest.mark.parametrize("in_backward", [False, True])
def test_recomputing_activations_changes_nothing_with_taps(in_backward: bool) -> None:
    run = replace(RUN, in_backward=in_backward)
    kept, one = train(imitation(), run)
    made_again, two = train(imitation(recompute=True), run)
    assert [s.losses for s in one] == [s.losses for s in two] and one[0].losses["feature"] > 0
    assert all(weights(kept)[name].equal(tensor) for name, tensor in weights(made_again).items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"in_backward": True, "clip": 1.0}, "clip"),
        ({"weights": "bf16"}, "weights: bf16 with precision no"),
        ({"optimizer": "adamw8bit", "precision": "fp16"}, "precision"),
    ],
)
def test_what_cannot_be_had_together_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        TrainState.start(imitation(), replace(RUN, **changes), device="cpu")


def test_a_gradient_that_is_not_finite_ends_a_run_with_updates_in_the_backward_pass() -> None:
    method = imitation()
    state = TrainState.start(method, replace(RUN, in_backward=True), device="cpu")
    with torch.no_grad():
        next(iter(state.parameters["student"].values())).fill_(float("nan"))
    with pytest.raises(UserError, match=r"(?s)step 1: .*nothing of this step was saved") as told:
        next(iter(loop(method, batches, state)))
    assert "not finite" in str(told.value)
