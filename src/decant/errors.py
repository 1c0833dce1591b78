"""The one error that says: the user can mend this."""

import errno
from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake at the door: where, what, what is allowed, and a hint. The command line exits with status 2."""


class UnfitError(ValueError):
    """What a validator of several settings raises: of itself each is allowed, together they are not.

    ``key`` is the setting to change, below the place that the validator looks at.
    """

    def __init__(self, key: str, value: object, *, allowed: str, hint: str) -> None:
        super().__init__(f"{key}: {value}; allowed: {allowed}; {hint}")
        self.key, self.value, self.allowed, self.hint = key, value, allowed, hint


def refuse(place: str, value: object, *, allowed: str, hint: str) -> UserError:
    """Build the error to raise: ``place: value; allowed: ...`` and, on its own line, ``hint: ...``."""
    return UserError(f"{place}: {value}\n  allowed: {allowed}\n  hint: {hint}")


def nearest(word: str, known: Iterable[str]) -> str:
    """A did-you-mean sentence for an unknown word, or the list of known ones."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def disk_full(error: BaseException) -> bool:
    """Whether an error says that nothing more can be written: no space, no quota, or too large a file."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors tells of the operating system's error in words alone.
    return any(f"os error {number}" in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
