"""Recipes: ordered compositions of methods, their grammar, their files, and their compilation for a model."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from keyword import iskeyword
from pathlib import Path
from typing import Any, TypeVar

from vlmfix import registry
from vlmfix.attention.compiled import Compiled
from vlmfix.checks import check_types
from vlmfix.errors import Refusal, UsageError, nearest
from vlmfix.method import AnswerMethod, AttentionMethod, DecodingMethod, Method, ModelFacts, PictureMethod

_M = TypeVar("_M", bound=Method)

FORMAT = 1
GRADES = ("ours", "ref-run", "derived", "abstract-only")
"""Evidence grades from strongest to weakest; a recipe has the weakest of its methods."""

RecipeLike = "Recipe | Method | str | Sequence[Recipe | Method | str]"


@dataclass(frozen=True)
class Recipe:
    """Methods in the order in which they act.

    Args:
        methods: the methods.
    """

    methods: tuple[Method, ...]

    @staticmethod
    def parse(text: str) -> Recipe:
        """Reads one recipe: `fastv(keep=.33)+var+vcd(alpha=1)`, `file.py:Class(beta=2)`.

        Raises:
            UsageError: a wrong name, key or value; names the nearest right one.
        """
        recipes = Recipe.parse_many(text)
        if len(recipes) != 1:
            raise UsageError(f"{text!r} holds {len(recipes)} recipes (';' separates recipes); give one")
        return recipes[0]

    @staticmethod
    def parse_many(text: str) -> list[Recipe]:
        """Reads recipes separated by `;`."""
        texts = [part for part in _split(text, ";") if part.strip()]
        if not texts:
            raise UsageError(f"empty recipe {text!r}; write a method's name, e.g. 'greedy'")
        return [Recipe(tuple(_parse_method(term, part) for term in _split(part, "+"))) for part in texts]

    @staticmethod
    def of(value: Any) -> Recipe:
        """A recipe from a recipe, a method, a text, or a sequence of these."""
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Method):
            return Recipe((value,))
        if isinstance(value, str):
            return Recipe.parse(value)
        if isinstance(value, Iterable):
            return Recipe(tuple(m for part in value for m in Recipe.of(part).methods))
        raise UsageError(f"cannot read a recipe from {value!r}; give a text, a method, or a list of these")

    def __str__(self) -> str:
        """Canonical text: names, and the settings that differ from their defaults."""
        return "+".join(_text(method) for method in self.methods)

    def to_json(self) -> dict[str, Any]:
        """All settings, defaults included."""
        methods = [{"name": registry.name_of(m), "settings": m.settings()} for m in self.methods]
        return {"format": FORMAT, "methods": methods}

    @staticmethod
    def from_json(data: Any) -> Recipe:
        """Reads `to_json`'s form; unknown keys are errors."""
        if not isinstance(data, dict):
            raise UsageError("a recipe file holds one JSON object with the keys format and methods")
        _no_others(data, {"format", "methods"}, "recipe file")
        if data.get("format") != FORMAT:
            raise UsageError(f"recipe format {data.get('format')!r} is not known; this version reads {FORMAT}")
        methods = []
        for entry in data.get("methods") or ():
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise UsageError(f"recipe file's method {entry!r} needs a name")
            _no_others(entry, {"name", "settings"}, "recipe file's method")
            methods.append(_make(entry["name"], entry.get("settings") or {}))
        if not methods:
            raise UsageError("the recipe file holds no method; 'greedy' is plain decoding")
        return Recipe(tuple(methods))

    def save(self, path: str | Path) -> None:
        """Writes the recipe as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Reads a recipe written by `save`."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise UsageError(f"{path}: not a readable recipe file ({error})") from error
        return Recipe.from_json(data)

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that change with any setting."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def evidence(self) -> str:
        """The weakest evidence grade among the methods; "unregistered" for methods from elsewhere."""
        rows = [registry.row_of(m) for m in self.methods]
        if any(row is None for row in rows):
            return "unregistered"
        return max((row.evidence for row in rows if row is not None), key=GRADES.index)

    def compile(self, facts: ModelFacts, preset: dict[str, dict[str, Any]] | None = None) -> Compiled:
        """Decides, for one model, what acts where and in which order.

        Args:
            facts: the model.
            preset: method name -> settings published for this checkpoint; they fill fields left at their defaults.

        Raises:
            Refusal: a method cannot act on this model, or two methods exclude each other.
        """
        attention: list[AttentionMethod] = []
        layers: list[frozenset[int]] = []
        decoding: list[DecodingMethod] = []
        dropped: list[str] = []
        own: list[int] = []
        pictures: list[PictureMethod] = []
        settling: list[AnswerMethod] = []
        for method in self.methods:
            name = registry.name_of(method)
            check_types(name, method)
            if method.neutral():
                dropped.append(name)
                continue
            if facts.crossing and (isinstance(method, AttentionMethod) or getattr(method, "attention", tuple)()):
                raise Refusal(
                    f"{name}: {facts.family} reads pictures through cross-attention, beside the keys that an attention "
                    "method changes"
                )
            ready = _with_preset(method, (preset or {}).get(name, {})).resolve(facts)
            if isinstance(ready, AttentionMethod):
                acting = frozenset(ready.acts_on(facts.depth)) & frozenset(facts.heads)
                if not acting:
                    raise Refusal(
                        f"{name}: none of its layers {sorted(ready.acts_on(facts.depth))} has attention in this "
                        f"{facts.family} model"
                    )
                attention.append(ready)
                layers.append(acting)
            elif isinstance(ready, DecodingMethod):
                decoding.append(ready)
                for part in ready.attention():
                    own.append(len(attention))
                    attention.append(part)
                    layers.append(frozenset(part.acts_on(facts.depth)) & frozenset(facts.heads))
            elif isinstance(ready, PictureMethod):
                pictures.append(ready)
            elif isinstance(ready, AnswerMethod):
                settling.append(ready)
            else:
                raise Refusal(f"{name}: methods of kind {method.kind!r} cannot act yet")
        chosen = _only(decoding, "rewrite the logits")
        settles = _only(settling, "settle whole answers")
        return Compiled(
            tuple(attention), tuple(layers), chosen, facts, tuple(dropped), tuple(own), tuple(pictures), settles
        )


def _only(methods: list[_M], deed: str) -> _M | None:
    """The one method that does something; two exclude each other."""
    if len(methods) > 1:
        names = " and ".join(registry.name_of(m) for m in methods)
        raise Refusal(f"{names} both {deed}; a recipe can hold one of them")
    return methods[0] if methods else None


def _split(text: str, separator: str) -> list[str]:
    """Splits outside brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if depth or quote:
        raise UsageError(f"unbalanced brackets or quotes in recipe {text!r}")
    return [*parts, text[start:]]


