"""Memory and company: a process's peak does not grow with the data set, and two may share a cache."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

WRITE = """
import hashlib, resource, sys
from pathlib import Path
import torch
from decant.data.latents import _Writer
from decant.data.shards import Shards
folder, n = Path(sys.argv[1]), int(sys.argv[2])
keys = [hashlib.sha256(str(i).encode()).digest() for i in range(n)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with _Writer(Shards([folder], keys, print)) as writer:
    for start in range(0, n, 100):
        at = torch.arange(start, start + 100).float()[:, None, None, None]
        rows = {"mean": at + torch.zeros(4, 16, 16), "std": at * 0 + torch.rand(4, 16, 16)}
        writer.add(keys[start : start + 100], rows)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""

READ = """
import hashlib, resource, sys
from pathlib import Path
import torch
from decant.data.latents import Latents
from decant.data.order import stream
from decant.data.shards import Shards
folder, n = Path(sys.argv[1]), int(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
keys = [hashlib.sha256(str(i).encode()).digest() for i in range(n)]
shards = Shards([folder], keys, print)
assert not shards.missing
tables = shards.tables(keys)
del keys, shards
words = {"words": torch.zeros(1, 2, 3)}
latents = Latents(tables["mean"], tables["std"], torch.zeros(n, dtype=torch.long), words, words)
for step in range(n // 20):
    batch = latents.batch(stream(0, step, 20, n))
    assert batch.mean[:, 0, 0, 0].tolist() == [position % n for position in batch.samples]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def _kilobytes(code: str, folder: Path, n: int) -> int:
    words = [sys.executable, "-c", code, str(folder), str(n)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    """20,000 rows of 8 KB are 160 MB: training on them takes at most 20 MB more than on 500; so does writing them."""
    written = [_kilobytes(WRITE, tmp_path / str(n), n) for n in (10_000, 20_000)]
    size = sum(file.stat().st_size for file in (tmp_path / "20000").iterdir())
    assert size > 160_000_000
    assert written[1] - written[0] < 20_000, written
    _kilobytes(WRITE, tmp_path / "500", 500)
    read = [_kilobytes(READ, tmp_path / str(n), n) for n in (500, 20_000)]
    assert read[1] - read[0] < 20_000, read


SHARE = """
import os, sys, time
from pathlib import Path
import torch
from decant.data.source import read
from decant.data.latents import Cache, encode_all
from safetensors.torch import save_file

class Slow:
    def encode(self, pictures):
        time.sleep(0.05)
        mean = torch.nn.functional.avg_pool2d(pictures, 8)
        return mean, mean / 2
    def condition(self, captions):
        return {"words": torch.tensor([[float(len(caption))] for caption in captions])}
    def null(self, condition):
        return {"words": condition["words"] * 0}
    def framing(self, frames):
        return {}
    def made_by(self):
        return {"pictures": "1", "captions": "1"}

data, cache, out, start = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
import decant.data.latents
decant.data.latents._FLUSH_SECONDS = 0.1
captioned = read(data)
Path(out).touch()
while not start.exists():
    time.sleep(0.001)
latents = encode_all(captioned, 16, Slow(), Cache(cache, cache, print))
batch = latents.batch(tuple(range(latents.n)))
save_file({"mean": batch.mean, "std": batch.std, "words": batch.condition["words"]}, out)
"""


def test_two_processes_that_fill_a_cache_at_once_do_no_harm(tmp_path: Path) -> None:
    data, cache, start = tmp_path / "data", tmp_path / "cache", tmp_path / "start"
    data.mkdir()
    for index in range(160):
        Image.new("RGB", (16, 16), (index, 255 - index, 7)).save(data / f"{index:03d}.png")
        (data / f"{index:03d}.txt").write_text("w" * (index % 5 + 1))
    outs = [tmp_path / name for name in ("a", "b", "c")]
    runs = [
        subprocess.Popen([sys.executable, "-c", SHARE, *map(str, (data, cache, out, start))], stdout=subprocess.PIPE)
        for out in outs
    ]
    while not all(out.exists() for out in outs):
        assert all(run.poll() is None for run in runs)
    start.touch()
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert not any(b"damaged" in words for words in said)
    first, *others = [load_file(out) for out in outs]
    assert all(first[name].equal(other[name]) for other in others for name in first)
    assert torch.allclose(first["mean"][:, 0, 0, 0], torch.arange(160) / 127.5 - 1, atol=1e-5)
    assert not list(cache.rglob(".tmp-*"))


def test_two_processes_share_the_work_and_one_that_is_killed_costs_its_part_alone(tmp_path: Path) -> None:
    """1,280 pictures in parts of 256: no part is encoded twice, but the one that the dead process was at."""
    data, cache, start, log = (tmp_path / name for name in ("data", "cache", "start", "log"))
    data.mkdir()
    lines = []
    for index in range(1280):
        Image.new("RGB", (16, 16), (index % 256, index // 256, 7)).save(data / f"{index:04d}.png")
        lines.append(json.dumps({"file_name": f"{index:04d}.png", "text": f"picture {index % 7}"}))
    (data / "metadata.jsonl").write_text("\n".join(lines))
    log.mkdir()
    slow = SHARE.replace("time.sleep(0.05)", "time.sleep(0.04); Path(sys.argv[5]).open('a').write(f'{len(pictures)} ')")
    outs = [tmp_path / name for name in ("a", "b")]
    runs = [
        subprocess.Popen([sys.executable, "-c", slow, *map(str, (data, cache, out, start, log / out.name))])
        for out in outs
    ]
    while not all(out.exists() for out in outs):
        assert all(run.poll() is None for run in runs)
        time.sleep(0.01)
    start.touch()
    victim = log / "a"
    while not (victim.exists() and len(victim.read_text().split()) > 20):
        assert all(run.poll() is None for run in runs)
        time.sleep(0.005)
    runs[0].send_signal(signal.SIGKILL)
    assert (runs[0].wait(), runs[1].wait()) == (-signal.SIGKILL, 0)
    encoded = [sum(map(int, (log / out.name).read_text().split())) for out in outs]
    assert 1280 <= sum(encoded) <= 1280 + 256 and min(encoded) > 256, encoded
    found = load_file(outs[1])
    assert torch.allclose(found["mean"][:, 0, 0, 0], torch.arange(1280) % 256 / 127.5 - 1, atol=1e-5)
    assert torch.allclose(found["mean"][:, 1, 0, 0], torch.arange(1280) // 256 / 127.5 - 1, atol=1e-5)
