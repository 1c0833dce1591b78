"""What is measured of the shipped teacher and of its cut, and under which conditions it says so."""

from pathlib import Path
from typing import Any

import pytest

from decant.errors import UserError
from decant.models.load import load, save, with_unet
from decant.models.surgery.presets import published
from decant.models.surgery.surgery import build
from decant.stages.bench import How, bench

HOW = How(steps=2, guidance_scale=4.0, batch_size=3, repeats=2, device="cpu")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("cut") / "tiny"
    teacher = load("scenes")
    save(with_unet(teacher, build(published(dict(teacher.unet.config), teacher.unet.state_dict(), "bk-tiny"))), folder)
    return bench({"teacher": "scenes", "tiny": folder, "twin": "scenes"}, HOW, lambda line: None)


def test_every_part_is_timed(measured: dict[str, Any]) -> None:
    for entry in measured.values():
        for figure in entry["latency_ms"].values():
            assert 0 < figure["low"] <= figure["median"] <= figure["high"]
            assert (figure["n"], figure["warmup"]) == (2, 1)
        times = {part: figure["median"] for part, figure in entry["latency_ms"].items()}
        assert times.keys() == {"picture", "text", "unet", "decode"}
        assert max(times["text"], times["unet"], times["decode"]) < times["picture"]


def test_rate_is_of_whole_batches(measured: dict[str, Any]) -> None:
    rate = measured["teacher"]["images_per_second"]
    assert rate["batch_size"] == 3 and rate["low"] <= rate["median"] <= rate["high"]
    slowest_ms = measured["teacher"]["latency_ms"]["picture"]["high"]
    assert 0.3 < rate["high"] * slowest_ms / 1000 < 30


def test_figures_say_their_conditions(measured: dict[str, Any]) -> None:
    conditions = measured["tiny"]["measured"]
    assert conditions["size"] == [64, 64] and conditions["interleaved"]
    assert (conditions["device"], conditions["dtype"], conditions["steps"]) == ("cpu", "float32", 2)
    assert measured["teacher"]["tokens"] == 32
    assert measured["tiny"]["parameters"] < measured["teacher"]["parameters"] == 11_273_924


def test_memory_is_of_a_process_of_its_own(measured: dict[str, Any]) -> None:
    """The weights of a model are the least that it takes beyond the libraries; another model's are not in it."""
    for entry in measured.values():
        memory, weights_mb = entry["peak_memory"], entry["parameters"] * 4 / 1e6
        assert entry["peak_memory_mb"] == memory["mb"]
        assert weights_mb < memory["mb"] - memory["libraries_mb"] < 400
    assert measured["tiny"]["peak_memory"]["libraries_mb"] == pytest.approx(
        measured["teacher"]["peak_memory"]["libraries_mb"], abs=10
    )


def test_a_twin_is_not_measured_twice(measured: dict[str, Any]) -> None:
    assert measured["twin"]["measured_as"] == "teacher"
    assert measured["twin"]["latency_ms"] == measured["teacher"]["latency_ms"]
    assert "measured_as" not in measured["tiny"]


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(UserError, match="hint"):
        bench({"x": "musetalk"}, HOW, lambda line: None)
    with pytest.raises(UserError, match="multiples"):
        bench({"x": "scenes"}, How(size=63, repeats=1), lambda line: None)
