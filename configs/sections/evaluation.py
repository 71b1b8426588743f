"""Evaluation: the validation loss while training, and answers before and after."""

from __future__ import annotations

from typing import Literal

from regrow.configs.sections.section import Count, Positive, Section, Whole


class EvaluationSection(Section):
    """How the model is judged."""

    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    """When the validation loss is taken while training. Default: `no` without validation data;
    `steps` when `eval_steps` or `evals_per_epoch` is given; else `epoch`."""

    eval_steps: Positive | None = None
    """Optimizer steps between validations; below 1: share of all steps."""

    evals_per_epoch: Whole | None = None
    """Validations in each epoch; 0: none."""

    eval_batch_size: Count | None = None
    """Rows in one forward pass of a validation. Default: `micro_batch_size`, as Axolotl does."""

    eval_prompts: tuple[str, ...] = ()
    """Prompts answered by the base model and by the fine-tuned one. Default: none beside those from
    the validation data."""

    eval_table_size: Whole = 8
    """Held-out examples answered before and after. Default 8: few enough to read."""

    eval_max_new_tokens: Count = 128
    """Longest answer in tokens. Default 128, Axolotl's."""
