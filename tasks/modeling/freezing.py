"""Trains some of a model's parameters and freezes the rest: Axolotl's `unfrozen_parameters`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regrow.tasks.stage import StageError

_ROWS = re.compile(r"\[(\d+):(\d+)\]$")


def train_only(
    model: nn.Module, patterns: Sequence[str], frozen_dtype: torch.dtype
) -> frozenset[str]:
    """Freeze every parameter whose name no pattern matches at its start.

    `[0:100]` behind a pattern leaves rows 0 to 99 of the parameter to train: the gradient of the
    others is zero. Frozen parameters are held in `frozen_dtype`.

    Returns:
        Names of the parameters trained in part, which weight decay must leave alone.

    Raises:
        StageError: for a pattern that matches nothing, or rows that a parameter has not.
    """
    chosen: dict[nn.Parameter, list[tuple[int, int] | None]] = {}
    names: dict[nn.Parameter, str] = {}
    for pattern in patterns:
        rows = _ROWS.search(pattern)
        matched = False
        # Tied weights have two names; either will do.
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if re.match(_ROWS.sub("", pattern), name):
                matched = True
                names.setdefault(parameter, name)
                chosen.setdefault(parameter, []).append(_range(rows, parameter, pattern))
        if not matched:
            raise StageError(f"unfrozen_parameters: {pattern!r} matches no parameter of the model")
    for parameter in model.parameters():
        if parameter not in chosen:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(frozen_dtype)
    partly = {p: ranges for p, ranges in chosen.items() if None not in ranges}
    for parameter, ranges in partly.items():
        _mask_gradient(parameter, [rows for rows in ranges if rows])
    unique = {id(p): name for name, p in model.named_parameters()}
    return frozenset(unique[id(parameter)] for parameter in partly)


def _range(rows: re.Match[str] | None, parameter: Tensor, pattern: str) -> tuple[int, int] | None:
    if rows is None:
        return None
    first, end = int(rows[1]), int(rows[2])
    if not first < end <= len(parameter):
        raise StageError(
            f"unfrozen_parameters: {pattern!r} names rows of a parameter that has {len(parameter)}"
        )
    return first, end


def _mask_gradient(parameter: nn.Parameter, ranges: list[tuple[int, int]]) -> None:
    trained = torch.zeros(len(parameter), dtype=torch.bool)
    for first, end in ranges:
        trained[first:end] = True
    shape = (-1, *[1] * (parameter.dim() - 1))

    def keep_rows(gradient: Tensor) -> Tensor:
        return gradient * trained.to(gradient.device).view(shape)

    parameter.register_hook(keep_rows)
