"""Rules about data and chat templates."""

from __future__ import annotations

import re
from collections.abc import Iterator

from regrow.configs.faults import Path
from regrow.configs.recipe import Recipe
from regrow.configs.rules.rule import Breach, rule
from regrow.configs.sections.data import CHAT_TEMPLATES, DataSection, Dataset

_KINDS = ("datasets", "test_datasets")
_USERINFO = re.compile(r"://[^/@\s]*@")


def _entries(recipe: Recipe) -> Iterator[tuple[Path, Dataset]]:
    for key in _KINDS:
        for i, entry in enumerate(getattr(recipe, key)):
            yield (key, i), entry


@rule("datasets")
def there_is_training_data(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """An empty list trains on nothing."""
    if not recipe.datasets:
        yield ("datasets",), "the list is empty", "Add `- path: ...` with its `type`"


@rule("val_set_size", "test_datasets")
def validation_data_is_said_once(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Validation examples come from test_datasets or are held back, not both."""
    if recipe.test_datasets and recipe.val_set_size:
        why = "`test_datasets` says already what to validate on"
        yield ("val_set_size",), why, "Use one of the two"


@rule("val_set_size")
def val_set_size_is_a_share_or_a_number(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """1.0 and 1.5 are neither a share of the examples nor a number of them."""
    size = recipe.val_set_size
    if isinstance(size, float) and size >= 1:
        why = "a fraction must be below 1, and a number of examples has no decimal point"
        yield ("val_set_size",), why, "Use 0.05 for 5 % or 500 for 500 examples"


@rule(*_KINDS)
def shards_and_index_fit(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """shards_idx names one of the shards."""
    for path, entry in _entries(recipe):
        if entry.shards_idx is None:
            continue
        if entry.shards is None:
            yield (*path, "shards_idx"), "`shards` is not given", "Add `shards` or remove it"
        elif entry.shards_idx >= entry.shards:
            why = f"with shards: {entry.shards} the last one is {entry.shards - 1}"
            yield (*path, "shards_idx"), why, f"Use 0 to {entry.shards - 1}"


@rule(*_KINDS)
def dataset_code_is_never_run(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Dataset scripts are refused, not ignored: without them the data would be other data."""
    for path, entry in _entries(recipe):
        if entry.trust_remote_code:
            why = "scripts that come with a dataset are never run"
            yield (*path, "trust_remote_code"), why, "Use a dataset of plain files"


@rule("chat_template", "chat_template_jinja", *_KINDS)
def jinja_templates_have_text(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """chat_template: jinja comes with chat_template_jinja, and the text with nothing else."""
    holders: list[tuple[Path, DataSection | Dataset]] = [((), recipe), *_entries(recipe)]
    for path, holder in holders:
        chosen, text = holder.chat_template, holder.chat_template_jinja
        if chosen == "jinja" and not text:
            why = "`chat_template_jinja` is not given"
            yield (*path, "chat_template"), why, "Add it: the template's text or its file"
        elif chosen != "jinja" and text:
            why = f"`chat_template: {chosen}` says otherwise"
            yield (*path, "chat_template_jinja"), why, "Use `chat_template: jinja`"


@rule("chat_template", *_KINDS)
def chat_templates_are_known(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """A template is the tokenizer's, Jinja text, or one of those that come with Regrow."""
    holders: list[tuple[Path, DataSection | Dataset]] = [((), recipe), *_entries(recipe)]
    for path, holder in holders:
        name = holder.chat_template
        if path and name == recipe.chat_template:
            continue  # told once
        bare = (name or _OWN).removeprefix(f"{_OWN}_fallback_")
        if bare not in (_OWN, "jinja", *CHAT_TEMPLATES):
            why = f"there is no such template; there are {', '.join(CHAT_TEMPLATES)}"
            remedy = f"Use `{_OWN}` for the model's own, or give the text with chat_template_jinja"
            yield (*path, "chat_template"), why, remedy


_OWN = "tokenizer_default"


@rule("min_sample_len", "sequence_len")
def some_length_is_left(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """An example can be both long enough and short enough."""
    if recipe.min_sample_len and recipe.min_sample_len > recipe.sequence_len:
        why = f"no example can be that long: sequence_len is {recipe.sequence_len}"
        yield ("min_sample_len",), why, "Lower it"


@rule(*_KINDS, "store", "mlflow_tracking_uri", "output_dir", "deepspeed")
def no_passwords_in_addresses(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """A recipe is recorded as it is, so it must hold no secret."""
    places: list[tuple[Path, str | None]] = [
        (("store",), recipe.store),
        (("mlflow_tracking_uri",), recipe.mlflow_tracking_uri),
        (("output_dir",), recipe.output_dir),
        *(((*path, "path"), entry.path) for path, entry in _entries(recipe)),
    ]
    for path, address in places:
        if address and _USERINFO.search(address):
            why = "secrets do not belong into a recipe, which is recorded"
            yield path, why, "Put user and password into the environment"


RULES = (
    there_is_training_data,
    validation_data_is_said_once,
    val_set_size_is_a_share_or_a_number,
    shards_and_index_fit,
    dataset_code_is_never_run,
    jinja_templates_have_text,
    chat_templates_are_known,
    some_length_is_left,
    no_passwords_in_addresses,
)
