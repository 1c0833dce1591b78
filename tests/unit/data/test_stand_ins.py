"""A picture that is damaged between look and encoding, in every kind of source: replaced, counted, named, and repeated.

Damaged in place, in as many bytes, where the source keeps its pictures: nothing but the contents tell.
"""

import io
import json
import tarfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pytest
from PIL import Image

from decant.data import remote
from decant.data.latents import Cache, Latents, encode_all
from decant.data.source import read
from decant.errors import UserError

N, LOST = 24, (3, 17)
Kind = Literal["folder", "coco", "shards", "parquet", "server", "server without ranges"]
KINDS: tuple[Kind, ...] = ("folder", "coco", "shards", "parquet", "server", "server without ranges")
Served = Callable[..., AbstractContextManager[tuple[str, list[str]]]]
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 16, 16, 3), dtype=np.uint8)


def _content(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(buffer, "PNG")
    return buffer.getvalue()


CONTENTS = [_content(number) for number in range(N)]


def _pictures(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, content in enumerate(CONTENTS):
        (folder / f"{number:02d}.png").write_bytes(content)
    return folder


def _made(kind: Kind, root: Path, served: Served, stack: ExitStack) -> str:
    """What --data names."""
    match kind:
        case "folder":
            folder = _pictures(root / "pictures")
            for number in range(N):
                (folder / f"{number:02d}.txt").write_text(f"picture {number}")
            return str(folder)
        case "coco":
            _pictures(root / "x")
            images = [{"id": number, "file_name": f"{number:02d}.png"} for number in range(N)]
            notes = [{"image_id": number, "caption": f"picture {number}"} for number in range(N)]
            file = root / "captions_x.json"
            file.write_text(json.dumps({"images": images, "annotations": notes}))
            return str(file)
        case "parquet":
            images = [{"bytes": content, "path": None} for content in CONTENTS]
            table = datasets.Dataset.from_dict({"image": images, "text": [f"picture {number}" for number in range(N)]})
            table.cast_column("image", datasets.Image()).to_parquet(str(root / "table.parquet"))
            return str(root / "table.parquet")
        case "shards" | "server" | "server without ranges":
            (root / "shards").mkdir()
            with tarfile.open(root / "shards/0.tar", "w") as tar:
                for number, content in enumerate(CONTENTS):
                    for ending, inside in (("png", content), ("txt", f"picture {number}".encode())):
                        info = tarfile.TarInfo(f"{number:02d}.{ending}")
                        info.size = len(inside)
                        tar.addfile(info, io.BytesIO(inside))
            if kind == "shards":
                return str(root / "shards")
            return stack.enter_context(served(root / "shards", ranges=kind == "server"))[0] + "/0.tar"


def _damage(root: Path, number: int) -> None:
    """The middle of a picture's bytes, wherever below a folder they lie: a table's are in its memory-mapped copy."""
    found = 0
    for file in root.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        place = content.find(CONTENTS[number])
        if place >= 0:
            with file.open("r+b") as opened:
                opened.seek(place + len(CONTENTS[number]) // 2)
                opened.write(bytes(40))
            found += 1
    assert found, number
    remote.replayed.cache_clear()  # what was read of a server without ranges stays in memory


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_picture_is_stood_in_for_by_a_seeded_draw(
    kind: Kind, tmp_path: Path, served: Served, spelled: Any
) -> None:
    root, index = tmp_path / "data", tmp_path / "data" / "index"
    root.mkdir()

    def encoded(seed: int, name: str) -> Latents:
        cache = Cache(tmp_path / name, tmp_path / name, lambda line: None)
        return encode_all(captioned, 8, spelled, cache, seed=seed)

    with ExitStack() as stack:
        captioned = read(_made(kind, root, served, stack), index=index)
        assert len(captioned.files) == N and not captioned.skipped
        whole = encoded(0, "whole").batch(tuple(range(N)))
        for number in LOST:
            _damage(root, number)
        first, again = encoded(0, "a"), encoded(0, "b")
        others = [_stand_ins(encoded(seed, "a"), whole.mean) for seed in range(1, 6)]
        names = [captioned.names[number] for number in LOST]
        assert [item.name for item in first.replaced] == names
        assert all("damaged" in item.reason or "others" in item.reason for item in first.replaced), first.replaced
        mine = _stand_ins(first, whole.mean)
        assert mine == _stand_ins(again, whole.mean) and not set(mine.values()) & set(LOST)
        assert any(other != mine for other in others), "the seed decides"
        assert first.batch((0,)).mean.equal(whole.mean[:1])
        for number in (0, 1):
            _damage(root, number)
        with pytest.raises(UserError, match=r"4 of 24 pictures[\s\S]*allowed:[\s\S]*hint:"):
            encoded(0, "c")


def _stand_ins(latents: Latents, whole: Any) -> dict[int, int]:
    """Which picture, with its own caption, stands in for each that was lost."""
    found = {}
    batch = latents.batch(tuple(range(N)))
    for number in LOST:
        (place,) = [place for place in range(N) if whole[place].equal(batch.mean[number])]
        assert batch.condition["words"][number].equal(batch.condition["words"][place])
        found[number] = place
    return found
