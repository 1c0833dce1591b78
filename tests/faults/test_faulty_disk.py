"""A disk that is full, cuts writes short, loses them, or fails at a rename or fsync: the checkpoint before survives.

The faults are the operating system's: a library preloaded before libc (``faulty_disk.c``), the kernel's limit on the
size of a file, and a file system of 96 KB.
"""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
BYTES = 6_000  # a little less than what a checkpoint of the writer takes
Fault = tuple[str, int]


def write_under(faults: list[Fault], work: Path, preload: Path | None, *before: str) -> list[dict[str, Any]]:
    environment = {"LD_PRELOAD": str(preload)} if preload else {}
    done = subprocess.run(
        [
            *before,
            "env",
            *(f"{k}={v}" for k, v in environment.items()),
            sys.executable,
            HERE / "faulty_writer.py",
            work,
        ],
        input=json.dumps(faults),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the failing disk is compiled, on Linux")
    library = tmp_path_factory.mktemp("disk") / "faulty_disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, HERE / "faulty_disk.c", "-ldl"], check=True)
    return library


def test_the_checkpoint_before_survives_every_fault(preload: Path, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    faults: list[Fault] = [("space", at) for at in (0, 1, *(chance.randrange(BYTES) for _ in range(20)))]
    faults += [("lie", chance.randrange(BYTES)) for _ in range(20)]
    faults += [("short", at) for at in (1, 7, 1000)]
    faults += [(kind, at) for kind, calls in (("rename", 2), ("fsync", 6), ("mkdir", 2)) for at in range(calls)]
    results = write_under(faults, tmp_path / "work", preload)
    assert len(results) == len(faults)
    for result in results:
        kind = result["fault"][0]
        assert result["before"] == 2 and result["again"] == 3, result
        if result["said"] is None:
            assert result["held"] == 3, f"a write that says nothing is whole: {result}"
        else:
            assert result["held"] in (2, 3) and result["litter"] == [], result
            assert ("make room" in result["said"]) == (kind in ("space", "mkdir")), result
            assert "the same command goes on" in result["said"]
    failed = {kind: sum(r["said"] is not None for r in results if r["fault"][0] == kind) for kind, _ in faults}
    assert failed["short"] == 0, "a short write is no fault: the rest is written by the next"
    assert failed["space"] == 22 and failed["lie"] == 20, failed
    assert failed["rename"] == 1 and failed["fsync"] >= 5 and failed["mkdir"] == 1, failed


def test_the_kernels_limit_on_the_size_of_a_file(tmp_path: Path) -> None:
    results = write_under([("limit", at) for at in (0, 100, 1000, 5000)], tmp_path / "work", None)
    for result in results:
        assert result["held"] == 2 and result["again"] == 3 and "make room" in result["said"], result
        assert "File too large" in result["said"]


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file system of 96 KB holds some of the checkpoints of 8 KB; the rest of it is filled by something else."""
    inside = f"mount -t tmpfs -o size=96k none {tmp_path} && head -c 36000 /dev/zero > {tmp_path}/other"
    if subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    script = f'{inside} && exec "$@"'
    code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from pathlib import Path
from faulty_writer import checkpoint, held, tensors
work = Path({str(tmp_path)!r}) / "work"
checkpoint.write(work, 1, tensors(1), {{}})
other = Path({str(tmp_path)!r}) / "more"
try:
    other.write_bytes(bytes(30000))
except OSError as error:
    print(error)
try:
    checkpoint.write(work, 2, tensors(2), {{}})
except ValueError as error:
    print(error)
print(held(work))
other.unlink()
checkpoint.write(work, 2, tensors(2), {{}})
print(held(work))
"""
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "No space left" in done.stdout and "make room" in done.stdout
    assert done.stdout.splitlines()[-1] == "2" and "\n1\n" in done.stdout
