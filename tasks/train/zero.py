"""Weights and optimizer under DeepSpeed ZeRO, by name. The only importer of DeepSpeed.

A state saved from here is the same as one saved under DDP or FSDP2, so each can go on from the
others'; but for bitsandbytes' in 8 bits, whose blocks run through all parameters here. Every
parameter is brought together once and kept by one rank, so that no rank's memory holds more than
its share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed import zero
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from regrow.tasks.modeling.fused import FusedAttention, FusedGateUpMLP, FusedMLP
from regrow.tasks.train.groups import NAMES, match_groups
from regrow.tasks.train.state import (
    OPTIMIZER,
    PARTS,
    WEIGHT,
    State,
    Stored,
    all_parameters,
    check_parts,
    trained_parameters,
)

# Tensors read together on resume: enough to use a disk well, few enough for a small memory.
_READ_TOGETHER = 32


def gather_with_layers(model: nn.Module) -> None:
    """ZeRO-3 gathers the weights of a child when the child is called. Our kernels call none: let
    what they take be gathered with the layer around them, and let go of with it."""
    for layer in model.modules():
        for child in layer.children():
            if isinstance(child, (FusedAttention, FusedMLP, FusedGateUpMLP)):
                for parameter in child.parameters():
                    zero.register_external_parameter(layer, parameter)


class ZeroEngine:
    """ZeRO-1, 2 and 3: the float32 weights that the optimizer holds, and its states."""

    def __init__(self, engine: Any, model: nn.Module) -> None:
        """`engine`: DeepSpeed's, around `model`."""
        self._zero = engine.optimizer
        self._inner: torch.optim.Optimizer = self._zero.optimizer
        self._stage: int = engine.zero_optimization_stage()
        self._model = model
        self._parameters = trained_parameters(model)
        self._rank = torch.distributed.get_rank()
        self._world_size = torch.distributed.get_world_size()

    def is_sharded(self) -> bool:
        """Whether the module's own weights are not what was trained: divided, or in bfloat16."""
        return True

    def whole_weights(self, *, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Each trained parameter in full and float32; all ranks go through it together.

        Args:
            frozen: those that are not trained, too, in the type that they are held in.
        """
        for name, parameter in all_parameters(self._model).items():
            if parameter.requires_grad:
                weight = safe_get_full_fp32_param(parameter)
                assert weight is not None, name
                yield name, weight
            elif frozen:
                with zero.GatheredParameters([parameter], enabled=self._stage == 3):
                    weight = parameter.detach().clone()  # DeepSpeed takes its own away again
                yield name, weight

    def capture(self) -> State:
        """Copies in the host's memory; each parameter's on one rank."""
        tensors: dict[str, Tensor] = {}
        fields, scalars = [], {}
        if self._in_blocks():
            tensors |= {k: value.cpu().clone() for k, value in self._blocks().items()}
        else:
            self._link()
            fields, scalars = self._fields()
        for number, (name, weight) in enumerate(self.whole_weights()):
            found = {WEIGHT + name: weight}
            for field in fields:
                value = safe_get_full_optimizer_state(self._parameters[name], field)
                assert value is not None, field
                found[f"{OPTIMIZER}{name}/{field}"] = value
            found |= {f"{OPTIMIZER}{name}/{field}": value for field, value in scalars.items()}
            if number % self._world_size == self._rank:
                tensors |= {key: value.detach().cpu().clone() for key, value in found.items()}
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {NAMES: []}
            for group in self._inner.param_groups
        ]
        counts = {name: self._counts() for name in self._parameters}
        values = {"optimizer": counts, "groups": groups}
        return State(tensors, values | ({PARTS: self._parts()} if self._in_blocks() else {}))

    def _counts(self) -> dict[str, int]:
        """Step counts that are no tensors, which all parameters share."""
        state: Mapping[str, Any] = next((s for s in self._inner.state.values() if s), {})
        return {key: value for key, value in state.items() if isinstance(value, int)}

    def _in_blocks(self) -> bool:
        """Whether the states are codes of 8 bits, which have scales for blocks of this process's
        part: no state of a single parameter can be cut out of them."""
        states = (value for state in self._inner.state.values() for value in state.values())
        return any(isinstance(value, Tensor) and value.dtype == torch.uint8 for value in states)

    def _blocks(self) -> dict[str, Tensor]:
        """The states of this process's parts, by their place."""
        return {
            f"{PARTS}/{self._rank}/{number}/{field}": value
            for number, flat in enumerate(self._flat_parameters())
            for field, value in self._inner.state[flat].items()
            if isinstance(value, Tensor)
        }

    def _parts(self) -> tuple[str, int]:
        return f"DeepSpeed's ZeRO-{self._stage}", self._world_size

    def _fields(self) -> tuple[list[str], dict[str, Tensor]]:
        """Names of the states as large as a parameter, and the step counts, which all share."""
        state: Mapping[str, Any] = next((s for s in self._inner.state.values() if s), {})
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        return (
            [key for key, value in tensors.items() if value.dim()],
            {key: value for key, value in tensors.items() if not value.dim()},
        )

    def restore(self, stored: Stored) -> list[int]:
        """Put back a state saved by any engine.

        Returns:
            For each group of the optimizer the number of the saved one that it goes on from.

        Raises:
            StageError: for states in 8 bits that were divided otherwise.
        """
        shapes = stored.shapes()
        self._make_states()
        check_parts(stored, self._parts() if self._in_blocks() else None)
        saved, groups = stored.values["groups"], self._inner.param_groups
        matched = match_groups([{**group, NAMES: []} for group in groups], saved)
        for group, number in zip(groups, matched, strict=True):
            group.update({key: value for key, value in saved[number].items() if key != NAMES})
        names = list(self._parameters)
        for start in range(0, len(names), _READ_TOGETHER):
            some = set(names[start : start + _READ_TOGETHER])
            targets = {
                k: torch.empty(s, dtype=t) for k, (s, t) in shapes.items() if _owner(k) in some
            }
            stored.load(dict(targets))
            for key, value in targets.items():
                self._put(key, value)
        self._put_blocks(stored)
        count = next(iter(stored.values["optimizer"].values()), {})
        for state in self._inner.state.values():
            state.update({key: n for key, n in count.items() if isinstance(state.get(key), int)})
        return matched

    def _put_blocks(self, stored: Stored) -> None:
        if not self._in_blocks():
            return
        live = self._blocks()
        targets = {key: torch.empty_like(value, device="cpu") for key, value in live.items()}
        stored.load(dict(targets))
        for key, value in targets.items():
            live[key].copy_(value)

    def _make_states(self) -> None:
        """Give the inner optimizer its empty states, as its first step does."""
        rates = [
            (group["lr"], group.get("weight_decay", 0.0)) for group in self._inner.param_groups
        ]
        parameters = self._flat_parameters()
        kept = [flat.grad for flat in parameters]  # of an optimizer on the host, its buffers
        for flat in parameters:
            flat.grad = torch.zeros_like(flat)
        for group in self._inner.param_groups:
            group["lr"], group["weight_decay"] = 0.0, 0.0
        if self._stage < 3:
            self._inner.step()
            if not self._in_blocks():
                self._link()
        else:
            self._step_each()
        for group, (rate, decay) in zip(self._inner.param_groups, rates, strict=True):
            group["lr"], group["weight_decay"] = rate, decay
        for flat, gradient in zip(parameters, kept, strict=True):
            flat.grad = gradient

    def _link(self) -> None:
        """Tell each parameter where its states are. DeepSpeed does so after the first step, but for
        the first of several groups of parameters only (0.19.8)."""
        if self._stage < 3:
            groups = zip(self._zero.bit16_groups, self._flat_parameters(), strict=True)
            for group, flat in groups:
                lazy_init_hp_params_optimizer_state(group, flat, self._inner.state)

    def _step_each(self) -> None:
        """ZeRO-3 hands its parts to the optimizer one at a time."""
        group = self._inner.param_groups[0]
        kept = [g["params"] for g in self._inner.param_groups]
        for other in self._inner.param_groups:
            other["params"] = []
        for flat in self._flat_parameters():
            group["params"] = [flat]
            self._inner.step()
        for other, parameters in zip(self._inner.param_groups, kept, strict=True):
            other["params"] = parameters

    def _flat_parameters(self) -> list[Tensor]:
        """What the inner optimizer steps: this rank's part of all parameters."""
        if self._stage < 3:
            return list(self._zero.single_partition_of_fp32_groups)
        return list(self._zero.fp32_partitioned_groups_flat)

    def _put(self, key: str, value: Tensor) -> None:
        name, field = _owner(key), key.rpartition("/")[2]
        parameter = self._parameters[name]
        if key.startswith(WEIGHT):
            self._put_weight(parameter, value)
        elif value.dim() == 0:
            for state in self._inner.state.values():
                if field in state:
                    state[field].copy_(value)
        elif self._stage < 3:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), field)
        else:
            safe_set_local_optimizer_state(parameter, self._part(parameter, value), field)

    def _put_weight(self, parameter: Any, value: Tensor) -> None:
        if self._stage < 3:
            parameter.data.copy_(value)
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
            return
        with zero.GatheredParameters([parameter], modifier_rank=0):
            if self._rank == 0:
                parameter.data.copy_(value)
        safe_set_local_fp32_param(parameter, self._part(parameter, value))

    def _part(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a tensor, with zeros behind the last rank's."""
        size = parameter.ds_tensor.ds_numel
        flat = torch.zeros(size * self._world_size, dtype=value.dtype)
        flat[: value.numel()] = value.flatten()
        return flat.narrow(0, size * self._rank, size).to(parameter.device)


def _owner(key: str) -> str:
    """The parameter that a tensor belongs to."""
    if key.startswith(WEIGHT):
        return key.removeprefix(WEIGHT)
    return key.removeprefix(OPTIMIZER).rpartition("/")[0]
