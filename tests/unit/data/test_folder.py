import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from decant.data.captioned import Captioned, split
from decant.data.folder import data_fingerprint
from decant.data.picture import picture
from decant.data.source import read
from decant.errors import UserError


def _png(path: Path, colour: str = "red", size: tuple[int, int] = (24, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def _noise_bytes(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _damaged(folder: Path) -> dict[str, str]:
    """Write pictures that cannot be used, each with a caption; names and a word of the reason."""
    corrupt = bytearray(_noise_bytes("PNG"))
    corrupt[200:260] = bytes(60)
    contents = {
        "zero.png": (b"", "format"),
        "text.png": (b"these are words", "format"),
        "cut.jpg": (_noise_bytes("JPEG")[:700], "truncated"),
        "cut.png": (_noise_bytes("PNG")[:1500], "truncated"),
        "corrupt.png": (bytes(corrupt), "damaged"),
        "bomb.png": (_bomb(30_000, 30_000), "bomb"),
        "large.png": (_bomb(10_000, 10_000), "bomb"),
        "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "format"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    return {name: reason for name, (_, reason) in contents.items()}


def _jsonl(folder: Path, lines: list[object]) -> None:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(encoded))


def test_every_kind_of_damage_is_skipped_with_its_name_and_reason(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    names = [_png(folder / f"good{i}.png").name for i in range(4)]
    expected = _damaged(folder)
    _png(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("empty.png", "number.png", "none.png", "bare.png", "unlisted.png", "surrogate.png"):
        _png(folder / name)
    lines: list[object] = [{"file_name": name, "text": f"  a   {name}\n"} for name in [*names, *expected]]
    lines += [
        {"file_name": "link.png", "text": "x"},
        {"file_name": "../secret.png", "text": "x"},
        {"file_name": str(tmp_path / "secret.png"), "text": "x"},
        {"file_name": "absent.png", "text": "x"},
        {"file_name": "x" * 300 + ".png", "text": "x"},
        {"file_name": "empty.png", "text": " \n"},
        {"file_name": "number.png", "text": 7},
        {"file_name": "none.png", "text": None},
        {"file_name": "bare.png"},
        {"file_name": "surrogate.png", "text": "\ud800"},
        {"file_name": "good0.png", "text": "a good0.png"},
        {"text": "no name"},
        b"{not json",
        b'{"file_name": "\xff.png", "text": "x"}',
        [1, 2],
    ]
    start = len(names) + len(expected)
    _jsonl(folder, lines)
    found = read(folder, max_skipped=0.9)
    expected |= {
        "link.png": "link",
        "../secret.png": "name leaves",
        str(tmp_path / "secret.png"): "name leaves",
        "absent.png": "no such file",
        "x" * 300 + ".png": "no such file",
        "empty.png": "empty",
        "number.png": "int",
        "none.png": "no caption",
        "bare.png": "no caption",
        "surrogate.png": "UTF-8",
        "good0.png": "twice",
        f"metadata.jsonl:{start + 12}": "file_name",
        f"metadata.jsonl:{start + 13}": "JSON",
        f"metadata.jsonl:{start + 14}": "UTF-8",
        f"metadata.jsonl:{start + 15}": "object",
        "unlisted.png": "not in the metadata",
    }
    assert found.names == tuple(names)
    assert found.captions == tuple(f"a {name}" for name in names)
    reasons = {item.name: item.reason for item in found.skipped}
    assert len(found.skipped) == len(reasons) and set(reasons) == set(expected)
    assert all(word in reasons[name] for name, word in expected.items()), reasons
    assert not any(str(tmp_path) in reason for reason in reasons.values())


def test_text_layout_reads_a_caption_beside_each_picture(tmp_path: Path) -> None:
    for name in ("b/2.png", "1.JPG", "3.png", "4.png", "5.png"):
        _png(tmp_path / name)
    (tmp_path / "b/2.txt").write_text("two\nlines", encoding="utf-8")
    (tmp_path / "1.txt").write_bytes("\ufeffone é".encode())
    (tmp_path / "4.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "5.txt").write_text("x" * 70_000)
    (tmp_path / "._1.png").write_bytes(b"a resource fork")
    found = read(tmp_path, max_skipped=0.6)
    assert dict(zip(found.names, found.captions, strict=True)) == {"1.JPG": "one é", "b/2.png": "two lines"}
    reasons = {item.name: item.reason for item in found.skipped}
    assert "no .txt" in reasons["3.png"] and "UTF-8" in reasons["4.png"] and "too large" in reasons["5.png"]


def test_csv_layout_and_caption_column(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        _png(tmp_path / name)
    rows = b'file_name,caption\nb.png,"a, b\xe2\x80\xa8 c"\na.png,first\nc.png\n,nameless\na.png,\xff\n'
    (tmp_path / "metadata.csv").write_bytes(rows)
    found = read(tmp_path, max_skipped=0.7)
    assert (found.names, found.captions) == (("a.png", "b.png"), ("first", "a, b c"))
    assert sorted((item.name, item.reason.split()[-1]) for item in found.skipped) == [
        ("a.png", "UTF-8"),
        ("c.png", "caption"),
        ("metadata.csv:5", "file_name"),
    ]


def test_csv_without_its_columns_is_refused(tmp_path: Path) -> None:
    _png(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("image,text\na.png,x\n")
    with pytest.raises(UserError, match=r"file_name, and text or caption"):
        read(tmp_path)


def test_folders_that_cannot_be_used_are_refused_with_a_hint(tmp_path: Path) -> None:
    _png(tmp_path / "pictures" / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="did you mean 'pictures'"):
        read(tmp_path / "pictres")
    with pytest.raises(UserError, match="no data that can be read"):
        read(tmp_path / "pictures" / "a.png")
    with pytest.raises(UserError, match="holds no pictures"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match=r"1 of 1 entries .* cannot be used \(a.png: no .txt"):
        read(tmp_path / "pictures", max_skipped=1.0)
    (tmp_path / "pictures" / "a.txt").write_text("a")
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "train").mkdir()
    (tmp_path / "outer" / "train" / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match="did you mean its folder 'train'"):
        read(tmp_path / "outer")


@pytest.mark.parametrize(("bad", "fits"), [(1, True), (2, False)])
def test_one_in_ten_may_be_skipped_and_no_more(tmp_path: Path, bad: int, fits: bool) -> None:
    for index in range(10):
        _png(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("" if index < bad else "words")
    if fits:
        assert len(read(tmp_path).skipped) == bad
    else:
        with pytest.raises(UserError, match="2 of 10"):
            read(tmp_path)


def _saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def _modes(folder: Path) -> list[tuple[Path, tuple[int, int, int]]]:
    """Pictures of one colour in many modes, and the colour that each must show."""
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    deep = Image.fromarray(np.full((8, 8), 0x8080, dtype=np.uint16))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    bright = Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32))
    return [
        (_saved(folder / "rgba.png", clear), (255, 127, 127)),
        (_saved(folder / "la.png", Image.new("LA", (8, 8), (0, 0))), (255, 255, 255)),
        (_saved(folder / "grey.png", Image.new("L", (8, 8), 90)), (90, 90, 90)),
        (_saved(folder / "one.png", Image.new("1", (8, 8), 1)), (255, 255, 255)),
        (_saved(folder / "deep.png", deep), (128, 128, 128)),
        (_saved(folder / "float.tiff", bright), (128, 128, 128)),
        (_saved(folder / "palette.png", palette), (0, 0, 255)),
        (_saved(folder / "hole.png", palette, transparency=1), (255, 255, 255)),
        (_saved(folder / "cmyk.jpg", Image.new("CMYK", (8, 8), (255, 0, 0, 0)), quality=100), (0, 255, 255)),
    ]


def _deep_rgb(colour: tuple[int, int, int]) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads but does not write."""
    row = b"\0" + struct.pack(">HHH", *(value * 257 for value in colour)) * 8
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(row * 8)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def _kinds(folder: Path) -> list[tuple[Path, tuple[int, int, int]]]:
    """Pictures that are unlike most, none of them damaged, and the colour that each must show."""
    colour, other = (200, 40, 90), Image.new("RGB", (8, 8), (0, 255, 0))
    plain = Image.new("RGB", (8, 8), colour)
    frames: dict[str, object] = {"save_all": True, "append_images": [other, other]}
    (folder / "deep-rgb.png").write_bytes(_deep_rgb(colour))
    return [
        (folder / "deep-rgb.png", colour),
        (_saved(folder / "moves.gif", plain, **frames), colour),
        (_saved(folder / "moves.png", plain, **frames), colour),
        (_saved(folder / "moves.webp", plain, lossless=True, **frames), colour),
        (_saved(folder / "a PNG.jpg", plain, format="PNG"), colour),
        (_saved(folder / "a JPEG.png", plain, format="JPEG", quality=100, subsampling=0), colour),
        (_saved(folder / "LOUD.BMP", plain), colour),
        (_saved(folder / "progressive.jpg", plain, progressive=True, quality=100, subsampling=0), colour),
        (_saved(folder / "packed.tiff", plain, compression="tiff_lzw"), colour),
        (_saved(folder / "thin.png", Image.new("RGB", (1, 3000), colour)), colour),
        (_saved(folder / "flat.png", Image.new("RGB", (3000, 1), colour)), colour),
        (_saved(folder / "dot.png", Image.new("RGB", (1, 1), colour)), colour),
        (_saved(folder / "caf\u00e9 \u732b.png", plain), colour),
    ]


def test_what_is_unlike_most_but_not_damaged_is_read(tmp_path: Path) -> None:
    kinds = _kinds(tmp_path)
    for path, _ in kinds:
        (tmp_path / f"{path.stem}.txt").write_text("words")
    found = read(tmp_path)
    assert not found.skipped and set(found.files) == {path for path, _ in kinds}


def test_every_mode_and_kind_becomes_the_rgb_that_a_viewer_shows(tmp_path: Path) -> None:
    for path, colour in [*_modes(tmp_path), *_kinds(tmp_path)]:
        seen = (picture(path, 8).mean((1, 2)) + 1) * 127.5
        assert torch.allclose(seen, torch.tensor(colour, dtype=torch.float32), atol=1.5), path.name


def test_a_picture_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), "black")
    image.paste("white", (0, 0, 16, 8))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: above comes to the right
    seen = picture(_saved(tmp_path / "t.png", image, exif=exif), 16)
    assert seen[:, :, 12:].mean() > 0.9 and seen[:, :, :4].mean() < -0.9


def test_shortest_side_is_resized_and_the_centre_kept(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (100, 300, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    seen = picture(_saved(tmp_path / "wide.png", image), 32)
    assert seen.shape == (3, 32, 32) and seen.dtype == torch.float32
    resized = image.resize((96, 32), Image.Resampling.LANCZOS).crop((32, 0, 64, 32))
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 127.5 - 1
    assert (seen - expected).abs().max() <= 1.01 / 127.5


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    seen = picture(_saved(tmp_path / "s.png", Image.fromarray(stripes)), 16)
    assert seen.abs().max() < 0.1


def test_a_picture_that_changed_since_the_scan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run again"):
        picture(tmp_path / "gone.png", 8)


_NAMES = st.lists(st.text("abc/xyz", min_size=1, max_size=8), min_size=2, max_size=40, unique=True)


def _captioned(names: list[str]) -> Captioned:
    files = tuple(Path("/d") / f"p{name.strip('/')}.png" for name in names)
    return Captioned(files, tuple(names), (), Path("/d"))


@settings(max_examples=60, deadline=None)
@given(names=_NAMES, seed=st.integers(0, 9), data=st.data())
def test_a_split_is_disjoint_whole_and_independent_of_order_and_of_other_files(
    names: list[str], seed: int, data: st.DataObject
) -> None:
    captioned = _captioned(names)
    try:
        train, held = split(captioned, 0.4, seed)
    except UserError:
        return
    pairs = list(zip(captioned.files, captioned.captions, strict=True))
    parts = [set(zip(part.files, part.captions, strict=True)) for part in (train, held)]
    assert not set(train.files) & set(held.files) and parts[0] | parts[1] == set(pairs)
    fewer = data.draw(st.permutations(names).map(lambda order: order[: len(order) // 2 + 1]))
    try:
        again = split(_captioned(list(fewer)), 0.4, seed)
    except UserError:
        return
    assert set(again[0].files) <= set(train.files) and set(again[1].files) <= set(held.files)


def test_a_split_holds_out_its_fraction_and_depends_on_the_seed_not_the_place() -> None:
    files = [f"{index}.png" for index in range(4000)]
    here = Captioned(tuple(Path("/a") / f for f in files), tuple(files), (), Path("/a"))
    there = Captioned(tuple(Path("/b/c") / f for f in files), tuple(files), (), Path("/b/c"))
    assert abs(len(split(here, 0.1, 0)[1].files) - 400) < 4 * (4000 * 0.09) ** 0.5
    assert split(here, 0.1, 0)[1].captions == split(there, 0.1, 0)[1].captions
    assert split(here, 0.1, 0)[1].captions != split(here, 0.1, 1)[1].captions


@pytest.mark.parametrize("held_out", [-0.1, 1.0, float("nan"), 1e-9])
def test_a_split_that_makes_no_sense_is_refused(held_out: float) -> None:
    with pytest.raises(UserError, match="held_out"):
        split(_captioned(["a", "b"]), held_out, 0)


@pytest.mark.parametrize("n", [2, 5, 24])
def test_where_nothing_is_held_out_a_fraction_that_holds_something_out_is_told(n: int) -> None:
    captioned = _captioned([f"{index:06d}" for index in range(n)])
    with pytest.raises(UserError, match="neither part empty") as told:
        split(captioned, 1e-9, 0)
    train, held = split(captioned, float(str(told.value).rpartition("take ")[2]), 0)
    assert train.files and held.files


def test_the_fingerprint_follows_captions_names_and_contents(tmp_path: Path) -> None:
    _png(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    first = data_fingerprint(tmp_path)
    (tmp_path / "a.txt").write_text("two")
    second = data_fingerprint(tmp_path)
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert len({first, second, data_fingerprint(tmp_path)}) == 3
    (tmp_path / "b.png").rename(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    assert data_fingerprint(tmp_path) == first
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(bytes(reversed(content)))
    assert data_fingerprint(tmp_path) != first
