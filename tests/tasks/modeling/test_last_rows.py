"""A last layer that computes supervised rows alone changes neither the loss nor any gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from regrow.tasks.modeling.batches import IGNORED, LAST_ROWS, flatten, rows_to_learn
from regrow.tasks.modeling.kernels import KERNELS, swap_kernels
from regrow.tasks.modeling.recompute import POLICIES, recompute_layers
from tests.tasks.modeling.models import packed_batch, tiny
from tests.tasks.modeling.test_kernels import with_lora

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "smollm3"]
MORE = packed_batch((150, 60), pad_to=256)
"""Another batch, with another number of rows to learn."""


def swapped(family, kind="lora") -> Any:
    model = with_lora(tiny(family)) if kind == "lora" else tiny(family)
    swap_kernels(model, KERNELS)
    return model


def last_layer(model) -> Any:
    decoder = model.get_base_model() if hasattr(model, "peft_config") else model
    return decoder.model.layers[-1]


def watched(module, seen):
    """Notes the number of rows of each call's input."""
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2]))
    return module


def gradients(model) -> dict[str, Any]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def without(batch):
    return {name: x for name, x in batch.items() if name != LAST_ROWS}


def check_alike(model, compute):
    """compute(model, change) gives a loss; `change` is done to each batch."""
    other, seen, rows = copy.deepcopy(model), [], []
    watched(last_layer(model).mlp, seen)
    watched(last_layer(other).mlp, rows)
    found, right = compute(model, dict), compute(other, without)
    torch.testing.assert_close(found, right, atol=0, rtol=1e-6)
    due = gradients(other)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            gradient, due[name], atol=1e-7, rtol=1e-5, msg=lambda text, at=name: f"{at}: {text}"
        )
    assert len(seen) == len(rows)
    assert all(some < every for some, every in zip(seen, rows, strict=True))
    return seen


def one_step(model, change):
    loss = model(**change(packed_batch())).loss
    loss.backward()
    return loss


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_stay_and_fewer_rows_are_computed(family, kind):
    model, heads = swapped(family, kind), []
    watched(model.get_output_embeddings(), heads)
    assert check_alike(model, one_step) == [64]
    assert heads == [64, 128]  # the copy's hook notes its calls here, too


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_layers_that_are_computed_again_take_the_same_rows(policy, reentrant):
    model = swapped("llama")
    recompute_layers(model, policy, reentrant)
    model.enable_input_require_grads()
    times = 1 if policy == "none" else 2
    assert check_alike(model, one_step) == times * [64]


@pytest.mark.parametrize("reentrant", [False, True])
def test_each_of_several_forward_passes_has_its_own_rows(reentrant):
    """Micro-batches of a step, and two losses with one backward pass as preferences have them."""

    def steps(model, change):
        one_step(model, change)
        one, other = (model(**change(batch)).loss for batch in (packed_batch(), MORE))
        (one - 2 * other).backward()
        return one - 2 * other

    model = swapped("qwen3")
    recompute_layers(model, "full", reentrant)
    model.enable_input_require_grads()
    assert sorted(check_alike(model, steps)) == [64] * 4 + [128] * 2


def test_autocast_and_wider_weights_give_the_types_they_gave():
    for kind in ("full", "lora"):
        model = swapped("llama", kind)
        other = copy.deepcopy(model)
        with torch.autocast("cpu", torch.bfloat16):
            found, right = one_step(model, dict), one_step(other, without)
        torch.testing.assert_close(found, right, rtol=1e-3, atol=0)
        due = gradients(other)
        for name, gradient in gradients(model).items():
            assert gradient.dtype == due[name].dtype
            # The order of sums decides how some are rounded.
            assert (gradient - due[name]).norm() <= 0.01 * due[name].norm(), name


def test_a_validation_computes_fewer_rows_too():
    model, seen = swapped("llama").eval(), []
    watched(last_layer(model).mlp, seen)
    with torch.no_grad():
        found, right = (model(**x).loss for x in (packed_batch(), without(packed_batch())))
    torch.testing.assert_close(found, right, atol=0, rtol=1e-6)
    assert seen == [64, 128]


def test_attention_that_goes_the_way_before_gives_the_rows_asked_for(monkeypatch):
    """As it does where an adapter is off."""
    from regrow.tasks.modeling import fused

    monkeypatch.setattr(fused, "are_ready", lambda layers: False)
    for kind in ("full", "lora"):
        assert check_alike(swapped("llama", kind), one_step) == [64]


def test_logits_are_those_of_all_rows():
    model = swapped("llama").eval()
    inputs = {name: x for name, x in packed_batch().items() if name != "labels"}
    assert LAST_ROWS in inputs
    assert model(**inputs).logits.shape[:2] == (1, 128)


@pytest.mark.parametrize("learnt", ["none", "all"])
def test_batches_without_rows_to_leave_out_are_computed_whole(learnt):
    model, seen = swapped("llama"), []
    watched(last_layer(model).mlp, seen)
    batch = flatten([], 128) if learnt == "none" else packed_batch()
    if learnt == "all":
        batch["labels"] = batch["input_ids"].clone()
        targets = torch.nn.functional.pad(batch["labels"][0, 1:], (0, 1), value=IGNORED)
        batch = without(batch) | rows_to_learn(targets)
    assert LAST_ROWS not in batch
    loss = model(**batch | {"num_items_in_batch": 7}).loss
    loss.backward()
    assert seen == [128]
    assert (loss == 0) == (learnt == "none")


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3", "qwen3_moe"])
def test_layers_that_need_all_rows_keep_them(family):
    model, seen = swapped(family, "full"), []
    watched(last_layer(model).mlp, seen)
    one_step(model, dict)
    assert seen == [128]


@pytest.mark.parametrize("missing", ["attention", "mlp", "rms_norm", "cross_entropy"])
def test_without_one_of_its_kernels_all_rows_are_computed(missing):
    model = tiny("llama")
    done = swap_kernels(model, [name for name in KERNELS if name != missing])
    assert "last_rows" not in done.parts
    seen = []
    watched(model.model.layers[-1].mlp, seen)
    right = tiny("llama")
    torch.testing.assert_close(one_step(model, dict), one_step(right, dict), atol=1e-5, rtol=1e-5)
    assert seen == [128]


def test_a_last_layer_with_another_forward_pass_keeps_all_rows():
    model = tiny("llama")
    layer = model.model.layers[-1]
    vars(layer)["forward"] = layer.forward  # as Accelerate's hooks do
    done = swap_kernels(model, KERNELS)
    assert done.parts["sums"] == 1
    assert "last_rows" not in done.parts
    one_step(model, dict)


def test_a_compiled_model_has_no_sizes_that_depend_on_the_batch(monkeypatch):
    model, seen = swapped("llama", "full"), []
    watched(last_layer(model).mlp, seen)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        model(**packed_batch())
    assert seen == [128]
