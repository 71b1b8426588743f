"""Every name a recipe may write has its format, and every other one its reason."""

from __future__ import annotations

import dataclasses

import pytest

from regrow.configs.load import parse_recipe
from regrow.configs.sections.dataset_types import (
    PROMPT_STYLES,
    REFUSED_TYPES,
    SUPERVISED_TYPES,
    PromptType,
)
from regrow.tasks.prepare.formats.registry import FORMATS, WITHOUT_NAME, format_name, kind_of
from regrow.tasks.prepare.formats.wording import STYLES
from regrow.tasks.stage import StageError


def test_the_recipes_names_are_those_of_the_formats():
    supervised = {name for name in FORMATS if kind_of(name) == "sft"}
    assert supervised == {*SUPERVISED_TYPES, "own_code", "user_defined"}
    assert not REFUSED_TYPES.keys() & (FORMATS.keys() - set(WITHOUT_NAME))
    assert STYLES == PROMPT_STYLES


@pytest.mark.parametrize("name", SUPERVISED_TYPES)
def test_a_name_means_its_format(name):
    assert format_name(name, "datasets[0]") == name
    assert callable(FORMATS[name].read)
    assert dataclasses.is_dataclass(FORMATS[name].Options)


@pytest.mark.parametrize("name", SUPERVISED_TYPES)
def test_a_key_for_a_column_has_its_effect_or_is_spoken_of(name):
    def options(**keys):
        loaded = parse_recipe(
            {
                "base_model": "owner/model",
                "datasets": [{"path": "owner/data", "type": name, **keys}],
                "micro_batch_size": 1,
                "gradient_accumulation_steps": 1,
                "learning_rate": 1e-4,
            }
        )
        ignored = {key for n in loaded.notices if n.action == "ignored" for key in n.keys}
        entry = loaded.recipe.datasets[0]
        return FORMATS[name].Options.from_recipe(entry, loaded.recipe), ignored

    plain, _ = options()
    for key in ("field", "field_system", "field_instruction", "field_input", "field_output"):
        changed, ignored = options(**{key: "other"})
        assert (changed == plain) == (key in ignored), key


def test_other_ways_to_name_a_format():
    assert format_name(PromptType(), "datasets[0]") == "user_defined"
    assert format_name("package.module.function", "datasets[0]") == "own_code"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alpcaa", r"datasets\[0\]\.type: 'alpcaa' is not a known format; use one of alpaca"),
        ("sharegpt.load_glaive", "Axolotl removed it.*chat_template"),
        ("messages.chat", "only Axolotl has.*chat_template"),
        ("own_code", "is not a known format"),
        ("user_defined", "Write a map under `type`"),
    ],
)
def test_other_names_are_refused_with_what_to_use(name, message):
    with pytest.raises(StageError, match=message):
        format_name(name, "datasets[0]")
