"""Tables of captioned pictures, through the ``datasets`` library: a hub id (``hf:owner/name``) or local parquet files.

What else must be said stands behind a question mark: ``hf:owner/name?split=train&image=image&text=caption``.
"""

import hashlib
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from decant.data.captioned import Captioned, Entry, Watch, gather, unwatched
from decant.data.folder import METADATA
from decant.data.picture import SUFFIXES
from decant.errors import nearest, refuse

_HUB = "hf:"
_OPTIONS = ("config", "image", "revision", "split", "text")
_IMAGES = ("image", "img", "picture", "jpg", "png", "webp")
_TEXTS = ("text", "caption", "captions", "prompt", "txt")


@dataclass(frozen=True)
class Row:
    """A picture in a table."""

    name: str
    table: Any
    column: str
    place: int

    def read_bytes(self) -> bytes:
        """Its contents, as they were put in."""
        value = self.table[self.place][self.column]
        content = value.get("bytes") if isinstance(value, Mapping) else value
        if content is None and isinstance(value, Mapping) and value.get("path"):
            content = Path(value["path"]).read_bytes()
        if not isinstance(content, bytes):
            raise OSError(None, "no picture in this row")
        return content

    def __str__(self) -> str:
        """As errors name it."""
        return f"row {self.name}"


@dataclass(frozen=True)
class Table:
    """A dataset of the hub, or some parquet files."""

    said: str
    hub: str = ""
    files: tuple[Path, ...] = ()
    options: tuple[tuple[str, str], ...] = ()

    @property
    def told(self) -> str:
        """Where it is from."""
        if self.hub:
            return f"the Hugging Face dataset {self.hub}, split {dict(self.options).get('split', 'train')}"
        return f"a table of {len(self.files)} parquet file{'s' * (len(self.files) > 1)}"

    @property
    def needs(self) -> str:
        """What a row needs."""
        return "each row needs a picture and a caption; name the columns: ?image=COLUMN&text=COLUMN"

    @property
    def folders(self) -> tuple[Path, ...]:
        """Those of the files."""
        return tuple({file.parent for file in self.files})

    def scan(self, watch: Watch = unwatched, index: Path | None = None) -> Captioned:
        """In the order of the rows; ``index`` keeps local files as memory-mapped tables."""
        table = _opened(self, index, self._stamps)
        image, text = _columns(table, dict(self.options), self.said)
        pictures = _undecoded(table.select_columns([image]), image)
        return gather(_entries(pictures, image, table[text]), watch, total=len(table), place=self.said)

    def fingerprint(self) -> str:
        """Of the files' contents, or of the dataset as the hub has it; and of split and columns."""
        digest = hashlib.sha256(repr(self.options).encode())
        for file in self.files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        if self.hub:
            digest.update(f"{self.hub} {_opened(self, None, ())._fingerprint}".encode())
        return digest.hexdigest()

    @property
    def _stamps(self) -> tuple[int, ...]:
        """Change when a file does."""
        return tuple(file.stat().st_mtime_ns for file in self.files)


def find(data: str) -> Table | None:
    """``hf:owner/name``, a ``.parquet`` file, or a folder of them (or with them in ``data/``).

    Raises ``UserError`` for an unknown word behind the question mark.
    """
    name, _, query = data.partition("?")
    path = Path(name)
    if name.startswith(_HUB):
        return Table(data, hub=name.removeprefix(_HUB), options=_options(query, data))
    if path.suffix == ".parquet" and path.is_file():
        return Table(data, files=(path,), options=_options(query, data))
    if path.is_dir() and not any((path / metadata).is_file() for metadata in METADATA):
        files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
        if files and not any(file.suffix.lower() in SUFFIXES for file in path.iterdir()):
            return Table(data, files=_of_split(files, query, data), options=_options(query, data))
    return None


def _options(query: str, said: str) -> tuple[tuple[str, str], ...]:
    pairs = parse_qsl(query)
    for key, _ in pairs:
        if key not in _OPTIONS:
            hint = nearest(key, _OPTIONS)
            raise refuse("--data", f"{said}: unknown {key!r}", allowed=", ".join(_OPTIONS), hint=hint)
    return tuple(sorted(pairs))


def _of_split(files: Sequence[Path], query: str, said: str) -> tuple[Path, ...]:
    """Of files that are named by their split, as the hub does, those of the one that is asked for, or of train."""
    split = dict(parse_qsl(query)).get("split")
    named = [file for file in files if file.stem.split("-")[0] == (split or "train")]
    if split and not named:
        known = {file.stem.split("-")[0] for file in files}
        raise refuse(
            "--data", f"{said}: no split {split!r}", allowed=", ".join(sorted(known)), hint=nearest(split, known)
        )
    return tuple(named or files)


