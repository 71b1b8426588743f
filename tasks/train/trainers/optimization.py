"""What every trainer shares of optimizing: the recipe's optimizer, schedule and loss.

Mixed in before `StepLoop`. It overrides public methods of `Trainer` only.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer

from regrow.tasks.modeling.joint_weights import lay_together
from regrow.tasks.modeling.offload import OffloadSaved
from regrow.tasks.train.gathering import gather_early
from regrow.tasks.train.learning_rate import make_scheduler
from regrow.tasks.train.losses import loss_function
from regrow.tasks.train.optimizers import (
    build_divided,
    class_in_place,
    divides_parameters,
    drop_empty_groups,
    own_optimizer,
    projectors_onto_device,
)
from regrow.tasks.train.shard_adamw import ShardAdamW
from regrow.tasks.train.shard_steps import stepping_shards
from regrow.tasks.train.spec import TrainSpec
from regrow.tasks.train.trainers.fused_adamw import NAMES, FusedAdamW

logger = logging.getLogger(__name__)

_Base = Trainer if TYPE_CHECKING else object


class Optimization(_Base):
    """Trainer behaviour that follows from the part of the spec about optimizing."""

    def __init__(
        self,
        *,
        spec: TrainSpec,
        partly_trained: frozenset[str] = frozenset(),
        model_has_loss: bool = False,
        offloads: bool = False,
        stays: float = 0,
        roomy: bool = True,
        **kwargs: Any,
    ) -> None:
        """`partly_trained`: names of parameters of which some rows are frozen; `model_has_loss`:
        the model's own loss has the recipe's terms already (`regrow.tasks.modeling.loss_head`);
        `offloads`: activations that are kept wait in the host's memory, all but the newest `stays`
        bytes of them; `roomy`: frozen weights may be laid anew, which leaves holes."""
        loss = None if model_has_loss else loss_function(spec.label_smoothing, spec.z_loss)
        super().__init__(
            optimizer_cls_and_kwargs=own_optimizer(spec), compute_loss_func=loss, **kwargs
        )
        self._spec, self._partly_trained = spec, partly_trained
        self._offloads, self._stays = offloads, stays
        self._has_kernels = model_has_loss
        if roomy and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            lay_together(cast(Any, self.model))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does."""
        if not self._offloads:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with OffloadSaved(inputs["input_ids"].shape[1], self._stays):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Weight decay would draw the frozen rows of a parameter to zero."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if name not in self._partly_trained]

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """The Trainer's or ours; bitsandbytes' in a form that takes what FSDP2 divides."""
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        cls = class_in_place(getattr(args.optim, "value", args.optim), cls)
        divided = getattr(args, "fsdp_plugin_args", None)  # None without FSDP
        return (stepping_shards(cls) if divided else cls), kwargs

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, unless parameters have rates of their own or ours computes the same."""
        if self.optimizer is None and self._steps_in_one_pass():
            kind = self._one_pass()
            assert kind is not None
            self.optimizer_cls_and_kwargs = kind, self._one_pass_settings()
            part = " of this process's part of each weight" if kind is ShardAdamW else ""
            logger.info("AdamW clips and steps in one pass%s", part)
        if self.optimizer is None and divides_parameters(self._spec):
            model: Any = args[0] if args and args[0] is not None else self.model
            decayed = set(self.get_decay_parameter_names(model))
            chosen = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
                self.args, model
            )
            self.optimizer = build_divided(model, self._spec, decayed, *chosen)
        optimizer = super().create_optimizer(*args, **kwargs)
        drop_empty_groups(optimizer)
        return optimizer

    def _steps_in_one_pass(self) -> bool:
        """Whether ours stands in for PyTorch's."""
        spec = self._spec
        trained = [p.dtype for p in cast(Any, self.model).parameters() if p.requires_grad]
        plain = spec.adapter is None and spec.optimizer in NAMES and not spec.optimizer_args
        known = self._one_pass() is not None and set(trained) == {torch.float32}
        return self._has_kernels and plain and known

    def _one_pass(self) -> type[FusedAdamW] | None:
        """The class of ours for how this training is laid out."""
        if self.is_deepspeed_enabled:
            return None
        if self.is_fsdp_enabled:
            plugin: Any = self.accelerator.state.fsdp_plugin
            offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)  # steps on the CPU
            return None if offloads or self.args.world_size == 1 else ShardAdamW
        return FusedAdamW if self.args.world_size == 1 else None

    def _one_pass_settings(self) -> dict[str, Any]:
        spec, loop = self._spec, cast(Any, self)
        more = {"after": self._gather_ahead} if self._one_pass() is ShardAdamW else {}
        return more | {
            "lr": spec.learning_rate,
            "betas": (float(spec.adam_beta1), float(spec.adam_beta2)),
            "eps": spec.adam_epsilon,
            "max_grad_norm": spec.max_grad_norm,
            "rounded": loop.rounded,
        }

    def _gather_ahead(self, moved: torch.Tensor) -> None:
        """The embedding is sent for the next step while all other weights move.

        Not one that is the head, too: others, which have not moved yet, may be sent with it.
        """
        model: Any = self.model
        first, last = model.get_input_embeddings(), model.get_output_embeddings()
        goes_on = self.state.global_step + 1 < self.state.max_steps
        alone = moved is first.weight and (last is None or moved is not last.weight)
        if goes_on and alone:
            gather_early(model)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does; of a step's last micro-batch, the gradients go to the optimizer."""
        loss = super().training_step(*args, **kwargs)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, ShardAdamW) and self.accelerator.sync_gradients:
            optimizer.take()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the norm of the gradients that the optimizer clips itself."""
        norm = getattr(getattr(self.optimizer, "optimizer", self.optimizer), "norm", None)
        if "grad_norm" in logs and norm is not None:
            logs["grad_norm"] = norm.item()
        super().log(logs, *args, **kwargs)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """The course that the spec says; the Trainer takes it as it is."""
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            chosen: Any = optimizer or self.optimizer
            self.lr_scheduler = make_scheduler(chosen, self._spec, warmup, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """With the weights that would be the result now."""
        with averaged_weights(self.optimizer):
            return super().evaluate(*args, **kwargs)

    def restore(self, saved: Any) -> None:
        """As `StepLoop` does; low-rank optimizers need one thing more."""
        super().restore(saved)  # pyright: ignore[reportAttributeAccessIssue]
        projectors_onto_device(getattr(self.optimizer, "optimizer", self.optimizer))

    def use_final_weights(self) -> None:
        """After the last step: put the weights that are the result into the model, for good."""
        optimizer = _averaging(self.optimizer)
        if optimizer is not None:
            optimizer.eval()


@contextlib.contextmanager
def averaged_weights(optimizer: Any) -> Iterator[None]:
    """Inside, the averages of a schedule-free optimizer are the model's weights.

    It can go back by itself, but only up to rounding: what was there is put back to the bit.
    """
    averaging = _averaging(optimizer)
    if averaging is None:
        yield
        return
    parameters = [p for group in averaging.param_groups for p in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    averaging.eval()
    try:
        yield
    finally:
        averaging.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _averaging(optimizer: Any) -> Any:
    """The optimizer itself, without Accelerate's cover, if it is schedule-free; else None."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if callable(getattr(inner, "eval", None)) else None
