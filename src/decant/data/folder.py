"""A folder of pictures with captions: each is decoded once, and what cannot be used is skipped and counted.

Three layouts, one function each: ``metadata.jsonl`` (Hugging Face ImageFolder: ``file_name`` and ``text``, or
``caption``), ``metadata.csv`` with the same columns, or a ``.txt`` beside each picture.
"""

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TypeVar

from decant.data.picture import SUFFIXES, Look, ahead, look
from decant.errors import UserError, nearest, refuse

_MAX_CAPTION_BYTES = 64 * 1024
_TEXT_KEYS = ("text", "caption")
_NOT_READ = frozenset({".avif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg", ".tga"})
_CLOSED = "the folder cannot be read"
_FOLDER = "a folder, not a picture"
_NO_FILE = "not a file, or a link that leads nowhere"

Watch = Callable[[int, int], object]
_Value = TypeVar("_Value")
_LAYOUTS = "metadata.jsonl, metadata.csv, or a .txt beside each picture"


@dataclass(frozen=True)
class Skipped:
    """Something in the folder that is not used: its name, or file and line, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Captioned:
    """Pictures that decode, each with its caption, sorted by name; and what was left out.

    A picture listed with several captions appears once for each. ``folder`` is what ``names`` are relative to;
    ``digests`` are the sha256 of the files' contents.
    """

    files: tuple[Path, ...]
    captions: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    folder: Path = Path()
    digests: tuple[bytes, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """File names relative to the folder, with forward slashes."""
        inside = (f.relative_to(self.folder) if f.is_relative_to(self.folder) else f for f in self.files)
        return tuple(file.as_posix() for file in inside)

    def first(self, most: int) -> "Captioned":
        """At most so many of the pictures, the first by name; nothing skipped."""
        return _part(self, [True] * most)


@dataclass(frozen=True)
class _Entry:
    """What a layout found: a picture's name and its caption, or the reason why it has none."""

    name: str
    caption: object = None
    problem: str = ""


def read_folder(path: str | Path, max_skipped: float = 0.1, watch: Watch = lambda done, total: None) -> Captioned:
    """Scan a folder of captioned pictures, decoding each picture once.

    ``watch(done, total)`` counts pictures. Raises ``UserError`` where the folder is missing, holds no pictures, or
    more than the fraction ``max_skipped`` of its entries (0.1: one in ten) cannot be used.
    """
    captioned = scan(path, watch)
    check_share(captioned, max_skipped)
    return captioned


def scan(path: str | Path, watch: Watch = lambda done, total: None) -> Captioned:
    """As `read_folder`, however many of the entries cannot be used."""
    folder = Path(path)
    _check_folder(folder)
    real = os.path.realpath(folder)
    checked = [_checked(folder, real, entry) for entry in _entries(folder)]
    good = [entry for entry, reason in checked if not reason]
    skipped = [Skipped(entry.name, reason) for entry, reason in checked if reason]
    names = sorted({entry.name for entry in good})
    looks: dict[str, Look] = {}
    for name, seen in zip(names, ahead(look, [folder / name for name in names]), strict=True):
        looks[name] = seen
        watch(len(looks), len(names))
    skipped += [Skipped(entry.name, looks[entry.name].problem) for entry in good if looks[entry.name].problem]
    pairs, twice = _unique([(e.name, _tidy(str(e.caption))) for e in good if not looks[e.name].problem])
    skipped = sorted([*skipped, *twice], key=lambda item: (item.name, item.reason))
    files, captions = tuple(folder / name for name, _ in pairs), tuple(caption for _, caption in pairs)
    return Captioned(files, captions, tuple(skipped), folder, tuple(looks[name].digest for name, _ in pairs))


def check_share(captioned: Captioned, max_skipped: float, named_in: str = "") -> None:
    """Refuse where more than the fraction ``max_skipped`` of the entries cannot be used; ``named_in`` is a file."""
    total = len(captioned.files) + len(captioned.skipped)
    if captioned.files and len(captioned.skipped) <= max_skipped * total:
        return
    first = "; ".join(f"{item.name}: {item.reason}" for item in captioned.skipped[:3])
    count = f"{len(captioned.skipped)} of {total} entries of {captioned.folder}"
    allowed = f"at most {max_skipped:.0%} skipped, and at least one used"
    hint = f"all are named in {named_in}" if named_in else "mend them"
    hint += ", or raise max_skipped" if captioned.files else f"; each picture needs a caption: {_LAYOUTS}"
    raise refuse("data", f"{count} cannot be used ({first or 'it is empty'})", allowed=allowed, hint=hint)


