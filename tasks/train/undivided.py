"""Quantized weights that no library lays out over processes: each process holds them whole.

They are frozen, and every process quantizes the same numbers, so nothing is lost but memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from regrow.tasks.modeling.quantized_experts import QuantizedStack, quantized_stacks


def keep_undivided(model: nn.Module, accelerator: Any) -> None:
    """Before the model is laid out: FSDP passes these weights over, and DDP does not send them.

    (FSDP shards tensors by their numbers, and int8 weights and quantized experts are numbers with
    scales beside them. 4-bit linear layers Accelerate passes over by itself.)
    """
    modules = list(_undivided(model))
    if not modules:
        return
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.ignored_modules = modules
        plugin.cpu_ram_efficient_loading = False  # it would load all weights anew, from rank 0
    names = [n for n, p in model.named_parameters() if isinstance(p, QuantizedStack)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def _undivided(model: nn.Module) -> Iterator[nn.Module]:
    """The innermost modules: what an adapter has put around them is not among them."""
    for _, module in quantized_stacks(model):
        yield module
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and not list(module.children()):
            yield module