@lru_cache(maxsize=4)
def _opened(table: Table, index: Path | None, stamps: tuple[int, ...]) -> Any:
    """A ``datasets.Dataset``, memory-mapped; what was opened stays open, while the files' ``stamps`` are the same."""
    if importlib.util.find_spec("datasets") is None:
        value = "the library for tables, `datasets`, is not installed"
        raise refuse(f"data {table.said}", value, allowed="with it", hint="pip install 'decant[datasets]'")
    import datasets

    datasets.disable_progress_bars()
    return _of_hub(table) if table.hub else _of_files(table, index)


def _of_hub(table: Table) -> Any:
    """From the hub, or where that does not answer from the library's own cache."""
    import datasets

    from decant.hub import why_away  # here, for it takes a second to import

    options = dict(table.options)
    away = why_away(table.hub, "README.md", "dataset", options.get("revision"))
    try:
        with _asking_nobody() if away else nullcontext():
            return datasets.load_dataset(
                table.hub, options.get("config"), split=options.get("split", "train"), revision=options.get("revision")
            )
    except Exception as error:  # what the hub, its cache and its client raise is of many kinds
        first = (str(error) or type(error).__name__).splitlines()[0]
        said = f"of the hub: {away}; and no cache here gives it ({first})" if away else first
        hint = f"where there is a network, `hf download --repo-type dataset {table.hub} --local-dir DIR`; "
        hint += "then --data DIR, here or on another machine"
        hint = hint if away else f"check name and split; without a network: {hint}"
        raise refuse(f"data {table.said}", said, allowed="a dataset that can be read", hint=hint) from None


@contextmanager
def _asking_nobody() -> Iterator[None]:
    """The library's own offline mode: it looks into its cache at once, in place of trying a dead network again."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _of_files(table: Table, index: Path | None) -> Any:
    import datasets
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    for file in table.files:
        try:
            ParquetFile(file).close()
        except (ArrowException, OSError) as error:
            hint = "was it cut off? copy it again"
            raise refuse(f"data {file}", f"no parquet file ({error})", allowed="parquet", hint=hint) from None
    try:
        return datasets.Dataset.from_parquet([str(file) for file in table.files], cache_dir=str(_place(index)))
    except Exception as error:  # of many kinds, from two libraries
        first = str(error.__cause__ or error).splitlines()[0]
        hint = "files of one table have the same columns"
        raise refuse(f"data {table.said}", first, allowed="parquet files of one table", hint=hint) from None


def _place(index: Path | None) -> Path:
    """Where tables are kept: with the run's other indices, or until the process ends."""
    if index is not None:
        with suppress(OSError):
            (index / "tables").mkdir(parents=True, exist_ok=True)
            return index / "tables"
    return Path(_until_the_end().name)


@lru_cache(maxsize=1)
def _until_the_end() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="decant-tables-")


def _columns(table: Any, options: Mapping[str, str], said: str) -> tuple[str, str]:
    """The columns of pictures and of captions: those that are named, or that are called or typed so."""
    names = list(table.column_names)
    images = [name for name in names if _is_image(table.features[name])]
    image = options.get("image") or next((name for name in _IMAGES if name in images), images[0] if images else None)
    text = options.get("text") or next((name for name in _TEXTS if name in names), None)
    for key, column in (("image", image), ("text", text)):
        if column not in names:
            value = f"{said}: no column {column!r}" if column else f"{said}: no column of {key}s is known by its name"
            hint = f"name it: ?{key}=COLUMN" if column is None else nearest(column, names)
            raise refuse("--data", value, allowed=", ".join(names), hint=hint)
    return str(image), str(text)


def _is_image(feature: Any) -> bool:
    import datasets

    if isinstance(feature, Mapping):
        return "bytes" in feature
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _undecoded(pictures: Any, image: str) -> Any:
    """The same table, but so that pictures are given as they were put in."""
    import datasets

    is_typed = isinstance(pictures.features[image], datasets.Image)
    return pictures.cast_column(image, datasets.Image(decode=False)) if is_typed else pictures


def _entries(pictures: Any, image: str, texts: Sequence[object]) -> Iterator[Entry]:
    for place, text in enumerate(texts):
        name = f"{place:08d}"
        captions = tuple(text) if isinstance(text, list) else (text,)
        yield Entry(name, Row(name, pictures, image, place), captions)