def split(captioned: Captioned, held_out: float, seed: int) -> tuple[Captioned, Captioned]:
    """(training part, held-out part), disjoint: about the fraction ``held_out`` of the names is held out.

    A picture's side is a hash of the seed and its name: neither the order nor the other pictures matter, so a
    held-out picture stays held out as the folder grows. Raises ``UserError`` where a part comes out empty.
    """
    if not 0 <= held_out < 1:
        hint = "0.1 holds out one picture in ten"
        raise refuse("held_out", held_out, allowed="a fraction from 0 up to, not including, 1", hint=hint)
    held = [_unit(name, seed) < held_out for name in captioned.names]
    train, kept = _part(captioned, [not side for side in held]), _part(captioned, held)
    if not train.files or (held_out > 0 and not kept.files):
        sizes = f"{len(train.files)} to train on and {len(kept.files)} held out"
        value = f"{held_out} of {len(held)} pictures leaves {sizes}"
        raise refuse("held_out", value, allowed="neither part empty", hint="add pictures, or change the fraction")
    return train, kept


def data_fingerprint(path: Path) -> str:
    """A sha256 over the names and the contents of a folder's files, as hexadecimal."""
    names = sorted(_files(path))
    digest = hashlib.sha256()
    for name, content in zip(names, ahead(_file_digest, [path / name for name in names]), strict=True):
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + content)
    return digest.hexdigest()


