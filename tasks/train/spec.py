"""What decides the trained weights (`TrainSpec`), and what place and pace (`TrainPlacement`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regrow.tasks.stage import StageError
from regrow.tasks.train.schedule import Cadence

if TYPE_CHECKING:
    from regrow.configs.recipe import Recipe

VERSION = 1
"""Raised whenever the same spec and data would give other bytes."""


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA adapter; the names are PEFT's, less the prefix `lora_`."""

    r: int
    alpha: float
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    """Names of layers, or one regular expression."""
    target_linear: bool = False
    rslora: bool = False
    dora: bool = False
    init: bool | str = True
    modules_to_save: tuple[str, ...] = ()

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> AdapterSpec | None:
        """None when all weights are trained.

        Raises:
            StageError: for an adapter that is not supported.
        """
        if recipe.adapter is None:
            return None
        if recipe.adapter != "lora" or recipe.load_in_4bit or recipe.load_in_8bit:
            raise StageError(
                f"adapter: {recipe.adapter} on a quantized base is not supported yet; "
                "use `adapter: lora` without load_in_4bit and load_in_8bit"
            )
        if recipe.lora_r is None or recipe.lora_alpha is None:
            raise StageError("adapter: lora needs lora_r and lora_alpha")
        if recipe.peft_init_lora_weights in ("pissa", "olora"):
            raise StageError(
                f"peft_init_lora_weights: {recipe.peft_init_lora_weights} changes the base model, "
                "which the adapter would not fit afterwards; it is not supported yet"
            )
        return cls(
            r=recipe.lora_r,
            alpha=recipe.lora_alpha,
            dropout=recipe.lora_dropout,
            target_modules=_targets(recipe.lora_target_modules),
            target_linear=recipe.lora_target_linear,
            rslora=recipe.peft_use_rslora,
            dora=recipe.peft_use_dora,
            init=recipe.peft_init_lora_weights,
            modules_to_save=tuple(sorted(recipe.lora_modules_to_save)),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdapterSpec:
        """The inverse of canonical JSON."""
        lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
        return cls(**{**data, **lists})


def _targets(names: tuple[str, ...]) -> tuple[str, ...] | str | None:
    """One text that is no plain name is a regular expression, as in PEFT."""
    if len(names) == 1 and not names[0].replace(".", "_").isidentifier():
        return names[0]
    return tuple(sorted(names)) or None


@dataclass(frozen=True)
class TrainSpec:
    """All that decides the trained weights, besides the prepared data."""

    base_model_digest: str
    dtype: str
    """In which forward and backward are computed, and the base of an adapter is held: "bfloat16" or
    "float32". What is trained is kept in float32 whatever this says; a model trained whole is
    stored in this type at the end."""
    global_batch_size: int
    """Rows of an optimizer step, over all ranks and micro-batches."""
    num_epochs: float
    learning_rate: float
    adapter: AdapterSpec | None = None
    """None: all weights are trained."""
    max_steps: int | None = None
    """Overrides `num_epochs`."""
    optimizer: str = "adamw_torch_fused"
    """A name in `transformers.training_args.OptimizerNames`."""
    lr_scheduler: str = "cosine"
    """A name in `transformers.SchedulerType`."""
    lr_scheduler_kwargs: Mapping[str, Any] = field(default_factory=dict)
    warmup_steps: int | None = None
    """Wins over `warmup_ratio`."""
    warmup_ratio: float | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """0 leaves gradients as they are."""
    neftune_noise_alpha: float | None = None
    seed: int = 42

    @classmethod
    def from_recipe(cls, recipe: Recipe, base_model_digest: str) -> TrainSpec:
        """The part of the recipe that decides the weights.

        Raises:
            StageError: for a setting whose result could not be repeated.
        """
        if recipe.lr_scheduler == "reduce_lr_on_plateau":
            raise StageError(
                "lr_scheduler: reduce_lr_on_plateau makes the weights depend on when the "
                "validation loss is taken; choose another, such as cosine"
            )
        scheduler, kwargs = _scheduler(recipe)
        return cls(
            base_model_digest=base_model_digest,
            dtype=recipe.dtype,
            adapter=AdapterSpec.from_recipe(recipe),
            global_batch_size=recipe.global_batch_size,
            num_epochs=recipe.num_epochs,
            max_steps=recipe.max_steps,
            learning_rate=recipe.learning_rate,
            optimizer=recipe.optimizer,
            lr_scheduler=scheduler,
            lr_scheduler_kwargs=kwargs,
            warmup_steps=recipe.warmup_steps,
            warmup_ratio=recipe.warmup_ratio,
            weight_decay=recipe.weight_decay,
            adam_beta1=recipe.adam_beta1,
            adam_beta2=recipe.adam_beta2,
            adam_epsilon=recipe.adam_epsilon,
            max_grad_norm=recipe.max_grad_norm,
            neftune_noise_alpha=recipe.neftune_noise_alpha,
            seed=recipe.seed,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainSpec:
        """The inverse of canonical JSON."""
        adapter = data.get("adapter")
        return cls(**{**data, "adapter": AdapterSpec.from_json(adapter) if adapter else None})


def _scheduler(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Axolotl's `cosine_min_lr_ratio` in Transformers' words."""
    kwargs = dict(recipe.lr_scheduler_kwargs)
    if recipe.lr_scheduler == "cosine" and recipe.cosine_min_lr_ratio is not None:
        return "cosine_with_min_lr", kwargs | {"min_lr_rate": recipe.cosine_min_lr_ratio}
    return recipe.lr_scheduler, kwargs


ONCE_PER_EPOCH = Cadence(per_epoch=1)


@dataclass(frozen=True)
class TrainPlacement:
    """Where and how fast; never changes the result beyond the rounding of sums."""

    base_model: str
    """Local directory, or a pinned place on the hub."""
    num_processes: int = 1
    micro_batch_size: int = 1
    """Rows of one forward pass on one rank."""
    eval_batch_size: int | None = None
    """Rows of one forward pass of a validation; None: as `micro_batch_size`."""
    logging_steps: int = 1
    evaluation: Cadence = ONCE_PER_EPOCH
    saving: Cadence = ONCE_PER_EPOCH
    save_total_limit: int | None = 4
    gradient_checkpointing: bool = False
    use_reentrant: bool = False
    dataloader_num_workers: int = 0
    pad_to: int | None = None
    """Pad each row to this many tokens."""
    tf32: bool = True
    """Let float32 matrix products use TF32 on a GPU that has it."""
    device: str = "auto"
    """"auto" (CUDA where there is some), "cpu" or "cuda"."""
    trust_remote_code: bool = False

    @classmethod
    def from_recipe(cls, recipe: Recipe, base_model: str, num_processes: int = 1) -> TrainPlacement:
        """The part of the recipe that decides where and how fast."""
        return cls(
            base_model=base_model,
            num_processes=recipe.num_processes or num_processes,
            micro_batch_size=recipe.micro_batch_size,
            eval_batch_size=recipe.eval_batch_size,
            logging_steps=recipe.logging_steps,
            evaluation=_cadence(recipe.eval_strategy, recipe.eval_steps, recipe.evals_per_epoch),
            saving=_cadence(recipe.save_strategy, recipe.save_steps, recipe.saves_per_epoch),
            save_total_limit=recipe.save_total_limit,
            gradient_checkpointing=recipe.gradient_checkpointing,
            use_reentrant=recipe.gradient_checkpointing_kwargs.use_reentrant,
            pad_to=recipe.sequence_len if recipe.pad_to_sequence_len else None,
            tf32=bool(recipe.tf32),
            trust_remote_code=recipe.trust_remote_code,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainPlacement:
        """The inverse of canonical JSON."""
        cadences = {name: Cadence(**data[name]) for name in ("evaluation", "saving")}
        return cls(**{**data, **cadences})


def _cadence(strategy: str | None, steps: float | None, per_epoch: int | None) -> Cadence:
    """Axolotl's three keys in one. Nothing said means once in each epoch."""
    if strategy == "no":
        return Cadence()
    if strategy == "epoch":
        return ONCE_PER_EPOCH
    if steps is not None or per_epoch is not None:
        return Cadence(steps=steps, per_epoch=per_epoch)
    return ONCE_PER_EPOCH
