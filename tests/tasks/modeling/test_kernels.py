"""A model with our kernels in it gives the loss and gradients that it gave without them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPTNeoXConfig, masking_utils

from regrow.tasks.modeling import attention, kernels
from regrow.tasks.modeling.families import family_of
from regrow.tasks.modeling.fused import FusedAttention, FusedNorm
from regrow.tasks.modeling.kernels import KERNELS, chosen_kernels, swap_kernels
from regrow.tasks.modeling.loss_head import LossTerms
from regrow.tasks.train.losses import token_losses
from tests.tasks.modeling.models import CONFIGS, packed_batch, tiny

LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down", "qkv", "gate_up")]


def with_lora(model, **settings):
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=sorted(names & set(LINEAR)), task_type="CAUSAL_LM"
    )
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # it starts at zero: the gradient of A would be zero too
            parameter.data = torch.randn_like(parameter.data) * 0.1
    return adapted


def step(model, **more):
    """(loss, {name: gradient}) of one forward and backward pass."""
    loss = model(**packed_batch() | more).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def check_equal(model, swapped, atol=1e-6):
    loss, gradients = step(model)
    found, others = step(swapped)
    torch.testing.assert_close(found, loss, atol=1e-5, rtol=1e-5)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            others[name], gradient, atol=atol, rtol=1e-4, msg=lambda text, at=name: f"{at}: {text}"
        )


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients_are_those_of_transformers(family, kind):
    model = tiny(family)
    model = with_lora(model) if kind == "lora" else model
    swapped = copy.deepcopy(model)
    done = swap_kernels(swapped, KERNELS)
    assert done.modules["attention"] == done.modules["mlp"] == 2
    assert done.modules["rms_norm"] >= 5
    assert done.modules["cross_entropy"] == 1
    assert not done.left
    for layer in (m for m in swapped.modules() if isinstance(m, FusedAttention)):
        layer._before[0].register_forward_pre_hook(never)  # it would hide what the kernels do
    check_equal(model, swapped)


def never(*args):
    raise AssertionError("the attention before was called")


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_host_does_not_wait_for_positions(family, kind, monkeypatch):
    """Transformers would look on the host whether they restart: a wait for the device a step."""
    model = tiny(family)
    swapped = with_lora(copy.deepcopy(model)) if kind == "lora" else copy.deepcopy(model)
    swap_kernels(swapped, ["attention"])
    looks = []
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looks.append)
    swapped(**packed_batch())
    assert not looks
    model(**packed_batch())
    assert looks


def test_routers_that_read_the_mask_get_none_made_for_them():
    model = tiny("qwen3_moe")
    model.config.output_router_logits = True
    swap_kernels(model, ["attention"])
    assert torch.isfinite(model(**packed_batch()).loss)


def test_gradients_of_heads_are_no_copies(monkeypatch):
    """x[0] would give zeros that the gradient is copied into, [T, N, H] of them."""
    monkeypatch.setattr(attention, "packed_attention", lambda q, k, v, *args, **options: q + k + v)
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    out, _ = attention.packed_attention_forward(
        torch.nn.Module(), q, k, v, None, cu_seq_lens_q=bounds, max_length_q=5
    )
    seen, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        seen.add(type(node).__name__)
        todo += [before for before, _ in node.next_functions if before is not None]
    assert "AccumulateGrad" in seen
    assert not any(name.startswith(("Select", "Slice", "Index", "Clone")) for name in seen)


def with_experts_adapted(model):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter.data) * 0.1
    return adapted


@pytest.mark.parametrize("kind", ["full", "lora", "experts"])
def test_experts_give_what_transformers_and_peft_give(kind):
    model = tiny("qwen3_moe")
    model = {"full": lambda m: m, "lora": with_lora, "experts": with_experts_adapted}[kind](model)
    swapped = copy.deepcopy(model)
    before = [name for name, _ in model.named_parameters()]
    done = swap_kernels(swapped, KERNELS)
    assert done.modules["experts"] == 2
    assert [name for name, _ in swapped.named_parameters()] == before
    check_equal(model, swapped)
    if kind == "experts":
        merged, right = swapped.merge_and_unload(), model.merge_and_unload()
        assert list(merged.state_dict()) == list(right.state_dict())


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "experts"])
def test_each_kernel_stands_alone(kernel):
    model = with_lora(tiny("qwen3"))
    swapped = copy.deepcopy(model)
    assert set(swap_kernels(swapped, [kernel]).modules) == {kernel}
    check_equal(model, swapped)


def test_every_parameter_keeps_its_name_and_its_memory():
    model = with_lora(tiny("qwen3"))
    before = [(name, p.data_ptr()) for name, p in model.named_parameters()]
    state = list(model.state_dict())
    swap_kernels(model, KERNELS)
    assert [(name, p.data_ptr()) for name, p in model.named_parameters()] == before
    assert list(model.state_dict()) == state


def test_tied_weights_stay_tied():
    model = tiny("llama")
    swap_kernels(model, KERNELS)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_merged_adapter_gives_what_it_gives_without_kernels():
    model = with_lora(tiny("llama"))
    swapped = copy.deepcopy(model)
    swap_kernels(swapped, KERNELS)
    merged, right = swapped.merge_and_unload(), model.merge_and_unload()
    assert list(merged.state_dict()) == list(right.state_dict())
    for name, weight in right.state_dict().items():
        assert torch.equal(merged.state_dict()[name], weight), name


def test_an_adapter_that_is_off_changes_nothing():
    model = with_lora(tiny("llama"))
    swapped = copy.deepcopy(model)
    swap_kernels(swapped, KERNELS)
    with model.disable_adapter(), swapped.disable_adapter(), torch.no_grad():
        off, ours = model(**packed_batch()).loss, swapped(**packed_batch()).loss
    assert abs(ours - off) < 1e-5
    with torch.no_grad():
        assert abs(model(**packed_batch()).loss - off) > 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing(kind, reentrant):
    model = with_lora(tiny("qwen3")) if kind == "lora" else tiny("qwen3")
    swapped = copy.deepcopy(model)
    swap_kernels(swapped, KERNELS)
    swapped.gradient_checkpointing_enable({"use_reentrant": reentrant})
    swapped.enable_input_require_grads()
    check_equal(model, swapped)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_autocast_computes_in_its_type(kind):
    """Weights in float32 and their gradients stay so; what lies between is rounded to bfloat16."""
    model = with_lora(tiny("qwen3")) if kind == "lora" else tiny("qwen3")
    swapped, exact = copy.deepcopy(model), copy.deepcopy(model)
    swap_kernels(swapped, KERNELS)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = step(model), step(swapped)
    right = step(exact)
    assert abs(ours[0] - right[0]) < 0.01 * right[0]
    for name, gradient in right[1].items():
        error = (ours[1][name] - gradient).norm()
        assert ours[1][name].dtype == torch.float32
        # As near to float32 as Transformers comes, with room for the luck of rounding.
        assert error <= 2 * (theirs[1][name] - gradient).norm() + 0.01 * gradient.norm(), name


def test_a_base_in_bfloat16_keeps_its_adapter_in_float32():
    model = with_lora(tiny("llama", torch.bfloat16))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    exact = copy.deepcopy(model).float()
    swap_kernels(model, KERNELS)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = step(model)
    right, others = step(exact)
    assert abs(loss - right) < 0.01 * right
    for name, gradient in others.items():
        assert gradients[name].dtype == torch.float32
        assert (gradients[name] - gradient).norm() < 0.1 * gradient.norm(), name


def test_dropout_has_the_mean_of_none_and_is_off_in_evaluation():
    model = with_lora(tiny("llama"), lora_dropout=0.3)
    swap_kernels(model, ["attention", "mlp"])
    layer = model.base_model.model.model.layers[0].mlp
    torch.manual_seed(0)
    x = torch.randn(1, 64, 32)
    with torch.no_grad():
        drawn = torch.stack([_gate(layer, x) for _ in range(400)])
        layer.eval()
        calm = _gate(layer, x)
        torch.testing.assert_close(calm, layer.gate_proj(x))
        base = layer.gate_proj.base_layer(x)
    assert not torch.equal(drawn[0], drawn[1])
    # The mean of 400 draws is off by about sqrt(0.3 / 0.7 / 400) = 3 % of the adapter's part.
    assert (drawn.mean(0) - calm).norm() < 0.05 * (calm - base).norm()


def _gate(layer, x):
    from regrow.tasks.modeling.fused import fused_linear

    return fused_linear(x, layer.gate_proj)[0]


def _inputs():
    batch = packed_batch()
    return {k: v for k, v in batch.items() if k not in ("labels", "num_items_in_batch")}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_has_the_recipes_terms_in_training_alone(family):
    model = tiny(family)
    swapped = copy.deepcopy(model)
    swap_kernels(swapped, ["cross_entropy"], LossTerms(0.1, 1e-2))
    batch = packed_batch()
    labels, items = batch["labels"], batch["num_items_in_batch"]
    logits = model(**batch).logits
    expected = token_losses(logits, labels, 0.1, 1e-2).sum() / items
    torch.testing.assert_close(swapped(**batch).loss, expected, atol=1e-5, rtol=1e-5)
    plain = model(**batch).loss
    torch.testing.assert_close(swapped.eval()(**batch).loss, plain, atol=1e-5, rtol=1e-5)


def test_logits_are_there_when_no_labels_are_given():
    model = tiny("llama")
    swapped = copy.deepcopy(model)
    swap_kernels(swapped, KERNELS)
    assert swapped(**packed_batch()).logits.numel() == 0
    found, expected = swapped(**_inputs()).logits, model(**_inputs()).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_batch_without_labels_has_zero_loss_and_zero_gradients():
    from regrow.tasks.modeling.batches import flatten

    model = tiny("llama")
    swap_kernels(model, KERNELS)
    loss = model(**flatten([]), num_items_in_batch=7).loss
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_generation_goes_to_the_attention_before():
    model = tiny("llama")
    swap_kernels(model, KERNELS)
    plain = tiny("llama")
    model.set_attn_implementation("sdpa")
    plain.set_attn_implementation("sdpa")
    ids = torch.tensor([[5, 6, 7]])
    ours = model.eval().generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours, plain.eval().generate(ids, max_new_tokens=5, do_sample=False))


def test_an_unknown_architecture_says_what_stays():
    attention.register()
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = GPTNeoXConfig(vocab_size=97, intermediate_size=48, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    done = swap_kernels(model, KERNELS)
    assert not done.modules
    assert done.left == {"GPTNeoXForCausalLM": {"no kernels are known for this architecture": []}}
    assert family_of(model) is None


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"use_dora": True}, "Dora"), ({"lora_bias": True}, "bias")],
)
def test_an_adapter_the_kernels_have_not_stays_peft_s(settings, why):
    model = tiny("qwen2")  # lora_bias wants a base with a bias
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **settings))
    swapped = copy.deepcopy(model)
    done = swap_kernels(swapped, KERNELS)
    (reason,) = done.left["attention"]
    assert why in reason
    assert done.modules["mlp"] == 2
    check_equal(model, swapped)


def test_a_head_that_is_trained_apart_stays():
    model = tiny("qwen2")
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    done = swap_kernels(model, KERNELS)
    (reason,) = done.left["cross_entropy"]
    assert "ModulesToSaveWrapper" in reason


def test_every_reason_is_told_with_its_modules():
    model = tiny("qwen3")
    model.model.layers[0].self_attn.attention_dropout = 0.1
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *a: None)
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *a: None)
    model.model.norm = torch.nn.LayerNorm(model.config.hidden_size)
    done = swap_kernels(model, KERNELS)
    first, second = (f"model.layers.{i}.self_attn" for i in range(2))
    assert done.left == {
        "attention": {"attention has dropout": [first], "a hook is on the layer": [second]},
        "mlp": {"a hook is on the layer": ["model.layers.1.mlp"]},
        "rms_norm": {"a norm of type LayerNorm": ["model.norm"]},
    }
    told = done.record()["left"]
    assert told["attention"]["attention has dropout"] == f"1 module: {first}"


def test_what_runs_inside_of_attention_is_told():
    sums = {"sums": 2, "last_rows": 1}
    assert swap_kernels(tiny("qwen3"), KERNELS).parts == {"rope": 2, "qk_norm": 2} | sums
    assert swap_kernels(tiny("llama"), KERNELS).parts == {"rope": 2} | sums
    assert swap_kernels(tiny("gemma2"), KERNELS).parts == {"rope": 2}


def test_a_layer_with_sums_is_known_as_the_layer_it_was():
    """By name and by class; its hooks, settings and hidden states are what they were."""
    model = tiny("qwen3")
    seen: list[int] = []
    model.model.layers[1].register_forward_hook(lambda *args: seen.append(1))
    right = model(**packed_batch(), output_hidden_states=True).hidden_states
    before = [type(layer) for layer in model.model.layers]
    names = [vars(layer).keys() for layer in model.model.layers]
    done = swap_kernels(model, ["rms_norm"])
    assert done.parts == {"sums": 2}
    for layer, its, held in zip(model.model.layers, before, names, strict=True):
        assert isinstance(layer, its)
        assert type(layer) is not its
        assert type(layer).__name__ == its.__name__
        assert vars(layer).keys() == held
    found = model(**packed_batch(), output_hidden_states=True).hidden_states
    assert len(seen) == 2
    for mine, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_layer_with_another_forward_pass_keeps_it():
    model = tiny("llama")
    layer = model.model.layers[0]
    vars(layer)["forward"] = layer.forward  # as Accelerate's hooks do
    assert swap_kernels(model, ["rms_norm"]).parts == {"sums": 1}


@pytest.mark.parametrize(
    ("weights", "stream", "autocast"),
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.bfloat16, True),
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
    ],
    ids=str,
)
def test_types_in_a_layer_are_those_of_transformers(weights, stream, autocast):
    """What the sums and norms give, for each type of weights and residual stream."""
    model = tiny("llama", weights)
    swapped = copy.deepcopy(model)
    swap_kernels(swapped, ["rms_norm"])
    x = torch.randn(1, 5, model.config.hidden_size, dtype=stream, requires_grad=True)
    angles = model.model.rotary_emb(x, torch.arange(5)[None])
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    row = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5}
    row |= {"position_embeddings": angles, "attention_mask": None}
    found = []
    for one in (model, swapped):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = one.model.layers[0](x, **row)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
        found.append((out, gradient))
    (right, due), (out, gradient) = found
    assert out.dtype == right.dtype
    torch.testing.assert_close(out, right, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(gradient, due, atol=2e-1, rtol=5e-2)


@pytest.mark.parametrize("kernels", [KERNELS, ["rms_norm", "mlp"], ["rms_norm", "attention"]])
@pytest.mark.parametrize("kind", ["full", "lora", "off"])
def test_sums_begin_with_an_adapter_or_stand_in_the_norm(kernels, kind, monkeypatch):
    model = tiny("llama") if kind == "full" else with_lora(tiny("llama"))
    swapped, given = copy.deepcopy(model), []
    swap_kernels(swapped, kernels)
    add = FusedNorm.forward
    monkeypatch.setattr(
        FusedNorm,
        "forward",
        lambda self, x, stream=None, **how: given.append(stream) or add(self, x, stream, **how),
    )
    if kind == "off":
        with model.disable_adapter(), swapped.disable_adapter(), torch.no_grad():
            right, found = model(**packed_batch()).loss, swapped(**packed_batch()).loss
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    else:
        check_equal(model, swapped)
    in_norms = 0 if kind != "full" and "attention" in kernels else 2
    assert sum(stream is not None for stream in given) == in_norms


def test_layers_in_pieces_keep_all_but_their_norms():
    model = tiny("llama")
    done = swap_kernels(model, KERNELS, whole_layers=False)
    assert set(done.modules) == {"rms_norm"}
    assert set(done.left) == set(KERNELS) - {"rms_norm"}


def test_auto_is_all_on_a_gpu_with_triton_and_none_elsewhere(monkeypatch):
    assert chosen_kernels("auto", "cpu") == ()
    assert chosen_kernels("off", "cuda") == ()
    assert chosen_kernels(["mlp"], "cpu") == ("mlp",)
    monkeypatch.setattr(kernels.backend, "triton", object())
    assert chosen_kernels("auto", "cuda") == KERNELS
    monkeypatch.setattr(kernels.backend, "triton", None)
    assert chosen_kernels("auto", "cuda") == ()


def test_the_record_names_what_ran_and_what_did_not():
    model = get_peft_model(
        tiny("qwen2"), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    done = swap_kernels(model, KERNELS)
    model(**packed_batch())
    record = done.record()
    assert "per_example" in record["attention_by"]
    assert record["swapped"] == {"attention": 2, "mlp": 2, "rms_norm": 5}
    assert set(record["left"]) == {"cross_entropy"}
    assert record["runs"] in ("Triton", "PyTorch")
