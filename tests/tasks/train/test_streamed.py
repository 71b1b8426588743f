"""A model stored weight by weight: the bytes of `save_pretrained`, and never all in memory."""

from __future__ import annotations

import ctypes
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from regrow.tasks.train import consolidation
from regrow.tasks.train.export import save_model
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.streamed import save_streamed, why_not_streamed
from regrow.tasks.train.worker import train
from tests.tasks.train.ranks import WAYS, needs_deepspeed, run_ranks, tensors
from tests.tasks.train.tiny_models import SIZES, tiny_mixtral

MIB = 2**20


def tiny_llama(**sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))


def with_buffer() -> LlamaForCausalLM:
    model = tiny_llama()
    model.model.register_buffer("scale", torch.tensor([1.001, 3.0]))
    return model


MODELS = {
    "tied": lambda: tiny_llama(tie_word_embeddings=True),
    "untied": tiny_llama,
    "experts": tiny_mixtral,
    "buffer": with_buffer,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_files_are_those_of_the_whole_model(tmp_path, file_bytes, kind, dtype):
    model = MODELS[kind]()
    (tmp_path / "streamed").mkdir()
    assert why_not_streamed(model) == ""
    model.config.use_cache = False
    save_streamed(model, model.named_parameters(), tmp_path / "streamed", dtype)
    save_model(model, tmp_path / "whole", getattr(torch, dtype), use_cache=False)
    assert file_bytes(tmp_path / "streamed") == file_bytes(tmp_path / "whole")
    assert (tmp_path / "whole" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda m: setattr(m.config, "auto_map", {"AutoModel": "a.B"}), "its code"),
        (lambda m: setattr(m, "hf_quantizer", object()), "quantized"),
        (
            lambda m: setattr(m.model.norm, "weight", m.model.layers[0].input_layernorm.weight),
            "shar",
        ),
        (
            lambda m: m.register_state_dict_post_hook(lambda m, state, *_: state.update(x=1)),
            "state",
        ),
    ],
)
def test_what_cannot_be_stored_weight_by_weight_says_why(spoil, why):
    model = tiny_llama()
    assert why_not_streamed(model) == ""
    spoil(model)
    assert why in why_not_streamed(model)


def test_a_model_whose_files_need_all_weights_at_once_is_known():
    """q, k and v of one stored matrix."""
    model: Any = tiny_llama()
    sources = ["self_attn.qkv_proj"]
    targets = [f"self_attn.{name}_proj" for name in "qkv"]
    model._weight_conversions = [WeightConverter(sources, targets, [Chunk(dim=0)])]
    assert "at once" in why_not_streamed(model)


@pytest.mark.parametrize("keep_best", [False, True])
def test_the_other_way_gives_the_same_files_and_is_said(
    make_job, file_bytes, monkeypatch, caplog, keep_best
):
    spec = {"adapter": None, "dtype": "bfloat16", "max_steps": 3, "learning_rate": 0.1}
    every = {"evaluation": Cadence(steps=1)}
    jobs = [make_job(name, spec | {"keep_best": keep_best}, every) for name in ("a", "b")]
    train(jobs[0])
    monkeypatch.setattr(consolidation, "why_not_streamed", lambda model: "this is a test")
    with caplog.at_level(logging.INFO):
        train(jobs[1])
    assert "put together in memory before they are stored: this is a test" in caplog.text
    assert file_bytes(jobs[0].out) == file_bytes(jobs[1].out)


@needs_deepspeed
@pytest.mark.slow
def test_what_was_frozen_comes_out_of_divided_weights_as_it_was(make_job, model_dir):
    """DeepSpeed gathers what it does not train in another way."""
    spec = {"adapter": None, "max_steps": 1, "warmup_steps": 0, "unfrozen": ("model.layers.1",)}
    job = make_job("a", spec, {"sharding": WAYS["zero3"]})
    run_ranks(job, 2)
    before, after = load_file(model_dir / "model.safetensors"), tensors(job)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == ("layers.1." not in name), name


def test_several_files_hold_what_one_would(tmp_path):
    """Those of one stack of experts among them, which come from views of one tensor."""
    model = tiny_mixtral()
    for name, most in (("one", 10 * MIB), ("several", 20_000)):
        (tmp_path / name).mkdir()
        save_streamed(model, model.named_parameters(), tmp_path / name, "bfloat16", most)
    expected = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    found: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        path = tmp_path / "several" / file
        tensors = load_file(path)
        assert all(index["weight_map"][name] == file for name in tensors)
        assert sum(t.nbytes for t in tensors.values()) <= 20_000
        found |= tensors
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def large_on_meta() -> LlamaForCausalLM:
    """67 million weights that take no memory: 256 MiB in float32, 128 MiB in bfloat16."""
    with torch.device("meta"):
        return tiny_llama(
            vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=20
        )


def made_when_asked(model: LlamaForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """As an engine gathers them: each a tensor of its own, that is gone when the next one comes."""
    for name, parameter in model.named_parameters():
        yield name, torch.full(parameter.shape, 0.3)


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which this process's memory is larger at its peak during the work than before."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak is counted anew from here
    before = memory()["VmRSS"]
    work()
    return memory()["VmHWM"] - before


def memory() -> dict[str, int]:
    found = re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return {name: int(size) * 1024 for name, size in found}


@pytest.fixture
def freed_memory_goes_back():
    """Else the C library keeps what earlier work gave back, and no growth is seen."""
    libc, threshold = ctypes.CDLL(None), -3  # mallopt(3): M_MMAP_THRESHOLD
    libc.malloc_trim(0)
    libc.mallopt(threshold, 128 * 1024)  # its first value, which grows with what is freed
    yield
    libc.mallopt(threshold, 32 * MIB)  # and grows to this


@pytest.mark.parametrize(("dtype", "files"), [("float32", 8), ("bfloat16", 4)])
def test_memory_is_that_of_two_files_however_large_the_model(
    tmp_path, freed_memory_goes_back, dtype, files
):
    model, limit = large_on_meta(), 32 * MIB
    assert why_not_streamed(model) == ""

    def stored() -> None:
        save_streamed(model, made_when_asked(model), tmp_path, dtype, limit)

    assert peak_growth(stored) < 2 * limit
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    # All of them together, which the same measure sees.
    assert peak_growth(lambda: dict(made_when_asked(model))) > 7 * limit
