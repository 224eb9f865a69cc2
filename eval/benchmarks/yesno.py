"""Yes or no: the parsers in use, each as its own code has it, since they disagree on real answers."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from typing import Literal

from .vqa import punctuation

Verdict = Literal["yes", "no", "both", "neither"]
"""What an answer says; `both` and `neither` only from parsers that know them."""

Parser = Callable[[str], Verdict]


def official(text: str) -> Verdict:
    """First sentence without commas, split at blanks: no if it has `No`, `not` or `no`, else yes (AoiDragon/POPE)."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"}.intersection(words) else "yes"


def opera_pai(text: str) -> Verdict:
    """Periods, commas deleted: no if `No`, `not`, `no`, `NO` or a word in n't occurs, else yes (OPERA, PAI, AvisC)."""
    words = text.replace(".", "").replace(",", "").split(" ")
    negative = {"No", "not", "no", "NO"}.intersection(words) or any(word.endswith("n't") for word in words)
    return "no" if negative else "yes"


def substring(text: str) -> Verdict:
    """Whether `yes` and `no` occur anywhere, `notebook` included (VCD, AGLA, ClearSight)."""
    low = text.lower()
    return _verdict("yes" in low, "no" in low)


def exact(text: str) -> Verdict:
    """The lower-cased answer is the word itself (lmms-eval)."""
    low = text.lower().strip()
    return _verdict(low == "yes", low == "no")


def words(text: str) -> Verdict:
    """Whether the words yes and no occur (VLMEvalKit without a judge)."""
    found = punctuation(text.lower(), repaired=True).split()
    return _verdict("yes" in found, "no" in found)


def strict(text: str) -> Verdict:
    """The answer is the word itself once punctuation is stripped around it."""
    low = text.lower().strip(string.punctuation + string.whitespace)
    return _verdict(low == "yes", low == "no")


def contains(text: str) -> Verdict:
    """`yes` anywhere, else `no` anywhere (lmms-eval's drivers)."""
    low = text.lower()
    return "yes" if "yes" in low else "no" if "no" in low else "neither"


def four(text: str) -> Verdict:
    """The word itself, else `yes`, then `no`, in the first four characters (MME)."""
    low = text.strip().lower()
    if low in ("yes", "no"):
        return "yes" if low == "yes" else "no"
    return contains(low[:4])


def capital(text: str) -> Verdict:
    """Exactly `Yes` or exactly `No` (AMBER)."""
    return _verdict(text == "Yes", text == "No")


PARSERS: dict[str, Parser] = {
    "official": official,
    "opera_pai": opera_pai,
    "vcd": substring,
    "clearsight": substring,
    "lmms_eval": exact,
    "vlmevalkit": words,
    "strict": strict,
}
"""POPE's parser variants by name; `official` is the headline."""


def unparsed(text: str) -> bool:
    """Whether an answer holds neither or both of the words yes and no."""
    return words(text) in ("both", "neither")


def asked_for(question: str) -> str:
    """The object of an existence question, or the question itself if it is none."""
    found = re.match(
        r"(?:is|are) there (?:an? |any )?(.+?) in (?:the|this) (?:image|imange|picture)\b", question.strip(), re.I
    )
    return found.group(1) if found else question.strip()


def _verdict(yes: bool, no: bool) -> Verdict:
    if yes and no:
        return "both"
    return "yes" if yes else "no" if no else "neither"
