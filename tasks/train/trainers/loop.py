"""What every trainer shares: data order, counting of tokens, a validation that leaves no trace.

Mixed in before a Transformers or TRL trainer class. It overrides public methods of `Trainer` only.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from regrow.tasks.modeling.rounded_weights import keep_rounded
from regrow.tasks.stage import StageError
from regrow.tasks.train.cpu_sharding import mesh_kept_back, shard_on_cpu
from regrow.tasks.train.evidence import DIVERGED, StepLosses, evidence_name, keep_evidence
from regrow.tasks.train.gathering import gather_early
from regrow.tasks.train.groups import for_groups
from regrow.tasks.train.loader import (
    ROW_LENGTHS,
    SUPERVISED,
    TOKENS,
    MicroBatches,
    make_loader,
)
from regrow.tasks.train.metrics import Meter
from regrow.tasks.train.state import Engine, State, Stored, TorchEngine

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
        self._losses: list[StepLosses] = []  # since the last look at them
        # Sharded parameters are put together anew for each layer: there is nothing to keep.
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.rounded = None if sharded else keep_rounded(cast(Any, self.model))
        """Copies of trained weights in the type of the products."""
        if autocast is not None:
            follow_autocast(cast(Any, self.model).get_input_embeddings())

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer does, FSDP2 on the CPU too."""
        with mesh_kept_back(self.args):
            super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled |= shard_on_cpu(self.accelerator, self.args)

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's micro-batches of all steps to come. They are not sharded again."""
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
        if self._batches.start < self.state.global_step < self.state.max_steps:
            gather_early(cast(Any, self.model))
        batches = list(itertools.islice(epoch_iterator, num_batches))
        # The Trainer would copy the number to the device, and wait for all work before it.
        num_items = torch.full((), sum(batch[SUPERVISED] for batch in batches), device=device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(num_items)
        if not batches:  # resumed after the last step
            return batches, num_items
        self._losses.append(StepLosses(self.state.global_step))
        self._expire()
        for batch in batches:
            self._meter.add(batch.pop(TOKENS), batch.pop(SUPERVISED))
        # Copied now and without waiting; the Trainer would wait for the GPU at every tensor.
        batches = [_on_device(batch, self.args.device) for batch in batches]
        # A step without any supervised token has loss 0, not 0 / 0.
        return batches, num_items.clamp(min=1)

    def _expire(self) -> None:
        """Weights have changed since they were rounded."""
        if self.rounded is not None:
            self.rounded.expire()

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

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As the Trainer does, keeping each micro-batch's loss for `check_losses`."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses[-1].micro.append(loss)
        return loss

    def check_losses(self) -> None:
        """Look at the losses since the last look; waits for the GPU.

        Raises:
            StageError: naming the first micro-batch whose loss is no number; its rows are kept.
        """
        seen, self._losses = self._losses, []
        path = Path(str(self.args.output_dir)).parent / evidence_name(self.args.process_index)
        for losses in seen:
            keep_evidence(losses, self._batches, path)

    # ---- saving and resuming ----

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does. The last public method before it notes where counting starts."""
        self.state.global_step = self._batches.start
        return super().create_optimizer(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing: the Trainer's own checkpoint is empty; `SaveCheckpoints` makes a real one.

        Only the rank that writes into its directory makes it, and `SaveCheckpoints` removes it
        there: another rank that came later would find it vanishing, or leave it behind.
        """
        if self.args.should_save:
            Path(str(output_dir)).mkdir(parents=True, exist_ok=True)

    @property
    def engine(self) -> Engine:
        """How the tensors of this training are reached; there once training has begun."""
        optimizer: Any = self.optimizer
        if self.is_deepspeed_enabled:
            from regrow.tasks.train.zero import ZeroEngine  # imports DeepSpeed

            return ZeroEngine(cast(Any, self.model_wrapped), cast(Any, self.model))
        return TorchEngine(cast(Any, self.model), optimizer.optimizer)

    def capture(self) -> State:
        """All that a resume needs but random states: live tensors, not copies."""
        state = self.engine.capture()
        scheduler: Any = self.lr_scheduler
        state.values |= {
            "step": self.state.global_step,
            "scheduler": scheduler.state_dict(),
            "best": (self.state.best_metric, self.state.best_global_step),
            "callbacks": {type(c).__name__: c.state()["attributes"] for c in self._stateful()},
        }
        return state

    def restore(self, saved: Stored) -> None:
        """Put back what `capture` gave."""
        matched = self.engine.restore(saved)
        scheduler: Any = self.lr_scheduler
        before, groups = saved.values["scheduler"], len(saved.values["groups"])
        scheduler.load_state_dict(for_groups(before, matched, groups))
        self.state.best_metric, self.state.best_global_step = saved.values["best"]
        for callback in self._stateful():
            for name, value in saved.values["callbacks"].get(type(callback).__name__, {}).items():
                setattr(callback, name, value)

    def _stateful(self) -> list[Any]:
        """Callbacks with a state of their own, such as early stopping."""
        found = self.callback_handler.callbacks
        return [callback for callback in found if isinstance(callback, ExportableState)]

    # ---- reports ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add rates, totals and memory to the report of a training step.

        Raises:
            StageError: when the loss is no number any more; every later step would be lost.
        """
        if "loss" in logs or "eval_loss" in logs:
            self.check_losses()
        if "loss" in logs:
            logs |= self._meter.settle(self.args.device)
        for name in ("loss", "eval_loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise StageError(
                    f"{name} is {logs[name]} at step {self.state.global_step}: {DIVERGED}"
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
        self._expire()
        with self._meter.paused(), _random_states_kept():
            loss, tokens = self._validation_sums()
        self._expire()
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
                batch.pop(ROW_LENGTHS)
                sums[1] += batch.pop(SUPERVISED)
                inputs = _on_device(batch, self.args.device)
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
                with self.compute_loss_context_manager():
                    # Divided by 1 item, the model's loss is the sum over tokens.
                    sums[0] += model(**inputs, num_items_in_batch=1).loss
        model.train(was_training)
        sums[0] /= self.get_tp_size()  # processes that divide each layer read the same rows
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        loss, tokens = sums.tolist()
        return loss, int(tokens)


def follow_autocast(embedding: torch.nn.Module) -> None:
    """Lets the sums between layers begin in autocast's type, as with weights in that type.

    Autocast leaves an embedding of float32 weights in float32, and with it every sum and norm:
    twice the bytes, 14 of 230 ms of a step of 16,384 tokens (Llama-3.2-1B's shape, H100, counted).
    """

    def cast_output(module: Any, args: Any, output: Tensor) -> Tensor:
        kind = output.device.type
        on = torch.is_autocast_enabled(kind)
        return output.to(torch.get_autocast_dtype(kind)) if on else output

    embedding.register_forward_hook(cast_output)


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
