"""Weights that were laid one under the other are the weights they were, wherever they are used."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file

from regrow.kernels import lora_linear
from regrow.kernels.neighbours import rows_of_one
from regrow.tasks.modeling import joint_weights
from regrow.tasks.modeling.float8 import Float8Linear, freeze_in_float8, round_together
from regrow.tasks.modeling.fused import OUTPUT
from regrow.tasks.modeling.joint_weights import lay_group, lay_together
from regrow.tasks.modeling.kernels import KERNELS, swap_kernels
from tests.tasks.modeling.models import packed_batch, tiny
from tests.tasks.modeling.test_kernels import check_equal, with_lora


@pytest.fixture
def on_gpu(monkeypatch):
    """As if the model lay on one."""
    monkeypatch.setattr(joint_weights, "_is_on_gpu", lambda layers: True)


@pytest.fixture
def joined(monkeypatch):
    """How many products were made of neighbours."""
    found = []

    def watched(function):
        def seen(*arguments):
            whole = function(*arguments)
            found.append(whole is not None)
            return whole

        return seen

    for name in ("below", "below_with_adapters"):
        monkeypatch.setattr(lora_linear, name, watched(getattr(lora_linear, name)))
    return found


def swapped(model):
    made = copy.deepcopy(model)
    swap_kernels(made, KERNELS)
    return made


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_loss_and_gradients_stay(on_gpu, joined, family):
    model = with_lora(tiny(family))
    ours = swapped(model)
    before = [name for name, _ in ours.named_parameters()]
    assert lay_together(ours) == 4
    assert [name for name, _ in ours.named_parameters()] == before
    for layers in (m.weights_to_lay() for m in ours.modules() if hasattr(m, "weights_to_lay")):
        for group in layers.values():
            assert rows_of_one([x.base_layer.weight for x in group]) is not None
    check_equal(model, ours)
    assert sum(joined) >= 2  # gate and up of each layer; q, k and v where Triton runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_hold_what_they_held(on_gpu, tmp_path, dtype):
    """A full model with its weights, an adapter alone, a merged model."""
    model = with_lora(tiny("llama", dtype))
    ours = swapped(model)
    assert lay_together(ours) == (8 if dtype == torch.bfloat16 else 4)
    layer = ours.get_base_model().model.layers[0].self_attn.o_proj.base_layer
    assert layer.weight.is_contiguous() == (dtype == torch.float32)  # there is room beside it
    for one, name in ((model, "theirs"), (ours, "ours")):
        one.save_pretrained(tmp_path / name / "adapter")
        merged = copy.deepcopy(one).merge_and_unload()
        merged.save_pretrained(tmp_path / name / "merged")
    for kind, file in (("adapter", "adapter_model"), ("merged", "model")):
        right, found = (
            load_file(tmp_path / name / kind / f"{file}.safetensors") for name in ("theirs", "ours")
        )
        assert right.keys() == found.keys()
        assert all(torch.equal(right[name], found[name]) for name in right)
    assert (tmp_path / "ours/merged/model.safetensors").stat().st_size == (
        tmp_path / "theirs/merged/model.safetensors"
    ).stat().st_size


def test_states_can_be_loaded_and_merges_undone(on_gpu):
    model = with_lora(tiny("qwen3"))
    ours = swapped(model)
    lay_together(ours)
    state = {name: 2 * value for name, value in model.state_dict().items()}
    for one in (model, ours):
        one.load_state_dict(state)
        one.merge_adapter()
        one.unmerge_adapter()
    check_equal(model, ours, atol=1e-5)


def test_what_is_trained_or_differs_stays_where_it_is():
    layers = [torch.nn.Linear(8, n, bias=False) for n in (4, 6)]
    assert lay_group(layers) is None
    for layer in layers:
        layer.weight.requires_grad_(False)
    layers[1].weight.data = layers[1].weight.data.double()
    assert lay_group(layers) is None
    assert lay_group(layers[:1]) is None
    layers[1].weight.data = layers[1].weight.data.float()
    assert lay_group(layers).below.shape == (0, 8)
    assert rows_of_one([layer.weight for layer in layers]) is not None


def test_behind_the_weights_is_room_for_the_adapters(on_gpu):
    model = swapped(with_lora(tiny("llama")))
    lay_together(model)
    for module in (m for m in model.modules() if hasattr(m, "weights_to_lay")):
        for name, layers in module.weights_to_lay().items():
            if name != OUTPUT:
                room = module.rooms[name].below
                assert room.shape == (4 * len(layers), 32)
                assert rows_of_one([*(x.base_layer.weight for x in layers), room]) is not None
    assert not any("room" in name for name in model.state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_on_the_gpu_every_gradient_stays(monkeypatch, joined, family):
    """By the kernels, in bfloat16 under adapters in float32, with room behind all."""
    torch.use_deterministic_algorithms(False)
    model = with_lora(tiny(family, torch.bfloat16), r=8)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    apart = swapped(model).cuda()
    ours = copy.deepcopy(apart)
    assert lay_together(ours) == 8
    products = []
    whole = lora_linear.joint_products
    monkeypatch.setattr(lora_linear, "joint_products", lambda *x: products.append(1) or whole(*x))
    batch = {k: v.cuda() if torch.is_tensor(v) else v for k, v in packed_batch().items()}
    for one in (apart, ours):
        one(**batch).loss.backward()
    # gate and up both ways, q, k and v of the second layer (the first one's input has no gradient)
    assert sum(joined) == 5
    assert (
        len(products) == 4
    )  # q, k and v, and down; cuDNN, which leaves room for o, has larger heads
    for (name, mine), theirs in zip(ours.named_parameters(), apart.parameters(), strict=True):
        if theirs.grad is not None:
            error = (mine.grad - theirs.grad).norm() / theirs.grad.norm()
            assert error < 3e-2, name


def test_on_the_host_nothing_moves():
    assert lay_together(swapped(with_lora(tiny("llama")))) == 0


def test_layers_in_8_bits_are_rounded_as_one(on_gpu, joined):
    model = with_lora(tiny("llama"))
    freeze_in_float8(model, "cpu")
    ours, apart = swapped(model), swapped(model)
    assert lay_together(ours) == 4
    losses = [one(**packed_batch()).loss for one in (apart, ours)]
    for loss in losses:
        loss.backward()
    assert sum(joined) >= 2
    # Rows of weights have the scales they had, columns those of the whole group.
    assert torch.equal(*losses)
    for mine, theirs in zip(ours.parameters(), apart.parameters(), strict=True):
        if theirs.grad is not None:
            error = (mine.grad - theirs.grad).norm() / theirs.grad.norm()
            assert error < 0.1
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    before = layer.in_8_bits()
    assert layer.in_8_bits() is before
    with torch.no_grad():
        layer.weight.mul_(2)
    assert layer.in_8_bits() is not before
    torch.testing.assert_close(layer.in_8_bits().row_scales_O, 2 * before.row_scales_O)
    assert copy.deepcopy(ours)(**packed_batch()).loss.isfinite()
    layer.weight = torch.nn.Parameter(layer.weight / 2, requires_grad=False)
    torch.testing.assert_close(layer.in_8_bits().row_scales_O, before.row_scales_O)


def test_layers_in_8_bits_go_at_once():
    linears = [Float8Linear(torch.nn.Linear(16, 16)) for _ in range(3)]
    round_together(linears[:2])
    gone = [weakref.ref(part) for each in linears for part in (each, each.in_8_bits().rows_OI)]
    gc.disable()
    try:
        del linears[:]
        assert [ref() for ref in gone] == [None] * 6
    finally:
        gc.enable()
