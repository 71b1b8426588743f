"""`type: package.module.function`: a Python function of the user's reads the rows.

The function gets a row, as a dict, and returns it in a form that Regrow knows:

- a list of messages, `{"role": ..., "content": ..., ...}`, for the chat template; or a dict with
  them under `messages`, and with `tools` if there are any;
- a list of pieces, `{"text": ..., "label": bool}`, as in `type: input_output`; or a dict with them
  under `segments`;
- `{"prompt": str, "completion": str}`: the completion is learnt, with an eos token behind it;
- `{"input_ids": [...], "labels": [...]}`, as in `type: pretokenized`;
- `{"text": str}`: all of it is learnt, as in `type: completion`;
- None: the row is left out.

It is imported by name, so its package must be installed or on PYTHONPATH. A name that ends in a
module means the module's function `read`. The module's source is part of the prepared data's key;
what else it imports is not, so a function should be all in one file.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from regrow.tasks.prepare.example import Conversation, Document, Pieces, RowError, TokenIds
from regrow.tasks.prepare.formats import chat_template, completion, input_output, pretokenized
from regrow.tasks.prepare.formats.wording import answered, fixed_column, trains_on_inputs
from regrow.tasks.stage import StageError

NAMES = ("own_code",)
"""The name of what is read here; in a recipe it is the function's own."""


@dataclass(frozen=True)
class Options:
    """Which function reads a row, and how what it gives is trained."""

    module: str = ""
    function: str = "read"
    sha256: str = ""
    """Of the module's source."""
    chat: chat_template.Options = field(default_factory=chat_template.Options)
    train_on_inputs: bool = False

    @classmethod
    def from_recipe(cls, dataset: Any, recipe: Any) -> Options:
        """The options that a recipe's dataset and its top level give.

        Raises:
            StageError: when the dataset is not trusted or there is no such module. Packages that
                hold the module are imported, but not the module itself.
        """
        if not dataset.trust_remote_code:
            raise StageError(
                f"type: {dataset.type!r} names Python code, which is run only if its dataset says "
                "`trust_remote_code: true`"
            )
        module, function = _found(dataset.type)
        return cls(
            module=module,
            function=function,
            sha256=hashlib.sha256(_source(module)).hexdigest(),
            chat=chat_template.Options.from_recipe(dataset, recipe),
            train_on_inputs=trains_on_inputs(dataset, recipe),
        )


def read(row: Mapping[str, Any], options: Options) -> Conversation | Document | Pieces | TokenIds:
    """What the function makes of the row.

    Raises:
        RowError: when it fails or returns something else.
        StageError: when there is no such function, or its source has changed.
    """
    return _example(called(row, options), f"{options.module}.{options.function}", options)


def called(row: Mapping[str, Any], options: Options) -> Any:
    """What the function returns for the row; raises like `read`."""
    function = _loaded(options.module, options.function, options.sha256)
    try:
        return function(dict(row))
    except Exception as error:
        name = f"{options.module}.{options.function}"
        raise RowError(f"{name} failed on it: {type(error).__name__}: {error}") from error


def _example(
    given: Any, name: str, options: Options
) -> Conversation | Document | Pieces | TokenIds:
    if given is None:
        return TokenIds((), ())
    if isinstance(given, (list, tuple)):
        is_pieces = bool(given) and isinstance(given[0], Mapping) and "role" not in given[0]
        given = {"segments" if is_pieces else "messages": list(given)}
    if not isinstance(given, Mapping):
        raise RowError(f"{name} returned {type(given).__name__}, not a dict, a list or None")
    if "messages" in given:
        return chat_template.read(given, options.chat)
    if "segments" in given:
        return input_output.pieces_of(given["segments"], options.train_on_inputs, name)
    if "prompt" in given and "completion" in given:
        prompt, answer = fixed_column(given, "prompt"), fixed_column(given, "completion")
        return answered(prompt, answer, options.train_on_inputs)
    if "input_ids" in given:
        return pretokenized.read(given, pretokenized.Options())
    if "text" in given:
        return completion.read(given, completion.Options())
    raise RowError(
        f"{name} returned a dict with {', '.join(map(repr, given)) or 'nothing in it'}; it must "
        "hold messages, segments, prompt and completion, input_ids and labels, or text"
    )


def _found(name: str) -> tuple[str, str]:
    """(module, function) that a dotted name means."""
    above, _, last = name.rpartition(".")
    holder = _spec(above)
    if holder is None or not (holder.origin or "").endswith(".py"):
        raise StageError(
            f"type: there is no Python module {above!r} for {name!r}. Install its package, or put "
            "its folder on PYTHONPATH; or name one of the formats that come with Regrow"
        )
    is_module = holder.submodule_search_locations is not None and _spec(name) is not None
    return (name, "read") if is_module else (above, last)


def _spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a package above it
        return None


def _source(module: str) -> bytes:
    found = importlib.util.find_spec(module)
    assert found is not None, module
    assert found.origin is not None, module
    return Path(found.origin).read_bytes()


@lru_cache(maxsize=8)  # a process meets few functions, and each source is to be read once
def _loaded(module: str, function: str, sha256: str) -> Callable[[dict[str, Any]], Any]:
    if hashlib.sha256(_source(module)).hexdigest() != sha256:
        raise StageError(f"type: the source of {module} has changed since the run was planned")
    loaded = getattr(importlib.import_module(module), function, None)
    if not callable(loaded):
        raise StageError(f"type: module {module} has no function {function!r}")
    return loaded
