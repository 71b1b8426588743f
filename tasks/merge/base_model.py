"""The base model to merge into: its layers at rest, and where their weights are read from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from regrow.tasks.merge.files import BaseFiles, fits
from regrow.tasks.merge.lazy import Weights, put_to_rest
from regrow.tasks.modeling.load import (
    DTYPES,
    empty_model,
    grow_embeddings,
    load_model,
    with_new_rows,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A bare model whose parameters rest, to be computed and merged layer by layer."""

    model: PreTrainedModel
    weights: Weights
    stored: Mapping[str, Tensor]
    """{name: weights in the stored precision}, read when they are asked for."""
    streamed: bool
    """Whether they come from the files one by one; False: the whole model is in memory, in the
    precision of its spec."""

    def read(self, name: str) -> Tensor:
        """A parameter's weights in float32, in memory of their own."""
        return self.stored[name].to(torch.float32, copy=True)


def open_base(directory: Path, dtype: str, vocabulary: int, trust_remote_code: bool) -> Base:
    """The model in `directory` with at least `vocabulary` rows of embeddings.

    Models whose files have other names or shapes than their modules (some mixtures of experts,
    weights stored quantized, code of their own) are loaded whole, in `dtype`.

    Raises:
        StageError: for a model that cannot be loaded.
    """
    model = empty_model(directory, trust_remote_code=trust_remote_code)
    files = BaseFiles(directory)
    embedding: Any = model.get_input_embeddings()
    grows = vocabulary > embedding.weight.shape[0]
    if not _is_plain(model, files, grows):
        logger.info("the files of %s do not map one to one: the model is loaded whole", directory)
        return _whole(directory, dtype, vocabulary, trust_remote_code)
    grown: set[str] = set()
    if grows:
        model = empty_model(directory, vocabulary=vocabulary, trust_remote_code=trust_remote_code)
        grown = _end_names(model)
    put_to_rest(model)
    buffers = _load_buffers(model, files)
    stored = _Stored(files, DTYPES[dtype], grown, vocabulary, _aliases(model, files), buffers)
    return Base(model, Weights(model), stored, streamed=True)


def _whole(directory: Path, dtype: str, vocabulary: int, trust_remote_code: bool) -> Base:
    model = load_model(directory, dtype=dtype, trust_remote_code=trust_remote_code)
    grow_embeddings(model, vocabulary)
    model.requires_grad_(False)
    weights = Weights(model)
    return Base(model, weights, {name: p.data for p, name in weights.names.items()}, False)


def _is_plain(model: PreTrainedModel, files: BaseFiles, grows: bool) -> bool:
    config: Any = model.config
    head: Any = model.get_output_embeddings()
    odd = getattr(config, "quantization_config", None) or getattr(config, "auto_map", None)
    if odd or (grows and getattr(head, "bias", None) is not None):
        return False
    buffers = model.state_dict().keys() - dict(model.named_parameters()).keys()
    names = files.names | _aliases(model, files).keys()
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return fits({*dict(model.named_parameters()), *(buffers - tied)}, names)


def _aliases(model: PreTrainedModel, files: BaseFiles) -> dict[str, str]:
    """{name: name in the files} of tied parameters that are stored under their other name."""
    groups: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(parameter, []).append(name)
    found = {}
    for first, *others in groups.values():
        stored = [name for name in others if name in files.names]
        if first not in files.names and stored:
            found[first] = stored[0]
    return found


def _end_names(model: PreTrainedModel) -> set[str]:
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [end.weight for end in ends if end is not None]
    return {name for name, p in model.named_parameters() if any(p is w for w in weights)}


def _load_buffers(model: PreTrainedModel, files: BaseFiles) -> set[str]:
    """Read the buffers that are part of the weights; their names."""
    found = set()
    for name, buffer in model.named_buffers():
        if name in files.names:
            buffer.copy_(files.read(name))
            found.add(name)
    return found


class _Stored(Mapping[str, Tensor]):
    """The parameters, and the buffers among the weights, in `dtype`; read anew each time."""

    def __init__(
        self,
        files: BaseFiles,
        dtype: torch.dtype,
        grown: set[str],
        vocabulary: int,
        aliases: Mapping[str, str],
        buffers: set[str],
    ) -> None:
        self._files, self._dtype = files, dtype
        self._grown, self._vocabulary = grown, vocabulary
        self._aliases, self._buffers = aliases, buffers

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._files.read(self._aliases.get(name, name))
        if tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        return with_new_rows(tensor, self._vocabulary) if name in self._grown else tensor

    def __iter__(self) -> Any:
        """Names of the buffers; those of the parameters are the model's."""
        return iter(sorted(self._buffers))

    def __len__(self) -> int:
        return len(self._buffers)
