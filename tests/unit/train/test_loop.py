"""The loop: accumulation, turns, switches, averages, divergence, resumption and logs, on small networks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import AutocastKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn

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

RUN = RunSettings(steps=4, seed=7, lr=1e-2)


def network(seed: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(8, 4, 3, padding=1))


@dataclass(frozen=True, eq=False)
class Imitation:
    """The least method: a student learns its teacher's answers; ``spoil`` breaks a term on purpose."""

    student: nn.Module
    teacher: nn.Module
    ema: float | None = None
    strength: float = 1.0
    spoil: Callable[[Tensor], Tensor] = field(default=lambda value: value)

    @property
    def players(self) -> Mapping[str, Player]:
        names = frozenset(name for name, _ in self.student.named_parameters())
        return {"student": Player(self.student, names, self.ema)}

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher}

    def turn(self, step: int) -> str:
        return "student"

    def terms(self, player: str, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw, step: int) -> Sequence[Term]:
        x = batch.latents(draw.normal("latent", tuple(batch.mean.shape[1:])))
        answer = nets["student"](x)
        output = mse(answer, nets["teacher"](x))
        size = answer.float().square().flatten(1).mean(1)
        return [
            Term("output", output, self.strength * (1 + draw.uniform("weight"))),
            Term("size", self.spoil(size), 0.1),
        ]


def imitation(**changes: Any) -> Imitation:
    return replace(Imitation(network(0), network(1)), **changes)


def source(sizes: Sequence[int], n: int = 20) -> Callable[[int], Sequence[Batch]]:
    """Micro-batches of these sizes, cut from the one stream."""
    made = torch.Generator().manual_seed(3)
    means, stds = torch.randn(n, 4, 8, 8, generator=made), torch.rand(n, 4, 8, 8, generator=made)

    def batches(step: int) -> Sequence[Batch]:
        samples, found = stream(7, step, sum(sizes), n), []
        for size in sizes:
            mine, samples = samples[:size], samples[size:]
            chosen = [p % n for p in mine]
            found.append(Batch(mine, means[chosen], stds[chosen], {}, {}))
        return found

    return batches


def train(
    method: Any, sizes: Sequence[int] = (4,), run: RunSettings = RUN, **start: Any
) -> tuple[TrainState, list[Step]]:
    state = TrainState.start(method, run, device="cpu", **start)
    return state, list(loop(method, source(sizes), state))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("split", [(2, 2, 2, 2), (1, 3, 4), (5, 3)])
