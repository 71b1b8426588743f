"""Supervised fine-tuning: cross entropy on the supervised tokens of packed examples."""

from __future__ import annotations

from transformers import Trainer

from regrow.tasks.train.trainers.balance import Balancing
from regrow.tasks.train.trainers.loop import StepLoop
from regrow.tasks.train.trainers.optimization import Optimization


class SftTrainer(Balancing, Optimization, StepLoop, Trainer):
    """Transformers' loop and the model's own loss; all else is in its mixins."""
