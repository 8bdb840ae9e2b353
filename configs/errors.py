"""Mistakes that a user can mend: the exception, and the hints that it carries."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the person at the keyboard: one line that says what is wrong and what would be right."""


def choice(key: str, value: str, valid: Iterable[str]) -> str:
    """Returns `value` if it is one of `valid`; else raises UserError with the list."""
    if value not in valid:
        raise UserError(f"{key}: {value!r} is unknown; valid: {', '.join(map(str, valid))}")
    return value


def suggest(word: str, valid: Iterable[str]) -> str:
    """The end of an error about an unknown word: the nearest valid one, or all of them."""
    near = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; valid: {', '.join(sorted(valid))}"
