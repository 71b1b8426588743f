"""All that decides how much memory a training step takes: the model, the adapter, the placement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from regrow.tasks.forecast.activations import (
    FUSED_FAMILIES,
    GPU,
    HALF,
    KERNELS,
    Compute,
    Layer,
    Machine,
)
from regrow.tasks.forecast.model_shape import ModelShape
from regrow.tasks.forecast.trainable import Trainable

NONE, SELECTIVE, FULL_LAYERS, OFFLOAD = "none", "selective", "full", "offload"
POLICIES = (NONE, SELECTIVE, FULL_LAYERS, OFFLOAD)
"""What is computed again in the backward pass, fastest first; see
`regrow.tasks.modeling.recompute`."""


@dataclass(frozen=True)
class Division:
    """How the model is laid over GPUs."""

    processes: int = 1
    shards: int = 1
    """Processes that share one copy."""
    way: str = "ddp"
    """ddp, fsdp2, zero1, zero2, zero3, or tp: layers cut by tensor parallelism."""
    keeps_gathered: bool = False
    """FSDP2 without resharding after the forward pass."""
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    context: int = 1
    """Processes that share each row."""
    cut: int = 1
    """Processes that each have a part of every layer: tensor parallelism."""

    @property
    def readers(self) -> int:
        """Groups of processes that read different rows."""
        return max(1, self.processes // self.context // self.cut)

    def share(self, part: str) -> float:
        """Of weights, gradients or optimizer: how much of it one GPU holds."""
        divided = {
            "ddp": (),
            "zero1": ("optimizer",),
            "zero2": ("optimizer", "gradients"),
            "zero3": ("optimizer", "gradients", "weights"),
            "fsdp2": ("optimizer", "gradients", "weights"),
            # Norms are not cut; they are next to nothing.
            "tp": ("optimizer", "gradients", "weights"),
        }[self.way]
        return 1 / self.shards if part in divided else 1.0


@dataclass(frozen=True)
class Setting:
    """All that decides how much memory a training step takes."""

    shape: ModelShape
    trainable: Trainable
    tokens: int
    """In one micro-batch on one GPU: rows times their full length, over the processes that share
    them."""
    optimizer: str = "adamw_torch_fused"
    kernels: tuple[str, ...] = KERNELS
    bits: int = 16
    double_quant: bool = True
    quantized_experts: bool = False
    """Whether the stacked matrices of experts are held in `bits` too."""
    float8: bool = False
    """Whether frozen layers under the adapter are held in 8-bit floats too, for each direction."""
    dtype_bytes: int = HALF
    """In which forward and backward are computed, and a frozen base is held."""
    checkpointing: bool | str = False
    """One of `POLICIES`; False is "none", True is "full"."""
    accumulates: bool = False
    """More than one micro-batch a step: gradients are there all the time."""
    division: Division = field(default_factory=Division)
    machine: Machine = GPU
    supervised: float = 1.0
    """Share of the tokens that have a label; where it is not known, all."""
    stays: float = 0.0
    """Bytes of the layers' inputs that stay on the GPU although the others are offloaded."""

    @property
    def policy(self) -> str:
        """`checkpointing` as one of `POLICIES`."""
        if isinstance(self.checkpointing, str):
            assert self.checkpointing in POLICIES, self.checkpointing
            return self.checkpointing
        return FULL_LAYERS if self.checkpointing else NONE

    @property
    def recomputes(self) -> bool:
        """Whether anything is computed again."""
        return self.policy != NONE

    @property
    def frozen(self) -> bool:
        """Whether the model's own weights are not trained."""
        return self.trainable.has_adapter

    @cached_property
    def compute(self) -> Compute:
        """With the kernels that can be put into this model."""
        kernels = set(self.kernels) if self.shape.model_type in FUSED_FAMILIES else set()
        if self.trainable.dora or self.bits == 8:
            kernels -= {"attention", "mlp"}
        kernels -= {"mlp"} if self.shape.family.experts is not None else {"experts"}
        return Compute(
            frozenset(kernels),
            self.bits,
            self.machine,
            self.division.context,
            halves=self.dtype_bytes == HALF,
            tokens=self.tokens,
            scarce=self.policy == OFFLOAD,
        )

    def layers(self) -> Iterator[Layer]:
        """Every layer."""
        for number in range(self.shape.layers):
            yield Layer(self.shape, self.shape.layer(number), self.trainable, self.compute)
