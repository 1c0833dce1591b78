"""What a comparison asks for: the prompts that were given, or some of ours."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from decant.data.prompt_file import PromptList, own_prompts, prompt_list, read_prompts
from decant.errors import refuse
from decant.models.shipped import NAMES
from decant.scenes.folder import captions_of
from decant.stages.asked import HELD_OUT_SEED

_COUNT = 20


def prompts_of(
    given: Sequence[str], file: Path | None, most: int | None, teacher: str, talk: Callable[[str], None]
) -> PromptList:
    """Those given, those of a file, or both; without any, held-out captions for a teacher of scenes, else ours.

    Raises:
        UserError: there are none, or the file cannot be read.
    """
    if most is not None and most < 1:
        raise refuse("--prompts", most, allowed="1 or more", hint="20 prompts of 4 images give intervals of some use")
    if not given and file is None:
        scenes = any(teacher == name for name in NAMES)
        own = _held_out(most or _COUNT) if scenes else own_prompts()[: most or _COUNT]
        words = "captions of held-out scenes" if scenes else "prompts of decant's own"
        talk(f"{len(own)} {words}; --prompts-file for yours")
        return prompt_list(own, place=words)
    found = read_prompts(file) if file is not None else PromptList((), {})
    place = " and ".join([*(["the command line"] if given else []), *([str(file)] if file else [])])
    whole = prompt_list([*given, *found.prompts], place)
    skipped = dict(Counter(found.skipped) + Counter(whole.skipped))
    if skipped:
        told = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        talk(f"prompts: {len(whole.prompts)} used; lines left out: {told}")
    return PromptList(whole.prompts[:most], skipped, place)


def _held_out(most: int) -> tuple[str, ...]:
    return tuple(caption for _, caption in captions_of(most, "held-out", HELD_OUT_SEED))
