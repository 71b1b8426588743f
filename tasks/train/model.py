"""The model that is trained: the base, what is put on it, and what of it is frozen."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import set_seed

from regrow.infra.launch import world_size
from regrow.tasks.modeling.adapter import add_adapter, embedding_names, load_adapter
from regrow.tasks.modeling.expert_balance import Routers
from regrow.tasks.modeling.first_values import (
    changes_base,
    initialise_from_data,
    keep_first_values,
)
from regrow.tasks.modeling.float8 import freeze_in_float8, multiply_in_float8
from regrow.tasks.modeling.freezing import train_only
from regrow.tasks.modeling.kernels import (
    WITH_ADAPTERS,
    Swapped,
    chosen_kernels,
    swap_kernels,
)
from regrow.tasks.modeling.load import (
    DTYPES,
    grow_embeddings,
    load_model,
    load_tokenizer,
    random_model,
)
from regrow.tasks.modeling.loss_head import LossTerms
from regrow.tasks.modeling.quantized_parts import divide_adapters
from regrow.tasks.modeling.rounds import Rounds
from regrow.tasks.modeling.rows import PackedRows, Row
from regrow.tasks.modeling.sharded_layers import (
    check_shared_weight,
    is_sharded,
    keep_gathered,
    shard_adapter,
    size_adapter,
)
from regrow.tasks.modeling.side_by_side import is_attached
from regrow.tasks.modeling.tensor_parallel import (
    check_adapter,
    check_divided,
    check_vocabulary,
    name_whole_sizes,
    take_first_values,
)
from regrow.tasks.stage import StageError
from regrow.tasks.train.adapter_spec import AdapterSpec
from regrow.tasks.train.job import WorkerJob
from regrow.tasks.train.noise import EmbeddingNoise
from regrow.tasks.train.state import trained_parameters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """A model ready for its first step."""

    model: Any
    """With an adapter (`PeftModel`) or without."""
    use_cache: bool
    """What the base's configuration says of the key-value cache; training turns it off."""
    partly_trained: frozenset[str] = frozenset()
    """Names of parameters of which some rows are frozen."""
    first_values: Path | None = None
    """The adapter before training, where it changed the base."""
    rounds: Rounds | None = None
    """Of a ReLoRA training: what the adapter has learnt before it began anew."""
    kernels: Swapped = field(default_factory=Swapped)
    """Which of our kernels compute it."""
    routers: Routers | None = None
    """Of a mixture whose experts are balanced."""


def build_model(job: WorkerJob, *, whole: bool = False) -> TrainedModel:
    """The model that the job's spec describes: the same on every rank, and after each resume.

    Args:
        whole: this process alone gets all of it, however training divides it.

    Raises:
        StageError: for a base, an adapter or a vocabulary that do not fit together.
    """
    spec = job.spec
    model = _base(job, whole=whole)
    use_cache = bool(getattr(model.config, "use_cache", True))
    known = len(load_tokenizer(job.prepared / "tokenizer"))
    sharding = job.placement.sharding
    if sharding.tensor_parallel_size > 1 and not whole:
        check_vocabulary(model, known)
    if is_sharded(model):
        _check_sharded(model, job)
    new_tokens = grow_embeddings(model, known)
    set_seed(spec.seed)
    partly: frozenset[str] = frozenset()
    first_values = None
    trained: Any = model
    if spec.adapter:
        trained = _with_adapter(model, spec.adapter, job, whole=whole)
        _check_new_tokens(trained, new_tokens)
        if changes_base(spec.adapter.init):
            first_values = job.work / f"first-values-{_rank()}"
            keep_first_values(trained, first_values)
    elif spec.unfrozen:
        partly = train_only(model, spec.unfrozen, DTYPES[spec.dtype])
    if spec.fp8:
        in_float8 = freeze_in_float8 if spec.adapter else multiply_in_float8
        count = in_float8(trained, job.placement.device)
        logger.info("%d linear layers multiply in float8", count)
    if spec.neftune_noise_alpha:
        EmbeddingNoise(spec.neftune_noise_alpha).attach(trained)
    rounds = Rounds(trained, DTYPES[spec.dtype]) if spec.relora else None
    kernels = _swap(trained, job)
    _check_side_by_side(trained, job)
    routers = Routers(trained, spec.router_aux_loss_coef) if spec.router_aux_loss else None
    return TrainedModel(trained, use_cache, partly, first_values, rounds, kernels, routers)


def _check_sharded(model: Any, job: WorkerJob) -> None:
    """A base that Transformers has laid out for FSDP2 while it loaded it."""
    if job.spec.adapter is None:
        check_shared_weight(model, world_size())
    if not (job.placement.sharding.fsdp or {}).get("reshard_after_forward", True):
        keep_gathered(model)


