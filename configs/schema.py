"""The recipe as a JSON Schema, so that editors complete and check: `regrow schema`."""

from __future__ import annotations

from typing import Any

from regrow.configs.recipe import Recipe
from regrow.configs.vocabulary import DATASET_WORDS, WORDS, Ignored, Renamed, Word

_EXTENDS = {
    "description": "Recipe to build on, or several, the later ones winning; paths start here.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}


def json_schema() -> dict[str, Any]:
    """The schema (JSON Schema 2020-12) of a recipe file.

    Every key may be null, which means "not given". Axolotl's keys that are read under another name
    or have no effect are marked as deprecated; those that are refused are left out, and so marked
    as wrong.
    """
    schema = Recipe.model_json_schema()
    for model in (schema, *schema.get("$defs", {}).values()):
        for name, its in model.get("properties", {}).items():
            model["properties"][name] = _nullable(its)
    schema["properties"] |= {"extends": _EXTENDS, **_old(WORDS)}
    schema["$defs"]["Dataset"]["properties"] |= _old(DATASET_WORDS)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Regrow recipe",
        # A key may have been given in an extended recipe.
        "required": [],
    }


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    about = {name: schema[name] for name in ("description", "default") if name in schema}
    rest = {name: value for name, value in schema.items() if name not in about}
    kinds = rest.get("anyOf") if set(rest) <= {"anyOf", "title"} else None
    options = [*(kinds or [rest]), _ENVIRONMENT]
    if {"type": "null"} not in options:
        options.append({"type": "null"})
    return {"anyOf": options, **about}


_ENVIRONMENT = {"type": "string", "pattern": r"^\$\{[A-Za-z_]\w*(:-[^}]*)?\}$"}
"""`${NAME}` stands for a value of any type."""


def _old(words: dict[str, Word]) -> dict[str, Any]:
    return {
        name: {"deprecated": True, "description": _about(word)}
        for name, word in words.items()
        if isinstance(word, (Renamed, Ignored))
    }


def _about(word: Renamed | Ignored) -> str:
    return f"Read as `{word.to}`." if isinstance(word, Renamed) else f"No effect: {word.why}."
