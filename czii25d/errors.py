"""The one exception that speaks to the user."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


INPUT_ERROR = 2  # the exit status of a script that ends with one


class InputError(ValueError):
    """Something the user gave is not what was expected; the message is one line and names the cure.

    Parameters
    ----------
    where
        The file, run or configuration key at fault.
    expected, found
        What should have been there, and what is.
    cure
        What to do about it, as an imperative.
    """

    def __init__(self, where: object, expected: str, found: str, cure: str) -> None:
        super().__init__(str(where), expected, found, cure)  # as arguments, so that it crosses processes

    def __str__(self) -> str:
        where, expected, found, cure = self.args
        return " ".join(f"{where}: expected {expected}, found {found}; {cure}".split())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest of the known names, or an empty string."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
