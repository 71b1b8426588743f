"""What every trainer shares: data order, counting of tokens, a validation that leaves no trace.

Mixed in before a Transformers or TRL trainer class. It overrides public methods of `Trainer` only.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from regrow.tasks.stage import StageError
from regrow.tasks.train.loader import SUPERVISED, TOKENS, MicroBatches, make_loader
from regrow.tasks.train.metrics import Meter

_Base = Trainer if TYPE_CHECKING else object


class StepLoop(_Base):
    """Trainer behaviour that does not depend on the method of training."""

    def __init__(
        self,
        *,
        batches: MicroBatches,
        validation: MicroBatches | None,
        meter: Meter,
        autocast: torch.dtype | None,
        **kwargs: Any,
    ) -> None:
        """`autocast`: compute in this type although weights are float32; None: no change."""
        super().__init__(train_dataset=batches, **kwargs)
        self._batches, self._validation = batches, validation
        self._meter, self._autocast = meter, autocast

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's micro-batches of all steps. Not sharded again: they are this rank's alone.

        On resume the Trainer passes over those of the steps done, by number, reading none.
        """
        return self._loader(self._batches)

    def _loader(self, batches: MicroBatches) -> DataLoader[Any]:
        pin = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        return make_loader(batches, self.args.dataloader_num_workers, pin)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of one step, and the supervised tokens of the whole global batch.

        The loss of every micro-batch is divided by that number, on every rank; so the gradient is
        the mean over tokens whatever the split.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        assert isinstance(num_items, Tensor), "this model's loss cannot be normalised by tokens"
        for batch in batches:
            self._meter.add(batch.pop(TOKENS), batch.pop(SUPERVISED))
        # Copied now and without waiting; the Trainer would wait for the GPU at every tensor.
        batches = [_on_device(batch, self.args.device) for batch in batches]
        # A step without any supervised token has loss 0, not 0 / 0.
        return batches, num_items.clamp(min=1)

    # ---- computing ----

    def compute_loss_context_manager(self) -> ExitStack:
        """Autocast here, not in Accelerate: that one would copy all logits to float32 once more."""
        contexts = ExitStack()
        if self._autocast is not None:
            contexts.enter_context(torch.autocast(self.args.device.type, dtype=self._autocast))
        return contexts

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: Transformers walks through all parameters for it, each micro-batch."""
        return 0

    # ---- reports ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add rates, totals and memory to the report of a training step.

        Raises:
            StageError: when the loss is no number any more; every later step would be lost.
        """
        if "loss" in logs:
            logs |= self._meter.settle(self.args.device)
        for name in ("loss", "eval_loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise StageError(
                    f"{name} is {logs[name]} at step {self.state.global_step}: training has "
                    "diverged. Lower learning_rate, raise warmup_steps, or set bf16: false; "
                    "and look for damaged examples in the data"
                )
        super().log(logs, start_time)

    # ---- validation ----

    def evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean loss over all supervised tokens of the validation split, the same for any split of
        the work. Random states are put back, so that training goes on as if it had not been."""
        with self._meter.paused(), _random_states_kept():
            loss, tokens = self._validation_sums()
        metrics = {f"{metric_key_prefix}_loss": loss / max(tokens, 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _validation_sums(self) -> tuple[float, int]:
        """(sum of the losses, number of supervised tokens) over all ranks."""
        assert self._validation is not None, "there is no validation split"
        model: Any = self.model
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for batch in self._loader(self._validation):
                batch.pop(TOKENS)
                sums[1] += batch.pop(SUPERVISED)
                inputs = _on_device(batch, self.args.device)
                with self.compute_loss_context_manager():
                    # Divided by 1 item, the model's loss is the sum over tokens.
                    sums[0] += model(**inputs, num_items_in_batch=1).loss
        model.train(was_training)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        loss, tokens = sums.tolist()
        return loss, int(tokens)


def _on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x
        for name, x in batch.items()
    }


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Put back the global random states of Python, numpy and torch (all devices)."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
