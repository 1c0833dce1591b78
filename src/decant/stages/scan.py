"""The pictures of a run, and what of the data is not used: told, counted and named."""

from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from decant.data.captioned import Captioned, Skipped, Source, check_share
from decant.data.remote import failures
from decant.data.source import find
from decant.stages.progress import Tick, progress
from decant.stages.stage import Inputs

_TOLD = 20
SKIPPED = "skipped.tsv"


def scan_data(inputs: Inputs, max_skipped: float, out: Path) -> Captioned:
    """Every picture looked at, before anything is trained; what is skipped is told, and named in ``skipped.tsv``.

    That file is in ``inputs.work``, so that it outlives a refusal, and in ``out``. Raises ``UserError`` where there are
    no pictures, or more than the fraction ``max_skipped`` cannot be used.
    """
    assert inputs.data is not None
    source = find(inputs.data)
    inputs.talk(f"data: {source.told}")
    captioned = _watched(source, inputs)
    tell_failures(inputs)
    if captioned.skipped:
        named = inputs.work / SKIPPED
        for folder in (inputs.work, out):
            _write(folder / SKIPPED, captioned.skipped)
        _tell(captioned, inputs, named)
        check_share(captioned, max_skipped, str(named), source.needs)
    check_share(captioned, max_skipped, needs=source.needs)
    return captioned


def tell_failures(inputs: Inputs) -> None:
    """What a server failed with and was asked for again, counted since it was told last."""
    counted = failures()
    if counted:
        said = "; ".join(f"{n} x {reason}" for reason, n in counted.most_common())
        inputs.talk(f"the server failed {counted.total()} times and was asked again: {said}")


def _watched(source: Source, inputs: Inputs) -> Captioned:
    with ExitStack() as stack:
        tick: list[Tick] = []

        def watch(done: int, total: int) -> None:
            if not tick:
                tick.append(stack.enter_context(progress("looking at pictures", total, inputs.talk)))
            if done < total:  # the last is told by what follows
                tick[0](done)

        return source.scan(watch, inputs.kept / "index")


def _write(file: Path, skipped: tuple[Skipped, ...]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{item.name}\t{item.reason}\n" for item in skipped)
    file.write_text(lines, encoding="utf-8", errors="backslashreplace")


def _tell(captioned: Captioned, inputs: Inputs, named: Path) -> None:
    skipped = captioned.skipped
    inputs.talk(f"skipped {len(skipped)} of {len(captioned.files) + len(skipped)} entries of {inputs.data}")
    for item in skipped[:_TOLD]:
        inputs.talk(f"skipped {item.name}: {item.reason}")
    if len(skipped) > _TOLD:
        inputs.talk(f"and {len(skipped) - _TOLD} more, all named in {named} and in the stage's record; by reason:")
        for reason, n in Counter(item.reason for item in skipped).most_common():
            inputs.talk(f"{n:>7}  {reason}")
