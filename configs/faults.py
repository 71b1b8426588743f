"""What a recipe is told: faults, each with its remedy, and notices of what was set or ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regrow.configs.secret_values import hidden

Path = tuple[str | int, ...]
"""Where a value is: ("datasets", 0, "type")."""

_LONGEST_VALUE = 60  # characters; a message line stays readable
_LONGEST_KEY = 100  # more than any path of keys that people write
_MOST_SHOWN = 100  # faults; the first recipe of most people has fewer than ten


def dotted(path: Path) -> str:
    """`path` as people write it: datasets[0].type."""
    text = ""
    for part in path:
        part = part if isinstance(part, int) or part.isprintable() else ascii(part)
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def printable(text: str) -> str:
    """`text` as any terminal or file takes it: half characters are written as their numbers."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Fault:
    """One reason why a recipe cannot run."""

    key: str
    """The key as people write it, such as datasets[0].type; empty for the whole file."""
    value: Any
    """What was written there; None where nothing was."""
    line: int | None
    """Line of the key in the recipe, from 1; None where it is not in the file."""
    why: str
    """What is wrong with it."""
    remedy: str = ""
    """What to write instead."""
    overridden: bool = False
    """Whether the value came from the command line."""
    file: str = ""
    """The extended recipe that holds the line; empty for the recipe itself."""

    def __str__(self) -> str:
        place = "on the command line" if self.overridden else f"line {self.line}"
        place = f"{self.file}, {place}" if self.file else place
        if self.line is None and not self.overridden:
            place = ""
        where = ": ".join(part for part in (place, self._written()) if part)
        head = f"{where}: {self.why}" if where else self.why
        return printable(f"{head}. {self.remedy}" if self.remedy else head)

    def _written(self) -> str:
        if not self.key:
            return ""
        key = self.key if len(self.key) <= _LONGEST_KEY else f"{self.key[:_LONGEST_KEY]}..."
        if self.value is None:
            return f"`{key}`"
        return f"`{key}: {_brief(self.value, self.key)}`"


@dataclass(frozen=True)
class Notice:
    """One thing done to a recipe that its author may want to know."""

    action: str
    """"set", "renamed", "ignored" or "note"."""
    keys: tuple[str, ...]
    """The keys it is about."""
    why: str
    """The reason; for "note" the whole message."""
    value: Any = None
    """What a key was set to, or the new name of a renamed one."""

    def __str__(self) -> str:
        names = ", ".join(self.keys)
        if self.action == "set":
            return f"set {names}: {_brief(self.value)} because {self.why}"
        if self.action == "renamed":
            return f"read {names} as {self.value} because {self.why}"
        if self.action == "ignored":
            return f"ignored {names} because {self.why}"
        return f"{names}: {self.why}" if names else self.why


class RecipeError(ValueError):
    """A recipe that cannot run, with every reason at once."""

    def __init__(
        self, faults: Sequence[Fault], source: str = "recipe", notices: Sequence[Notice] = ()
    ) -> None:
        assert faults, "a RecipeError needs a fault"
        self.faults = tuple(faults)
        self.notices = tuple(notices)
        self.source = source
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        head = f"{printable(source)} cannot run: {count}"
        lines = [head, *(f"  {fault}" for fault in faults[:_MOST_SHOWN])]
        if len(faults) > _MOST_SHOWN:
            lines.append(f"  and {len(faults) - _MOST_SHOWN} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.faults, self.source, self.notices)


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes out no numbers of more than 4,300 digits
        return "(a very long number)"


def _brief(value: Any, key: str = "") -> str:
    """`value` on one line, cut short, without a secret."""
    if value is None or isinstance(value, bool):
        text = "null" if value is None else "true" if value else "false"
    elif isinstance(value, str):
        plain = value.strip() == value and value and value.isprintable()
        text = value if plain else repr(value)
    else:
        text = _shown(list(value) if isinstance(value, tuple) else value)
    text = hidden(key, " ".join(text.split()))
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
