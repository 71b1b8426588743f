"""What a training needs to go on: its tensors by name, its plain values, its random states.

The names are those of the model's parameters, whatever wraps and shards it, so that a state saved
by any number of processes under DDP or FSDP2 can be loaded by any other. Only what is trained is in
it: the frozen rest is made again from the base model, the spec and the seed.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from regrow.tasks.stage import StageError
from regrow.tasks.train.block_states import (
    SHARDS,
    as_part,
    empty_like_saved,
    is_of_shard,
    of_this_shard,
    shards_of,
)
from regrow.tasks.train.groups import NAMES, match_groups

logger = logging.getLogger(__name__)

# Names that wrappers put between a model's own: torch.compile, activation checkpointing, DDP.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "module.")

WEIGHT, OPTIMIZER = "weight/", "optimizer/"
PARTS = "parts"
"""Names the states of an optimizer that only the same processes can read, and who they were."""


@dataclass
class State:
    """Tensors (of the sharded ones, each rank's part) and values that `torch.save` can hold."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Stored(Protocol):
    """A saved state, as `regrow.tasks.train.files` reads it."""

    @property
    def values(self) -> Mapping[str, Any]: ...

    def shapes(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """{name: (global shape, type)} of all tensors."""
        ...

    def load(self, targets: dict[str, Tensor]) -> None:
        """Fill the tensors, of each rank its part; all ranks call it together."""
        ...


def check_parts(stored: Stored, here: tuple[str, int] | None) -> None:
    """Raises StageError when a state's parts are not those of these processes.

    Args:
        here: (how the processes divide 8-bit states, their number); None: not in such parts.
    """
    saved = stored.values.get(PARTS)
    if (tuple(saved) if saved else None) != here:
        way, number = saved or ("anything but DeepSpeed", "any number of")
        raise StageError(
            f"optimizer: {number} processes with {way} divided the 8-bit states of the checkpoint, "
            "and here they are divided otherwise; go on with those, or begin anew"
        )


class Engine(Protocol):
    """How tensors get into and out of what trains: torch itself, or DeepSpeed."""

    def capture(self) -> State: ...
    def restore(self, stored: Stored) -> list[int]: ...
    def is_sharded(self) -> bool: ...
    def whole_weights(self, *, frozen: bool = False) -> Iterator[tuple[str, Tensor]]: ...


def clean_name(name: str) -> str:
    """A parameter's name in the bare model."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "") if wrapper != "module." else name.removeprefix(wrapper)
    return name


def all_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name in the bare model: parameter}."""
    return {clean_name(name): parameter for name, parameter in model.named_parameters()}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The same of what is trained."""
    return {name: p for name, p in all_parameters(model).items() if p.requires_grad}


class TorchEngine:
    """Weights and optimizer of one process, of DDP, and of FSDP2."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    @torch.no_grad()
    def capture(self) -> State:
        """The live tensors, not copies."""
        parameters = trained_parameters(self._model)
        tensors: dict[str, Tensor] = {WEIGHT + n: p.detach() for n, p in parameters.items()}
        others: dict[str, dict[str, Any]] = {}
        for name, parameter in parameters.items():
            others[name] = {}
            for field, value in self._optimizer.state.get(parameter, {}).items():
                if _is_plain(value) and is_of_shard(value, parameter):
                    part = as_part(field, value, cast(DTensor, parameter))
                    tensors[f"{OPTIMIZER}{name}/{field}"] = part
                    others[name][SHARDS] = shards_of(parameter)[0]
                elif _is_plain(value):
                    _check_sharded_alike(value, parameter, self._optimizer)
                    tensors[f"{OPTIMIZER}{name}/{field}"] = value
                else:
                    others[name][field] = value
        return State(tensors, {"optimizer": others, "groups": self._groups(parameters)})

    def is_sharded(self) -> bool:
        """Whether this process holds only a part of what is trained."""
        return any(isinstance(p, DTensor) for p in self._model.parameters())

    def whole_weights(self, *, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Each trained parameter in full, one after the other; all ranks go through it together.

        Args:
            frozen: those that are not trained, too.
        """
        parameters = all_parameters if frozen else trained_parameters
        for name, parameter in parameters(self._model).items():
            weight = parameter.detach()
            yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight

    def _groups(self, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
        names = {id(p): name for name, p in parameters.items()}
        return [
            {name: value for name, value in group.items() if name != "params"}
            | {NAMES: [names[id(p)] for p in group["params"] if id(p) in names]}
            for group in self._optimizer.param_groups
        ]

    @torch.no_grad()
    def restore(self, stored: Stored) -> list[int]:
        """Put a saved state back. The optimizer must hold the same parameters.

        Returns:
            For each group of the optimizer the number of the saved one that it goes on from.

        Raises:
            KeyError: when the state is of another model or optimizer.
            StageError: for states in 8 bits that DeepSpeed divided.
        """
        check_parts(stored, None)
        parameters = trained_parameters(self._model)
        targets: dict[str, Tensor] = {WEIGHT + n: p.detach() for n, p in parameters.items()}
        others = _others(stored)
        fields: dict[str, dict[str, Any]] = {n: dict(others.get(n, {})) for n in parameters}
        for key, (shape, dtype) in stored.shapes().items():
            if key.startswith(OPTIMIZER):
                name, _, field = key.removeprefix(OPTIMIZER).rpartition("/")
                empty = _like(field, parameters[name], shape, dtype, self._pages())
                targets[key] = fields[name][field] = empty
        stored.load(targets)
        fields = {name: of_this_shard(saved, parameters[name]) for name, saved in fields.items()}
        saved = stored.values["groups"]
        matched = match_groups(self._groups(parameters), saved)
        self._load_optimizer(parameters, fields, [saved[number] for number in matched])
        return matched

    def _load_optimizer(
        self,
        parameters: Mapping[str, nn.Parameter],
        fields: Mapping[str, dict[str, Any]],
        groups: list[dict[str, Any]],
    ) -> None:
        """Through the optimizer's own `load_state_dict`, which numbers parameters by position."""
        names = {id(p): name for name, p in parameters.items()}
        state, placed, number = {}, [], 0
        for live, saved in zip(self._optimizer.param_groups, groups, strict=True):
            numbers = []
            for parameter in live["params"]:
                name = names.get(id(parameter))
                if name is not None and fields.get(name):
                    state[number] = fields[name]
                numbers.append(number)
                number += 1
            kept = {name: value for name, value in saved.items() if name != NAMES}
            here = {name: live[name] for name in _HOW if name in live}
            placed.append(kept | here | {"params": numbers})
        whole: Any = {"state": state, "param_groups": placed}
        if self._pages():
            cast(Any, self._optimizer).load_state_dict(whole, move_to_device=False)
            page_states(self._optimizer)
        else:
            self._optimizer.load_state_dict(whole)

    def _pages(self) -> bool:
        return getattr(self._optimizer, "is_paged", False)


_HOW = ("fused", "foreach", "capturable", "differentiable")
"""Of an optimizer's group: how this process computes, whatever the one that saved it did."""


_SMALLEST_PAGED = 100_000
"""Numbers of a parameter whose states are paged (bitsandbytes 0.50.2, `get_state_buffer`)."""


def page_states(optimizer: Any) -> None:
    """After a resume: the states of bitsandbytes' paged optimizers into memory that the driver
    moves to and from a GPU, as they were made. `load_state_dict` puts them into the GPU's own,
    which they may not fit."""
    for parameter, state in optimizer.state.items():
        here = _local(parameter)
        for name, value in state.items():
            if name in ("state1", "state2") and here.numel() >= _SMALLEST_PAGED:
                # AdEMAMix keeps two rows of the first; what is expanded takes no memory.
                buffer = optimizer.get_state_buffer(here.expand(value.shape), dtype=value.dtype)
                state[name] = buffer.copy_(value)
            elif isinstance(value, Tensor):
                state[name] = value.to(here.device)


def _others(stored: Stored) -> Mapping[str, Mapping[str, Any]]:
    return cast(Mapping[str, Mapping[str, Any]], stored.values["optimizer"])


def _is_plain(value: Any) -> bool:
    """Whether safetensors can hold it; tensor subclasses of quantized optimizers it cannot."""
    return type(value) in (Tensor, nn.Parameter, DTensor)


def _check_sharded_alike(value: Tensor, parameter: Tensor, optimizer: Any) -> None:
    """A part of a state can be found again only if it is sharded as its parameter is."""
    alike = isinstance(value, DTensor) and value.shape == parameter.shape
    assert not isinstance(parameter, DTensor) or alike or value.dim() == 0, (
        f"{type(optimizer).__name__} keeps a state of shape {tuple(value.shape)} for a sharded "
        f"parameter of shape {tuple(parameter.shape)}"
    )


def _like(
    field: str, parameter: Tensor, shape: tuple[int, ...], dtype: torch.dtype, on_host: bool
) -> Tensor:
    """An empty tensor for a state: sharded as the parameter, where it has the same shape.

    Args:
        on_host: in the host's memory, for a GPU may not hold all of them.
    """
    if on_host and not isinstance(parameter, DTensor):
        return torch.empty(shape, dtype=dtype)
    found = empty_like_saved(field, parameter, shape, dtype, on_host)
    if found is not None:
        return found
    if tuple(parameter.shape) == shape:
        return torch.empty_like(parameter, dtype=dtype)
    device = parameter.device if shape else torch.device("cpu")  # torch keeps step counts on CPU
    return torch.empty(shape, dtype=dtype, device=device)


# ---- random states ----


def random_states(device: torch.device) -> dict[str, Any]:
    """The global random states of this process and its device."""
    numpy = cast(dict[str, Any], np.random.get_state(legacy=False))
    numpy["state"] = {**numpy["state"], "key": numpy["state"]["key"].tolist()}
    states = {"python": random.getstate(), "numpy": numpy, "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_states` gave."""
    numpy = dict(states["numpy"])
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    numpy["state"] = {**numpy["state"], "key": key}
    random.setstate(states["python"])
    np.random.set_state(numpy)
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


# ---- copies ----


class Staging:
    """Copies a state into the host's memory, into the same buffers each time.

    On a GPU the buffers are pinned, which lets the copy run at the bus's full rate.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._making: threading.Thread | None = None
        self._closed = threading.Event()

    def prepare(self, state: State) -> None:
        """Begin to make the buffers for states like this one, while training goes on.

        Pinned ones take a second for each 1.3 GB (2 x H200, 2026-11-22: 8.8 s for 11.5 GB of each
        rank), for which the first copy would wait. Call `close` at the end.
        """
        # No daemon: an interpreter that ends while torch makes a buffer aborts.
        making = threading.Thread(target=self._make, args=(dict(state.tensors),), name="staging")
        self._making = making
        making.start()

    def close(self) -> None:
        """Make no more buffers, and give back the memory of those there are."""
        self._closed.set()
        self._await_made()
        self._buffers = {}
        if torch.cuda.is_initialized():
            _empty_host_cache()

    def _await_made(self) -> None:
        if self._making is not None:
            self._making.join()
            self._making = None

    def _make(self, tensors: Mapping[str, Tensor]) -> None:
        try:
            for name, tensor in tensors.items():
                if self._closed.is_set():
                    return
                self._buffers[name] = _buffer(tensor)
        except (RuntimeError, MemoryError) as fault:
            logger.warning("no memory yet for a copy of the training's state: %s", fault)

    def copy(self, state: State) -> State:
        """The copy; the next call overwrites it."""
        self._await_made()
        kept = self._buffers
        self._buffers = {}
        for name, tensor in state.tensors.items():
            buffer = kept.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = _buffer(tensor)
            _local(buffer).copy_(_local(tensor), non_blocking=True)
            self._buffers[name] = buffer
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return State(dict(self._buffers), _copied(state.values))


def _buffer(tensor: Tensor) -> Tensor:
    """In the host's memory, for what a tensor holds."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


def _empty_host_cache() -> None:
    """Pinned memory that is in use no more goes back to the machine: torch keeps it otherwise."""
    names = ((torch.accelerator, "empty_host_cache"), (torch._C, "_host_emptyCache"))  # new, 2.11
    empty = next((getattr(module, name) for module, name in names if hasattr(module, name)), None)
    if empty is not None:
        with contextlib.suppress(RuntimeError):  # after a fault of the GPU, which is told elsewhere
            empty()


def _copied(value: Any) -> Any:
    """A deep copy; of tensors that wrap others (torchao's quantized states), which cannot be
    cloned as a whole, copies of what they wrap."""
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    if isinstance(value, Tensor) and not _is_plain(value):
        names, context = value.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        inner = {name: getattr(value, name).clone() for name in names}
        rebuild: Any = type(value)
        return rebuild.__tensor_unflatten__(inner, context, value.shape, value.stride())
    return copy.deepcopy(value)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
