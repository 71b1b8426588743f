"""Every rule between keys; a rule runs on the filled-in recipe."""

from __future__ import annotations

from regrow.configs.rules import (
    adapter,
    batch,
    data,
    model,
    parallel,
    patterns,
    relora,
    reporting,
    schedule,
)
from regrow.configs.rules.rule import Rule

ALL_RULES: tuple[Rule, ...] = (
    *data.RULES,
    *batch.RULES,
    *schedule.RULES,
    *adapter.RULES,
    *patterns.RULES,
    *model.RULES,
    *parallel.RULES,
    *relora.RULES,
    *reporting.RULES,
)
