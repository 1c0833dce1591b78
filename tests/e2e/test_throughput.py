"""The bare loop does decant's work, and the benchmark writes what it measured."""

import json
from importlib import import_module
from itertools import islice
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_bare_loop_is_short_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len((EXAMPLES / "bare_kd.py").read_text().splitlines()) <= 100
    monkeypatch.syspath_prepend(str(EXAMPLES))
    bare = import_module("bare_kd")
    args = bare.options().parse_args(["--batch", "2", "--lr", "1e-3", "--device", "cpu"])
    torch.manual_seed(0)
    nets = bare.networks("scenes", "bk-tiny")
    losses = [float(loss) for loss in islice(bare.steps(nets, bare.random_inputs(nets[0], 2), args), 4)]
    assert losses[-1] < losses[0] and nets[0].training is False


@pytest.mark.slow
def test_both_loops_descend_the_same_loss_and_the_figures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    throughput = import_module("throughput")
    document, page = tmp_path / "throughput.json", tmp_path / "throughput.md"
    words = ["--rounds", "2", "--steps", "1", "--warmup", "1", "--pictures", "12", "--batch", "3", "--device", "cpu"]
    throughput.main([*words, "--json", str(document), "--page", str(page)])
    found = json.loads(document.read_text())
    assert found["first_loss"]["decant"] == pytest.approx(found["first_loss"]["bare"], rel=1e-5), "identical work"
    assert found["percent_of_bare"]["wall"]["n"] == 2 and found["ms"]["processor"]["bare"]["median"] > 0
    assert all(ms > 0 for ms in found["parts_ms"].values()) and len(found["parts_ms"]) >= 7
    assert f"{found['percent_of_bare']['wall']['median']:.1f} (" in page.read_text()
