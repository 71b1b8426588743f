"""Adapters on a model whose layers are divided over processes (tensor parallelism).

Transformers divides the model while loading, by its plan for the architecture, and PEFT from 0.21.2
on divides the adapter along with it. Two things are left: PEFT gives a divided adapter layer the
sizes of its part, where Transformers 5.23 reads those of the whole; and it draws first values for
each part by itself, where they must be those of one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from regrow.tasks.modeling.quantized_parts import is_part
from regrow.tasks.stage import StageError

_SUMMED = "replicated_with_grad_allreduce"


def check_adapter(init: bool | str, dora: bool, trained_whole: bool) -> None:
    """Raises StageError for adapters that need whole layers, of which no process has one.

    Args:
        trained_whole: whether layers or tokens are trained in full beside the adapter.
    """
    if init not in (True, False, "gaussian", "orthogonal"):
        raise StageError(f"tensor_parallel_size: the first values {init!r} need whole layers")
    if dora:
        raise StageError("tensor_parallel_size: DoRA needs the length of whole rows")
    if trained_whole:
        raise StageError(
            "tensor_parallel_size: lora_modules_to_save, lora_target_parameters and "
            "peft_trainable_token_indices need whole layers; remove them, or use `fsdp_config`"
        )


def check_divided(model: nn.Module) -> None:
    """Raises StageError where PEFT left an adapter whole on a layer that is divided."""
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        base: Any = layer.get_base_layer()
        if not isinstance(getattr(base, "weight", None), DTensor) and not is_part(base):
            continue
        held: Any = [*layer.lora_A.values(), *layer.lora_B.values()]
        parts = [module.weight for module in held]
        if parts and not any(isinstance(weight, DTensor) for weight in parts):
            raise StageError(
                f"tensor_parallel_size: PEFT {peft.__version__} does not divide adapters along "
                "with their layers; install peft 0.21.2 or later, or use `fsdp_config`"
            )


def check_vocabulary(model: Any, tokens: int) -> None:
    """Raises StageError where the embedding would have to grow, which is divided."""
    if tokens > model.get_input_embeddings().weight.shape[0]:
        raise StageError(
            f"tensor_parallel_size: the tokenizer has {tokens} tokens, more than the base model's "
            "embedding, and a divided one cannot grow; use `fsdp_config`"
        )


def check_accumulation(model: Any) -> None:
    """Raises StageError for a model whose gradients Transformers would sum too often.

    The norms of heads lie whole on every process, which sees its own heads alone. Transformers 5.23
    (`ReplicatedWithGradAllReduce`) sums their gradients over the processes after each micro-batch,
    those of earlier ones once more each time.
    """
    norms = [name for name, style in model.tp_plan.items() if style == _SUMMED]
    ends = tuple(name.rpartition(".")[2] for name in norms)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    if any(name.split(".")[-2] in ends for name in trained if name.count(".")):
        raise StageError(
            f"tensor_parallel_size: {', '.join(sorted(set(ends)))} of this architecture can be "
            "trained so with one micro-batch a step only: raise micro_batch_size to the global "
            "batch, train an adapter, or use `fsdp_config`"
        )


def name_whole_sizes(model: nn.Module) -> None:
    """Let every divided linear layer say the sizes of the whole, which its weight knows."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor):
            module.out_features, module.in_features = module.weight.shape


@torch.no_grad()
def take_first_values(model: nn.Module, whole: Mapping[str, Tensor] | None) -> None:
    """Give every trained parameter its part of the first process's values; all call it together.

    Args:
        whole: on the first process {name: values} of every trained parameter, None on the others.
    """
    device: Any = next(model.parameters()).device
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if whole is not None:
            value.copy_(whole[name])
        torch.distributed.broadcast(value, src=0)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            parameter.copy_(distribute_tensor(value, mesh, placements, src_data_rank=None))
        else:
            parameter.copy_(value)
