"""The training loop: batches, steps, optimizer, schedule, precision, checkpoints."""

from __future__ import annotations

from typing import Any, Literal

from regrow.configs.optimizers import Optimizer
from regrow.configs.sections.section import (
    Count,
    Fraction,
    NotNegative,
    Positive,
    Ratio,
    Section,
    Seed,
    Texts,
    Whole,
)

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
    "one_cycle",
    "rex",
]


class LearningRateGroup(Section):
    """Layers that learn at a rate of their own."""

    name: str
    """What people call the group."""
    modules: Texts
    """Parts of the parameters' names, such as embed_tokens."""
    lr: Positive
    """Their highest learning rate."""


class GradientCheckpointingKwargs(Section):
    """How activations are recomputed."""

    use_reentrant: bool = False
    """torch's older implementation when true. Default false, which torch recommends; the gradients
    are the same."""


class TrainingSection(Section):
    """How the weights are trained."""

    micro_batch_size: Literal["auto"] | Count = 1
    """Rows in one forward pass on one device. Placement: never changes the result while
    `batch_size` or the product with `gradient_accumulation_steps` stays. `auto`: as many as are
    computed to fit the GPU (`regrow plan`), 1 where none is known; needs `batch_size`. Default 1,
    Axolotl's."""

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

    optimizer: Optimizer = "adamw_torch_fused"
    """Axolotl's name of the optimizer; the 8-bit and paged ones need bitsandbytes or torchao, some
    others a package of their own, named when it is missing. Default `adamw_torch_fused`,
    Axolotl's."""

    optim_args: str | dict[str, Any] = {}
    """Further arguments of the optimizer: a map, or text such as "rank=64, scale=0.25". Default:
    none."""

    optim_target_modules: Texts = ()
    """Layers whose gradients galore_* and apollo_* project: names or regular expressions, or
    all-linear. Default for these optimizers: attn and mlp, Axolotl's."""

    weight_decay: NotNegative = 0.0
    """Decoupled weight decay. Default 0, Axolotl's."""

    adam_beta1: Fraction = 0.9
    """Decay of Adam's first moment. Default 0.9, Adam's."""

    adam_beta2: Fraction = 0.999
    """Decay of Adam's second moment. Default 0.999, Adam's."""

    adam_epsilon: Positive = 1e-8
    """Keeps Adam from dividing by zero. Default 1e-8, Adam's."""

    adam_beta3: Fraction | None = None
    """CAME's third decay, or AdEMAMix's slow one. Default: the optimizer's own."""

    adam_epsilon2: Positive | None = None
    """CAME's second epsilon. Default: the optimizer's own."""

    embedding_lr: Positive | None = None
    """Learning rate of embeddings and output head that are trained in full. Default:
    `learning_rate`."""

    embedding_lr_scale: Positive | None = None
    """The same as a multiple of `learning_rate`."""

    lr_groups: tuple[LearningRateGroup, ...] = ()
    """Layers that learn at rates of their own. Default: none."""

    unfrozen_parameters: Texts = ()
    """Without `adapter`: regular expressions of the parameters that are trained, and no others;
    `[0:32000]` behind one means these rows only. Default: all are trained."""

    max_grad_norm: NotNegative = 1.0
    """Gradients are scaled down to this norm; 0 turns it off. Default 1, Transformers'."""

    lr_scheduler: Scheduler = "cosine"
    """The learning rate's course: Transformers' names, `one_cycle` and `rex`. Default `cosine`,
    Axolotl's."""

    lr_scheduler_kwargs: dict[str, Any] = {}
    """Further arguments of the scheduler, such as min_lr_rate. Default: none."""

    cosine_min_lr_ratio: Ratio | None = None
    """With `lr_scheduler: cosine`: end at this share of `learning_rate` instead of at 0."""

    cosine_constant_lr_ratio: Fraction | None = None
    """With `cosine_min_lr_ratio`: the lowest rate is reached after this share of all steps, and
    kept. Default: at the end."""

    lr_div_factor: Positive | None = None
    """With `lr_scheduler: one_cycle`: it starts at learning_rate / this. Default 25, torch's."""

    lr_quadratic_warmup: bool = False
    """With `lr_scheduler: cosine`: warm up as the square of the share of steps. Default false."""

    jagged_restart_steps: Count | None = None
    """The learning rate falls to a thousandth and warms up again every so many steps. Default:
    never."""

    jagged_restart_warmup_steps: Whole | Literal[False] | None = None
    """Steps of each such warm-up. Default 0."""

    jagged_restart_anneal_steps: Whole | Literal[False] | None = None
    """Steps over which the rate falls before each restart. Default 0: at once."""

    relora: bool = False
    """With `jagged_restart_steps`: at each restart the adapter begins anew over what it has learnt,
    so that many updates of a low rank sum up to a high one (arXiv 2307.05695). The result is one
    adapter with the ranks of all rounds; the base stays as it is. Default false."""

    relora_prune_method: Literal["magnitude", "random", "reset"] = "magnitude"
    """Which elements of the optimizer's moments become 0 at a restart: the smallest, or a random
    choice (reset: of nearly all). Default magnitude, Axolotl's."""

    relora_prune_ratio: Ratio | None = None
    """Their share. Default 0.9, with `relora_prune_method: reset` 0.999; Axolotl's."""

    warmup_steps: Whole | None = None
    """Steps over which the learning rate rises from 0. Default: see `warmup_ratio`."""

    warmup_ratio: Fraction | None = None
    """The same as a share of all steps. Default 0.03 when `warmup_steps` is not given: Axolotl's,
    less its cap of 100 steps."""

    neftune_noise_alpha: Positive | None = None
    """Strength of NEFTune's noise on the embeddings while training; 5 is usual. Default: none."""

    group_by_length: bool = False
    """Steps of rows of like length, in random order. Only without `sample_packing`, where rows
    differ in length. Default false, Axolotl's."""

    curriculum_sampling: bool = False
    """Train on the rows in the order of the prepared data, in every epoch. Default false: mixed
    anew for each epoch, as Axolotl does."""

    label_smoothing_factor: Fraction = 0.0
    """Share of each target's probability given to all tokens alike. Default 0."""

    z_loss_coefficient: NotNegative = 0.0
    """Weight of the square of the logits' log-sum-exp in the loss, which keeps logits small; 1e-4
    is usual (PaLM, arXiv 2204.02311). Default 0."""

    output_router_logits: bool = False
    """Add the loss that balances a mixture's experts (Switch Transformer, arXiv 2101.03961): of
    each row what Transformers' models add, and the mean over the rows of a step, so that it is the
    same on any number of processes. Axolotl's place for it is `model_config`, which is read, too.
    Default false."""

    router_aux_loss_coef: NotNegative | None = None
    """What that loss weighs. Default: as the model's `config.json` says."""

    loss_watchdog_threshold: Positive | None = None
    """A training loss above this counts as diverged. Default: no watch is kept."""

    loss_watchdog_patience: Count = 3
    """Reports of a loss above the threshold, one after the other, that end the training with an
    error. Default 3, Axolotl's examples'."""

    early_stopping_patience: Count | None = None
    """Stop when this many validations in a row bring no lower loss; the model of the lowest loss is
    the result. Default: train to the end."""

    load_best_model_at_end: bool = False
    """The model of the lowest validation loss is the result, not the last one. Default false."""

    metric_for_best_model: Literal["loss", "eval_loss"] = "loss"
    """What the best model is best in: the validation loss."""

    greater_is_better: Literal[False] = False
    """Whether a larger metric is better; of a loss it never is."""

    seed: Seed = 42
    """Seed of the data order, the adapter's first values and dropout; numpy takes 32 bits. Default
    42, Axolotl's."""

    bf16: Literal["auto", "full"] | bool = "auto"
    """Compute in bfloat16; false: float32. `auto` and `full` mean true, on every machine. Default
    `auto`, Axolotl's."""

    fp8: bool = False
    """Linear layers multiply in 8-bit floats, on GPUs that have them. All weights are trained: by
    torchao, one scale for each tensor. With `adapter: lora`: the frozen layers under it, one scale
    for each row; their 8 bits take as much memory again, and the merge adds the adapter to the
    weights in 16 bits. Weights and sums stay as with `bf16`. Default false."""

    tf32: Literal["auto"] | bool = "auto"
    """Let float32 matrix products use TF32 where the GPU has it; `auto` means true. Default `auto`,
    Axolotl's."""

    gradient_checkpointing: Literal["auto", "selective", "offload"] | bool = False
    """Recompute activations in the backward pass: less memory, about a third more time; the same
    gradients. `selective`: all but attention's results; `offload`: the layers' inputs wait in the
    host's memory; `auto`: as little as the GPU's memory allows.
    Default false, Axolotl's."""

    gradient_checkpointing_kwargs: GradientCheckpointingKwargs = GradientCheckpointingKwargs()
    """How: `use_reentrant`."""

    logging_steps: Count = 1
    """Optimizer steps between reports of the loss. Default 1: 239 of 244 published recipes use
    it."""

    save_strategy: Literal["no", "steps", "epoch", "best"] | None = None
    """When a checkpoint to resume from is kept; `best`: after each validation that brings the
    lowest loss so far. Default, as Axolotl does: `steps` when `save_steps`
    or `saves_per_epoch` is given, else `epoch`."""

    save_steps: Positive | None = None
    """Optimizer steps between checkpoints; below 1: share of all steps."""

    saves_per_epoch: Whole | None = None
    """Checkpoints in each epoch; 0: none."""

    save_total_limit: Count = 4
    """Checkpoints kept; older ones are removed. Default 4, Axolotl's."""
