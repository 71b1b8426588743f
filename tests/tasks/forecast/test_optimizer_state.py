"""The states of optimizers are those that the libraries make for real tensors."""

import math

import pytest
import torch

from regrow.tasks.forecast.optimizer_state import state_bytes, state_of

SHAPES = [(96, 64), (64,), (100, 50), (128, 128)]


def held(optimizer):
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.numel() > 1 and "qmap" not in name
    )


def parameters(shapes=SHAPES):
    made = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    return made


def tensors(shapes=SHAPES, end=""):
    return [(shape, end) for shape in shapes]


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor", "sgd", "rmsprop", "adagrad"])
def test_of_torch_and_transformers(name):
    from transformers.optimization import Adafactor

    made = {
        "adamw_torch": lambda p: torch.optim.AdamW(p),
        "adafactor": lambda p: Adafactor(p, scale_parameter=False, relative_step=False, lr=1e-3),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p),
        "adagrad": lambda p: torch.optim.Adagrad(p),
    }[name]
    shapes = [(48, 32), (64,), (3, 16, 24)]
    optimizer = made(parameters(shapes))
    optimizer.step()
    assert state_bytes(name, tensors(shapes)) == held(optimizer)


def test_muon_leaves_vectors_and_ends_to_adamw():
    matrices = parameters([(48, 32)])
    optimizer = torch.optim.Muon(matrices, lr=1e-3)
    optimizer.step()
    assert state_bytes("muon", tensors([(48, 32)])) == held(optimizer)
    for end in ("embedding", "head"):
        assert state_bytes("muon", tensors([(48, 32)], end)) == 8 * 48 * 32
    assert state_bytes("muon", tensors([(48,)])) == 8 * 48


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw_8bit", "AdamW8bit"),
        ("lion_8bit", "Lion8bit"),
        ("lion_32bit", "Lion32bit"),
        ("ademamix_8bit", "AdEMAMix8bit"),
        ("ademamix", "AdEMAMix"),
        ("rmsprop_bnb", "RMSprop"),
        ("rmsprop_bnb_8bit", "RMSprop8bit"),
        ("paged_adamw_32bit", "AdamW32bit"),
    ],
)
def test_of_bitsandbytes(name, kind):
    optim = pytest.importorskip("bitsandbytes").optim
    # It knows weights that stay in 32 bits by their place in memory, also those of earlier tests.
    optim.GlobalOptimManager.get_instance().initialize()
    optimizer = getattr(optim, kind)(parameters(), lr=1e-3)
    optimizer.step()
    assert state_bytes(name, tensors()) == held(optimizer)


def test_bitsandbytes_keeps_embeddings_wide_and_torchao_does_not():
    assert state_bytes("adamw_8bit", tensors([(128, 128)], "embedding")) == 8 * 128 * 128
    assert state_bytes("ao_adamw_8bit", tensors([(128, 128)], "embedding")) < 3 * 128 * 128


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ao_adamw_8bit", "AdamW8bit"), ("ao_adamw_4bit", "AdamW4bit"), ("ao_adamw_fp8", "AdamWFp8")],
)
def test_of_torchao(name, kind):
    """Its states alone: a step would compile them."""
    optim = pytest.importorskip("torchao.optim")
    optimizer = getattr(optim, kind)(parameters())
    found = 0
    for shape in SHAPES:
        state = optimizer._new_buffer(torch.ones(shape), True)
        inner = [getattr(state, part) for part in ("codes", "scale") if hasattr(state, part)]
        found += 2 * sum(part.nbytes for part in inner or [state])
    assert state_bytes(name, tensors()) == found


def test_an_unknown_optimizer_counts_as_adam():
    assert state_of("galore_adamw") == (state_of("adamw_torch")[0], False)
    assert state_of("paged_lion_8bit")[1]
    assert state_bytes("galore_adamw", tensors()) == 8 * sum(math.prod(s) for s in SHAPES)