def _check_side_by_side(model: Any, job: WorkerJob) -> None:
    """What needs packed rows inside of the model, too."""
    if not is_attached(model):
        return
    why = "this model computes its examples side by side, padded, which does not go with it"
    if job.spec.router_aux_loss:
        raise StageError(f"output_router_logits: {why}; remove it")
    if job.placement.sharding.context_parallel_size > 1:
        raise StageError(f"context_parallel_size: {why}; remove it")


def _base(job: WorkerJob, *, whole: bool) -> Any:
    """The model that training begins with, before anything is put on it."""
    spec, trust = job.spec, job.placement.trust_remote_code
    if spec.reinit_weights:
        return random_model(job.base_model, spec.seed, trust_remote_code=trust)
    size = job.placement.sharding.tensor_parallel_size
    # bitsandbytes quantizes on the GPU, which may not hold all that it has a part of: the whole is
    # made in the host's memory, for its adapter's names and values alone.
    quantization = None if whole and size > 1 else spec.quantization
    return load_model(
        job.base_model,
        # What is trained is float32: in bfloat16 most small updates round to nothing.
        dtype=spec.dtype if spec.adapter else "float32",
        trust_remote_code=trust,
        quantization=quantization,
        tensor_parallel_size=1 if whole else size,
        fsdp_size=1 if whole else job.placement.sharding.shards_of_layers(world_size()),
    )


def _swap(model: Any, job: WorkerJob) -> Swapped:
    """Our kernels, where the placement has them."""
    spec, place = job.spec, job.placement
    on_cuda = place.device != "cpu" and torch.cuda.is_available()
    kernels = chosen_kernels(place.kernels, "cuda" if on_cuda else "cpu")
    if place.sharding.tensor_parallel_size > 1:  # they know whole layers only
        kernels = ()
    if spec.relora:  # they know one adapter on a layer, and its earlier rounds are a second one
        kernels = tuple(name for name in kernels if name not in WITH_ADAPTERS)
    if any(name.endswith("Norm") for name in place.sharding.wrapped_classes):
        kernels = tuple(name for name in kernels if name != "rms_norm")  # FSDP looks for its class
    terms = LossTerms(spec.label_smoothing, spec.z_loss)
    zero3 = place.sharding.divides_weights_by_zero
    done = swap_kernels(
        model,
        kernels,
        terms,
        whole_layers=zero3 or place.sharding.gathers_layers,
        apart=place.sharding.kernels_apart,
    )
    if zero3:
        from regrow.tasks.train.zero import gather_with_layers  # imports DeepSpeed

        gather_with_layers(model)
    return done


def _with_adapter(model: Any, spec: AdapterSpec, job: WorkerJob, *, whole: bool) -> PeftModel:
    if spec.start is not None:
        assert job.start_adapter is not None
        return load_adapter(model, job.start_adapter, trainable=True)
    divided = job.placement.sharding.tensor_parallel_size > 1 and not whole
    if divided:
        others = bool(spec.modules_to_save or spec.trainable_tokens or spec.target_parameters)
        check_adapter(spec.init, spec.dora, others)
    settings = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    del settings["start"]
    adapted = add_adapter(model, **settings)
    if divided:
        check_divided(adapted)
        sharded = is_sharded(adapted)
        if sharded:
            size_adapter(adapted)
        drawn_whole = divide_adapters(adapted)
        name_whole_sizes(adapted)
        if not drawn_whole:
            first = _rank() == 0
            take_first_values(adapted, trained_parameters(_one_process(job)) if first else None)
        if sharded:
            shard_adapter(adapted)
        set_seed(job.spec.seed)  # drop out the same on all
    if spec.init == "eva":
        if torch.cuda.is_available():
            adapted.to(torch.device("cuda", torch.cuda.current_device()))
        initialise_from_data(adapted, _rows(job.prepared))
    return adapted


def _one_process(job: WorkerJob) -> Any:
    """The model as one process alone builds it, in the host's memory."""
    return build_model(job, whole=True).model


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _rows(prepared: Path) -> Iterator[Row]:
    """Training rows from the first on: the same on every rank."""
    rows = PackedRows(prepared, "train")
    return (rows[index] for index in range(len(rows)))


def _check_new_tokens(model: PeftModel, new: int) -> None:
    if not new:
        return
    logger.info("the vocabulary has %d new tokens; the embedding grew", new)
    config: Any = model.peft_config["default"]
    base: Any = model.get_base_model()
    needed = embedding_names(base)
    if not needed <= set(config.modules_to_save or ()) and not config.trainable_token_indices:
        raise StageError(
            f"the tokenizer has {new} tokens that the base model does not know, and an adapter "
            f"alone cannot learn them: set lora_modules_to_save: [{', '.join(sorted(needed))}], or "
            "name them in peft_trainable_token_indices"
        )
