"""What no file could give back unchanged is a fault, wherever it stands."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from regrow.configs.faults import RecipeError
from regrow.configs.load import parse_recipe

RECIPE: dict[str, Any] = {
    "base_model": "org/model",
    "datasets": [{"path": "org/data", "type": "alpaca"}],
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 2e-4,
}


def nested(levels: int) -> Any:
    inner: Any = 1
    for _ in range(levels):
        inner = [inner]
    return inner


ODD = [
    (datetime.date(2001, 1, 1), "date is no value"),
    (b"x", "bytes is no value"),
    (object(), "object is no value"),
    (10**400, "more than 64 bits"),
    (10**5000, "more than 64 bits"),
    (float("nan"), "a finite number"),
    (float("-inf"), "a finite number"),
    ("a\0b", "a null character"),
    ("\ud800", "half a character"),
    ({1: 2}, "the key 1 is not text"),
    ({None: 2}, "the key None is not text"),
    ({(1, 2): 2}, "is not text"),
    ({"\0": 2}, "a key holds a null character"),
]


@pytest.mark.parametrize(("value", "why"), ODD, ids=[why for _, why in ODD])
@pytest.mark.parametrize(
    "place", ["run_name", "lr_scheduler_kwargs", "deepspeed", "seed", "unknown", "fsdp_config"]
)
def test_it_is_told_once_at_its_place(value, why, place):
    inside = {"a": value} if place in ("lr_scheduler_kwargs", "deepspeed") else value
    with pytest.raises(RecipeError) as error:
        parse_recipe({**RECIPE, place: inside})
    found = [fault for fault in error.value.faults if why in fault.why]
    assert len(found) == 1
    assert found[0].key.startswith(place)
    str(error.value).encode()


@pytest.mark.parametrize("key", [1, None, (1, 2), 2.5, b"x", "\0", "\ud800"])
def test_keys_of_the_recipe_are_text(key):
    with pytest.raises(RecipeError) as error:
        parse_recipe({**RECIPE, key: 1})
    assert len(error.value.faults) == 1


def test_what_is_taken_out_is_not_missed_as_well():
    with pytest.raises(RecipeError) as error:
        parse_recipe({**RECIPE, "base_model": "a\0"})
    assert [fault.key for fault in error.value.faults] == ["base_model"]


@pytest.mark.parametrize("levels", [60, 5000])
def test_depth_has_an_end(levels):
    with pytest.raises(RecipeError, match="nested"):
        parse_recipe({**RECIPE, "lr_scheduler_kwargs": {"a": nested(levels)}})
    with pytest.raises(RecipeError, match="nested"):
        parse_recipe(RECIPE, {"lr_scheduler_kwargs": {"a": nested(min(levels, 900))}})


def test_what_contains_itself_has_no_end():
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(RecipeError, match="contains itself"):
        parse_recipe({**RECIPE, "tokens": loop})


def test_overrides_are_looked_at_too():
    with pytest.raises(RecipeError, match="a null character"):
        parse_recipe(RECIPE, ["--run_name", "a\0b"])


def test_thousands_of_faults_are_told_at_once():
    with pytest.raises(RecipeError) as error:
        parse_recipe({**RECIPE, **{f"learning_rat{i}": 1 for i in range(3000)}})
    assert len(error.value.faults) == 3000
    assert "and 2900 more" in str(error.value)
