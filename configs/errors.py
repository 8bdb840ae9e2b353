"""The exception for mistakes that the user can fix, and the hints in its message."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user. The message is one line that names the mistake and the fix."""


def choice(key: str, value: str, valid: Iterable[str]) -> str:
    """Returns `value` if it is valid; otherwise raises UserError, which lists the valid values."""
    if value not in valid:
        raise UserError(f"{key}: {value!r} is unknown; valid: {', '.join(map(str, valid))}")
    return value


def suggest(word: str, valid: Iterable[str]) -> str:
    """Returns the end of an error about an unknown word: the nearest valid word, or all of them."""
    near = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; valid: {', '.join(sorted(valid))}"
