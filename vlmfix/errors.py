"""Errors: each names the item and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlmfixError(Exception):
    """Something the caller can mend; the message says what and how."""


class UsageError(VlmfixError):
    """A wrong name, key or value."""


class Refusal(VlmfixError):  # noqa: N818 - it is an answer, not a fault
    """A method cannot act here and says why, instead of doing nothing."""


class PictureError(VlmfixError):
    """A picture that cannot be read."""


def nearest(name: str, names: Iterable[str]) -> str:
    """A suffix for an error message: the nearest right names; if none is near, all of few or some of many."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {', '.join(close)}?"
    if len(known) <= 12:
        return f"; known: {', '.join(known)}"
    return f"; known are {', '.join(difflib.get_close_matches(name, known, n=5, cutoff=0))} and others"
