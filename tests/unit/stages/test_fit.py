"""--fit: what is counted against torch's own tracker and a real process; what is chosen; what is refused."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from decant.errors import UserError
from decant.models.surgery.surgery import skeleton
from decant.stages.distill_settings import Distill
from decant.stages.fit import Pair, Peaks, blank_batch, fit, ladder, megabytes, method_maker
from decant.stages.training import run_settings
from decant.train.rehearsal import Held, _advance, _Alone, _gradient
from decant.train.state import TrainState

EXAMPLE = Path(__file__).parents[3] / "examples" / "memory.py"
SMALL = Distill(batch_size=8, device="cpu", size=128, feature=0)
LEAN: dict[str, Any] = {
    "precision": "bf16",
    "optimizer": "adamw8bit",
    "weights": "bf16",
    "gradient_checkpointing": True,
}


@cache
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def small() -> tuple[Pair, Peaks]:
    """A network of one level as both student and teacher."""
    one = {"block_out_channels": (64,), "down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None}
    given = config(64, 1, one | {"up_block_types": ("CrossAttnUpBlock2D",)})
    pair = Pair(given, given, None, 16)
    return pair, Peaks(pair)


def config(width: int, layers: int, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of two levels, but for the ``changes``."""
    sizes = {"block_out_channels": (width, 2 * width), "layers_per_block": layers, "cross_attention_dim": 64}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "sample_size": 32}
    given = sizes | blocks | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")} | (changes or {})
    return dict(skeleton(given).config)


@pytest.mark.parametrize(
    ("text", "mb"), [("6GB", 6000.0), ("6 gb", 6000.0), ("1.5GiB", 1610.612736), ("800MB", 800.0), ("1MiB", 1.048576)]
)
def test_sizes_are_read(text: str, mb: float) -> None:
    assert megabytes(text) == pytest.approx(mb)


