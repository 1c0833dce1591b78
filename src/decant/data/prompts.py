"""Prompts alone: ``captions.json``, a list of ``{"text": ...}``; latents come from the teacher."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decant.data.captioned import Captioned, Entry, Watch, caption_problem, gather, tidy, unwatched
from decant.data.coco import first_character, read_json
from decant.data.folder import TEXT_KEYS
from decant.data.picture import Look
from decant.errors import refuse


@dataclass(frozen=True)
class Prompt:
    """In a picture's place."""

    name: str

    def read_bytes(self) -> bytes:
        """Nothing is there to be read."""
        raise OSError(None, "a prompt has no picture")


@dataclass(frozen=True)
class Prompts:
    """A file of prompts."""

    file: Path

    @property
    def told(self) -> str:
        """What it is, and what follows."""
        return f"prompts alone, {self.file.name}: there are no pictures"

    @property
    def needs(self) -> str:
        """What an entry needs."""
        return 'an entry is {"text": "..."}'

    @property
    def folders(self) -> tuple[Path, ...]:
        """None: a run writes no prompts."""
        return ()

    def scan(self, watch: Watch = unwatched, index: Path | None = None) -> Captioned:
        """In the order of the file; a prompt is called by its own words, so that it keeps its side of a split."""
        document = read_json(self.file)
        if not isinstance(document, list):
            allowed, hint = '[{"text": "..."}, ...]', "COCO's captions come with their images"
            raise refuse(f"data {self.file}", "no list of prompts", allowed=allowed, hint=hint)
        found = gather(_entries(document, self.file.name), watch, total=len(document), place=str(self.file))
        return replace(found, alone=True)

    def fingerprint(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()


def find(data: str) -> Prompts | None:
    """A ``.json`` file that holds a list, or a folder with a ``captions.json`` and nothing else."""
    path = Path(data)
    if path.is_dir():
        inside = [file.name for file in path.iterdir() if not file.name.startswith(".")]
        return Prompts(path / "captions.json") if inside == ["captions.json"] else None
    return Prompts(path) if path.suffix == ".json" and first_character(path) != "{" and path.is_file() else None


def _entries(document: list[Any], place: str) -> Iterator[Entry]:
    for number, value in enumerate(document):
        key = next((key for key in TEXT_KEYS if key in value), None) if isinstance(value, dict) else None
        said = value if isinstance(value, str) else value[key] if isinstance(value, dict) and key else None
        problem = caption_problem(said)
        if problem:
            yield Entry(f"{place}[{number}]", problem=problem)
        else:
            text = tidy(str(said))
            yield Entry(text, Prompt(text), (text,), seen=Look(hashlib.sha256(text.encode()).digest()))
