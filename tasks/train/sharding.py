"""How the model is laid over processes: placement in the recipe's words, made plain. Light."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrow.configs.zero import zero_stage

if TYPE_CHECKING:
    from regrow.configs.recipe import Recipe


@dataclass(frozen=True)
class Sharding:
    """One way of many GPUs; never changes the result beyond the rounding of sums."""

    fsdp: Mapping[str, Any] | None = None
    """Options of FSDP2 under Transformers' names; None: not FSDP."""
    deepspeed: Mapping[str, Any] | None = None
    """DeepSpeed's configuration; None: not DeepSpeed."""
    dp_replicate_size: int = 1
    """Copies of a model that FSDP shards within each of them."""
    dp_shard_size: int | None = None
    """Processes of each copy, beside those that share its rows; None: what is left."""
    context_parallel_size: int = 1
    """Processes that share each row."""
    tensor_parallel_size: int = 1
    """Processes that each hold a part of every layer."""

    @property
    def shards(self) -> bool:
        """Whether no process holds the whole of what it trains."""
        divided = self.tensor_parallel_size > 1
        return self.fsdp is not None or self.divides_weights_by_zero or divided

    def shards_of_layers(self, processes: int) -> int:
        """Groups of processes over which FSDP2 shards divided layers; 1: it does not."""
        together = self.tensor_parallel_size
        return processes // together if self.fsdp is not None and together > 1 else 1

    @property
    def divides_weights_by_zero(self) -> bool:
        """Whether DeepSpeed leaves each process a part of every weight: ZeRO-3."""
        return zero_stage(self.deepspeed) == 3

    @property
    def gathers_layers(self) -> bool:
        """Whether all weights of a layer are there while it runs, not those of one child alone."""
        by_layer = (self.fsdp or {}).get("auto_wrap_policy") != "SIZE_BASED_WRAP"
        inside = any(not name.endswith(("Layer", "Block")) for name in self.wrapped_classes)
        return by_layer and not inside and zero_stage(self.deepspeed) < 3

    @property
    def kernels_apart(self) -> tuple[str, ...]:
        """Kernels (`regrow.tasks.modeling.kernels`) whose weights are not there while they run.

        ZeRO-3 gathers what a layer's attention and MLP take with the layer (`regrow.tasks.train.
        zero`), but not all experts of it, nor the head for the loss function.
        """
        if self.divides_weights_by_zero:
            return ("experts", "cross_entropy")
        return () if self.gathers_layers else ("attention", "mlp", "experts", "cross_entropy")

    @property
    def wrapped_classes(self) -> tuple[str, ...]:
        """Classes of modules that FSDP is told to gather by themselves; none: the layers."""
        return tuple((self.fsdp or {}).get("transformer_layer_cls_to_wrap") or ())

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Sharding:
        """What the recipe says of it."""
        config = recipe.fsdp_config
        fsdp = None
        if config is not None:
            fsdp = {
                "version": 2,
                "reshard_after_forward": config.reshard_after_forward,
                "auto_wrap_policy": config.auto_wrap_policy,
                "cpu_offload": config.offload_params,
                "cpu_ram_efficient_loading": config.cpu_ram_efficient_loading,
                "min_num_params": config.min_num_params,
                "state_dict_type": "FULL_STATE_DICT",  # never made: see `regrow.tasks.train.saving`
            }
            if config.transformer_layer_cls_to_wrap:
                fsdp["transformer_layer_cls_to_wrap"] = list(config.transformer_layer_cls_to_wrap)
        return cls(
            fsdp,
            recipe.deepspeed,
            recipe.dp_replicate_size,
            recipe.dp_shard_size,
            recipe.context_parallel_size,
            recipe.tensor_parallel_size,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Sharding:
        """The inverse of canonical JSON."""
        return cls(**(data or {}))
