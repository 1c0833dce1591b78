"""How the report writes numbers, and the sentences of its verdict."""

import json
from collections.abc import Mapping, Sequence

from decant.report.plot import Observation
from decant.report.record import Cell, Measured, Model, Report, Score, Spread

MAIN = "scene_accuracy"
AGREEMENT = "agreement_with_teacher"
_FEW = 30  # pictures; below, an interval is wider than most differences between students
_SHORT = {word: word.upper() for word in ("clip", "fid", "kid", "lpips", "mse")}
_PARTS = {"text": "Text encoder", "unet": "One UNet call", "decode": "VAE decode"}
_THIN = "\u202f"  # between a number and its unit, where no line may break


def main_score(report: Report) -> str | None:
    """The key of the score that the report is about: scene accuracy, else the first that a model has."""
    if any(MAIN in model.scores for model in report.models):
        return MAIN
    return next((key for model in report.models for key in model.scores), None)


def title(key: str) -> str:
    """``scene_accuracy`` as ``Scene accuracy``."""
    words = " ".join(_SHORT.get(word, word) for word in key.rsplit("/", 1)[-1].split("_") if word)
    return words[:1].upper() + words[1:]


def part(key: str) -> str:
    """A part of a picture's latency by its name in ``latency_ms``."""
    return _PARTS.get(key, title(key))


def big(value: float | None) -> str:
    """A count in the field's own units: 859.5 M, 401.6 G, 4,096."""
    if value is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.4g}{_THIN}{unit}"
    return f"{value:,.0f}"


def plain(value: float | None) -> str:
    """A number with about three significant digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share of 1 in percent."""
    return "–" if value is None else f"{100 * value:.{digits}f}{_THIN}%"


def score(value: Score) -> str:
    """A score in its unit."""
    return percent(value.value) if value.unit == "share" else plain(value.value)


def score_notes(value: Score) -> tuple[str, ...]:
    """What stands below the heading of a score: its unit, features and reference, and whether lower is better."""
    unit = value.unit if value.unit not in ("share", "number") else ""
    features = f"features: {value.features}" if value.features else ""
    reference = f"against {value.reference}" if value.reference else ""
    floor = f"real pictures: {plain(value.floor)}" if value.floor is not None else ""
    said = (unit, features, reference, floor, "lower is better" if value.better == "lower" else "")
    return tuple(note for note in said if note)


def difference(value: Score) -> str:
    """Own minus the teacher's with its paired interval, where the score is no share; those have a ratio."""
    if value.difference is None or value.unit == "share":
        return ""
    if value.difference_low is None or value.difference_high is None:
        return f"{value.difference:+.3g} to teacher’s"
    return f"{value.difference:+.3g} ({value.difference_low:+.3g} to {value.difference_high:+.3g}) to teacher’s"


def interval(value: Score) -> str:
    """The ends of a score's interval, or nothing."""
    if value.low is None or value.high is None:
        return ""
    if value.unit == "share":
        return f"{100 * value.low:.1f}–{100 * value.high:.1f}"
    return f"{plain(value.low)}–{plain(value.high)}"


def spread(value: Spread) -> str:
    """The range of a latency, or nothing."""
    return "" if value.low is None or value.high is None else f"{plain(value.low)}–{plain(value.high)}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 41.2 s, 3 min 12 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f}{_THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_THIN}min {rest}{_THIN}s"
    return f"{minutes // 60}{_THIN}h {minutes % 60}{_THIN}min"


def control_of(student: Model, models: Sequence[Model]) -> Model | None:
    """The undistilled twin of a student: the control that names it, else the only one of its size."""
    controls = [model for model in models if model.role == "control"]
    named = [model for model in controls if model.control_of == student.name]
    same = [m for m in controls if m.control_of is None and m.parameters == student.parameters is not None]
    return named[0] if named else same[0] if len(same) == 1 else None


def best_student(report: Report) -> Model | None:
    """The student with the best main score; of equals, the faster."""
    key = main_score(report)
    students = [model for model in report.models if model.role == "student" and key in model.scores]
    if key is None or not students:
        return None
    return max(students, key=lambda model: (_signed(model.scores[key]), -_latency(model)))


def verdict(report: Report) -> str:
    """One sentence on the best student: what it kept, at what latency, and what distillation added."""
    best, key = best_student(report), main_score(report)
    if best is None or key is None:
        return "No student has been scored yet."
    teacher = _teacher(report)
    latency = relative_latency(best, teacher)
    at = f" at {latency:.2f}× the latency" if latency is not None else ""
    control = control_of(best, report.models)
    if best.scores[key].better == "lower":
        return f"{_distance(best, teacher, control, key)}{',' if at else ''}{at}."
    gained = _gained(best, control, key)
    return f"{best.name} {_kept(best, teacher, key)}{at}{', and ' if gained else ''}{gained}."


def caution(report: Report) -> str:
    """What the verdict does not show, or nothing: harm done, too few pictures, or no difference from the teacher."""
    best, key = best_student(report), main_score(report)
    if best is None or key is None:
        return ""
    own = best.scores[key]
    if is_worse_than_cut(best, report):
        return f"{best.name} is worse than the same cut left undistilled: train longer, or at another learning rate."
    if own.n is not None and own.n < _FEW:
        return f"Only {own.n} pictures a model: a first look. Differences smaller than the intervals may be chance."
    if own.relative_low is not None and own.relative_high is not None and own.relative_low <= 1 <= own.relative_high:
        return "The interval includes all of it: these pictures do not show the student to differ from its teacher."
    return ""


def is_worse_than_cut(student: Model, report: Report) -> bool:
    """Whether a student's distillation has done harm, by the main score."""
    key, control = main_score(report), control_of(student, report.models)
    if key is None or control is None or key not in control.scores:
        return False
    return _signed(student.scores[key]) < _signed(control.scores[key])


