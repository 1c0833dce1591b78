"""Parts of the stages that can be tested by themselves."""

import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from decant.data.latents import Latents
from decant.errors import UserError
from decant.maths.schedules import scaled_linear
from decant.metrics.interval import bootstrap_mean
from decant.models.device import pick
from decant.report.collect import collect
from decant.scenes.checker import read
from decant.scenes.render import render
from decant.scenes.world import scenes
from decant.stages.curve import Curve
from decant.stages.interrupt import Interrupted, asked_to_stop, interruptible
from decant.stages.output_error import output_error
from decant.stages.progress import progress
from decant.stages.scoring import same
from decant.stages.stage import Settings, validate
from decant.train.loop import Step


class _Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class _Plain:
    """A family whose networks see x_t alone."""

    prediction = "epsilon"
    schedule = scaled_linear(0.00085, 0.012, 1000)

    def corrupt(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.at(t, x_0.ndim)
        return alpha * x_0 + sigma * noise

    def denoise(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: object) -> Tensor:
        return net(x_t)


def _latents(n: int) -> Latents:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(n, 4, 8, 8, generator=generator)
    words = {"encoder_hidden_states": torch.zeros(1, 2, 3)}
    return Latents(mean, torch.full_like(mean, 0.1), torch.zeros(n, dtype=torch.long), words, words)


def test_output_error_is_the_squared_difference() -> None:
    """Networks a x and b x differ by (a - b)^2 E[x^2]: the ratio of two errors is known exactly."""
    data = _latents(12)
    far = output_error(_Plain(), _Scaled(3.0), _Scaled(1.0), data, seed=0)
    near = output_error(_Plain(), _Scaled(2.0), _Scaled(1.0), data, seed=0)
    assert torch.allclose(far.by_picture, 4 * near.by_picture, rtol=1e-4)
    assert output_error(_Plain(), _Scaled(1.0), _Scaled(1.0), data, seed=0).mean == 0


def test_output_error_does_not_depend_on_the_batch() -> None:
    data = _latents(10)
    ones = output_error(_Plain(), _Scaled(2.0), _Scaled(1.0), data, seed=0, batch_size=1)
    all_at_once = output_error(_Plain(), _Scaled(2.0), _Scaled(1.0), data, seed=0, batch_size=64)
    assert torch.allclose(ones.by_picture, all_at_once.by_picture, atol=1e-6)


def test_same_scene_in_two_pictures() -> None:
    drawn = [(scene, seed) for seed, scene in scenes(20, "train", first_seed=77)]
    for (scene, seed), (other, other_seed) in pairwise(drawn):
        assert same(read(render(scene, seed)), read(render(scene, seed)))
        assert not same(read(render(scene, seed)), read(render(other, other_seed)))


def test_bootstrap_interval_holds_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    held = [
        interval.low <= 1.0 <= interval.high
        for interval in (bootstrap_mean(random.exponential(1.0, 60).tolist(), resamples=400) for _ in range(200))
    ]
    assert 0.85 <= np.mean(held) <= 0.99


@pytest.fixture
def listening() -> Iterator[None]:
    """A process started in the background of a shell inherits an ignored SIGINT, one under nohup SIGHUP."""
    fresh = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in fresh.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_and_the_second_acts(listening: None, first: int, second: int) -> None:
    with interruptible():
        with pytest.raises(Interrupted) as caught, asked_to_stop() as stop:
            stop.check()
            _send(first)
            assert stop.number == first
            _send(second)
            pytest.fail("the second did not act")
        assert caught.value.status == 128 + second
        with pytest.raises(Interrupted) as caught:
            _send(first)
        assert caught.value.status == 128 + first
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so() -> None:
    """What nohup asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible(), asked_to_stop() as stop:
            _send(signal.SIGHUP)
            assert stop.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_curve_cut_short_anywhere_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """A kill may leave steps that the checkpoint does not know, and half a line."""

    def step(number: int) -> Step:
        return Step("student", number, {"task": 1 / number, "output": number**0.5}, 0.0, 0.0, 0.0, 1.0, 1.0)

    def draw(path: Path, done: int, numbers: range) -> list[dict[str, Any]]:
        with Curve(path, done, 1000) as curve:
            for number in numbers:
                curve.add(step(number))
        return curve.thinned()

    whole = draw(tmp_path / "whole.jsonl", 0, range(1, 1001))
    assert len(whole) == 200 and whole[0]["losses"]["task"] == pytest.approx(sum(1 / n for n in range(1, 6)) / 5)
    path = tmp_path / "cut.jsonl"
    draw(path, 0, range(1, 778))
    path.write_bytes(path.read_bytes()[:-7])
    assert draw(path, 700, range(701, 1001)) == whole


def test_a_device_that_is_not_there_is_refused() -> None:
    assert pick("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="hint:"):
            pick("cuda")


def test_a_run_without_evaluation_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="evaluat"):
        collect(tmp_path)


def test_settings_refuse_unknown_keys() -> None:
    class Some(Settings):
        steps: int = 1

    with pytest.raises(UserError, match="steps"):
        validate(Some, {"stepz": 2}, "some")


def test_the_time_left_is_right_where_a_tick_stands_for_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three models of 512 pictures, a minute each; and a run resumed at 900 of 1000 steps, a second each."""
    clock, said = [0.0], list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with progress("drawing", 1536, said.append) as tick:
        for done in (512, 1024):
            clock[0] += 60
            tick(done)
    with progress("distilling", 1000, said.append) as tick:
        for done in range(901, 951):
            clock[0] += 1
            tick(done)
    assert said[0] == "drawing 512/1536  " and said[1].endswith("  60 s left")
    assert said[-1].startswith("distilling 950/1000") and said[-1].endswith("  50 s left")
