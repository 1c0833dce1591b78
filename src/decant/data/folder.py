"""A folder of pictures with captions: each is decoded once, and what cannot be used is skipped and counted.

Three layouts, one function each: ``metadata.jsonl`` (Hugging Face ImageFolder: ``file_name`` and ``text``, or
``caption``), ``metadata.csv`` with the same columns, or a ``.txt`` beside each picture.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from decant.data.captioned import Captioned, Entry, Watch, caption_problem, gather, tidy, unwatched
from decant.data.picture import SUFFIXES, ahead
from decant.errors import UserError, refuse

_MAX_CAPTION_BYTES = 64 * 1024
TEXT_KEYS = ("text", "caption")
"""What a caption is called, the first that is there."""
_NOT_READ = frozenset({".avif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg", ".tga"})
_CLOSED = "the folder cannot be read"
_FOLDER = "a folder, not a picture"
_NO_FILE = "not a file, or a link that leads nowhere"
METADATA = ("metadata.jsonl", "metadata.csv")
"""The files that make a folder one of captioned pictures."""
_LAYOUTS = "metadata.jsonl, metadata.csv, or a .txt beside each picture"


@dataclass(frozen=True)
class Folder:
    """A folder of captioned pictures."""

    path: Path

    @property
    def told(self) -> str:
        """The folder's layout, in words."""
        listed = next((name for name in METADATA if (self.path / name).is_file()), "a .txt beside each picture")
        return f"a folder of pictures, captions from {listed}"

    @property
    def needs(self) -> str:
        """What a picture needs."""
        return f"each picture needs a caption: {_LAYOUTS}"

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder itself."""
        return (self.path,)

    def scan(self, watch: Watch = unwatched, index: Path | None = None) -> Captioned:
        """Sorted by name, however many of the entries cannot be used. No index: files may change at any time."""
        real = os.path.realpath(self.path)
        entries = [_checked(self.path, real, entry) for entry in _entries(self.path)]
        entries.sort(key=lambda entry: (entry.name, [tidy(str(caption)) for caption in entry.captions]))
        return gather(entries, watch, total=len(entries), folder=self.path)

    def fingerprint(self) -> str:
        """A sha256 over the names and the contents of the folder's files."""
        return data_fingerprint(self.path)


def find(data: str) -> Folder | None:
    """Any folder."""
    return Folder(Path(data)) if Path(data).is_dir() else None


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


def _entries(folder: Path) -> Iterator[Entry]:
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
            yield Entry(entry.name, problem=entry.problem or "not in the metadata file")


def _jsonl_layout(file: Path) -> Iterator[Entry]:
    """One JSON object a line; a line that is none is named by its number."""
    for number, line in enumerate(_lines(file), start=1):
        place = f"{file.name}:{number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            yield Entry(place, problem="the line is not JSON in UTF-8")
            continue
        yield (_listed(values, place) if isinstance(values, dict) else Entry(place, problem="not a JSON object"))


def _lines(file: Path) -> list[bytes]:
    return contents(file).removeprefix(b"\xef\xbb\xbf").splitlines()


def contents(file: Path) -> bytes:
    """All of a file that lists pictures. Raises ``UserError`` where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        hint = "check its permissions"
        raise refuse(f"data {file}", error.strerror, allowed="a file that can be read", hint=hint) from None


def _csv_layout(file: Path) -> Iterator[Entry]:
    """A header with ``file_name`` and ``text`` or ``caption``, then one row a picture."""
    # Bytes that are not UTF-8 become lone surrogates, which the caption check then refuses by row.
    text = b"\n".join(_lines(file)).decode("utf-8", errors="surrogateescape")
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = list(rows.fieldnames or ())
    if "file_name" not in columns or not set(TEXT_KEYS) & set(columns):
        value = f"its columns are {', '.join(columns) or 'none'}"
        hint = "the first line names the columns"
        raise refuse(f"data {file}", value, allowed="file_name, and text or caption", hint=hint)
    while True:
        try:
            values = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Entry(f"{file.name}:{rows.line_num}", problem=f"the row is not CSV ({error})")
            continue
        yield _listed({k: v for k, v in values.items() if isinstance(k, str)}, f"{file.name}:{rows.line_num}")


def _txt_layout(folder: Path) -> Iterator[Entry]:
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
            yield Entry(entry.name, captions=(_read_caption(folder, (folder / entry.name).with_suffix(".txt")),))
        except UserError as error:
            yield Entry(entry.name, problem=str(error))


def _read_caption(folder: Path, file: Path) -> str:
    problem = outside(os.path.realpath(folder), file.relative_to(folder).as_posix())
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


def _listed(values: dict[str, object], place: str) -> Entry:
    """An entry of a metadata file."""
    name = values.get("file_name")
    if not isinstance(name, str) or not name.strip():
        return Entry(place, problem="no file_name")
    key = next((key for key in TEXT_KEYS if key in values), None)
    return Entry(name, problem="no caption") if key is None else Entry(name, captions=(values[key],))


def _checked(folder: Path, real: str, entry: Entry) -> Entry:
    """The entry under its plain name, with its file, or why it cannot be used as far as seen without decoding it."""
    if entry.problem:
        return entry
    name = PurePosixPath(entry.name).as_posix()
    problem = outside(real, entry.name) or missing(folder, entry.name) or caption_problem(entry.captions[0])
    return Entry(name, folder / name, entry.captions, problem)


def outside(real: str, name: str) -> str:
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


def missing(folder: Path, name: str) -> str:
    """Why a listed name is no file of the folder, or ""."""
    file = folder / name
    try:
        if file.is_file():
            return ""
        if file.is_dir():
            return _FOLDER
        return _NO_FILE if file.is_symlink() or file.exists() else "listed, but there is no such file"
    except (OSError, ValueError):
        return "listed, but there is no such file"


def _files(folder: Path) -> Iterator[str]:
    """Relative names of the files below a folder, hidden ones left out; links to folders are not followed."""
    return (entry.name for entry in _below(folder) if (folder / entry.name).is_file())


def _pictures(folder: Path) -> list[Entry]:
    """What is named like a picture below a folder, sorted, and why some of it is none."""
    known = SUFFIXES | _NOT_READ
    found = [e for e in _below(folder) if e.problem == _CLOSED or PurePosixPath(e.name).suffix.lower() in known]
    return sorted(found, key=lambda entry: entry.name)


def _below(folder: Path) -> Iterator[Entry]:
    """Files, links that lead nowhere and folders, by relative name; hidden ones are left out."""
    closed: list[str] = []
    for root, folders, files in os.walk(folder, onerror=lambda error: closed.append(str(error.filename))):
        folders[:] = [name for name in folders if not name.startswith(".")]
        place = "" if Path(root) == folder else Path(root).relative_to(folder).as_posix() + "/"
        for name in folders:
            yield Entry(place + name, problem=_FOLDER)
        for name in files:
            if not name.startswith("."):
                yield Entry(place + name, problem=_no_picture(Path(root, name)))
    for name in closed:
        yield Entry(Path(name).relative_to(folder).as_posix() + "/", problem=_CLOSED)


def _no_picture(file: Path) -> str:
    """Why a file is no picture, as far as its name and kind say."""
    if file.suffix.lower() in _NOT_READ:
        return f"{file.suffix.lower()} is not read: convert it to PNG or JPEG"
    return "" if file.is_file() else _NO_FILE
