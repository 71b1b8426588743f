"""The recipe as a JSON Schema, so that editors complete and check: `regrow schema`."""

from __future__ import annotations

from typing import Any

from regrow.configs.recipe import Recipe
from regrow.configs.sharding import OLD_OPTIONS
from regrow.configs.vocabulary import (
    DATASET_READ_OTHERWISE,
    DATASET_WORDS,
    OFF,
    READ_OTHERWISE,
    WORDS,
    Ignored,
    Renamed,
    Word,
)

_EXTENDS = {
    "description": "Recipe to build on, or several, the later ones winning; paths start here.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}

_SHARE = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
_OTHER_FORMS: dict[str, Any] = {
    "warmup_steps": _SHARE,
    "logging_steps": _SHARE,
    "deepspeed": {"type": "string"},
    "tokens": {"type": "object"},
    "kernels": {"type": "boolean"},
    "gradient_checkpointing": {"enum": ["offload", "offload_disk"]},
    "save_strategy": {"const": False},
    "eval_strategy": {"const": False},
}
"""Key -> what else may be written for it, which phase 1 reads. (YAML reads `no` as false.)"""


def json_schema() -> dict[str, Any]:
    """The schema (JSON Schema 2020-12) of a recipe file.

    Every key may be null, which means "not given". Axolotl's keys that are read under another name
    or have no effect are marked as deprecated; those that are refused may only be off.
    """
    schema = Recipe.model_json_schema()
    for model in (schema, *schema.get("$defs", {}).values()):
        for name, its in model.get("properties", {}).items():
            forms = [_OTHER_FORMS[name]] if model is schema and name in _OTHER_FORMS else []
            model["properties"][name] = _nullable(its, forms)
    entries, sharding = (schema["$defs"][name]["properties"] for name in ("Dataset", "FsdpConfig"))
    schema["properties"] |= {"extends": _EXTENDS, **_old(WORDS), **_otherwise(READ_OTHERWISE)}
    entries |= {**_old(DATASET_WORDS), **_otherwise(DATASET_READ_OTHERWISE)}
    sharding |= _otherwise(dict.fromkeys(OLD_OPTIONS, "of FSDP1, which FSDP2 stands in for"))
    sharding |= {f"fsdp_{name}": its for name, its in sharding.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Regrow recipe",
        # A key may have been given in an extended recipe.
        "required": [],
    }


def _nullable(schema: dict[str, Any], forms: list[Any]) -> dict[str, Any]:
    about = {name: schema[name] for name in ("description", "default") if name in schema}
    rest = {name: value for name, value in schema.items() if name not in about}
    kinds = rest.get("anyOf") if set(rest) <= {"anyOf", "title"} else None
    options = [*(kinds or [rest]), *forms, _ENVIRONMENT]
    if {"type": "null"} not in options:
        options.append({"type": "null"})
    return {"anyOf": options, **about}


_ENVIRONMENT = {"type": "string", "pattern": r"^\$\{[A-Za-z_]\w*(:-[^}]*)?\}$"}
"""`${NAME}` stands for a value of any type."""


def _old(words: dict[str, Word]) -> dict[str, Any]:
    return {name: _of_word(name, word) for name, word in words.items()}


def _of_word(name: str, word: Word) -> dict[str, Any]:
    if isinstance(word, Renamed):
        return {"deprecated": True, "description": f"Read as `{word.to}`."}
    if isinstance(word, Ignored):
        return {"deprecated": True, "description": f"No effect: {word.why}."}
    off = [None, False, 0, "", [], {}, *OFF.get(name, ())]
    return {"deprecated": True, "description": f"Refused: {word.why}.", "enum": off}


def _otherwise(keys: dict[str, str]) -> dict[str, Any]:
    return {
        name: {"deprecated": True, "description": f"Older form: {how}."}
        for name, how in keys.items()
    }
