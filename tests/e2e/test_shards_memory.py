"""Peak memory does not grow with the shards: the documented command, on small ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "shards_memory.py"


@pytest.mark.slow
def test_ten_times_the_shards_take_the_same_memory(tmp_path: Path) -> None:
    """From 12 MB to 120 MB of shards, each takes at most 20 MB more: runs on the same ones differ by 13."""
    words = [sys.executable, str(EXAMPLE), "--megabytes", "12", "120", "--out", str(tmp_path / "figures.json")]
    subprocess.run(words, check=True, capture_output=True)
    small, large = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert large["pictures"] > 9 * small["pictures"] > 300
    for what in ("scan_peak_mb", "train_peak_mb"):
        assert 0 < large[what] < small[what] + 20, (small, large)
