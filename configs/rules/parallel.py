"""Rules about many processes: how they share the model."""

from __future__ import annotations

from collections.abc import Iterator

from regrow.configs.recipe import Recipe
from regrow.configs.rules.rule import Breach, rule


@rule("deepspeed", "fsdp_config")
def one_way_of_sharding(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """DeepSpeed and FSDP exclude each other."""
    if recipe.deepspeed and recipe.fsdp_config is not None:
        yield ("deepspeed",), "FSDP is asked for as well", "Use one of the two"


@rule("fsdp_config", "dp_replicate_size", "dp_shard_size")
def sizes_need_fsdp(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """The sizes say how FSDP shards; without it they would do nothing."""
    for key in ("dp_replicate_size", "dp_shard_size"):
        if recipe.fsdp_config is None and (getattr(recipe, key) or 1) > 1:
            yield (key,), "it says how FSDP shards, which is off", "Add `fsdp_config: {}`"


@rule("dp_replicate_size", "dp_shard_size", "num_processes")
def sizes_multiply_to_the_processes(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Where all three are given they agree."""
    shards, copies = recipe.dp_shard_size, recipe.dp_replicate_size
    if shards and recipe.num_processes and recipe.num_processes % (shards * copies):
        why = f"dp_replicate_size * dp_shard_size is {shards * copies}, which does not divide the "
        yield ("dp_shard_size",), f"{why}{recipe.num_processes} processes", "Remove it"


@rule("fsdp_config", "load_in_8bit")
def int8_weights_are_not_sharded(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """FSDP shards floating point tensors."""
    if recipe.fsdp_config is not None and recipe.load_in_8bit:
        yield ("load_in_8bit",), "FSDP cannot shard int8 weights", "Use `load_in_4bit` or DeepSpeed"


RULES = (
    one_way_of_sharding,
    sizes_need_fsdp,
    sizes_multiply_to_the_processes,
    int8_weights_are_not_sharded,
)
