"""What all sections share: strictness, and the number types whose errors read well."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A frozen group of recipe keys; a key it does not know is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        # `run_name: 42` means the text "42".
        coerce_numbers_to_str=True,
        # `model_type` is an Axolotl key, not a method of ours.
        protected_namespaces=(),
        # Only Recipe, which holds every field, is ever built: half the import time.
        defer_build=True,
    )


def _not_bool(value: Any) -> Any:
    """Python counts `true` as 1; a person who writes it does not mean a number."""
    if isinstance(value, bool):
        raise PydanticCustomError("not_bool", "expected a number, not true or false")
    return value


def _one_or_many(value: Any) -> Any:
    """A single text stands for a list of one, as in Axolotl."""
    return [value] if isinstance(value, str) else value


_NotBool = BeforeValidator(_not_bool)

Count = Annotated[int, _NotBool, Field(ge=1)]
"""A whole number, 1 or more."""

Whole = Annotated[int, _NotBool, Field(ge=0)]
"""A whole number, 0 or more."""

Seed = Annotated[int, _NotBool, Field(ge=0, lt=2**32)]
"""A whole number of 32 bits, which is what numpy takes."""

Positive = Annotated[float, _NotBool, Field(gt=0)]
"""A number above 0."""

NotNegative = Annotated[float, _NotBool, Field(ge=0)]
"""A number, 0 or more."""

Fraction = Annotated[float, _NotBool, Field(ge=0, lt=1)]
"""A number from 0 up to but not including 1."""

Ratio = Annotated[float, _NotBool, Field(ge=0, le=1)]
"""A number from 0 to 1."""

_UNITS = {"gib": 2**30, "mib": 2**20, "gb": 10**9, "mb": 10**6}
AMOUNT = r"^\s*(\d*[1-9]\d*(?:\.\d*)?|\d*\.\d*[1-9]\d*)\s*([GgMm][Ii]?[Bb])\s*$"
"""Of a text that says an amount of memory with its unit."""


def _in_gib(value: Any) -> Any:
    """`16000MiB` as a number of GiB."""
    if not (isinstance(value, str) and value.strip()[-1:].isalpha()):
        return value
    found = re.match(AMOUNT, value)
    if found is None:
        raise PydanticCustomError("amount", "expected GiB, or a number with GiB, MiB, GB or MB")
    return float(found[1]) * _UNITS[found[2].lower()] / 2**30


Gib = Annotated[float, BeforeValidator(_in_gib), _NotBool, Field(gt=0)]
"""An amount of memory above 0 in GiB; as text also with a unit: GiB, MiB, GB or MB."""

# The pattern, of any text, keeps `configs/schema.py` from taking a number for the text.
_TEXTS_SCHEMA = {
    "anyOf": [{"type": "string", "pattern": ""}, {"type": "array", "items": {"type": "string"}}]
}

Texts = Annotated[tuple[str, ...], BeforeValidator(_one_or_many), WithJsonSchema(_TEXTS_SCHEMA)]
"""A list of texts; one text alone is a list of one."""
