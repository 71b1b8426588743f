"""Counts bytes of tensors in a real training step on the CPU: kept for backward, and most alive."""

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from regrow.tasks.forecast.model_shape import ModelShape, model_shape
from regrow.tasks.modeling import attention
from regrow.tasks.modeling.adapter import add_adapter
from regrow.tasks.modeling.kernels import swap_kernels
from regrow.tasks.train.trainers.loop import follow_autocast

TOKENS, SEGMENTS = 256, 4
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "pad_token_id": 0,
}


def build(
    kind: str, adapter: dict[str, Any] | None, kernels: tuple[str, ...] = (), **config: Any
) -> tuple[Any, ModelShape]:
    """A small model as the worker makes it: float32, or bfloat16 under a float32 adapter."""
    attention.register()
    sizes = {name: size for name, size in (SMALL | config).items() if size is not None}
    made = AutoConfig.for_model(kind, **sizes)
    plain = json.loads(made.to_json_string(use_diff=False))
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        made,
        dtype=torch.bfloat16 if adapter else torch.float32,
        attn_implementation=attention.NAME,
    )
    model.config.use_cache = False
    if adapter:
        model = add_adapter(model, **adapter)
    if kernels:
        swap_kernels(model, kernels)
    follow_autocast(model.get_input_embeddings())
    return model.train(), model_shape(plain)


def batch(vocabulary: int, tokens: int = TOKENS) -> dict[str, Any]:
    """One packed row of four examples, all of it supervised."""
    ids = torch.randint(0, vocabulary, (1, tokens))
    length = tokens // SEGMENTS
    labels = ids.clone()
    labels[0, ::length] = -100
    seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": (torch.arange(tokens) % length)[None],
        "cu_seq_lens_q": seqlens,
        "cu_seq_lens_k": seqlens,
        "max_length_q": length,
        "max_length_k": length,
        "num_items_in_batch": torch.tensor(tokens),
    }


class _Held:
    """A saved tensor; as long as the graph lives, so does this."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_bytes(model: Any, inputs: dict[str, Any]) -> int:
    """Bytes that the graph of one forward pass holds, besides parameters and inputs."""
    held: list[weakref.ref[_Held]] = []

    def pack(tensor: torch.Tensor) -> _Held:
        made = _Held(tensor)
        held.append(weakref.ref(made))
        return made

    known = {_storage(t) for t in (*model.parameters(), *model.buffers())}
    known |= {_storage(t) for t in inputs.values() if isinstance(t, torch.Tensor)}
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda made: made.tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        loss = model(**inputs).loss
    found = {}
    for reference in held:
        alive = reference()
        if alive is not None and _storage(alive.tensor) not in known:
            found[_storage(alive.tensor)] = alive.tensor.untyped_storage().nbytes()
    del loss
    return sum(found.values())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Meter(TorchDispatchMode):
    """Adds up the storages that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, torch.Tensor):
                self._seen.add(leaf.untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@contextmanager
def peak_meter() -> Iterator[_Meter]:
    """Most bytes of tensors made inside that were alive at once: `meter.peak`."""
    meter = _Meter()
    with meter:
        yield meter
