"""The training loop: batches, steps, optimizer, schedule, precision, checkpoints."""

from __future__ import annotations

from typing import Any, Literal, get_args

from regrow.configs.sections.section import (
    Count,
    Fraction,
    NotNegative,
    Positive,
    Ratio,
    Section,
    Whole,
)

TorchOptimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"
]
"""Optimizers that Transformers builds from torch and itself alone."""

BitsandbytesOptimizer = Literal[
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_8bit",
    "paged_ademamix_32bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
]
"""Optimizers that Transformers builds from bitsandbytes: the worker needs the extra `gpu`."""

BITSANDBYTES_OPTIMIZERS = get_args(BitsandbytesOptimizer)

Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
]


class GradientCheckpointingKwargs(Section):
    """How activations are recomputed."""

    use_reentrant: bool = False
    """torch's older implementation when true. Default false, which torch recommends; the gradients
    are the same."""


class TrainingSection(Section):
    """How the weights are trained."""

    micro_batch_size: Count = 1
    """Rows in one forward pass on one device. Placement: never changes the result while
    `batch_size` or the product with `gradient_accumulation_steps` stays. Default 1, Axolotl's."""

    gradient_accumulation_steps: Count = 1
    """Forward passes before each step of the optimizer. The global batch is this times
    `micro_batch_size` rows, on any number of devices. Default 1, Axolotl's."""

    batch_size: Count | None = None
    """Rows before each step of the optimizer, over all devices; stands in for
    `gradient_accumulation_steps`. Default: micro_batch_size * gradient_accumulation_steps."""

    num_epochs: Positive = 1.0
    """Passes over the training data. Default 1, Axolotl's."""

    max_steps: Count | None = None
    """Optimizer steps to train for, whatever `num_epochs` says. Default: none."""

    learning_rate: Positive
    """Highest learning rate. No default: it depends on the model and the adapter. 1e-4 to 3e-4 is
    usual for LoRA, 1e-5 to 5e-5 for full weights."""

    optimizer: TorchOptimizer | BitsandbytesOptimizer = "adamw_torch_fused"
    """Transformers' name of the optimizer; the 8-bit and paged ones need bitsandbytes and a GPU.
    Default `adamw_torch_fused`, Axolotl's."""

    weight_decay: NotNegative = 0.0
    """Decoupled weight decay. Default 0, Axolotl's."""

    adam_beta1: Fraction = 0.9
    """Decay of Adam's first moment. Default 0.9, Adam's."""

    adam_beta2: Fraction = 0.999
    """Decay of Adam's second moment. Default 0.999, Adam's."""

    adam_epsilon: Positive = 1e-8
    """Keeps Adam from dividing by zero. Default 1e-8, Adam's."""

    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this norm; 0 turns it off. Default 1, Transformers'."""

    lr_scheduler: Scheduler = "cosine"
    """Transformers' name of the learning rate's course. Default `cosine`, Axolotl's."""

    lr_scheduler_kwargs: dict[str, Any] = {}
    """Further arguments of the scheduler, such as min_lr_rate. Default: none."""

    cosine_min_lr_ratio: Ratio | None = None
    """With `lr_scheduler: cosine`: end at this share of `learning_rate` instead of at 0."""

    warmup_steps: Whole | None = None
    """Steps over which the learning rate rises from 0. Default: see `warmup_ratio`."""

    warmup_ratio: Fraction | None = None
    """The same as a share of all steps. Default 0.03 when `warmup_steps` is not given: Axolotl's,
    less its cap of 100 steps."""

    neftune_noise_alpha: Positive | None = None
    """Strength of NEFTune's noise on the embeddings while training; 5 is usual. Default: none."""

    seed: Whole = 42
    """Seed of the data order, the adapter's first values and dropout. Default 42, Axolotl's."""

    bf16: Literal["auto", "full"] | bool = "auto"
    """Compute in bfloat16; false: float32. `auto` and `full` mean true, on every machine. Default
    `auto`, Axolotl's."""

    fp16: bool = False
    """Compute in float16 (not here: use `bf16`)."""

    tf32: Literal["auto"] | bool = "auto"
    """Let float32 matrix products use TF32 where the GPU has it; `auto` means true. Default `auto`,
    Axolotl's."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time; the same
    gradients. Default false, Axolotl's."""

    gradient_checkpointing_kwargs: GradientCheckpointingKwargs = GradientCheckpointingKwargs()
    """How: `use_reentrant`."""

    logging_steps: Count = 1
    """Optimizer steps between reports of the loss. Default 1: 239 of 244 published recipes use
    it."""

    save_strategy: Literal["no", "steps", "epoch"] | None = None
    """When a checkpoint to resume from is kept. Default, as Axolotl does: `steps` when `save_steps`
    or `saves_per_epoch` is given, else `epoch`."""

    save_steps: Positive | None = None
    """Optimizer steps between checkpoints; below 1: share of all steps."""

    saves_per_epoch: Whole | None = None
    """Checkpoints in each epoch; 0: none."""

    save_total_limit: Count = 4
    """Checkpoints kept; older ones are removed. Default 4, Axolotl's."""
