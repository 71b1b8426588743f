"""The recipe as a JSON Schema, so that editors complete and check: `regrow schema`."""

from __future__ import annotations

from typing import Any

from regrow.configs.kernels import all_words
from regrow.configs.meanings import WAYS_OF_OFFLOADING
from regrow.configs.recipe import Recipe
from regrow.configs.rename import takes_empty_text
from regrow.configs.sections.section import AMOUNT
from regrow.configs.sharding import OLD_OPTIONS
from regrow.configs.switches import switch_of
from regrow.configs.vocabulary import (
    DATASET_READ_OTHERWISE,
    DATASET_WORDS,
    OFF,
    READ_OTHERWISE,
    RENAMED_VALUES,
    WORDS,
    Ignored,
    Renamed,
    Word,
)

_EXTENDS = {
    "description": "Recipe to build on, or several, the later ones winning; paths start here.",
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
}

_BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}
"""pydantic's names of bounds behind a validator of our own -> JSON Schema's."""

_YES_OR_NO = ("true", "false", "yes", "no", "on", "off", "y", "n", "t", "f")
_TRUTHS = [
    *(0, 1, "0", "1"),
    *(form for word in _YES_OR_NO for form in (word, word.title(), word.upper())),
]
_TRUTH = {"enum": [True, False, None, ""]}
_SHARE = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
_NO_SIZE = {"enum": [0, False, "0", [], {}]}
_OTHER_FORMS: dict[str, Any] = {
    "warmup_steps": _SHARE,
    "logging_steps": _SHARE,
    "deepspeed": {"anyOf": [{"type": "string"}, {"enum": [False, 0, []]}]},
    "tokens": {"$ref": "#/$defs/SpecialTokens"},
    "fsdp_version": {"enum": [1, "1", "2"]},
    "attn_implementation": {"type": "string"},
    "optim_args": {"type": "number"},
    "greater_is_better": {"const": 0},
    "eval_max_new_tokens": {"const": 0},
    **dict.fromkeys(
        (
            *("tensor_parallel_size", "context_parallel_size", "jagged_restart_steps"),
            *("dp_shard_size", "dp_replicate_size"),
        ),
        _NO_SIZE,
    ),
    "gpu_memory_limit": {"type": "string", "pattern": AMOUNT},
    "wandb_watch": {"const": False},
    "kernels": {"type": "boolean"},
    "gradient_checkpointing": {"enum": ["offload", "offload_disk", "unsloth"]},
    **{key: {"enum": list(values)} for key, values in RENAMED_VALUES.items()},
    "save_strategy": {"const": False},
    "eval_strategy": {"const": False},
}
"""Key -> what else may be written for it, which phase 1 reads. (YAML reads `no` as false.)"""


_OFF = [None, False, 0, "", [], {}]
_SWITCH: dict[str, Any] = {"enum": [True, *_OFF, *(word for word in _TRUTHS if word != 0)]}
_OLDER_FORMS: dict[str, Any] = {
    **dict.fromkeys(
        (
            *("bfloat16", "float32", "fp16", "float16", "flash_attention", "xformers_attention"),
            *("sdp_attention", "flex_attention", "sage_attention", "eager_attention"),
            *all_words(),
        ),
        _TRUTH,
    ),
    "expert_parallel_size": {
        "anyOf": [
            {"type": "integer", "minimum": 1},
            {"type": "string", "pattern": r"^\s*\+?\d(_?\d)*\s*$"},
            {"enum": _OFF},
        ]
    },
    **dict.fromkeys(("push_to_hub", "use_ray"), _SWITCH),
    "activation_offloading": {"anyOf": [_SWITCH, {"enum": list(WAYS_OF_OFFLOADING)}]},
    "selective_checkpointing": {"anyOf": [_SWITCH, {"type": "object"}]},
    "plugins": {"anyOf": [{"type": ["array", "null"]}, {"const": ""}]},
    "pretraining_dataset": {"type": ["string", "object", "array", "boolean", "number", "null"]},
    "max_packed_sequence_len": {"anyOf": [{"type": "integer"}, {"enum": _OFF}]},
    "fsdp": {"anyOf": [{"type": ["string", "array"]}, {"enum": _OFF}]},
}
"""Key of READ_OTHERWISE -> its type, where it has one."""


