"""What decides the trained weights (`TrainSpec`), and what place and pace (`TrainPlacement`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regrow.tasks.modeling.quantization import Quantization
from regrow.tasks.stage import StageError
from regrow.tasks.train.adapter_spec import AdapterSpec
from regrow.tasks.train.cluster import RayWorkers
from regrow.tasks.train.reporters import Reporters
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.sharding import Sharding

if TYPE_CHECKING:
    from regrow.configs.recipe import Recipe

VERSION = 1
"""Raised whenever the same spec and data would give other bytes."""


@dataclass(frozen=True)
class LearningRateGroup:
    """Parameters that learn at a rate of their own."""

    modules: tuple[str, ...]
    """Parts of their names."""
    lr: float


@dataclass(frozen=True)
class Restarts:
    """A learning rate that falls and warms up again every so many steps."""

    steps: int
    warmup: int = 0
    anneal: int = 0


@dataclass(frozen=True)
class ReLoRASpec:
    """What an adapter's restart takes out of the optimizer; it restarts with the learning rate."""

    prune_method: str = "magnitude"
    prune_ratio: float = 0.9


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
    """None: the weights themselves are trained."""
    quantization: Quantization | None = None
    """Of the base below an adapter; None: it is held in `dtype`."""
    fp8: bool = False
    """Linear layers multiply in 8-bit floats, see `regrow.tasks.modeling.float8`."""
    reinit_weights: bool = False
    """Training begins at random weights; of the base model only the architecture counts."""
    unfrozen: tuple[str, ...] = ()
    """Without an adapter: regular expressions of the parameters that are trained; none: all."""
    max_steps: int | None = None
    """Overrides `num_epochs`."""
    optimizer: str = "adamw_torch_fused"
    """A name in `regrow.configs.optimizers`."""
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer."""
    optimizer_targets: tuple[str, ...] = ()
    """Layers whose gradients a low-rank optimizer projects."""
    lr_groups: tuple[LearningRateGroup, ...] = ()
    """The first group that names a part of a parameter's name holds it."""
    embedding_lr: float | None = None
    """Of embeddings and head trained in full; None: `learning_rate`."""
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float | None = None
    lr_scheduler: str = "cosine"
    """A name in `transformers.SchedulerType`, or in `regrow.tasks.train.learning_rate`."""
    lr_scheduler_kwargs: Mapping[str, Any] = field(default_factory=dict)
    restarts: Restarts | None = None
    relora: ReLoRASpec | None = None
    """The adapter begins anew at each of the restarts, over what it has learnt."""
    warmup_steps: int | None = None
    """Wins over `warmup_ratio`."""
    warmup_ratio: float | None = None
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    adam_beta3: float | None = None
    adam_epsilon2: float | None = None
    max_grad_norm: float = 1.0
    """0 leaves gradients as they are."""
    neftune_noise_alpha: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    """Weight of the squared log-sum-exp of the logits in the loss."""
    router_aux_loss: bool = False
    """The loss that balances a mixture's experts is added, see
    `regrow.tasks.modeling.expert_balance`."""
    router_aux_loss_coef: float | None = None
    """What it weighs; None: as the model's own configuration says."""
    keep_best: bool = False
    """The result is the model of the lowest validation loss, not the last one."""
    early_stopping_patience: int | None = None
    """Validations without a lower loss that end the training; None: it goes to its end."""
    validation: Cadence | None = None
    """When validations run, where the weights depend on them; None: that is placement."""
    row_order: str = "mixed"
    """As `order.DataOrder.kind`: mixed, by_length or stored."""
    seed: int = 42

    @classmethod
    def from_recipe(
        cls, recipe: Recipe, base_model_digest: str, start_adapter_digest: str | None = None
    ) -> TrainSpec:
        """The part of the recipe that decides the weights.

        Raises:
            StageError: for an adapter without rank or scale.
        """
        scheduler, kwargs = _scheduler(recipe)
        plateau = scheduler == "reduce_lr_on_plateau"
        return cls(
            base_model_digest=base_model_digest,
            dtype=recipe.dtype,
            adapter=AdapterSpec.from_recipe(recipe, start_adapter_digest),
            quantization=Quantization.from_recipe(recipe),
            fp8=recipe.fp8,
            reinit_weights=recipe.reinit_weights,
            unfrozen=recipe.unfrozen_parameters,
            global_batch_size=recipe.global_batch_size,
            num_epochs=recipe.num_epochs,
            max_steps=recipe.max_steps,
            learning_rate=recipe.learning_rate,
            optimizer=recipe.optimizer,
            optimizer_args=_arguments(recipe.optim_args),
            optimizer_targets=recipe.optim_target_modules,
            lr_groups=tuple(LearningRateGroup(g.modules, g.lr) for g in recipe.lr_groups),
            embedding_lr=_embedding_lr(recipe),
            loraplus_lr_ratio=recipe.loraplus_lr_ratio,
            loraplus_lr_embedding=_loraplus_lr_embedding(recipe),
            lr_scheduler=scheduler,
            lr_scheduler_kwargs=kwargs,
            restarts=_restarts(recipe),
            relora=_relora(recipe),
            warmup_steps=recipe.warmup_steps,
            warmup_ratio=recipe.warmup_ratio,
            weight_decay=recipe.weight_decay,
            adam_beta1=recipe.adam_beta1,
            adam_beta2=recipe.adam_beta2,
            adam_epsilon=recipe.adam_epsilon,
            adam_beta3=recipe.adam_beta3,
            adam_epsilon2=recipe.adam_epsilon2,
            max_grad_norm=recipe.max_grad_norm,
            neftune_noise_alpha=recipe.neftune_noise_alpha,
            **_loss_terms(recipe),
            keep_best=recipe.load_best_model_at_end,
            early_stopping_patience=recipe.early_stopping_patience,
            validation=_validation(recipe) if plateau or recipe.load_best_model_at_end else None,
            row_order=_row_order(recipe),
            seed=recipe.seed,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainSpec:
        """The inverse of canonical JSON."""
        adapter, restarts, cadence = (data.get(n) for n in ("adapter", "restarts", "validation"))
        groups = data.get("lr_groups", ())
        parts = {
            "adapter": AdapterSpec.from_json(adapter) if adapter else None,
            "quantization": Quantization.from_json(data.get("quantization")),
            "lr_groups": tuple(LearningRateGroup(tuple(g["modules"]), g["lr"]) for g in groups),
            "restarts": Restarts(**restarts) if restarts else None,
            "relora": ReLoRASpec(**data["relora"]) if data.get("relora") else None,
            "validation": Cadence(**cadence) if cadence else None,
        }
        lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
        return cls(**{**data, **lists, **parts})


def _loss_terms(recipe: Recipe) -> dict[str, Any]:
    """What the loss has beside cross entropy."""
    return {
        "label_smoothing": recipe.label_smoothing_factor,
        "z_loss": recipe.z_loss_coefficient,
        "router_aux_loss": recipe.output_router_logits,
        "router_aux_loss_coef": recipe.router_aux_loss_coef,
    }


def _row_order(recipe: Recipe) -> str:
    if recipe.curriculum_sampling:
        return "stored"
    return "by_length" if recipe.group_by_length else "mixed"


def _scheduler(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Axolotl's keys in the words of `regrow.tasks.train.learning_rate`."""
    name, kwargs = recipe.lr_scheduler, dict(recipe.lr_scheduler_kwargs)
    lowest = recipe.cosine_min_lr_ratio
    if name == "cosine" and (recipe.lr_quadratic_warmup or recipe.cosine_constant_lr_ratio):
        kwargs |= {"min_lr_rate": lowest or 0.0, "quadratic": recipe.lr_quadratic_warmup}
        return "cosine_until", kwargs | {"until": recipe.cosine_constant_lr_ratio or 1.0}
    if name == "cosine" and lowest is not None:
        return "cosine_with_min_lr", kwargs | {"min_lr_rate": lowest}
    if name == "rex" and lowest is not None:
        return name, {"min_lr_rate": lowest} | kwargs
    if name == "one_cycle" and recipe.lr_div_factor:
        return name, kwargs | {"div_factor": recipe.lr_div_factor}
    return name, kwargs


def _arguments(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """`optim_args` as a map; Axolotl takes text such as "rank=64, scale=0.25" too.

    Raises:
        StageError: for text that is nothing of the kind.
    """
    if not isinstance(given, str):
        return dict(given)
    pairs = [part.partition("=") for part in given.replace(" ", "").split(",") if part]
    if not all(sign and name for name, sign, _ in pairs):
        raise StageError(f'optim_args: {given!r} is not of the form "name=value, name=value"')
    return {name: value for name, _, value in pairs}


def _embedding_lr(recipe: Recipe) -> float | None:
    scale = recipe.embedding_lr_scale
    return recipe.embedding_lr or (recipe.learning_rate * scale if scale else None)


def _loraplus_lr_embedding(recipe: Recipe) -> float | None:
    return recipe.loraplus_lr_embedding if recipe.loraplus_lr_ratio else None


def _restarts(recipe: Recipe) -> Restarts | None:
    if not recipe.jagged_restart_steps:
        return None
    warmup, anneal = recipe.jagged_restart_warmup_steps, recipe.jagged_restart_anneal_steps
    return Restarts(recipe.jagged_restart_steps, warmup or 0, anneal or 0)


_RESET = 0.999
"""Share of the moments that `reset` takes: Axolotl's, and the paper's code's."""


def _relora(recipe: Recipe) -> ReLoRASpec | None:
    if not recipe.relora:
        return None
    ratio, method = recipe.relora_prune_ratio, recipe.relora_prune_method
    if ratio is None:
        ratio = _RESET if method == "reset" else ReLoRASpec.prune_ratio
    return ReLoRASpec(method, ratio)


def _validation(recipe: Recipe) -> Cadence:
    return _cadence(recipe.eval_strategy, recipe.eval_steps, recipe.evals_per_epoch)


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
    save_at_best: bool = False
    """Save after each validation with the lowest loss so far, as well."""
    start_adapter: str | None = None
    """Place of the adapter to go on from: a local directory, or a pinned place on the hub."""
    loss_watchdog_threshold: float | None = None
    """A training loss above it is a sign of divergence: `loss_watchdog_patience` such reports in a
    row end the training with an error. A result that comes is the same with or without."""
    loss_watchdog_patience: int = 3
    gradient_checkpointing: bool | str = False
    """Whether activations are computed again in the backward pass: true, false, or a policy in
    `regrow.tasks.modeling.recompute`; "auto": the one that computes least again and fits."""
    fallback: str | None = None
    """The policy that takes the place of `gradient_checkpointing` since memory ran out; "offload"
    then keeps nothing on a device that seems to have room. For the stage to set."""
    use_reentrant: bool = False
    kernels: str | tuple[str, ...] = "auto"
    """"auto" (all on CUDA, none elsewhere), "off", or names in `regrow.tasks.modeling.kernels`.
    They round other sums than Transformers' layers and depend on the device, as sharding does: that
    is placement, and the result names those that ran."""
    dataloader_num_workers: int = 0
    pad_to: int | None = None
    """Pad each row to this many tokens."""
    tf32: bool = True
    """Let float32 matrix products use TF32 on a GPU that has it."""
    device: str = "auto"
    """"auto" (CUDA where there is some), "cpu" or "cuda"."""
    trust_remote_code: bool = False
    time_limit: float | None = None
    """Seconds after which training saves and stops, to go on in another run."""
    gpu_memory_limit: float | None = None
    """GiB that torch may take of each GPU; None: all of it."""
    hang_timeout: float | None = 1800.0
    """Seconds without any step after which a worker counts as hanging; None: for ever."""
    max_restarts: int = 3
    """How often a worker that died is started again without a newer checkpoint in between."""
    retry_on_oom: bool = True
    """Halve the micro-batch when memory runs out, and go on."""
    sharding: Sharding = field(default_factory=Sharding)
    """How the model is laid over the processes."""
    ray: RayWorkers | None = None
    """Workers of a Ray cluster that train; None: this machine, and those of its environment."""
    reporters: Reporters = field(default_factory=Reporters)
    """Who hears of the course of training beside MLflow."""

    @classmethod
    def from_recipe(
        cls,
        recipe: Recipe,
        base_model: str,
        num_processes: int = 1,
        start_adapter: str | None = None,
        micro_batch_size: int | None = None,
        gradient_checkpointing: bool | str | None = None,
    ) -> TrainPlacement:
        """The part of the recipe that decides where and how fast.

        Args:
            micro_batch_size: what its `auto` means here; None: its own value, or one row.
            gradient_checkpointing: the same; None: its own value, of which the worker makes out
                what `auto` means on its device.
        """
        if gradient_checkpointing is None:
            gradient_checkpointing = recipe.gradient_checkpointing
        workers = RayWorkers.from_recipe(recipe)
        return cls(
            base_model=base_model,
            num_processes=recipe.num_processes or (workers.ranks if workers else num_processes),
            ray=workers,
            micro_batch_size=micro_batch_size or recipe.rows_at_once,
            eval_batch_size=recipe.eval_batch_size,
            logging_steps=recipe.logging_steps,
            evaluation=_validation(recipe),
            saving=_cadence(recipe.save_strategy, recipe.save_steps, recipe.saves_per_epoch),
            save_at_best=recipe.save_strategy == "best",
            start_adapter=start_adapter,
            loss_watchdog_threshold=recipe.loss_watchdog_threshold,
            loss_watchdog_patience=recipe.loss_watchdog_patience,
            save_total_limit=recipe.save_total_limit,
            # Not by Accelerate, which leaves random states: dropout would drop others (1.15).
            gradient_checkpointing=True
            if recipe.fsdp_config and recipe.fsdp_config.activation_checkpointing
            else gradient_checkpointing,
            use_reentrant=recipe.gradient_checkpointing_kwargs.use_reentrant,
            kernels=recipe.kernels,
            pad_to=recipe.sequence_len if recipe.pad_to_sequence_len else None,
            tf32=bool(recipe.tf32),
            trust_remote_code=recipe.trust_remote_code,
            gpu_memory_limit=recipe.gpu_memory_limit,
            time_limit=recipe.time_limit and 60 * recipe.time_limit,
            hang_timeout=recipe.hang_timeout and 60 * recipe.hang_timeout,
            max_restarts=recipe.max_restarts,
            retry_on_oom=recipe.auto_find_batch_size,
            sharding=Sharding.from_recipe(recipe),
            reporters=Reporters.from_recipe(recipe),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainPlacement:
        """The inverse of canonical JSON."""
        cadences = {name: Cadence(**data[name]) for name in ("evaluation", "saving")}
        sharding = Sharding.from_json(data.get("sharding"))
        kernels = data.get("kernels", "auto")
        kernels = kernels if isinstance(kernels, str) else tuple(kernels)
        reporters = Reporters.from_json(data.get("reporters"))
        parts = {"sharding": sharding, "kernels": kernels, "reporters": reporters}
        parts["ray"] = RayWorkers.from_json(data.get("ray"))
        return cls(**{**data, **cadences, **parts})


def _cadence(strategy: str | None, steps: float | None, per_epoch: int | None) -> Cadence:
    """Axolotl's three keys in one. Nothing said means once in each epoch."""
    if strategy in ("no", "best"):
        return Cadence()
    if strategy == "epoch":
        return ONCE_PER_EPOCH
    if steps is not None or per_epoch is not None:
        return Cadence(steps=steps, per_epoch=per_epoch)
    return ONCE_PER_EPOCH