def _file_digest(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError:  # one of those that are then skipped
        return bytes(32)


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    beside = folder.parent
    known = sorted(entry.name for entry in beside.iterdir() if entry.is_dir()) if beside.is_dir() else []
    hint = nearest(folder.name, known) if known and not folder.exists() else "give the folder that holds the pictures"
    what = "is not a folder" if folder.exists() else "does not exist"
    raise refuse("data", f"{folder} {what}", allowed=f"a folder of pictures with {_LAYOUTS}", hint=hint)


def _entries(folder: Path) -> Iterator[_Entry]:
    """What the folder's own layout lists; with a metadata file, the pictures that it forgets too."""
    if (folder / "metadata.jsonl").is_file():
        listed = list(_jsonl_layout(folder / "metadata.jsonl"))
    elif (folder / "metadata.csv").is_file():
        listed = list(_csv_layout(folder / "metadata.csv"))
    else:
        yield from _txt_layout(folder)
        return
    yield from listed
    known = {os.path.normpath(entry.name) for entry in listed}
    for entry in _pictures(folder):
        if os.path.normpath(entry.name) not in known:
            yield _Entry(entry.name, problem=entry.problem or "not in the metadata file")


def _jsonl_layout(file: Path) -> Iterator[_Entry]:
    """One JSON object a line; a line that is none is named by its number."""
    for number, line in enumerate(_lines(file), start=1):
        place = f"{file.name}:{number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            yield _Entry(place, problem="the line is not JSON in UTF-8")
            continue
        yield (_listed(values, place) if isinstance(values, dict) else _Entry(place, problem="not a JSON object"))


def _lines(file: Path) -> list[bytes]:
    try:
        return file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        hint = "check its permissions"
        raise refuse(f"data {file}", error.strerror, allowed="a file that can be read", hint=hint) from None


def _csv_layout(file: Path) -> Iterator[_Entry]:
    """A header with ``file_name`` and ``text`` or ``caption``, then one row a picture."""
    # Bytes that are not UTF-8 become lone surrogates, which the caption check then refuses by row.
    text = b"\n".join(_lines(file)).decode("utf-8", errors="surrogateescape")
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = list(rows.fieldnames or ())
    if "file_name" not in columns or not set(_TEXT_KEYS) & set(columns):
        value = f"its columns are {', '.join(columns) or 'none'}"
        hint = "the first line names the columns"
        raise refuse(f"data {file}", value, allowed="file_name, and text or caption", hint=hint)
    while True:
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Entry(f"{file.name}:{rows.line_num}", problem=f"the row is not CSV ({error})")
            continue
        yield _listed({k: v for k, v in values.items() if isinstance(k, str)}, f"{file.name}:{rows.line_num}")


def _txt_layout(folder: Path) -> Iterator[_Entry]:
    """A ``.txt`` of the same stem beside each picture, in the folder and the folders below."""
    entries = _pictures(folder)
    if not entries:
        below = sorted(f.parent.name for kind in ("jsonl", "csv") for f in folder.glob(f"*/metadata.{kind}"))
        hint = f"did you mean its folder {below[0]!r}?" if below else "check that --data is the folder of the pictures"
        allowed = f"a folder of pictures with {_LAYOUTS}"
        raise refuse("data", f"{folder} holds no pictures", allowed=allowed, hint=hint)
    for entry in entries:
        if entry.problem:
            yield entry
            continue
        try:
            yield _Entry(entry.name, caption=_read_caption(folder, (folder / entry.name).with_suffix(".txt")))
        except UserError as error:
            yield _Entry(entry.name, problem=str(error))


def _read_caption(folder: Path, file: Path) -> str:
    problem = _outside(os.path.realpath(folder), file.relative_to(folder).as_posix())
    if not file.is_file():
        problem = "no .txt beside it"
    elif not problem and file.stat().st_size > _MAX_CAPTION_BYTES:
        problem = "the caption file is too large"
    if problem:
        raise UserError(problem)
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"the caption file cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError("the caption file is not text in UTF-8") from None


def _listed(values: dict[str, object], place: str) -> _Entry:
    """An entry of a metadata file."""
    name = values.get("file_name")
    if not isinstance(name, str) or not name.strip():
        return _Entry(place, problem="no file_name")
    key = next((key for key in _TEXT_KEYS if key in values), None)
    return _Entry(name, problem="no caption") if key is None else _Entry(name, caption=values[key])


def _checked(folder: Path, real: str, entry: _Entry) -> tuple[_Entry, str]:
    """The entry under its plain name, and why it cannot be used, as far as seen without decoding it."""
    if entry.problem:
        return entry, entry.problem
    reason = _outside(real, entry.name) or _missing(folder, entry.name) or _caption_problem(entry.caption)
    return _Entry(PurePosixPath(entry.name).as_posix(), entry.caption), reason


def _outside(real: str, name: str) -> str:
    """Why a file name must not be followed: it leaves the folder ``real``, by itself or through a link."""
    parts, windows = PurePosixPath(name), PureWindowsPath(name)
    if "\0" in name or parts.is_absolute() or windows.drive or windows.root or ".." in (*parts.parts, *windows.parts):
        return "the file name leaves the folder"
    try:
        name.encode()
        inside = Path(os.path.realpath(f"{real}/{name}")).is_relative_to(real)
    except UnicodeEncodeError:
        return "the file name is not text in UTF-8"
    except OSError:
        inside = False
    return "" if inside else "the file is a link that leaves the folder"


def _missing(folder: Path, name: str) -> str:
    file = folder / name
    try:
        if file.is_file():
            return ""
        if file.is_dir():
            return _FOLDER
        return _NO_FILE if file.is_symlink() or file.exists() else "listed, but there is no such file"
    except (OSError, ValueError):
        return "listed, but there is no such file"


def _caption_problem(caption: object) -> str:
    if caption is None:
        return "no caption"
    if not isinstance(caption, str):
        return f"the caption is not text ({type(caption).__name__})"
    if not _tidy(caption):
        return "the caption is empty"
    try:
        size = len(caption.encode("utf-8"))
    except UnicodeEncodeError:
        return "the caption is not text in UTF-8"
    return "the caption is too long" if size > _MAX_CAPTION_BYTES else ""


def _tidy(caption: str) -> str:
    return " ".join(caption.split())


def _unique(pairs: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """Sorted pairs of name and caption without exact repeats, and the repeats."""
    counts = Counter(pairs)
    twice = [Skipped(name, "listed twice") for (name, _), n in counts.items() for _ in range(n - 1)]
    return sorted(counts), twice


def _files(folder: Path) -> Iterator[str]:
    """Relative names of the files below a folder, hidden ones left out; links to folders are not followed."""
    return (entry.name for entry in _below(folder) if (folder / entry.name).is_file())


def _pictures(folder: Path) -> list[_Entry]:
    """What is named like a picture below a folder, sorted, and why some of it is none."""
    known = SUFFIXES | _NOT_READ
    found = [e for e in _below(folder) if e.problem == _CLOSED or PurePosixPath(e.name).suffix.lower() in known]
    return sorted(found, key=lambda entry: entry.name)


def _below(folder: Path) -> Iterator[_Entry]:
    """Files, links that lead nowhere and folders, by relative name; hidden ones are left out."""
    closed: list[str] = []
    for root, folders, files in os.walk(folder, onerror=lambda error: closed.append(str(error.filename))):
        folders[:] = [name for name in folders if not name.startswith(".")]
        place = "" if Path(root) == folder else Path(root).relative_to(folder).as_posix() + "/"
        for name in folders:
            yield _Entry(place + name, problem=_FOLDER)
        for name in files:
            if not name.startswith("."):
                yield _Entry(place + name, problem=_no_picture(Path(root, name)))
    for name in closed:
        yield _Entry(Path(name).relative_to(folder).as_posix() + "/", problem=_CLOSED)


def _no_picture(file: Path) -> str:
    """Why a file is no picture, as far as its name and kind say."""
    if file.suffix.lower() in _NOT_READ:
        return f"{file.suffix.lower()} is not read: convert it to PNG or JPEG"
    return "" if file.is_file() else _NO_FILE


def _unit(name: str, seed: int) -> float:
    """A number in [0, 1) that only the seed and the name decide."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _part(captioned: Captioned, keep: Sequence[bool]) -> Captioned:
    def kept(values: Sequence[_Value]) -> tuple[_Value, ...]:
        return tuple(compress(values, keep))

    files, captions, digests = kept(captioned.files), kept(captioned.captions), kept(captioned.digests)
    return Captioned(files, captions, (), captioned.folder, digests)
