"""The sentences of a comparison's page."""

from collections.abc import Sequence

from decant.report.compare_record import Arm, ArmScore, Comparison
from decant.report.words import percent, plain, relative_interval, score, title

_FEW = 10  # prompts; below, intervals over prompts say little
_KEPT = 0.9
_FELL = 0.9


def best_arm(comparison: Comparison) -> Arm | None:
    """Of the students that keep nine tenths of what the best one keeps, the fastest."""
    key = comparison.main_score
    students = [arm for arm in comparison.models if arm.role == "student"]
    if key:
        values = {arm.name: arm.scores[key].value for arm in students}
        most = max(values.values(), default=0.0)
        students = [arm for arm in students if values[arm.name] >= _KEPT * most]
    timed = [arm for arm in students if arm.speedup is not None]
    return max(timed, key=_speed) if timed else students[0] if students else None


def verdict(comparison: Comparison) -> str:
    """One sentence on the best student: how much faster it is, what it keeps, and how much its pictures differ."""
    best, teacher = best_arm(comparison), comparison.models[0]
    if best is None:
        return "No student was compared."
    said = [f"{best.speedup.value:.3g}\u202f× as fast as {teacher.name}"] if best.speedup else []
    key = comparison.main_score
    if key and best.scores[key].relative_to_teacher is not None:
        said.append(
            f"with {part(best.scores[key])} of its {_spoken(key)} ({_of(best, key)} against {_of(teacher, key)})"
        )
    varied = diversity_key(comparison)
    if varied in best.scores and best.scores[varied].relative_low is not None:
        said.append(f"and {part(best.scores[varied])} of its diversity between seeds")
    return f"{best.name}: {' '.join(said)}." if said else f"{best.name} was drawn; nothing here could score it."


def caution(comparison: Comparison) -> str:
    """What the verdict does not show: too few prompts, pictures that became alike, or broken ones that differ more."""
    best, n = best_arm(comparison), len(comparison.prompts)
    if n < _FEW:
        return f"Only {n} prompt{'s' * (n != 1)}: a first look. Differences smaller than the intervals may be chance."
    own = best.scores.get(diversity_key(comparison)) if best else None
    if best is None or own is None or own.relative_high is None or own.relative_low is None:
        return ""
    if own.relative_high < _FELL:
        return f"{best.name} draws pictures of one prompt that are more alike than its teacher’s."
    if own.relative_low > 1 / _FELL and diversity_key(comparison) != "diversity_of_right":
        return f"The pictures of {best.name} differ more than its teacher’s: look whether that is variety or damage."
    return ""


def diversity_key(comparison: Comparison) -> str:
    """The diversity that says most: of right pictures, by LPIPS, else by coarse pixels."""
    return next((k for k in ("diversity_of_right", "diversity_lpips") if k in comparison.columns), "diversity")


def part(value: ArmScore) -> str:
    """A score as a part of the teacher's: 93 % (88–97)."""
    ends = relative_interval(value)
    return percent(value.relative_to_teacher, 0) + (f" ({ends})" if ends else "")


def heading(key: str) -> str:
    """A score above its column."""
    return {"clip_score": "CLIPScore", "agreement_with_teacher": "Same as teacher’s"}.get(key, title(key))


def note(key: str, comparison: Comparison) -> str:
    """What stands below a heading."""
    found = next((arm.scores[key] for arm in comparison.models if key in arm.scores), None)
    if found is None:
        return ""
    said = [found.features or "", "lower is nearer" if found.better == "lower" else ""]
    if found.shuffled is not None:
        said.append(f"teacher’s pictures with other prompts: {plain(found.shuffled)}")
    return "; ".join(filter(None, said))


def absent(key: str, comparison: Comparison) -> str:
    """Why a score is in no line: "not measured: ..."."""
    reason = next((item.reason for item in comparison.left_out if item.score == key), "")
    return f"not measured: {reason}" if reason else "–"


def sampled(arm: Arm) -> str:
    """How an arm was sampled: ddim, guidance 7.5."""
    guided = arm.guidance_scale is not None and arm.guidance_scale > 1
    return f"{arm.sampler}, {f'guidance {arm.guidance_scale:g}' if guided else 'no guidance'}"


def cut(comparison: Comparison) -> list[tuple[str, str]]:
    """Prompts that are longer than the text encoder reads: what is read of each, and what is not."""
    return [(p.prompt[: len(p.prompt) - len(p.unread)], p.unread) for p in comparison.prompts if p.unread]


def left_out_lines(skipped: Sequence[tuple[str, int]]) -> str:
    """Why lines of a prompts file were not used."""
    return ", ".join(f"{count} {reason}" for reason, count in skipped)


def _of(arm: Arm, key: str) -> str:
    return score(arm.scores[key])


def _spoken(key: str) -> str:
    name = heading(key)
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


def _speed(arm: Arm) -> float:
    return arm.speedup.value if arm.speedup else 0.0