@pytest.mark.parametrize("text", ["6", "GB", "0GB", "six GB", "6TB", "-1GB", "6GBs"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--fit"):
        megabytes(text)


@pytest.mark.parametrize("changes", [{}, LEAN | {"batch_size": 2, "accumulation": 4}], ids=["plain", "lean"])
def test_the_count_is_that_of_torch_s_tracker(changes: dict[str, Any]) -> None:
    pair, peaks = small()
    settings = SMALL.model_copy(update=changes)
    assert peaks.updates_mb(settings) == pytest.approx(example().tracked_mb(settings, pair), rel=0.02)


def test_one_rehearsed_update_holds_what_two_real_ones_do() -> None:
    """Every batch and every step of two updates made, though on tensors without numbers."""
    pair, peaks = small()
    settings = SMALL.model_copy(update=LEAN | {"batch_size": 2, "accumulation": 2})
    run, make = run_settings(settings, 0), method_maker(settings, pair)
    with FakeTensorMode(allow_non_fake_inputs=True), Held() as held:
        method, alone = make(), _Alone(torch.device("cpu"), run)
        state = TrainState(method, run, alone, {})
        for _ in range(2):
            state.focus("student")
            for _ in range(settings.accumulation):
                _gradient(method, state, "student", blank_batch(settings, pair))
            _advance(state, "student")
    assert peaks.updates_mb(settings) == pytest.approx(held.peak / 1e6, rel=0.01)


def test_the_line_over_the_batch_size_never_lies_above_the_count() -> None:
    _, peaks = small()
    assert 0.5 * peaks.mb(SMALL) < peaks.roughly_mb(SMALL) <= 1.01 * peaks.mb(SMALL)


def test_a_rung_keeps_the_update_s_pictures_and_the_first_changes_nothing() -> None:
    rungs = ladder(SMALL)
    assert rungs[0].changes == {} and [rung.cost for rung in rungs] == sorted(rung.cost for rung in rungs)
    for rung in rungs:
        chosen = SMALL.model_copy(update=rung.changes)
        assert chosen.batch_size * chosen.accumulation == SMALL.batch_size * SMALL.accumulation
        run_settings(chosen, 0)  # whatever is offered can be had


def test_updates_in_the_backward_pass_are_offered_where_the_gradient_is_not_clipped() -> None:
    offered = [rung.changes for rung in ladder(SMALL.model_copy(update={"clip": None}))]
    assert any(changes.get("optimizer_in_backward") for changes in offered)
    assert not any(rung.changes.get("optimizer_in_backward") for rung in ladder(SMALL))


def test_enough_memory_changes_nothing_and_less_takes_a_slower_rung() -> None:
    pair, peaks = small()
    said: list[str] = []
    plain = peaks.mb(SMALL)
    assert fit(SMALL, pair, plain + 1, said.append).changes == {}
    found = fit(SMALL, pair, 0.6 * plain, said.append)
    assert found.changes and found.peak_mb <= 0.6 * plain
    assert peaks.mb(SMALL.model_copy(update=found.changes)) == pytest.approx(found.peak_mb)
    assert f"predicted peak {found.peak_mb:,.0f} MB" in said[1]


def test_what_cannot_be_reached_is_refused_with_what_can() -> None:
    pair, _ = small()
    with pytest.raises(UserError, match=r"allowed: at least [\d,]+ MB") as told:
        fit(SMALL, pair, 1.0, lambda line: None)
    assert "hint: --fit" in str(told.value) and "optimizer=adamw8bit" in str(told.value)


def test_an_average_is_counted_too() -> None:
    pair, peaks = small()
    more = peaks.updates_mb(SMALL.model_copy(update={"ema": 0.9}))
    parameters = sum(p.numel() for p in skeleton(pair.student).parameters())
    assert more > peaks.updates_mb(SMALL) + 3.5 * parameters / 1e6
    assert replace(peaks, found={}).updates_mb(SMALL) == peaks.updates_mb(SMALL), "the same for the same question"


def test_a_lora_is_refused() -> None:
    lora = Distill.model_validate({**SMALL.model_dump(), "lora": {"rank": 2}})
    with pytest.raises(UserError, match=r"--fit: with distill\.lora"):
        fit(lora, small()[0], 1e6, lambda line: None)


@pytest.mark.slow
def test_bk_tiny_of_sd_15_at_512_px_takes_less_than_6_gb() -> None:
    """Batch 1 with accumulation, by the count and by torch's tracker; the proof before and after as well."""
    pair = example().pair_of("sd15", "bk-tiny")
    settings = Distill(size=512, batch_size=1, accumulation=64, device="cpu").model_copy(update=LEAN)
    assert Peaks(pair).mb(settings) < 6000
    assert example().tracked_mb(settings, pair) < 6000


CHILD = """
import gc, json, multiprocessing, sys, psutil, torch
from decant.bench.timer import peak_memory_mb
from decant.cli.memory import give_back_freed_memory
from decant.stages.training import run_settings
from decant.stages.distill_settings import Distill
from decant.stages.fit import Pair, blank_batch, method_maker
from decant.train.loop import loop
from decant.train.state import TrainState

def train(given, **changes):
    settings = Distill.model_validate({**given[1], **changes})
    pair = Pair(given[0], given[0], None, 16)
    method = method_maker(settings, pair)()
    state = TrainState.start(method, run_settings(settings, 0), device="cpu")
    for _ in loop(method, lambda step: [blank_batch(settings, pair)], state):
        pass

def measured(given):
    give_back_freed_memory()
    train(given, size=16, batch_size=1)  # every library's code and tables are there now
    gc.collect()
    before = psutil.Process().memory_info().rss / 1e6
    train(given)
    print(json.dumps(peak_memory_mb().process_mb - before), flush=True)

torch.set_num_threads(1)
for given in json.load(sys.stdin):
    process = multiprocessing.get_context("fork").Process(target=measured, args=(given,))
    process.start()
    process.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process may keep what it freed")
def test_a_real_process_takes_what_was_predicted() -> None:
    """A mid-size network on a CPU: what training adds to a process, within 3 % of the prediction."""
    full = config(128, 1)
    plain = {"steps": 2, "batch_size": 4, "size": 128, "feature": 0, "device": "cpu"}
    each = [plain, {**plain, "gradient_checkpointing": True, "optimizer": "adamw8bit"}]
    peaks = Peaks(Pair(full, full, None, 16))
    predicted = [peaks.updates_mb(Distill.model_validate(asked)) for asked in each]
    given = json.dumps([[full, asked] for asked in each], default=list)
    done = subprocess.run([sys.executable, "-c", CHILD], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = [float(line) for line in done.stdout.split()]
    print(f"predicted {predicted}, measured {measured} MB")
    assert predicted == pytest.approx(measured, rel=0.03), done.stderr
