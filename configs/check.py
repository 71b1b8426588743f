"""Phase 3: types, unknown keys and the rules between keys, every fault in the author's words."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from regrow.configs.draft import Draft
from regrow.configs.facts import Facts
from regrow.configs.faults import Notice, Path, dotted
from regrow.configs.recipe import Recipe
from regrow.configs.rules.all_rules import ALL_RULES
from regrow.configs.rules.facts import FACT_RULES
from regrow.configs.vocabulary import WORDS

_STAND_INS: dict[str, Any] = {
    "base_model": "x",
    "learning_rate": 1e-4,
    "datasets": [{"path": "x", "type": "completion"}],
}
"""Values for required keys that are at fault, so that the rules between the others still run."""

_LONGEST_NAME = 60
"""Twice the length of the longest key."""

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "dict": "a map of keys",
    "model": "a map of keys",
    "mapping": "a map of keys",
}
"""First word of a pydantic error type -> what was expected, in the author's words."""


_SUGGESTIONS = 20
"""Unknown keys for which a known one is looked for, some milliseconds each; a recipe with more of
them is a file of another kind."""


def check_types(draft: Draft) -> Recipe | None:
    """The draft as a Recipe. Where keys are at fault, the rest of it with those left out, so that
    the rules can find further faults; None where not even that is one."""
    try:
        return Recipe.model_validate(draft.data)
    except ValidationError as error:
        bad = _report(draft, error)
    rest = _without(draft.data, bad)
    try:
        return Recipe.model_validate(rest)
    except ValidationError as error:
        tops = {detail["loc"][0] for detail in error.errors(include_url=False) if detail["loc"]}
        left = {key: value for key, value in rest.items() if key not in tops}
        return Recipe.model_validate({**_STAND_INS, **left})


def check_rules(recipe: Recipe, given: frozenset[str], draft: Draft) -> None:
    """Add the faults of every rule none of whose keys is at fault already."""
    at_fault = {fault.key for fault in draft.faults}
    for rule in ALL_RULES:
        if at_fault.isdisjoint(rule.reads):
            for path, why, remedy in rule.check(recipe, given):
                draft.fault(path, why, remedy)


def check_facts(recipe: Recipe, facts: Facts, draft: Draft) -> None:
    """Add what the rules between the recipe and `facts` find."""
    at_fault = {fault.key for fault in draft.faults}
    for rule in FACT_RULES:
        if not at_fault.isdisjoint(rule.reads):
            continue
        for found in rule.check(recipe, facts):
            if isinstance(found, Notice):
                draft.notices.append(found)
            else:
                draft.fault(*found)


def _report(draft: Draft, error: ValidationError) -> set[Path]:
    """Turn pydantic's errors into faults; the paths that are at fault."""
    found: dict[Path, list[dict[str, Any]]] = {}
    for detail in error.errors(include_url=False):
        path = _real_path(draft.data, detail["loc"], detail["type"])
        found.setdefault(path, []).append(detail)  # type: ignore[arg-type]
    told = {fault.key for fault in draft.faults}
    unknown = 0
    for path, details in found.items():
        kind = details[0]["type"]
        if dotted(path) in told:
            continue  # its value was taken out, with a fault that says why
        if kind == "extra_forbidden":
            unknown += 1
            remedy = _nearest(path) if unknown <= _SUGGESTIONS else "Remove it"
            draft.fault(path, "unknown key", remedy)
        elif kind == "missing":
            draft.fault(path, "this key is required", _meaning(path))
        else:
            draft.fault(path, _why_of(details), _remedy(path, details[0]))
    return set(found)


def _real_path(data: Any, loc: tuple[int | str, ...], kind: str) -> Path:
    """`loc` without the names pydantic adds for the branches of a union."""
    path: list[int | str] = []
    for part in loc:
        inside = isinstance(data, dict) and part in data
        if not inside and not (isinstance(data, list) and isinstance(part, int)):
            if kind == "missing" and part == loc[-1]:
                path.append(part)
            continue
        path.append(part)
        data = data[part] if inside or part < len(data) else None  # type: ignore[operator]
    return tuple(path)


def _why_of(details: list[dict[str, Any]]) -> str:
    """One reason for the branches of a union: expected a number or one of these words."""
    first, *others = dict.fromkeys(_why(detail) for detail in details)
    return " or ".join([first, *(other.removeprefix("expected ") for other in others)])


def _why(detail: dict[str, Any]) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        return f"expected {context['expected'].replace(chr(39), '')}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        sign = {"greater_than": "above", "less_than": "below"}.get(kind)
        limit = next(iter(context.values()))
        bound = f"{sign} {limit}" if sign else f"{limit} or {'more' if 'great' in kind else 'less'}"
        return f"expected a number {bound}"
    expected = _EXPECTED.get(kind.split("_")[0])
    return f"expected {expected}" if expected else detail["msg"]


def _remedy(path: Path, detail: dict[str, Any]) -> str:
    if detail["type"].startswith("string") and isinstance(detail["input"], bool):
        return "Quote it: YAML reads yes, no, on and off as true and false"
    return _meaning(path)


def _field(path: Path) -> FieldInfo | None:
    """The field that `path` names, if there is one."""
    model: type[BaseModel] | None = Recipe
    field: FieldInfo | None = None
    for part in path:
        if isinstance(part, int):
            continue
        if model is None or part not in model.model_fields:
            return None
        field = model.model_fields[part]
        model = _nested(field.annotation)
    return field


def _nested(annotation: Any) -> type[BaseModel] | None:
    """The section an annotation holds, as `tuple[Dataset, ...]` holds Dataset."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for found in map(_nested, get_args(annotation)) if found), None)


def _meaning(path: Path) -> str:
    """The first sentence of the field's documentation."""
    field = _field(path)
    if field is None or not field.description:
        return ""
    sentence = " ".join(field.description.split()).split(". ")[0]
    return f"It means: {sentence.rstrip('.')}"


def _nearest(path: Path) -> str:
    """The known key that is spelt most like the last part of `path`."""
    if len(str(path[-1])) > _LONGEST_NAME:
        return "Remove it"
    above = [part for part in path[:-1] if not isinstance(part, int)]
    field = _field(tuple(above)) if above else None
    model = _nested(field.annotation) if field else None
    known = list((model or Recipe).model_fields)
    close = difflib.get_close_matches(str(path[-1]), known, 1, 0.6)
    if not close and not above:
        close = difflib.get_close_matches(str(path[-1]), list(WORDS), 1, 0.8)
    if not close and above and path[-1] in Recipe.model_fields:
        return f"`{path[-1]}` is a key of the recipe itself, not of `{above[-1]}`"
    return f"Did you mean `{close[0]}`?" if close else "Remove it"


def _without(data: Any, bad: set[Path], path: Path = ()) -> Any:
    """A copy of `data` without what is at fault; list entries keep their places."""
    if isinstance(data, dict):
        items = {key: _without(value, bad, (*path, key)) for key, value in data.items()}
        return {key: value for key, value in items.items() if (*path, key) not in bad}
    if isinstance(data, list):
        return [_without(value, bad, (*path, i)) for i, value in enumerate(data)]
    return data