@pytest.mark.parametrize("clip", [None, 1e-2])
def test_accumulation_equals_the_one_big_batch(split: tuple[int, ...], clip: float | None) -> None:
    whole, parts = imitation(ema=0.9), imitation(ema=0.9)
    run = replace(RUN, clip=clip)
    whole_state, one = train(whole, (8,), run)
    parts_state, many = train(parts, split, run)
    for a, b in zip(one, many, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-4)
        assert (a.total, a.grad_norm) == pytest.approx((b.total, b.grad_norm), rel=1e-4)
    for a, b in ((weights(whole.student), weights(parts.student)), *_averages(whole_state, parts_state)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def _averages(a: TrainState, b: TrainState) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return [(a.ema["student"].weights, b.ema["student"].weights)]


def test_an_update_is_the_one_written_out_by_hand() -> None:
    """Gradient of the mean over samples of the weighted terms, clipped, by torch's own AdamW."""
    method, twin = imitation(), network(0)
    run = replace(RUN, steps=1, clip=0.05)
    _, (step,) = train(method, (4,), run)
    batch = source((4,))(0)[0]
    draw = Draw(7, 0, batch.samples)
    terms = imitation(student=twin).terms("student", {"student": twin, "teacher": network(1)}, batch, draw, 0)
    total = sum(((term.weight * term.value).mean() for term in terms), torch.tensor(0.0))
    optimizer = torch.optim.AdamW(twin.parameters(), lr=run.lr, weight_decay=run.weight_decay, betas=run.betas)
    total.backward()
    norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
    optimizer.step()
    assert norm > 0.05, "clipping must bite for this test to mean anything"
    assert (step.total, step.grad_norm) == pytest.approx((total.item(), norm.item()), rel=1e-5)
    assert step.losses == pytest.approx({term.name: term.value.mean().item() for term in terms}, rel=1e-5)
    torch.testing.assert_close(weights(method.student), weights(twin))


def test_a_step_comes_after_its_update() -> None:
    method = imitation()
    state = TrainState.start(method, RUN, device="cpu")
    before = weights(method.student)
    step = next(iter(loop(method, source((4,)), state)))
    assert step.step == state.step == state.updates["student"] == 1
    assert not same(before, weights(method.student))
    assert step.images_per_second == pytest.approx(4 / step.seconds)


def test_the_teacher_stays_frozen_and_out_of_the_way() -> None:
    method = imitation()
    method.teacher.train()
    before = weights(method.teacher)
    state, steps = train(method)
    assert steps[-1].losses["output"] < steps[0].losses["output"]
    assert same(before, weights(method.teacher)) and not method.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert state.nets["teacher"] is method.teacher, "a frozen network is placed, never wrapped"
    assert state.accelerator._models == [state.nets["student"]]


def test_the_learning_rate_follows_its_schedule() -> None:
    run = replace(RUN, schedule="cosine", warmup=2)
    _, steps = train(imitation(), run=run)
    assert [step.lr for step in steps] == pytest.approx([0.0, 0.005, 0.01, 0.005])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(bad: float) -> None:
    method = imitation(spoil=lambda value: value * bad)
    state = TrainState.start(method, RUN, device="cpu")
    before = weights(method.student)
    with pytest.raises(UserError, match=r"step 1: loss/size"):
        next(iter(loop(method, source((4,)), state)))
    assert same(before, weights(method.student)) and state.step == 0


def test_a_gradient_that_is_not_finite_names_its_term() -> None:
    """sqrt at 0: a finite loss with an infinite gradient."""
    method = imitation(spoil=lambda value: (value - value.detach()).sqrt())
    state = TrainState.start(method, RUN, device="cpu")
    before = weights(method.student)
    with pytest.raises(UserError, match=r"step 1: gradient of loss/size"):
        next(iter(loop(method, source((2, 2)), state)))
    assert same(before, weights(method.student)) and state.step == 0


@pytest.mark.parametrize("ema", [0.9, None])
def test_a_parameter_that_is_not_finite_is_named_and_never_saved(tmp_path: Path, ema: float | None) -> None:
    """A learning rate beyond float32: losses and gradients are fine, the weights after the second update are not."""
    method = imitation(ema=ema)
    state = TrainState.start(method, replace(RUN, lr=1e39, warmup=2), device="cpu")
    steps = loop(method, source((4,)), state)
    assert next(steps).step == 1
    state.save(tmp_path)
    with pytest.raises(UserError, match=r"step 2: parameter 0\.weight of student: not finite"):
        next(steps)
    with pytest.raises(UserError, match="not finite"):
        state.save(tmp_path)
    good = imitation(ema=ema)
    again = TrainState.start(good, replace(RUN, lr=1e39, warmup=2), device="cpu")
    assert again.resume(tmp_path) and again.step == 1
    assert all(tensor.isfinite().all() for tensor in weights(good.student).values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("ema", [0.9999, None])
def test_one_spoiled_number_in_a_parameter_is_seen_in_the_same_step(
    monkeypatch: pytest.MonkeyPatch, bad: float, ema: float | None
) -> None:
    """As a bad memory cell would have it: the loss never sees it, for the parameter is not used."""
    student = network(0)
    student.register_parameter("unused", nn.Parameter(torch.zeros(5000)))
    method = imitation(student=student, ema=ema)
    steps = loop(method, source((4,)), state := TrainState.start(method, RUN, device="cpu"))
    assert next(steps).step == 1
    optimizer = state.optimizers["student"].optimizer
    step = optimizer.step

    def spoiled() -> None:
        step()
        student.unused.data[4321] = bad

    monkeypatch.setattr(optimizer, "step", spoiled)
    with pytest.raises(UserError, match="step 2: parameter unused of student: not finite"):
        next(steps)


@pytest.mark.parametrize("ema", [0.9, None])
def test_large_but_finite_parameters_are_no_error(ema: float | None) -> None:
    """Their norm and their sum overflow in float32; they do not."""
    student = network(0)
    student.register_parameter("unused", nn.Parameter(torch.full((3,), 3e38)))
    _, steps = train(imitation(student=student, ema=ema))
    assert len(steps) == RUN.steps


def scaled(method: Any, monkeypatch: pytest.MonkeyPatch, scale: float, clip: float | None = None) -> TrainState:
    """A run with fp16's loss scaling, which torch has for the CPU too; Accelerate and decant offer it on CUDA alone."""
    state = TrainState.start(method, replace(RUN, clip=clip), device="cpu")
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    monkeypatch.setattr(type(state.accelerator), "mixed_precision", "fp16")
    state.accelerator.scaler, state.accelerator.native_amp = scaler, True
    state.accelerator.autocast_handler = AutocastKwargs(enabled=False)
    for name, optimizer in state.optimizers.items():
        state.optimizers[name] = AcceleratedOptimizer(optimizer.optimizer, scaler=scaler)
    return state


def test_an_overflow_of_scaled_losses_is_skipped_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    method = imitation(strength=1e4)
    state = scaled(method, monkeypatch, 2.0**118)  # a gradient of thousands times that is beyond float32
    before = weights(method.student)
    moved = []
    for _ in loop(method, source((4,)), state):
        moved.append(not same(before, weights(method.student)))
        assert all(tensor.isfinite().all() for tensor in moments(state).values())
    assert moved[0] is False and moved[-1] is True and state.step == 4
    assert state.accelerator.scaler.get_scale() < 2.0**118


def test_a_scaled_run_is_clipped_as_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, method = imitation(), imitation()
    _, expected = train(plain, run=replace(RUN, clip=0.05))
    steps = list(loop(method, source((4,)), scaled(method, monkeypatch, 2.0**10, clip=0.05)))
    for mine, theirs in zip(steps, expected, strict=True):
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4) and mine.grad_norm > 0.05
    torch.testing.assert_close(weights(method.student), weights(plain.student), rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_never_finite_ends_a_scaled_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    method = imitation(spoil=lambda value: (value - value.detach()).sqrt())
    state = scaled(method, monkeypatch, 2.0)
    steps = loop(method, source((4,)), state)
    next(steps), next(steps)
    with pytest.raises(UserError, match=r"step 3: gradient of loss/size"):
        next(steps)


@dataclass(frozen=True, eq=False)
class Duel:
    """Two players who share a module, a parameter set each; the second moves twice as often."""

    shared: nn.Module

    @property
    def players(self) -> Mapping[str, Player]:
        first = frozenset({"0.weight", "0.bias"})
        return {
            "student": Player(self.shared, first, 0.9),
            "critic": Player(self.shared, frozenset({"3.weight", "3.bias"})),
        }

    @property
    def frozen(self) -> Mapping[str, nn.Module]:
        return {}

    def turn(self, step: int) -> str:
        return "student" if step % 3 == 0 else "critic"

    def terms(self, player: str, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw, step: int) -> Sequence[Term]:
        wanted = {name for name, p in self.shared.named_parameters() if p.requires_grad}
        assert wanted == self.players[player].parameters, "only the turn's parameters require gradients"
        return [Term(player, nets[player](batch.mean).square().flatten(1).mean(1))]


def test_each_player_moves_in_its_turn_and_the_student_ends_the_run() -> None:
    method = Duel(network(0))
    run = replace(RUN, schedule="linear")
    state = TrainState.start(method, run, device="cpu")
    seen, before = [], weights(method.shared)
    for step in loop(method, source((2,)), state):
        after = weights(method.shared)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        assert moved == (method.players[step.player].parameters if step.lr else set())
        seen.append((step.player, round(step.lr / run.lr, 6)))
        before = after
    student, critic = (
        [lr for who, lr in seen if who == "student"],
        [lr for who, lr in seen if who == "critic"],
    )
    assert student == [1.0, 0.75, 0.5, 0.25], "learning rates count the player's own updates"
    assert critic == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert state.updates == {"student": 4, "critic": 6} and state.step == 10
    assert set(state.ema) == {"student"} and set(state.ema["student"].weights) == {"0.weight", "0.bias"}


def test_a_parameter_has_one_trainer() -> None:
    class Both(Duel):
        @property
        def players(self) -> Mapping[str, Player]:
            every = frozenset(name for name, _ in self.shared.named_parameters())
            return {
                "student": Player(self.shared, every),
                "critic": Player(self.shared, frozenset({"0.bias"})),
            }

    with pytest.raises(AssertionError, match="one player"):
        TrainState.start(Both(network(0)), RUN, device="cpu")


def test_half_precision_keeps_trained_weights_and_losses_in_float32() -> None:
    method = imitation(student=network(0).to(torch.bfloat16), ema=0.9)
    run = replace(RUN, steps=20, precision="bf16")
    state, steps = train(method, run=run)
    assert {p.dtype for p in method.student.parameters()} == {torch.float32}
    assert {p.dtype for p in method.teacher.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in state.ema["student"].weights.values()} == {torch.float32}
    assert steps[-1].losses["output"] < steps[0].losses["output"]
    twin, x = network(5), torch.randn(1, 4, 8, 8)
    twin.load_state_dict(method.student.state_dict())
    assert torch.equal(method.student(x), twin(x)), "no autocast stays behind"
    train(imitation())  # and another precision can follow in the same process


def test_devices_and_precisions_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="fp16"):
        train(imitation(), run=replace(RUN, precision="fp16"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device"):
            TrainState.start(imitation(), RUN, device="cuda")


def test_dropout_in_a_network_depends_on_the_step_alone() -> None:
    results = []
    for noise in (1, 2):
        method = imitation(student=network(0, dropout=0.5))
        torch.manual_seed(noise)
        kept = torch.random.get_rng_state()
        train(method)
        assert torch.equal(kept, torch.random.get_rng_state()), "the caller's generator is left alone"
        results.append(weights(method.student))
    assert same(*results)


def test_the_order_of_terms_and_deterministic_algorithms_do_not_matter() -> None:
    results = []
    for strict in (False, True):
        method = imitation()
        torch.use_deterministic_algorithms(strict)
        try:
            train(method)
        finally:
            torch.use_deterministic_algorithms(False)
        results.append(weights(method.student))
    assert same(*results)


class Notebook(GeneralTracker):
    """A tracker as users write them: Accelerate's own interface."""

    name, requires_logging_directory = "notebook", False

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.lines: list[tuple[int | None, dict[str, Any]]] = []
        self.finished = False

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_trackers_get_every_step_and_the_settings() -> None:
    notebook = Notebook()
    _, steps = train(imitation(), trackers=[notebook])
    assert notebook.config["run.lr"] == "0.01" and notebook.finished
    assert [number for number, _ in notebook.lines] == [1, 2, 3, 4]
    for step, (_, values) in zip(steps, notebook.lines, strict=True):
        assert values["loss/output"] == step.losses["output"] and values["lr/student"] == step.lr
        assert values["total"] == step.total and values["grad_norm"] == step.grad_norm


def moments(state: TrainState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state._moments().items()}


@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, stop: int) -> None:
    run = replace(RUN, schedule="one_cycle", warmup=2)
    whole = imitation(student=network(0, dropout=0.3), ema=0.9)
    whole_state, whole_steps = train(whole, (3, 2), run)
    first = imitation(student=network(0, dropout=0.3), ema=0.9)
    state = TrainState.start(first, run, device="cpu")
    for step in loop(first, source((3, 2)), state):
        if step.step == stop:
            state.save(tmp_path)
            break
    again = imitation(student=network(5, dropout=0.3), ema=0.9)  # whatever it holds is replaced
    resumed = TrainState.start(again, run, device="cpu")
    assert resumed.resume(tmp_path) and resumed.step == stop
    rest = list(loop(again, source((3, 2)), resumed))
    assert [s.losses for s in rest] == [s.losses for s in whole_steps[stop:]]
    assert same(weights(again.student), weights(whole.student))
    assert same(resumed.ema["student"].weights, whole_state.ema["student"].weights)
    assert same(moments(resumed), moments(whole_state)) and len(moments(resumed)) == 3 * 4


def test_two_players_resume_too(tmp_path: Path) -> None:
    whole, first, again = Duel(network(0)), Duel(network(0)), Duel(network(5))
    whole_state = TrainState.start(whole, RUN, device="cpu")
    list(loop(whole, source((2,)), whole_state))
    state = TrainState.start(first, RUN, device="cpu")
    for step in loop(first, source((2,)), state):
        if step.step == 5:
            state.save(tmp_path)
            break
    resumed = TrainState.start(again, RUN, device="cpu")
    assert resumed.resume(tmp_path) and resumed.updates == {"student": 2, "critic": 3}
    list(loop(again, source((2,)), resumed))
    assert same(weights(again.shared), weights(whole.shared)) and same(moments(resumed), moments(whole_state))


def test_without_a_checkpoint_a_run_begins_at_the_beginning(tmp_path: Path) -> None:
    state = TrainState.start(imitation(), RUN, device="cpu")
    assert not state.resume(tmp_path / "absent") and state.step == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"run": replace(RUN, lr=2e-2)}, "run.lr"),
        ({"run": replace(RUN, steps=9)}, "run.steps"),
        ({"method": {"strength": 0.5}}, "method.strength"),
        ({"method": {"ema": 0.99}}, "ema"),
        ({"method": {"student": nn.Conv2d(4, 4, 1)}}, "shape of student/"),
        ({"extra": {"data": "other"}}, "extra.data"),
    ],
)
def test_a_resume_with_anything_else_is_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    state = TrainState.start(imitation(ema=0.9), RUN, device="cpu", extra={"data": "one"})
    state.save(tmp_path)
    method = imitation(**{"ema": 0.9} | change.get("method", {}))
    run, extra = change.get("run", RUN), change.get("extra", {"data": "one"})
    other = TrainState.start(method, run, device="cpu", extra=extra)
    before = weights(method.student)
    with pytest.raises(UserError, match=named):
        other.resume(tmp_path)
    assert same(before, weights(method.student)) and other.step == 0


