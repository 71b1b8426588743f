"""Recipe: every key a person can write, flat, checked for type, frozen."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

from regrow.configs.sections.adapter import AdapterSection
from regrow.configs.sections.data import DataSection
from regrow.configs.sections.evaluation import EvaluationSection
from regrow.configs.sections.model import ModelSection
from regrow.configs.sections.parallel import ParallelSection
from regrow.configs.sections.publish import PublishSection
from regrow.configs.sections.quantization import QuantizationSection
from regrow.configs.sections.reporting import ReportingSection
from regrow.configs.sections.rl import RLSection
from regrow.configs.sections.tracking import TrackingSection
from regrow.configs.sections.training import TrainingSection

SECTIONS = (
    ModelSection,
    DataSection,
    RLSection,
    AdapterSection,
    TrainingSection,
    EvaluationSection,
    ParallelSection,
    QuantizationSection,
    TrackingSection,
    ReportingSection,
    PublishSection,
)
"""In the order people read them."""


# pydantic lists the fields of the last base first: SECTIONS in reverse.
class Recipe(
    PublishSection,
    ReportingSection,
    TrackingSection,
    QuantizationSection,
    ParallelSection,
    EvaluationSection,
    TrainingSection,
    AdapterSection,
    RLSection,
    DataSection,
    ModelSection,
):
    """What a run is. Built by `load_recipe` or `parse_recipe`, which rename, fill in and check."""

    model_config = ConfigDict(defer_build=False)

    def given(self) -> dict[str, Any]:
        """What was written and what follows from it, as plain data that gives the recipe again."""
        return self.model_dump(mode="json", exclude_unset=True)

    @property
    def global_batch_size(self) -> int:
        """Rows before each step of the optimizer, over all devices."""
        return self.batch_size or self.rows_at_once * self.gradient_accumulation_steps

    @property
    def rows_at_once(self) -> int:
        """Rows of a forward pass as far as the recipe says; 1 where it leaves them to be chosen."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def dtype(self) -> str:
        """Compute type, "bfloat16" or "float32"; the same on every machine."""
        return "float32" if self.bf16 is False else "bfloat16"

    @property
    def name(self) -> str | None:
        """The name given to the run, if any; `Loaded.name` falls back to the file's."""
        return self.run_name or self.mlflow_run_name

    @property
    def uses_adapter(self) -> bool:
        """Whether an adapter is trained in place of all weights."""
        return self.adapter is not None

    @property
    def validates(self) -> bool:
        """Whether there is validation data."""
        return bool(self.test_datasets or self.val_set_size)
