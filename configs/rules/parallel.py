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


@rule("deepspeed")
def deepspeed_says_only_where(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """What decides the result stands in the recipe's own keys, which enter the stages' keys."""
    config = recipe.deepspeed or {}
    for key in _DECIDING:
        if config.get(key, "auto") != "auto":
            why = f"it says `{key}`, which the recipe's own keys decide"
            yield ("deepspeed", key), why, "Take it out of the file, or make it auto"
    half = config.get("fp16")
    if isinstance(half, dict) and half.get("enabled") not in (None, False, "auto"):
        why = "float16 would need a scaled loss, which is not here yet"
        yield ("deepspeed", "fp16"), why, "Use `bf16: {enabled: auto}`"


_DECIDING = (
    *("optimizer", "scheduler", "gradient_clipping", "train_batch_size"),
    *("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
)


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


@rule("fsdp_config")
def sizes_have_a_number(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """SIZE_BASED_WRAP gathers so many parameters at a time."""
    config = recipe.fsdp_config
    if config and config.auto_wrap_policy == "SIZE_BASED_WRAP" and not config.min_num_params:
        why = "`min_num_params` says how many parameters are gathered at a time, and is not given"
        yield ("fsdp_config", "auto_wrap_policy"), why, "Add it, such as 100000000"


@rule("optimizer", "deepspeed")
def muon_sees_whole_matrices(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """DeepSpeed hands optimizers flat pieces; Muon needs matrices."""
    if recipe.optimizer == "muon" and recipe.deepspeed:
        why = "`deepspeed` flattens the matrices that muon needs whole"
        yield ("optimizer",), why, "Use adamw_torch_fused, or `fsdp_config` for `deepspeed`"


@rule("optimizer", "fsdp_config")
def int8_states_are_not_sharded(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """bitsandbytes' kernels take plain tensors, not those that FSDP2 shards."""
    if recipe.fsdp_config is not None and recipe.optimizer in _PLAIN_TENSORS:
        why = "bitsandbytes' optimizers cannot take the tensors that FSDP2 shards"
        yield ("optimizer",), why, f"Use {_PLAIN_TENSORS[recipe.optimizer]}"


_PLAIN_TENSORS = {"adamw_8bit": "adamw_torch_8bit", "adamw_bnb_8bit": "adamw_torch_8bit"}
"""Optimizers that Axolotl refuses with FSDP2, and torchao's that stand in for them."""


RULES = (
    one_way_of_sharding,
    deepspeed_says_only_where,
    sizes_need_fsdp,
    sizes_multiply_to_the_processes,
    int8_weights_are_not_sharded,
    sizes_have_a_number,
    muon_sees_whole_matrices,
    int8_states_are_not_sharded,
)
