"""The safety checker of a teacher, which a student keeps: it looks at pictures and does not know who drew them."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from decant.errors import UserError
from decant.models.guard import check_inside, read_header, read_json
from decant.models.layout import INDEX

_CHECKER = ["stable_diffusion", "StableDiffusionSafetyChecker"]
_EXTRACTORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")


@dataclass(frozen=True)
class Safety:
    """What became of the safety checker: ``kept``, ``absent`` from the start, or ``dropped``; and why."""

    state: Literal["kept", "absent", "dropped"]
    why: str

    def to_json(self) -> dict[str, str]:
        """As the record holds it."""
        return asdict(self)


def carry_safety(source: Path, student: Path) -> Safety:
    """Copy safety checker and feature extractor from a teacher's folder into a student's, and name them in its index.

    What cannot be opened safely is left out, and the reason is given: nothing is dropped in silence.
    """
    if source.is_file():
        return Safety("absent", "the teacher is one file, which holds none")
    index = _read(source / INDEX)
    earlier = _read(source / "decant.json").get("safety_checker")
    if isinstance(earlier, dict) and earlier.get("state") in ("absent", "dropped"):
        return Safety(earlier["state"], str(earlier.get("why", "unknown")))
    checker = index.get("safety_checker")
    if not isinstance(checker, list) or checker[:1] in ([], [None]):
        return Safety("absent", "the teacher has none")
    why = _unfit(source, index)
    if why:
        return Safety("dropped", why)
    for name in ("safety_checker", "feature_extractor"):
        shutil.copytree(source / name, student / name, ignore=shutil.ignore_patterns("*.bin", "*.py"))
    named = {name: index[name] for name in ("safety_checker", "feature_extractor")}
    own = {**_read(student / INDEX), **named, "requires_safety_checker": True}
    (student / INDEX).write_text(json.dumps(own, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Safety("kept", "copied from the teacher")


def _unfit(source: Path, index: dict[str, Any]) -> str:
    """Why the checker cannot come along; "" where it can."""
    extractors = [["transformers", name] for name in _EXTRACTORS]
    if index["safety_checker"] != _CHECKER or index.get("feature_extractor") not in extractors:
        return "it is of a class that decant does not open"
    checker, extractor = source / "safety_checker", source / "feature_extractor"
    weights = sorted(checker.glob("*.safetensors")) if checker.is_dir() else []
    if not weights or not (checker / "config.json").is_file():
        return "its weights are not there as safetensors"
    if not (extractor / "preprocessor_config.json").is_file():
        return "its feature extractor is missing"
    try:
        check_inside(source, [checker, extractor, *checker.rglob("*"), *extractor.rglob("*")])
        for file in weights:
            read_header(file)
        for config in (checker / "config.json", extractor / "preprocessor_config.json"):
            if read_json(config).get("auto_map"):
                return "it brings code of its own"
    except UserError as error:
        return str(error).splitlines()[0]
    return ""


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, most_bytes=10**8) if file.is_file() else {}
