"""What a rule is: the keys it reads, and a function from a recipe to what is wrong between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from regrow.configs.faults import Path
from regrow.configs.recipe import Recipe

Breach = tuple[Path, str, str]
"""(path of the key to change, what is wrong, what to do)."""

Check = Callable[[Recipe, frozenset[str]], Iterator[Breach]]
"""Gets the filled-in recipe and the keys its author gave."""


@dataclass(frozen=True)
class Rule:
    """One condition that holds in every recipe that runs."""

    check: Check
    reads: frozenset[str]
    """Keys it reads; with one of them at fault already, the rule does not run."""

    @property
    def name(self) -> str:
        """The function's name."""
        return self.check.__name__


def rule(*reads: str) -> Callable[[Check], Rule]:
    """Make a function a rule that reads these keys."""
    return lambda check: Rule(check, frozenset(reads))
