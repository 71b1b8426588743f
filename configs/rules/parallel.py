"""Rules about many processes: how they share the model."""

from __future__ import annotations

from collections.abc import Iterator

from regrow.configs.optimizers import BY_ELEMENT
from regrow.configs.recipe import Recipe
from regrow.configs.rules.rule import Breach, rule
from regrow.configs.zero import zero_stage


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


@rule("deepspeed")
def deepspeed_is_a_configuration(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """The parts of DeepSpeed's configuration that are read before training have their form."""
    config = recipe.deepspeed or {}
    for key in ("zero_optimization", "bf16", "fp16", "activation_checkpointing", "compile"):
        if not isinstance(config.get(key, {}), dict):
            yield ("deepspeed", key), "expected a map of keys", "See DeepSpeed's documentation"
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return
    path = ("deepspeed", "zero_optimization")
    stage = zero_stage(config)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        yield (*path, "stage"), "expected 0, 1, 2 or 3", "Use 3, which divides the weights too"
    for key in ("offload_optimizer", "offload_param"):
        option = zero.get(key) or {}
        if not isinstance(option, dict):
            yield (*path, key), "expected a map of keys", "Use {device: cpu}"
        elif option.get("device", "none") not in ("none", "cpu", "nvme"):
            yield (*path, key, "device"), "expected none, cpu or nvme", "Use cpu"


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


@rule(
    *("dp_replicate_size", "dp_shard_size", "context_parallel_size"),
    *("num_processes", "ray_num_workers", "launcher"),
)
def sizes_multiply_to_the_processes(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Copies times processes of a copy make all processes, of one machine or of several.

    How many machines there will be a recipe says with `ray_num_workers` only; where both sizes are
    given they may ask for several, and so may processes that share rows.
    """
    shards, copies, local = recipe.dp_shard_size, recipe.dp_replicate_size, recipe.num_processes
    context = recipe.context_parallel_size
    if local is None:
        return
    workers = recipe.ray_num_workers if recipe.launcher == "ray" else None
    total, product = local * (workers or 1), (shards or 1) * copies * (context if shards else 1)
    if workers and total % product:
        key = "dp_shard_size" if shards else "dp_replicate_size"
        yield (key,), _not_divided(product, total, context), "Remove it"
    elif shards is None and not workers and local % copies:
        why = f"{local} processes cannot be {copies} copies of a model"
        remedy = "With several machines add `dp_shard_size`, the processes that share one copy"
        yield ("dp_replicate_size",), why, remedy
    elif shards is not None and total % product and product % total:
        yield ("dp_shard_size",), _not_divided(product, local, context), "Remove it"
    if shards is None and total % context and (workers or context % local):
        why = f"{total} processes are no groups of {context} that share rows"
        yield ("context_parallel_size",), why, "Lower it, or change `num_processes`"


def _not_divided(product: int, processes: int, context: int) -> str:
    shared = " * context_parallel_size" if context > 1 else ""
    why = f"dp_replicate_size * dp_shard_size{shared} is {product}, which does not divide the "
    return f"{why}{processes} processes"


@rule("fsdp_config")
def lists_of_layers_are_not_gathered(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """By size Accelerate (1.15) gathers the list of layers itself, which torch refuses."""
    config = recipe.fsdp_config
    if config and config.auto_wrap_policy == "SIZE_BASED_WRAP":
        why = "it has FSDP2 gather the list of all layers, which has no forward pass"
        yield ("fsdp_config", "auto_wrap_policy"), why, "Use TRANSFORMER_BASED_WRAP, or NO_WRAP"


@rule("optimizer", "deepspeed")
def muon_sees_whole_matrices(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """DeepSpeed hands optimizers flat pieces; Muon needs matrices."""
    if recipe.optimizer == "muon" and recipe.deepspeed:
        why = "`deepspeed` flattens the matrices that muon needs whole"
        yield ("optimizer",), why, "Use adamw_torch_fused, or `fsdp_config` for `deepspeed`"


_PLAIN = "Use adamw_torch_fused"


@rule(
    *("tensor_parallel_size", "context_parallel_size", "num_processes"),
    *("load_in_8bit", "quantize_moe_experts", "fsdp_config"),
)
def divided_layers_are_whole_copies(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Tensor parallelism makes one copy over all processes; of quantized bases it divides those
    whose linear layers are in 4 bits."""
    size, local, key = recipe.tensor_parallel_size, recipe.num_processes, ("tensor_parallel_size",)
    if size == 1:
        return
    if recipe.context_parallel_size > 1:
        yield key, "its processes cannot share rows too", "Remove `context_parallel_size`"
    if recipe.load_in_8bit:
        yield key, "a base in 8 bits cannot be divided", "Use `load_in_4bit: true`, or remove it"
    if recipe.quantize_moe_experts:
        yield key, "quantized experts cannot be divided", "Remove it: each process then has a copy"
    if local is not None and size % local and recipe.fsdp_config is None:
        why = f"it must be the number of all processes, of which a machine has {local}"
        yield key, why, f"Use {local}, or add `fsdp_config` to shard over groups of {size}"


@rule(
    *("tensor_parallel_size", "fsdp_config", "num_processes", "dp_shard_size"),
    "load_in_4bit",
)
def divided_layers_are_sharded_in_groups(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """Beside tensor parallelism FSDP2 shards over groups of its processes, as Transformers lays
    that out."""
    size, local, key = recipe.tensor_parallel_size, recipe.num_processes, ("tensor_parallel_size",)
    config, shards = recipe.fsdp_config, recipe.dp_shard_size
    if size == 1 or config is None:
        return
    product = size * (shards or 1)
    if local is not None and local % product and product % local:
        sharded = " * dp_shard_size" if shards else ""
        why = f"tensor_parallel_size{sharded} is {product}, and a machine has {local} processes"
        yield key, why, "Change one of them, so that groups of processes make up all"
    if recipe.load_in_4bit:
        remedy = "Remove `fsdp_config`: all processes then divide the layers"
        yield key, "FSDP2 cannot shard the divided layers of a quantized base", remedy
    if config.offload_params:
        why = "Transformers lays out FSDP2 beside tensor_parallel_size, without this"
        yield ("fsdp_config", "offload_params"), why, "Remove it, or tensor_parallel_size"


_OF_WHOLE_LAYERS = (
    *("unfrozen_parameters", "reinit_weights", "output_router_logits"),
    *("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio"),
    *("lora_model_dir", "peft_use_dora", "lora_modules_to_save", "lora_target_parameters"),
    "peft_trainable_token_indices",
)


@rule("tensor_parallel_size", "optimizer", "peft_init_lora_weights", "peft", *_OF_WHOLE_LAYERS)
def divided_layers_are_trained_plainly(recipe: Recipe, given: frozenset[str]) -> Iterator[Breach]:
    """What `regrow.tasks.train.parallel` and `regrow.tasks.modeling.tensor_parallel` refuse: needs
    of whole layers, or of one kind of tensors in a group of the optimizer."""
    if recipe.tensor_parallel_size == 1:
        return
    if recipe.optimizer not in BY_ELEMENT:
        why = "it cannot take the tensors that tensor_parallel_size divides"
        yield ("optimizer",), why, _PLAIN
    why = "tensor_parallel_size divides layers, and it needs whole ones"
    remedy = "Remove it, or use `fsdp_config`"
    for key in _OF_WHOLE_LAYERS:
        if getattr(recipe, key):
            yield (key,), why, remedy
    if recipe.peft_init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        own = "peft_init_lora_weights" in given
        path = ("peft_init_lora_weights",) if own else ("peft", "loftq_config")
        yield path, why, remedy


RULES = (
    divided_layers_are_whole_copies,
    divided_layers_are_sharded_in_groups,
    divided_layers_are_trained_plainly,
    one_way_of_sharding,
    deepspeed_says_only_where,
    deepspeed_is_a_configuration,
    sizes_need_fsdp,
    sizes_multiply_to_the_processes,
    lists_of_layers_are_not_gathered,
    muon_sees_whole_matrices,
)
