"""Writes the merged model, one layer after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from regrow.tasks.merge.base_model import Base
from regrow.tasks.merge.lazy import merged, units
from regrow.tasks.modeling.load import DTYPES
from regrow.tasks.modeling.model_files import ShardWriter, write_config
from regrow.tasks.modeling.rounding import round_stochastically


def write_merged(base: Base, adapted: PeftModel, dtype: str, out: Path) -> None:
    """Store the model with the adapter merged into it in `out`: safetensors and configuration.

    Float32 sums are rounded as `regrow.tasks.modeling.rounding` says; what the adapter does not
    touch is copied.
    """
    weights = merged_weights(base, adapted, DTYPES[dtype])
    if base.streamed:
        writer = ShardWriter(out)
        for name, tensor in weights:
            writer.add(name, tensor)
        writer.close()
        write_config(base.model, dtype, out)
        return
    # The model's own way back to the names and shapes of its files.
    parameters = {name: parameter for parameter, name in base.weights.names.items()}
    final = dict(weights)
    model: Any = adapted.unload()
    for name, tensor in final.items():
        parameters[name].data = tensor
    model.save_pretrained(str(out))


@torch.no_grad()
def merged_weights(
    base: Base, adapted: PeftModel, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """(name, merged weights in `dtype`) of each parameter, and of buffers among the weights."""
    names = base.weights.names
    trained_whole = _trained_whole(adapted)
    done = set()
    for unit in (u for u in units(adapted) if isinstance(u, BaseTunerLayer)):
        inside = [p for p in unit.parameters() if p in names and names[p] not in done]
        with base.weights.awake(inside, base.read), merged(unit):
            rounded = [(names[p], _rounded(p.data, names[p], dtype)) for p in inside]
        done |= {name for name, _ in rounded}
        yield from rounded
    for parameter, name in names.items():
        if name in done:
            continue
        replacement = trained_whole.get(parameter)
        if replacement is not None:
            yield name, _rounded(replacement.float(), name, dtype)
        else:
            yield name, base.stored[name].to(dtype)
    for name in base.stored if base.streamed else ():
        yield name, base.stored[name]


def _rounded(weight: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16 and weight.dtype == torch.float32:
        return round_stochastically(weight, name)
    return weight.to(dtype, copy=True)


def _trained_whole(adapted: PeftModel) -> dict[nn.Parameter, Tensor]:
    """{base parameter: what stands for it} of the modules trained in full."""
    found = {}
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            new = dict(module.modules_to_save["default"].named_parameters())
            for name, parameter in module.original_module.named_parameters():
                found[parameter] = new[name].data
    return found
