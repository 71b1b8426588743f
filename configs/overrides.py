"""Command-line overrides: `--learning_rate 1e-4 --datasets.0.path x --lora_r=8 --sample_packing`."""

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
        if not word.startswith("--") or word.strip("-=") == "":
            why = "not an override"
            draft.faults.append(Fault(word, None, None, why, "Write --key value", True))
            continue
        name, equals, text = word[2:].partition("=")
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
        below = here[part] if isinstance(here, dict) or part < len(here) else None
        if isinstance(here, dict) and part not in here or below is None:
            below = [] if isinstance(path[depth + 1], int) else {}
            _put(here, part, below)
        here = below


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


def _put(here: Any, part: str | int, value: Any) -> None:
    if isinstance(here, list) and part == len(here):
        here.append(value)
    else:
        here[part] = value
