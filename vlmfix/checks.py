"""Whether hyper-parameters have the types their dataclass declares."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vlmfix.errors import UsageError

WORDS = {float: "a number", int: "a whole number", bool: "True or False", str: "a text", NoneType: "None"}


def check_types(name: str, settings: Any) -> None:
    """Compares the fields of a dataclass instance with their annotations.

    Args:
        name: what the error calls it.
        settings: the instance.

    Raises:
        UsageError: a value of another type, or a number that is not finite; says what to give.
    """
    hints = _hints(type(settings))  # type: ignore[arg-type]
    for field in fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if not _fits(value, hint):
            raise UsageError(f"{name}({field.name}={value!r}): give {_words(hint)}")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        many = len(parts) == 2 and parts[1] is Ellipsis
        wanted = parts[:1] * len(value) if many and isinstance(value, tuple) else parts
        return isinstance(value, tuple) and len(value) == len(wanted) and all(map(_fits, value, wanted))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint in WORDS:
        return isinstance(value, hint) and (hint is not int or not isinstance(value, bool))
    return True


def _words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if origin is tuple:
        many = len(parts) == 2 and parts[1] is Ellipsis
        inside = [_words(part) for part in (parts[:1] if many else parts)]
        return f"({', '.join(inside)}{', ...' if many else ''})"
    return WORDS.get(hint, "another value")
