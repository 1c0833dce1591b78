"""COCO captions: ``captions_*.json`` and the folder of its images; about five captions an image.

Chen et al., "Microsoft COCO Captions: Data Collection and Evaluation Server", arXiv 1504.00325.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from decant.data.captioned import Captioned, Entry, Watch, caption_problem, gather, unwatched
from decant.data.folder import METADATA, contents, data_fingerprint, missing, outside
from decant.errors import refuse

_TRIED = 64


@dataclass(frozen=True)
class Coco:
    """A captions file, and the folder in which its images lie."""

    file: Path
    images: Path

    @property
    def told(self) -> str:
        """File and folder."""
        return f"COCO captions {self.file.name}, images in {self.images}; one of an image's captions drawn each epoch"

    @property
    def needs(self) -> str:
        """What an image needs."""
        return "each image needs its file and an annotation with a caption"

    @property
    def folders(self) -> tuple[Path, ...]:
        """That of the images."""
        return (self.images,)

    def scan(self, watch: Watch = unwatched, index: Path | None = None) -> Captioned:
        """In the order of the file, images as they are listed, captions as they are annotated. No index."""
        entries = list(_entries(read_json(self.file), self.images, self.file.name))
        return gather(entries, watch, total=len(entries), folder=self.images, place=str(self.file))

    def fingerprint(self) -> str:
        """Of the captions file and of the images."""
        return hashlib.sha256(self.file.read_bytes() + data_fingerprint(self.images).encode()).hexdigest()


def find(data: str) -> Coco | None:
    """A ``.json`` file that holds an object, or a folder with ``captions_*.json`` in it or in its ``annotations``.

    Of several in a folder, the one for training is taken. Raises ``UserError`` where that is not one, or the images
    are not found.
    """
    path = Path(data)
    if path.is_dir():
        if any((path / name).is_file() for name in METADATA):
            return None
        found = sorted([*path.glob("captions_*.json"), *path.glob("annotations/captions_*.json")])
        return _with_images(_one_of(found, path)) if found else None
    return _with_images(path) if path.suffix == ".json" and first_character(path) == "{" else None


def first_character(file: Path) -> str:
    """What a file's text begins with: ``{`` for a JSON object, ``[`` for a list; "" where it cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(64).decode("utf-8-sig", errors="replace").lstrip()[:1]
    except OSError:
        return ""


def read_json(file: Path) -> Any:
    """A JSON document. Raises ``UserError`` where it is none."""
    content = contents(file)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        value = f"no JSON in UTF-8 ({error})"
        raise refuse(f"data {file}", value, allowed="one JSON document", hint="was it cut off? copy it again") from None


def _one_of(found: Sequence[Path], folder: Path) -> Path:
    chosen = [file for file in found if "train" in file.name] if len(found) > 1 else list(found)
    if len(chosen) == 1:
        return chosen[0]
    value = f"{folder} has {', '.join(file.name for file in found)}"
    raise refuse("--data", value, allowed="one captions file for training", hint=f"name it: --data {found[0]}")


def _with_images(file: Path) -> Coco:
    """The folder is that of which the first listed images are: named as the file says, beside it or one level up."""
    name = file.stem.removeprefix("captions_")
    above = (file.absolute().parent, file.absolute().parent.parent)
    likely = [place / inner for inner in (name, f"images/{name}", "images", "") for place in above]
    listed = _first_names(file)
    for folder in likely:
        if any((folder / image).is_file() for image in listed):
            return Coco(file, folder)
    for folder in likely[:4]:
        if folder.is_dir():
            return Coco(file, folder)
    value = f"{file} is there, and none of the first {len(listed)} images that it lists is"
    allowed = f"the images in {name}/ or images/, beside the file or one level up"
    raise refuse("--data", value, allowed=allowed, hint=f"put or link the images to {likely[1]}")


def _first_names(file: Path) -> list[str]:
    document = read_json(file)
    images = document.get("images") if isinstance(document, dict) else None
    if not isinstance(images, list) or not isinstance(document.get("annotations"), list):
        keys = ", ".join(sorted(document)[:8]) if isinstance(document, dict) else ""
        allowed = 'COCO\'s {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'
        hint = 'a list of prompts alone is [{"text": "..."}]'
        raise refuse(f"data {file}", f"its keys are {keys or 'none'}", allowed=allowed, hint=hint)
    names = (image.get("file_name") for image in images[:_TRIED] if isinstance(image, dict))
    return [name for name in names if isinstance(name, str) and name.strip() and not PurePosixPath(name).is_absolute()]


def _entries(document: Mapping[str, Any], folder: Path, place: str) -> Iterator[Entry]:
    real = os.path.realpath(folder)
    images: dict[Any, str] = {}
    for number, image in enumerate(document["images"]):
        key, name, problem = _image(image, images)
        if problem:
            yield Entry(name or f"{place} images[{number}]", problem=problem)
        else:
            images[key] = name
    captions: dict[Any, list[Any]] = defaultdict(list)
    for number, annotation in enumerate(document["annotations"]):
        key, caption, problem = _annotation(annotation, images)
        if problem:
            yield Entry(f"{place} annotations[{number}]", problem=problem)
        else:
            captions[key].append(caption)
    for key, name in images.items():
        problem = outside(real, name) or missing(folder, name) or ("" if captions[key] else "no caption")
        plain = PurePosixPath(name).as_posix()
        yield Entry(plain, folder / plain, tuple(captions[key]), problem)


def _image(image: object, known: Mapping[Any, str]) -> tuple[Any, str, str]:
    """(id, name, problem) of a listed image."""
    if not isinstance(image, dict):
        return None, "", "not a JSON object"
    key, name = image.get("id"), image.get("file_name")
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return None, "", "no file_name"
    if not isinstance(key, int | str):
        return None, name, "no id"
    return key, name, f"its id {key} is another image's" if key in known else ""


def _annotation(annotation: object, images: Mapping[Any, str]) -> tuple[Any, object, str]:
    """(id of the image, caption, problem) of an annotation."""
    if not isinstance(annotation, dict):
        return None, None, "not a JSON object"
    key, caption = annotation.get("image_id"), annotation.get("caption")
    if not isinstance(key, int | str) or key not in images:
        return None, None, f"no image {key!r} is listed"
    problem = caption_problem(caption)
    return key, caption, f"{images[key]}: {problem}" if problem else ""
