"""Sizes and switches mean the same in every spelling of a number, true and false."""

from __future__ import annotations

import pytest

SIZES = (
    *("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"),
    *("expert_parallel_size", "dp_shard_size", "dp_replicate_size", "jagged_restart_steps"),
)


@pytest.mark.parametrize("off", ["false", "0", "'0'", "'false'", "'no'"])
def test_what_is_off_is_off_in_every_spelling(load, minimal, off):
    hub = load(f"{minimal}hub_model_id: me/mine\npush_to_hub: {off}\n").recipe
    assert hub.hub_model_id is None
    keys = ("activation_offloading", "selective_checkpointing")
    for lines in (
        f"use_ray: {off}\n",
        *(f"gradient_checkpointing: true\n{k}: {off}\n" for k in keys),
    ):
        recipe = load(minimal + lines).recipe
        assert recipe.launcher == "torchrun"
        assert recipe.gradient_checkpointing in (False, True)
    offloads = f"gradient_checkpointing: {off}\nactivation_offloading: {off}\n"
    assert load(minimal + offloads).recipe.gradient_checkpointing is False


@pytest.mark.parametrize("on", ["true", "1", "'true'", "legacy"])
def test_offloading_is_on_in_every_spelling(load, minimal, on):
    lines = f"gradient_checkpointing: 'true'\nactivation_offloading: {on}\n"
    assert load(minimal + lines).recipe.gradient_checkpointing == "offload"


@pytest.mark.parametrize("off", ["false", "0", "'0'", "[]"])
@pytest.mark.parametrize("key", SIZES)
def test_sizes_may_be_off(load, minimal, key, off):
    assert load(f"{minimal}{key}: {off}\n").recipe == load(minimal).recipe


@pytest.mark.parametrize("key", ["tensor_parallel_size", "expert_parallel_size"])
def test_quoted_sizes_are_numbers(load, minimal, key):
    quoted, plain = (load(f"{minimal}fsdp_config: {{}}\n{key}: {n}\n") for n in ("'2'", "2"))
    assert quoted.recipe == plain.recipe
