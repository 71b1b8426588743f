"""What all sections share: strictness, and the number types whose errors read well."""

from __future__ import annotations

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

# The pattern, of any text, keeps `configs/schema.py` from taking a number for the text.
_TEXTS_SCHEMA = {
    "anyOf": [{"type": "string", "pattern": ""}, {"type": "array", "items": {"type": "string"}}]
}

Texts = Annotated[tuple[str, ...], BeforeValidator(_one_or_many), WithJsonSchema(_TEXTS_SCHEMA)]
"""A list of texts; one text alone is a list of one."""
