"""Stores a model from weights that come one after the other: no memory ever holds them all.

The files are those of `save_pretrained` for the same weights, but of 4 GiB at most: tied weights
are stored once, and tensors go back to the names and shapes of the files that Transformers loads
(a stack of experts to one matrix for each).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from regrow.tasks.modeling.load import DTYPES
from regrow.tasks.modeling.model_files import SHARD_BYTES, ShardWriter, write_config
from regrow.tasks.modeling.rounding import rounded
from regrow.tasks.train.state import clean_name


def why_not_streamed(model: Any) -> str:
    """What of a model lets its files not be made from one weight at a time; "" when nothing.

    Of the model alone, not of how training divides it: the same files in every way.
    """
    if getattr(model.config, "auto_map", None):
        return "its code is stored with it"
    if getattr(model, "hf_quantizer", None) is not None:
        return "its weights are stored quantized"
    if getattr(model, "_keys_to_ignore_on_save", None):
        return "some of its weights are not stored"
    groups, buffers = list(_names_of_one(model)), dict(_buffers(model))
    if any(len(_kept(group, model)) != 1 for group in groups):
        return "it shares weights that it does not name as shared"
    names = {name for group in groups for name in group} | buffers.keys()
    if {clean_name(name) for name in model.state_dict()} != names:
        return "its state holds more than parameters and buffers"
    parameters = {clean_name(n): p for n, p in model.named_parameters()}
    held = {_kept(group, model)[0]: parameters[group[0]] for group in groups} | buffers
    return "" if _go_back_alone(model, held) else "its files need several of its weights at once"


def save_streamed(
    model: Any,
    weights: Iterable[tuple[str, Tensor]],
    out: Path,
    dtype: str,
    most_bytes: int = SHARD_BYTES,
) -> None:
    """The configuration of `model` and all `weights`, of its parameters' names, in `dtype`.

    Each weight is rounded as `regrow.tasks.modeling.rounding` says. Of the model itself only the
    buffers' numbers are read.
    """
    stored = {group[0]: _kept(group, model)[0] for group in _names_of_one(model)}
    missing = set(stored)
    writer = ShardWriter(out, most_bytes)
    for name, weight in itertools.chain(weights, _buffers(model)):
        missing.discard(name)
        tensor = rounded(weight.detach().cpu(), name, DTYPES[dtype])
        parts = revert_weight_conversion(model, {stored.get(name, name): tensor})
        for part_name, part in parts.items():
            writer.add(part_name, part)
    assert not missing, missing
    writer.close()
    write_config(model, dtype, out)


def _names_of_one(model: Any) -> Iterator[list[str]]:
    """Of each parameter its names: several where it is shared."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(clean_name(name))
    yield from groups.values()


def _kept(names: list[str], model: Any) -> list[str]:
    """Those of a parameter's names by which Transformers looks for it: one, if it knows it."""
    return names if len(names) == 1 else [n for n in names if n not in model.all_tied_weights_keys]


def _buffers(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Those that are stored."""
    known = model.state_dict().keys()
    return ((clean_name(n), buffer) for n, buffer in model.named_buffers() if n in known)


def _go_back_alone(model: Any, held: Mapping[str, Tensor]) -> bool:
    """Whether Transformers makes the same of each tensor by itself as of all together."""
    empty = {
        # A parameter that DeepSpeed has divided says its shape elsewhere.
        name: torch.empty(getattr(tensor, "ds_shape", tensor.shape), device="meta")
        for name, tensor in held.items()
    }
    together = revert_weight_conversion(model, dict(empty))
    alone: dict[str, Tensor] = {}
    for name, tensor in empty.items():
        alone |= revert_weight_conversion(model, {name: tensor})
    return {n: t.shape for n, t in alone.items()} == {n: t.shape for n, t in together.items()}