@dataclass(frozen=True, eq=False)
class Felt(Imitation):
    """Imitation of what goes on inside, too: both networks are tapped."""

    def terms(self, player: str, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw, step: int) -> Sequence[Term]:
        x = batch.latents(draw.normal("latent", tuple(batch.mean.shape[1:])))
        answer, inside = nets["student"](x)
        taught, teacher_inside = nets["teacher"](x)
        return [Term("output", mse(answer, taught)), Term("feature", mse(inside["1"], teacher_inside["1"]))]


def test_compiled_with_fast_products_trains_the_same_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    run = replace(RUN, compile=True, fast_products=True)
    torch._dynamo.reset()

    def begin(run: RunSettings) -> tuple[Felt, TrainState]:
        method = Felt(tap(network(0, dropout=0.3), ["1"]), tap(network(1), ["1"]), ema=0.9)
        return method, TrainState.start(method, run, device="cpu")

    eager, state = begin(replace(run, compile=False, fast_products=False))
    eager_steps = list(loop(eager, source((4,)), state))
    whole, whole_state = begin(run)
    assert whole_state.nets["student"] is not whole.student and whole_state.nets["teacher"] is not whole.teacher
    steps = []
    for step in loop(whole, source((4,)), whole_state):
        steps.append(step)
        if step.step == 2:
            whole_state.save(tmp_path)
    assert steps[0].losses["feature"] == pytest.approx(eager_steps[0].losses["feature"], rel=2e-2) != 0
    torch._dynamo.reset()
    again, resumed = begin(run)
    assert resumed.resume(tmp_path) and resumed.step == 2
    rest = list(loop(again, source((4,)), resumed))
    assert [step.losses for step in rest] == [step.losses for step in steps[2:]]
    assert same(weights(again.student), weights(whole.student)) and same(moments(resumed), moments(whole_state))
    torch._dynamo.reset()


def test_fast_products_run_with_the_networks_and_end_with_them() -> None:
    seen = []

    @dataclass(frozen=True, eq=False)
    class Watched(Imitation):
        def terms(self, *args: Any) -> Sequence[Term]:
            seen.append(torch.backends.mkldnn.conv.fp32_precision)
            return super().terms(*args)

    before = torch.backends.mkldnn.conv.fp32_precision
    train(Watched(network(0), network(1)), run=replace(RUN, fast_products=True))
    assert set(seen) == {"bf16"} != {before} and torch.backends.mkldnn.conv.fp32_precision == before


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="compile"):
        TrainState.start(imitation(), replace(RUN, compile=True), device="cpu")
