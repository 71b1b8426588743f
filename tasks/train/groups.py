"""An optimizer's groups of parameters in a checkpoint, found again where they are cut otherwise.

Transformers cuts a group in two where tensor parallelism divides some of its parameters and not
others; DeepSpeed's groups do not know the names of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regrow.tasks.stage import StageError

NAMES = "names"
"""Field of a group: the parameters in it; empty where they are not known."""


def match_groups(
    here: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[int]:
    """For each group of an optimizer, the number of the saved one that it goes on from.

    Raises:
        StageError: when there is none.
    """
    if len(here) == len(saved) and not all(group[NAMES] for group in (*here, *saved)):
        return list(range(len(saved)))
    return [_match(group, saved) for group in here]


def _match(group: Mapping[str, Any], saved: Sequence[Mapping[str, Any]]) -> int:
    """By a name that both hold, else by the weight decay: where one side has no names, the groups
    of a spec differ in nothing else, or it is refused."""
    names, decay = set(group[NAMES]), group.get("weight_decay")
    for number, other in enumerate(saved):
        if names & set(other[NAMES]):
            return number
    alike = [
        number
        for number, other in enumerate(saved)
        if not (names and other[NAMES]) and other.get("weight_decay") == decay
    ]
    if not alike:
        raise StageError(
            "optimizer: the checkpoint has no such group of parameters as one of this training; "
            "begin anew"
        )
    if len({saved[number].get("initial_lr") for number in alike}) > 1:
        raise StageError(
            "optimizer: the checkpoint has several groups of parameters with one weight decay and "
            "other learning rates, and does not say which is which; go on with as many processes "
            "and the same sharding as before, or begin anew"
        )
    return alike[0]


def for_groups(schedule: Mapping[str, Any], matched: Sequence[int], saved: int) -> dict[str, Any]:
    """A scheduler's state for groups matched with the `saved` ones it was of; it keeps some things
    in lists with one entry for each group."""
    if list(matched) == list(range(saved)):
        return dict(schedule)
    return {
        name: [value[number] for number in matched]
        if isinstance(value, (list, tuple)) and len(value) == saved
        else value
        for name, value in schedule.items()
    }
