"""Peak memory of reading WebDataset shards does not grow with them: the figures, as JSON.

python examples/shards_memory.py [--megabytes 200 2000] [--out docs/shards_memory.json]

For each size, shards of pictures of 512 x 512 are written (one set of 64 pictures again and again, each made another by
a comment in its file), then one process scans them and another one encodes and reads batches in shuffled order from its
cache; what each takes at most, libraries and all, is what the operating system counted.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from decant.data.latents import Cache, encode_all
from decant.data.order import stream
from decant.data.picture import Frame
from decant.data.source import read

_SHARD_BYTES = 50 * 2**20


class Averages:
    """In the place of a VAE and a text encoder, so that what is measured is the reading."""

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.nn.functional.avg_pool2d(pictures, 8)
        return mean, mean * 0

    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return {"words": torch.tensor([[float(len(caption))] for caption in captions])}

    def null(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"words": condition["words"] * 0}

    def framing(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        return {}

    def made_by(self) -> dict[str, str]:
        return {"pictures": "averages", "captions": "lengths"}


def contents() -> Iterator[bytes]:
    """JPEGs of about 200 KB, no two alike."""
    random = np.random.default_rng(0)
    bases = []
    for _ in range(64):
        buffer = io.BytesIO()
        pixels = random.integers(0, 256, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=60)
        bases.append(buffer.getvalue())
    number = 0
    while True:
        comment = b"\xff\xfe\x00\x0a" + f"{number:08d}".encode()
        base = bases[number % 64]
        yield base[:2] + comment + base[2:]
        number += 1


def write(folder: Path, megabytes: int) -> int:
    """Shards of 50 MB; how many pictures are in them."""
    folder.mkdir()
    pictures, number = contents(), 0
    for shard in range(-(-megabytes * 10**6 // _SHARD_BYTES)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            size = 0
            while size < min(_SHARD_BYTES, megabytes * 10**6 - shard * _SHARD_BYTES):
                for kind, content in (("jpg", next(pictures)), ("txt", f"picture {number % 1000}".encode())):
                    info = tarfile.TarInfo(f"{number:08d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                    size += len(content)
                number += 1
    return number


def work(shards: Path, kept: Path, what: str) -> None:
    """In a process of its own: print the most it took, in MB, libraries and all."""
    found = read(shards, index=kept / "index")
    if what == "train":
        latents = encode_all(found, 64, Averages(), Cache(kept, kept, lambda line: None))
        for step in range(latents.n // 16):
            latents.batch(stream(0, step, 16, latents.n))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measured(folder: Path, megabytes: int) -> dict[str, float]:
    """Both processes on shards of a size."""
    shards, kept = folder / "shards", folder / "kept"
    row: dict[str, float] = {"megabytes": megabytes, "pictures": write(shards, megabytes)}
    for what in ("scan", "train"):
        words = [sys.executable, __file__, "--work", str(shards), str(kept), what]
        row[f"{what}_peak_mb"] = round(float(subprocess.run(words, check=True, capture_output=True).stdout), 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", nargs=3, metavar=("SHARDS", "KEPT", "WHAT"))
    args = parser.parse_args()
    if args.work:
        work(Path(args.work[0]), Path(args.work[1]), args.work[2])
        return
    rows = []
    for megabytes in args.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(Path(folder), megabytes))
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