def _parse_method(text: str, recipe: str) -> Method:
    name, bracket, rest = text.strip().partition("(")
    name, rest = name.strip(), rest.strip()
    if not name:
        where = "before its settings" if bracket else "beside a '+'"
        raise UsageError(f"recipe {recipe.strip()!r}: a method's name is missing {where}; write it as in 'var+vcd'")
    if bracket and not rest.endswith(")"):
        raise UsageError(f"cannot read {text.strip()!r}; write name(key=value, ...)")
    return _make(name, _arguments(name, rest[:-1]) if bracket else {})


def _arguments(name: str, text: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"f({text})", mode="eval").body
    except SyntaxError as error:
        raise UsageError(f"cannot read the settings of {name}({text}); write key=value, ...") from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise UsageError(f"cannot read the settings of {name}({text}); write key=value, ...")
    if call.args or any(k.arg is None for k in call.keywords):
        raise UsageError(f"{name}({text}): settings need their names, key=value")
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        assert keyword.arg is not None
        if keyword.arg in values:
            raise UsageError(f"{name}({text}): {keyword.arg} is given twice")
        try:
            values[keyword.arg] = (
                keyword.value.id if isinstance(keyword.value, ast.Name) else ast.literal_eval(keyword.value)
            )
        except ValueError as error:
            raise UsageError(f"{name}({keyword.arg}=...): the value is not a number, text, list or None") from error
    return values


def _make(name: str, settings: dict[str, Any]) -> Method:
    cls = _from_file(name) if ".py:" in name else registry.find(name)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise UsageError(f"{name} is not a method; derive it from vlmfix.method.AttentionMethod or DecodingMethod")
    known = {f.name: f for f in fields(cls)}
    for key in settings:
        if key not in known:
            raise UsageError(f"{name} has no setting {key!r}{nearest(key, known) if known else '; it has none'}")
    method: Method = cls(**{key: _frozen(value) for key, value in settings.items()})
    return method


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _from_file(name: str) -> type[Method]:
    path, _, class_name = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{path}: no such file; a method of your own is written file.py:Class(...)")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path}: running it failed ({type(error).__name__}: {error})") from error
    cls: Any = getattr(module, class_name, None)
    classes = [
        k
        for k, v in vars(module).items()
        if isinstance(v, type) and issubclass(v, Method) and v.__module__ == module.__name__
    ]
    if cls is None:
        raise UsageError(f"{path} has no class {class_name!r}{nearest(class_name, classes)}")
    cls.recipe_name = name
    return cls  # type: ignore[no-any-return]


def _text(method: Method) -> str:
    changed = [(f.name, getattr(method, f.name)) for f in fields(method) if getattr(method, f.name) != f.default]
    inside = ",".join(f"{key}={_value(value)}" for key, value in changed)
    return registry.name_of(method) + (f"({inside})" if inside else "")


def _value(value: Any) -> str:
    """A setting as the grammar reads it: words bare, other text quoted."""
    bare = isinstance(value, str) and value.isidentifier() and not iskeyword(value)
    return value if bare else repr(value)


def _with_preset(method: Method, preset: dict[str, Any]) -> Method:
    known = {f.name: f.default for f in fields(method)}
    fill = {key: _frozen(value) for key, value in preset.items() if key in known and getattr(method, key) == known[key]}
    return replace(method, **fill) if fill else method


def _no_others(data: dict[str, Any], known: set[str], what: str) -> None:
    for key in data:
        if key not in known:
            raise UsageError(f"{what} has an unknown key {key!r}{nearest(key, known)}")
