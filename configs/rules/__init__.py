"""Every rule between keys. A rule runs on the filled-in recipe; all of their faults are reported."""

from __future__ import annotations

from regrow.configs.rules import adapter, batch, data, precision, schedule
from regrow.configs.rules.rule import Rule

ALL_RULES: tuple[Rule, ...] = (
    *data.RULES,
    *batch.RULES,
    *schedule.RULES,
    *adapter.RULES,
    *precision.RULES,
)
