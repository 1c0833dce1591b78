"""COCO captions: found by looking, read whole, and one of an image's captions drawn in each epoch."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from decant.data.captioned import split
from decant.data.coco import Coco
from decant.data.latents import Cache, encode_all
from decant.data.source import find, read
from decant.errors import UserError


def _image(folder: Path, number: int) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{number:012d}.jpg"
    Image.new("RGB", (24, 16), (number * 40 % 256, 90, 200)).save(folder / name)
    return {"id": number, "file_name": name, "height": 16, "width": 24}


def _coco(root: Path, images: int = 4, captions: int = 5, name: str = "train2017") -> Path:
    """As published: annotations/captions_NAME.json, and NAME/ beside annotations/."""
    document = {
        "info": {"year": 2017},
        "images": [_image(root / name, number) for number in range(images)],
        "annotations": [
            {"id": number * 10 + nth, "image_id": number, "caption": f"caption {nth} of {number}"}
            for nth in range(captions)
            for number in range(images)
        ],
    }
    file = root / "annotations" / f"captions_{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(document))
    return file


def _change(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def test_file_and_root_are_the_same_and_every_image_has_its_captions(tmp_path: Path) -> None:
    file = _coco(tmp_path)
    _coco(tmp_path, 2, name="val2017")
    by_file, by_root = read(file), read(tmp_path)
    assert by_file == by_root and not by_file.skipped
    assert by_file.names == tuple(f"{number:012d}.jpg" for number in range(4))
    assert by_file.choices[2] == tuple(f"caption {nth} of 2" for nth in range(5))
    assert "captions_train2017.json" in find(tmp_path).told
    held = split(by_file, 0.5, 3)[1]
    assert len(held.files) == len(held.choices) == len(held.digests)
    assert all(own[0].endswith(f"of {int(name[:12])}") for own, name in zip(held.choices, held.names, strict=True))


@pytest.mark.parametrize("place", ["captions.d", "images", "."])
def test_images_are_found_beside_the_file(tmp_path: Path, place: str) -> None:
    file = _coco(tmp_path / "a", name="x")
    beside = tmp_path / "b"
    beside.mkdir()
    target = beside / ("x" if place == "captions.d" else place)
    target.mkdir(exist_ok=True)
    for image in (tmp_path / "a" / "x").iterdir():
        image.rename(target / image.name)
    moved = file.rename(beside / file.name)
    source = find(moved)
    assert isinstance(source, Coco) and source.images.resolve() == target.resolve()
    assert len(read(moved).files) == 4


def test_what_cannot_be_used_is_skipped_with_its_place_and_reason(tmp_path: Path) -> None:
    file = _coco(tmp_path, 10, 2)
    folder = tmp_path / "train2017"
    (folder / "000000000001.jpg").unlink()
    (folder / "000000000002.jpg").write_bytes(b"these are words")

    def damage(document: dict[str, Any]) -> None:
        notes = document["annotations"]
        assert (notes[3]["image_id"], notes[13]["image_id"]) == (3, 3)
        notes[3]["caption"] = 7
        notes[13]["caption"] = None  # image 3 keeps no caption
        notes[4]["caption"] = " \n"  # image 4 keeps one
        notes[5]["image_id"] = 99
        notes[6] = "words"
        document["images"] += [{"id": 50}, 5, {"id": 0, "file_name": "x.jpg"}, {"id": 51, "file_name": "../out.jpg"}]

    _change(file, damage)
    found = read(file, max_skipped=0.9)
    assert len(found.files) == 7
    assert found.choices[found.names.index("000000000004.jpg")] == ("caption 1 of 4",)
    place = "captions_train2017.json "
    assert {item.name: item.reason for item in found.skipped} == {
        "000000000001.jpg": "listed, but there is no such file",
        "000000000002.jpg": "not a picture in a known format",
        "000000000003.jpg": "no caption",
        f"{place}annotations[3]": "000000000003.jpg: the caption is not text (int)",
        f"{place}annotations[13]": "000000000003.jpg: no caption",
        f"{place}annotations[4]": "000000000004.jpg: the caption is empty",
        f"{place}annotations[5]": "no image 99 is listed",
        f"{place}annotations[6]": "not a JSON object",
        f"{place}images[10]": "no file_name",
        f"{place}images[11]": "not a JSON object",
        "x.jpg": "its id 0 is another image's",
        "../out.jpg": "the file name leaves the folder",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"images": [', "no JSON"),
        ('{"images": [], "info": {}}', "its keys are images, info"),
        ('{"images": [], "annotations": []}', "it is empty"),
        ('{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []}', "none of the first 1 images"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, text: str, said: str) -> None:
    place = tmp_path / "deep" / "er"
    place.mkdir(parents=True)
    (place / "captions_x.json").write_text(text)
    if "empty" in said:
        (place / "x").mkdir()
    with pytest.raises(UserError, match=rf"{said}[\s\S]*allowed:[\s\S]*hint:"):
        read(place / "captions_x.json")


def test_several_files_of_which_none_is_for_training_must_be_named(tmp_path: Path) -> None:
    for name in ("val2014", "val2017"):
        _coco(tmp_path, name=name)
    with pytest.raises(UserError, match=r"captions_val2014.json, captions_val2017.json[\s\S]*hint: name it"):
        find(tmp_path)


def test_the_fingerprint_follows_captions_and_images(tmp_path: Path) -> None:
    file = _coco(tmp_path)
    first = find(file).fingerprint()
    _change(file, lambda document: document["annotations"][0].update(caption="another"))
    second = find(file).fingerprint()
    _image(tmp_path / "train2017", 17)
    assert len({first, second, find(file).fingerprint()}) == 3


def test_each_epoch_draws_a_caption_from_seed_and_position_alone(tmp_path: Path, spelled: Any) -> None:
    """All five are drawn about equally often; batches, history and the cache do not matter, another seed does."""
    file = _coco(tmp_path)
    _change(file, lambda document: document["annotations"].pop())  # the last image has four
    captioned = read(file)

    def latents(seed: int) -> Any:
        cache = Cache(tmp_path / "cache", tmp_path / "cache", lambda line: None)
        return encode_all(captioned, 16, spelled, cache, seed=seed)

    def words(seed: int, positions: range, at_once: int) -> list[str]:
        table = latents(seed)
        batches = [table.batch(tuple(positions[i : i + at_once])) for i in range(0, len(positions), at_once)]
        return [spelled.read(row) for batch in batches for row in batch.condition["words"]]

    whole = words(0, range(800), 16)
    assert words(0, range(500, 520), 5) == whole[500:520]
    assert words(1, range(800), 16) != whole
    for index in range(4):
        counts = Counter(whole[index::4])
        assert set(counts) == set(captioned.choices[index])
        assert all(abs(n - 200 / len(counts)) < 30 for n in counts.values()), counts
