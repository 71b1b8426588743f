"""`type` as a map: the prompt's words and the columns are written in the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regrow.tasks.prepare.formats import alpaca
from regrow.tasks.prepare.formats.wording import Wording, trains_on_inputs

read = alpaca.read

NAMES = ("user_defined",)
"""The name of what is read here; in a recipe it is a map."""


@dataclass(frozen=True)
class Options(alpaca.Options):
    """Which columns are read, the words around them, and what is trained."""

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options of the map under the dataset's `type`."""
        given = dataset.type
        prompt = (given.format, given.no_input_format, given.system_format)
        return cls(
            wording=Wording(*prompt, given.system_prompt, given.system_prompt),
            instruction=given.field_instruction,
            input=given.field_input,
            output=given.field_output,
            system=given.field_system,
            system_may_be_absent=True,
            train_on_inputs=trains_on_inputs(dataset, recipe),
        )