def json_schema() -> dict[str, Any]:
    """The schema (JSON Schema 2020-12) of a recipe file.

    Every key may be null, which means "not given". Axolotl's keys that are read under another name
    or have no effect are marked as deprecated; those that are refused may only be off.
    """
    schema = _as_people_write(Recipe.model_json_schema())
    for model in (schema, *schema.get("$defs", {}).values()):
        for name, its in model.get("properties", {}).items():
            forms = [_OTHER_FORMS[name]] if model is schema and name in _OTHER_FORMS else []
            if model is schema and not takes_empty_text(Recipe.model_fields[name]):
                forms.append({"const": ""})
            model["properties"][name] = _nullable(its, forms)
    entries, sharding = (schema["$defs"][name]["properties"] for name in ("Dataset", "FsdpConfig"))
    fields = schema["properties"]
    older = {name: how for name, how in READ_OTHERWISE.items() if name not in fields}
    fields |= {"extends": _EXTENDS, **_old(WORDS, fields), **_otherwise(older)}
    entries |= {**_old(DATASET_WORDS, entries), **_otherwise(DATASET_READ_OTHERWISE)}
    entries["train_on_split"].pop("enum")  # beside the same `split` it is let pass
    entry = schema["$defs"]["Dataset"]
    entry["required"].remove("path")
    entry["anyOf"] = [{"required": ["path"]}, {"required": ["ds_type", "data_files"]}]
    sharding |= _otherwise(dict.fromkeys(OLD_OPTIONS, "of FSDP1, which FSDP2 stands in for"))
    sharding |= {f"fsdp_{name}": its for name, its in sharding.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Regrow recipe",
        # A key may have been given in an extended recipe.
        "required": [],
    }


def _as_people_write(node: Any) -> Any:
    """pydantic's schema, and the forms that it takes for numbers, texts, true and false."""
    if isinstance(node, list):
        return [_as_people_write(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {_BOUNDS.get(name, name): _as_people_write(its) for name, its in node.items()}
    kind = node.get("type")
    if not isinstance(kind, str) or "enum" in node or "const" in node:
        return node
    if kind == "string" and "pattern" not in node:
        return {**node, "type": ["string", "number"]}
    if kind not in ("number", "integer", "boolean"):
        return node
    quoted = {"type": "string", "pattern": _quoted(node)}
    other = {"enum": _TRUTHS} if kind == "boolean" else quoted
    about = {name: node.pop(name) for name in ("description", "default") if name in node}
    return {"anyOf": [node, other], **about}


def _quoted(node: dict[str, Any]) -> str:
    """The pattern of a number of this type and within these bounds that is written as text."""
    digits = {"integer": r"\d(_?\d)*(\.0*)?"}.get(node["type"], r"(\d[\d_]*\.?\d*|\.\d+)")
    power = "" if node["type"] == "integer" else r"([eE][+-]?\d+)?"
    if 1 in (node.get("maximum"), node.get("exclusiveMaximum")):
        one = r"|0*1(\.0*)?" if node.get("maximum") == 1 else ""
        digits, power = rf"(0*\.\d+|0+\.?{one})", r"([eE]-\d+)?"
    above_0 = node.get("minimum", 0) == 1 or node.get("exclusiveMinimum") == 0
    sign = r"\+?" if above_0 or "minimum" in node else r"[+-]?"
    return rf"^\s*{sign}{'(?=[^eE]*[1-9])' if above_0 else ''}{digits}{power}\s*$"


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


def _old(words: dict[str, Word], fields: dict[str, Any]) -> dict[str, Any]:
    return {name: _of_word(name, word, fields) for name, word in words.items()}


def _of_word(name: str, word: Word, fields: dict[str, Any]) -> dict[str, Any]:
    if isinstance(word, Renamed):
        about = {"deprecated": True, "description": f"Read as `{word.to}`."}
        if switch_of(name) is not None:  # of any type where the switch is off
            return about
        return {**fields.get(word.to, {}), **about}
    if isinstance(word, Ignored):
        return {"deprecated": True, "description": f"No effect: {word.why}."}
    if (switch := switch_of(name)) is not None:
        why = f"Refused beside `{switch}`: {word.why}. Else without effect."
        return {"deprecated": True, "description": why}
    off = [*_OFF, *OFF.get(name, ()), *(() if name != "resume_from_checkpoint" else (True,))]
    return {"deprecated": True, "description": f"Refused: {word.why}.", "enum": off}


def _otherwise(keys: dict[str, str]) -> dict[str, Any]:
    return {
        name: {
            **_OLDER_FORMS.get(name, {}),
            "deprecated": True,
            "description": f"Older form: {how}.",
        }
        for name, how in keys.items()
    }
