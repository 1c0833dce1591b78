"""How the report writes numbers, and the sentences of its verdict."""

from collections.abc import Sequence

from decant.report.record import Model, Report, Score, Spread

MAIN = "scene_accuracy"
AGREEMENT = "agreement_with_teacher"
_THIN = "\u202f"  # between a number and its unit, where no line may break


def main_score(report: Report) -> str | None:
    """The key of the score that the report is about: scene accuracy, else the first that a model has."""
    if any(MAIN in model.scores for model in report.models):
        return MAIN
    return next((key for model in report.models for key in model.scores), None)


def title(key: str) -> str:
    """``scene_accuracy`` as ``Scene accuracy``."""
    words = key.rsplit("/", 1)[-1].replace("_", " ").strip()
    return words[:1].upper() + words[1:]


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
    """One sentence on the best student: what it kept, how fast it is, what distillation added."""
    best, key = best_student(report), main_score(report)
    if best is None or key is None:
        return "No student has been scored yet."
    teacher = next((model for model in report.models if model.role == "teacher"), None)
    control = control_of(best, report.models)
    clauses = [_kept(best, teacher, key), _faster(best, teacher), _gained(best, control, key)]
    said = [clause for clause in clauses if clause]
    joined = said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    return f"{best.name} {joined}."


def _kept(best: Model, teacher: Model | None, key: str) -> str:
    own = best.scores[key]
    name = title(key).lower()
    reached = f"reaches {score(own)} {name}"
    if teacher is None or key not in teacher.scores:
        return reached
    against = f"{score(own)} against {score(teacher.scores[key])}"
    relative = _relative(own, teacher.scores[key])
    if own.better == "lower" or relative is None:
        return f"has {name} {against} for its teacher"
    counted = f", n\u00a0=\u00a0{own.n}" if own.n else ""
    return f"keeps {percent(relative, 0)} of its teacher’s {name} ({against}{counted})"


def _relative(own: Score, teacher: Score) -> float | None:
    if own.relative_to_teacher is not None:
        return own.relative_to_teacher
    return own.value / teacher.value if teacher.value > 0 else None


def _faster(best: Model, teacher: Model | None) -> str:
    ratio = speedup(best, teacher)
    if ratio is None:
        return ""
    return f"draws a picture {ratio:.2f} times as fast" if ratio >= 1 else f"takes {1 / ratio:.2f} times as long"


def speedup(model: Model, teacher: Model | None) -> float | None:
    """How many times faster per picture than the teacher, where both were timed."""
    if teacher is None or "picture" not in model.latency_ms or "picture" not in teacher.latency_ms:
        return None
    return teacher.latency_ms["picture"].median / model.latency_ms["picture"].median


def _gained(best: Model, control: Model | None, key: str) -> str:
    if control is None or key not in control.scores:
        return ""
    own, other = best.scores[key], control.scores[key]
    difference = _signed(own) - _signed(other)
    side = "above" if difference >= 0 else "below"
    if own.better == "lower":
        side = "better" if difference >= 0 else "worse"
        return f"is {plain(abs(difference))} {side} than the same cut left undistilled ({score(other)})"
    amount = f"{100 * abs(difference):.1f} points" if own.unit == "share" else plain(abs(difference))
    return f"stands {amount} {side} the same cut left undistilled ({score(other)})"


def _signed(value: Score) -> float:
    return value.value if value.better == "higher" else -value.value


def _latency(model: Model) -> float:
    return model.latency_ms["picture"].median if "picture" in model.latency_ms else float("inf")
