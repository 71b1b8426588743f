"""Lays a fully trained model out for FSDP2 so that matrices travel in the type they multiply in.

Weights are kept in float32, and autocast rounds each matrix before it multiplies. FSDP2 can round
first and send half the bytes: the same numbers are multiplied, and a gradient is rounded where
autocast's backward pass would round it, then added up over processes in float32. What autocast
leaves in float32 must not be rounded at all, norms above all: all of that is one small group of its
own, gathered once for each pass. (FSDP2 has one policy for each group, and a module is the root of
one group only: so the model itself holds the norms of all layers, and a layer the rest.)

Accelerate takes a model that is laid out already as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import TrainerCallback

from regrow.tasks.modeling.load import DTYPES
from regrow.tasks.modeling.sharded_layers import is_sharded
from regrow.tasks.train.sharding import Sharding
from regrow.tasks.train.spec import TrainSpec

logger = logging.getLogger(__name__)

_KEPT_WHOLE = 0.01
"""The largest share of the layers' numbers that each process may hold in float32 for a whole step:
norms are 1/10,000 of Llama-3.1-8B; experts, which are no linear layers, are nearly all."""


def rounds_before_sending(spec: TrainSpec, sharding: Sharding) -> bool:
    """Whether a training is one whose matrices should travel rounded.

    With adapters the frozen base is held in bfloat16 and travels so. What Accelerate does while it
    lays a model out itself is left to it: to fill the empty tensors that an efficient load into the
    host's memory gives all ranks but one.
    """
    whole = spec.adapter is None and spec.quantization is None and not spec.fp8
    loads_once = (sharding.fsdp or {}).get("cpu_ram_efficient_loading")
    by_layer = sharding.fsdp is not None and sharding.gathers_layers and not loads_once
    return whole and by_layer and spec.dtype != "float32"


def gather_rounded(model: Any, trainer: Any, spec: TrainSpec, sharding: Sharding) -> None:
    """Before Accelerate prepares a model for FSDP2: lay it out, if this training is such a one."""
    accelerator = trainer.accelerator
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None or is_sharded(model):
        trainer.add_callback(ReshardAfterValidation())
    if plugin is None or not rounds_before_sending(spec, sharding):
        return
    plugin.set_auto_wrap_policy(model)
    is_layer = fsdp2_prepare_auto_wrap_policy(plugin, model)
    layers = [m for m in _bottom_up(model) if is_layer and m is not model and is_layer(m)]
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    processes = mesh.size(mesh.ndim - 1) if mesh is not None else accelerator.num_processes
    why = _why_not(model, layers, processes)
    if why:
        logger.info("FSDP sends weights in float32: %s", why)
        return
    logger.info("FSDP sends matrices in %s, and what else is trained in float32", spec.dtype)
    how: dict[str, Any] = {"mesh": mesh, "offload_policy": plugin.cpu_offload}
    _lay_out(model, layers, DTYPES[spec.dtype], plugin.reshard_after_forward, how)


def _why_not(model: nn.Module, layers: list[nn.Module], processes: int) -> str:
    """What of a model would not go with it; "" when nothing."""
    if not layers:
        return "the model does not say which modules are its layers"
    inside = {p for layer in layers for p in layer.parameters()}
    rest = inside - _matrices(layers)
    if _numbers(rest) > _KEPT_WHOLE * _numbers(inside):
        return "its layers hold large weights that are not those of linear layers"
    # Accelerate tells parameters by the addresses of their parts, and an empty part has none.
    if any(p.ndim == 0 or _leaves_one_empty(len(p), processes) for p in model.parameters()):
        return f"a weight cannot be cut into {processes} parts"
    return ""


def _leaves_one_empty(rows: int, processes: int) -> bool:
    """As `torch.chunk` divides: 128 rows are 22 parts of at most 6, not 24."""
    return -(-rows // processes) * (processes - 1) >= rows


def _lay_out(
    model: Any, layers: list[nn.Module], dtype: torch.dtype, reshard: Any, how: dict[str, Any]
) -> None:
    rounded = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    ends = _ends(model)
    low = _matrices([*layers, *(module for group in ends for module in group)])
    apart = {p for group in ends for module in group for p in module.parameters()}
    # The model first: whoever comes later leaves alone what it has, and the other way round.
    fully_shard(model, mp_policy=exact, ignored_params=low | apart, **how)
    for layer in layers:
        # Laid out anew, the model's own are other tensors than before.
        ignored = {p for p in layer.parameters() if p not in low or p in apart}
        fully_shard(
            layer, mp_policy=rounded, reshard_after_forward=reshard, ignored_params=ignored, **how
        )
    for group in ends:
        policy = rounded if all(p in low for m in group for p in m.parameters()) else exact
        # The head's weight is needed after its forward pass, and first of all in the backward one.
        last = group[-1] is model.get_output_embeddings()
        fully_shard(
            group[0] if len(group) == 1 else group,
            mp_policy=policy,
            reshard_after_forward=False if last else reshard,
            **how,
        )
        if not last:  # an embedding's gradient is that of its rows, whatever they hold
            group[0].set_unshard_in_backward(False)


def _ends(model: Any) -> list[list[Any]]:
    """Embedding and head: two groups, or one where they share a weight."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if last is None or last.weight is first.weight:
        return [[module for module in (first, last) if module is not None]]
    return [[first], [last]]


def _matrices(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    """What autocast rounds before it multiplies, and nothing else uses: weights of linear layers.

    An embedding's gradient is a sum over all tokens that are alike: bfloat16 would lose most of it
    (4,096 ones add up to 256 there). So it stays, and with it a head that shares its weight.
    """
    linear: set[nn.Parameter] = set()
    others: set[nn.Parameter] = set()
    for module in (inner for outer in modules for inner in outer.modules()):
        kind = linear if isinstance(module, nn.Linear) else others
        kind.update(module.parameters(recurse=False))
    return linear - others


class ReshardAfterValidation(TrainerCallback):
    """Lets go of weights that wait for a backward pass (the head's, in Accelerate's layout too).

    After a validation none comes: a checkpoint would hold them whole, some of them rounded, and
    nothing of their optimizer's states.
    """

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """`model` is among the keywords."""
        reshard(kwargs["model"])


def gather_early(model: Any) -> None:
    """Before the rows of a step are read: begin to send the embedding, which comes first of all.

    Later there is nothing to compute meanwhile; no layer waits for so much (2 GiB of Llama 3.1's).
    """
    embedding = model.get_input_embeddings()
    if isinstance(embedding, FSDPModule):
        embedding.unshard(async_op=True)


def reshard(model: nn.Module) -> None:
    """Each process holds its own parts only."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _bottom_up(model: nn.Module) -> list[nn.Module]:
    return list(model.modules())[::-1]  # parents come before their children in `modules`


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
