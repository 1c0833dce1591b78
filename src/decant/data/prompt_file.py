"""A file of prompts to be drawn: a line each, or ``captions.json``."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from decant.data.captioned import caption_problem, tidy
from decant.data.folder import contents
from decant.data.prompts import Prompts
from decant.errors import refuse


@dataclass(frozen=True)
class PromptList:
    """Prompts in order, each once; ``skipped``: why entries were left out, and how many; ``place``: whence they are."""

    prompts: tuple[str, ...]
    skipped: Mapping[str, int]
    place: str = ""


def read_prompts(file: Path) -> PromptList:
    """The prompts of a text file, a line each, or of a ``.json`` list of ``{"text": ...}``.

    Blank lines and prompts that stood before are left out and counted.

    Raises:
        UserError: the file is missing, is no text, or holds no prompt.
    """
    if file.suffix == ".json":
        found = Prompts(file).scan()
        return prompt_list([*found.captions], place=str(file), reasons=[item.reason for item in found.skipped])
    try:
        lines = contents(file).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        value = f"{file} is no text in UTF-8 ({error.reason} at byte {error.start})"
        raise refuse("prompts", value, allowed="one prompt a line", hint="save it as UTF-8") from None
    return prompt_list(lines, place=str(file))


def own_prompts() -> tuple[str, ...]:
    """Prompts of ours for models of photographs and paintings, where none are given."""
    return tuple((files("decant.data") / "prompts.txt").read_text(encoding="utf-8").splitlines())


def prompt_list(lines: Iterable[str], place: str, reasons: Iterable[str] = ()) -> PromptList:
    """Lines as prompts: white space is one blank; ``reasons`` are of what was left out before.

    Raises:
        UserError: no prompt is left.
    """
    kept: dict[str, None] = {}
    skipped = Counter(reasons)
    for line in lines:
        problem, text = caption_problem(line), tidy(line)
        if problem:
            skipped["blank" if not text else problem] += 1
        elif text in kept:
            skipped["said before"] += 1
        else:
            kept[text] = None
    if not kept:
        told = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "it is empty"
        raise refuse("prompts", f"none in {place} ({told})", allowed="one prompt or more", hint="write one a line")
    return PromptList(tuple(kept), dict(skipped), place)
