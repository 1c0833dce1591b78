"""What a part is worth, on the shipped teacher."""

import json
from pathlib import Path

import pytest
from PIL import Image

from decant.cli.main import main
from decant.models.cost import macs, parameters
from decant.models.load import load
from decant.scenes.folder import draw_folder
from decant.stages.importance import importance
from decant.stages.prune import damage_of
from decant.stages.stage import Inputs


def status(words: list[str]) -> int:
    """The exit status of a command."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    return int(caught.value.code or 0)


@pytest.mark.slow
def test_parts_are_measured_and_a_cut_uses_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = draw_folder(tmp_path / "data", 6, "train")
    inputs = Inputs("scenes", {"teacher": "scenes"}, data, 0, tmp_path / "work")
    found = importance(inputs, tmp_path / "out", pictures=2, repeats=1)
    assert found == json.loads((tmp_path / "out" / "importance.json").read_text())
    assert Image.open(tmp_path / "out" / "importance.png").size[0] > 500
    parts = {part["name"]: part for part in found["parts"]}
    unet = load("scenes").unet
    blocks = [part for part in parts.values() if part["kind"] == "transformer block"]
    assert len(blocks) == 16
    assert all(part["damage"] > 0 and len(part["damage_by_level"]) == 4 for part in parts.values())
    assert all(0 < part["macs"] < macs(unet, (4, 8, 8), 32) for part in parts.values())
    assert parts["mid_block"]["parameters"] == parameters(unet.mid_block)
    assert damage_of(tmp_path / "out" / "importance.json") == {part["name"]: part["damage"] for part in blocks}

    description = tmp_path / "student.yaml"
    description.write_text("down: {0: {depth: [0, 1]}}\nmid: {depth: 0}\n")
    words = ["prune", "--teacher", "scenes", "--student", str(description), "--out", str(tmp_path / "cut")]
    words += ["--rule", "sensitive", "--importance", str(tmp_path / "out" / "importance.json")]
    assert status(words) == 0
    record = json.loads((tmp_path / "cut" / "decant.json").read_text())
    assert "down_blocks.0: 0 of 1 transformer blocks of attention 0 stay" in record["changes"]
    capsys.readouterr()
    words[words.index("--out") + 1] = str(tmp_path / "other")
    assert status([*words[:-1], str(description)]) == 2
    assert "as `decant importance` writes it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["magnitude", "activation", "taylor"])
def test_levels_are_narrowed_by_every_rule(rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = draw_folder(tmp_path / "data", 6, "train")
    description = tmp_path / "narrow.yaml"
    description.write_text("widths: [32, 64, 96, 96]\n")
    words = ["prune", "--teacher", "scenes", "--student", str(description), "--channels", rule, "--data", str(data)]
    assert status([*words, "--set", "calibration=4", "--out", str(tmp_path / "cut")]) == 0
    record = json.loads((tmp_path / "cut" / "decant.json").read_text())
    assert record["changes"][0] == "level 0: 32 of 64 channels stay"
    groups = record["surgery_map"]["groups"]
    assert 1 < len(groups) < len(record["surgery_map"]["kept"])
    assert load(tmp_path / "cut").unet.config["block_out_channels"] == [32, 64, 96, 96]
    without = [word for word in words if word not in ("--data", str(data))]
    refused = status([*without, "--out", str(tmp_path / "other")])
    assert refused == (0 if rule == "magnitude" else 2)
    if refused:
        assert "--data" in capsys.readouterr().err
