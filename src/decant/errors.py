"""The one error that says: the user can mend this."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake at the door: where, what, what is allowed, and a hint. The command line exits with status 2."""


def refuse(place: str, value: object, *, allowed: str, hint: str) -> UserError:
    """Build the error to raise: ``place: value; allowed: ...`` and, on its own line, ``hint: ...``."""
    return UserError(f"{place}: {value}\n  allowed: {allowed}\n  hint: {hint}")


def nearest(word: str, known: Iterable[str]) -> str:
    """A did-you-mean sentence for an unknown word, or the list of known ones."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