def _teacher(report: Report) -> Model | None:
    return next((model for model in report.models if model.role == "teacher"), None)


def _spoken(key: str) -> str:
    """A score's name inside a sentence."""
    name = title(key)
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


def _distance(best: Model, teacher: Model | None, control: Model | None, key: str) -> str:
    """A score where lower is better, beside the undistilled cut's and the teacher's, which may be 0 by definition."""
    own = best.scores[key]
    beside = [
        f"{words} {score(other.scores[key])}"
        for other, words in ((control, "the same cut left undistilled:"), (teacher, "its teacher:"))
        if other is not None and key in other.scores and other.scores[key].value != 0
    ]
    return f"{best.name} has {_spoken(key)} {score(own)}" + (f" ({', '.join(beside)})" if beside else "")


def _kept(best: Model, teacher: Model | None, key: str) -> str:
    own, name = best.scores[key], _spoken(key)
    if teacher is None or key not in teacher.scores:
        return f"reaches {score(own)} {name}"
    against = f"{score(own)} against {score(teacher.scores[key])}"
    relative = _relative(own, teacher.scores[key])
    if relative is None:
        return f"has {name} {against} for its teacher"
    ends = relative_interval(own)
    counted = f", n\u00a0=\u00a0{own.n}" if own.n else ""
    share = percent(relative, 0) + (f" ({ends})" if ends else "")
    return f"kept {share} of its teacher’s {name} ({against}{counted})"


def relative_interval(value: Score) -> str:
    """The ends of the paired interval of a score as a part of its teacher's, in percent, or nothing."""
    if value.relative_low is None or value.relative_high is None:
        return ""
    return f"{100 * value.relative_low:.0f}–{100 * value.relative_high:.0f}"


def _relative(own: Score, teacher: Score) -> float | None:
    if own.relative_to_teacher is not None:
        return own.relative_to_teacher
    return own.value / teacher.value if teacher.value > 0 else None


def relative_latency(model: Model, teacher: Model | None) -> float | None:
    """Latency per picture over the teacher's, where both were timed; below 1 is faster."""
    if teacher is None or "picture" not in model.latency_ms or "picture" not in teacher.latency_ms:
        return None
    return model.latency_ms["picture"].median / teacher.latency_ms["picture"].median


def conditions(model: Model) -> str:
    """What a model's pictures were drawn with: 25 ddim steps, guidance 4, float32 on cpu."""
    return _joined(_sampling(model), _placed(model))


def timing(model: Model) -> str:
    """What a model's times were measured with, or nothing."""
    how = model.measured
    if how is None:
        return ""
    return _joined(
        _sampling(how),
        f"{how.size[0]} × {how.size[1]}{_THIN}px" if how.size else "",
        _placed(how),
        f"{how.threads} thread{'s' * (how.threads > 1)}" if how.threads else "",
        f"{how.repeats} repeats" + (f" after {how.warmup} to warm up" if how.warmup else "") if how.repeats else "",
        "models in turn" if how.interleaved else "",
    )


def _sampling(how: Model | Measured) -> str:
    if not how.steps:
        return ""
    guided = f", guidance {how.guidance_scale:g}" if how.guidance_scale is not None else ""
    return f"{how.steps} {how.sampler + ' ' if how.sampler else ''}steps{guided}"


def _placed(how: Model | Measured) -> str:
    return " on ".join(word for word in (how.dtype, how.device) if word)


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def requirements(versions: Mapping[str, str]) -> str:
    """Versions as lines of a requirements file; Python as a comment above them."""
    python = [f"# Python {version}" for name, version in versions.items() if name == "python"]
    return "\n".join(python + [f"{name}=={version}" for name, version in versions.items() if name != "python"])


def python_string(text: str) -> str:
    """A text as a Python literal."""
    return json.dumps(text, ensure_ascii=False)


def plotted(observations: Sequence[Observation], key: str, share: bool) -> str:
    """The plot in words, for those who do not see it."""
    said = [
        f"{item.name} ({item.role}): {percent(item.y[0]) if share else plain(item.y[0])} at {plain(item.x[0])} ms"
        for item in observations
    ]
    return f"{title(key)} against latency per picture. " + "; ".join(said) + "."


def drawn(line_term: str, first: float, last: float, steps: tuple[int, int]) -> str:
    """A loss curve in words."""
    return f"{line_term} from {plain(first)} at step {steps[0]} to {plain(last)} at step {steps[1]}"


def few(names: Sequence[str]) -> str:
    """At most three names of what is wrong with a picture, and how many there are besides."""
    return ", ".join(names if len(names) <= 3 else [*names[:2], f"{len(names) - 2} more"])


def pictured(model: str, caption: str, cell: Cell) -> str:
    """A picture in words: whose it is, what was asked for, and what is wrong with it."""
    judged = {None: "", True: ", right", False: ", wrong: " + (", ".join(cell.wrong) or "not as asked")}[cell.correct]
    return f"{model}’s picture of “{caption}”{judged}"


def _gained(best: Model, control: Model | None, key: str) -> str:
    if control is None or key not in control.scores:
        return ""
    own, other = best.scores[key], control.scores[key]
    difference = _signed(own) - _signed(other)
    side = "above" if difference >= 0 else "below"
    amount = f"{100 * abs(difference):.1f} points" if own.unit == "share" else plain(abs(difference))
    return f"stands {amount} {side} the same cut left undistilled ({score(other)})"


def _signed(value: Score) -> float:
    return value.value if value.better == "higher" else -value.value


def _latency(model: Model) -> float:
    return model.latency_ms["picture"].median if "picture" in model.latency_ms else float("inf")
