"""Command-line overrides: `--learning_rate 1e-4 --datasets.0.path x --lora_r=8 --tf32`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regrow.configs.draft import Draft
from regrow.configs.faults import Fault, Path, dotted
from regrow.configs.yaml_lines import parse_value

Overrides = Sequence[str] | Mapping[str, Any]


def apply_overrides(draft: Draft, overrides: Overrides) -> None:
    """Put every override into the draft's data; what cannot be placed becomes a fault."""
    for name, value in _pairs(draft, overrides):
        _place(draft, _path(name), value)


def _pairs(draft: Draft, overrides: Overrides) -> list[tuple[str, Any]]:
    """(dotted key, value) of each override."""
    if isinstance(overrides, Mapping):
        return [(str(name), value) for name, value in overrides.items()]
    pairs: list[tuple[str, Any]] = []
    words = list(overrides)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not name or not word.startswith("--"):
            why = "not an override"
            draft.faults.append(Fault(word, None, None, why, "Write --key value", True))
            continue
        if not equals and words and not words[0].startswith("--"):
            text, equals = words.pop(0), "="
        pairs.append((name, parse_value(text) if equals else True))
    return pairs


def _path(name: str) -> Path:
    """`datasets.0.path` or `datasets[0].path` as a path; dashes count as underscores."""
    parts = name.replace("-", "_").replace("[", ".").replace("]", "").split(".")
    return tuple(int(part) if part.isascii() and part.isdigit() else part for part in parts)


def _place(draft: Draft, path: Path, value: Any) -> None:
    here: Any = draft.data
    for depth, part in enumerate(path):
        why = _misfit(here, part)
        if why:
            fault = Fault(dotted(path), None, None, why, _PLACE_REMEDY, True)
            draft.faults.append(fault)
            return
        if depth == len(path) - 1:
            _put(here, part, value)
            draft.overridden.add(path)
            return
        here = _below(here, part, path[depth + 1])


_PLACE_REMEDY = "Name map entries by key and list entries by number, such as --datasets.0.path"


def _misfit(here: Any, part: str | int) -> str:
    """Why `part` cannot address something in `here`; empty where it can."""
    if isinstance(here, dict):
        return "" if isinstance(part, str) and part else f"a map has no entry {part!r}"
    if isinstance(here, list):
        if isinstance(part, int):
            return "" if part <= len(here) else f"the list has only {len(here)} entries"
        return f"a list has no entry {part!r}"
    return "what it is in is a single value"


def _below(here: Any, part: Any, next_part: str | int) -> Any:
    """What `part` of `here` holds; a new list or map where there is nothing yet."""
    there = here.get(part) if isinstance(here, dict) else here[part] if part < len(here) else None
    if there is None:
        there = [] if isinstance(next_part, int) else {}
        _put(here, part, there)
    return there


def _put(here: Any, part: Any, value: Any) -> None:
    if isinstance(here, list) and part == len(here):
        here.append(value)
    else:
        here[part] = value
