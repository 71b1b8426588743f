"""Prepared artifacts for the evaluate stage's tests."""

import pytest
import torch
from transformers import AutoTokenizer

from regrow.tasks.modeling.load import load_model
from tests.tasks.evaluate.prepared import examples, write_prepared


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models are slower on several threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer(tiny_llama_dir):
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.fixture(scope="session")
def prepared(tokenizer, tmp_path_factory):
    """Two validation rows of three and two examples, and five prompts."""
    return write_prepared(tmp_path_factory.mktemp("p"), tokenizer, [[0, 3, 2], [4, 1]], True)


@pytest.fixture(scope="session")
def trained_dir(tiny_llama_dir, tokenizer, tmp_path_factory):
    """The tiny model after it has learnt the examples by heart."""
    model = load_model(tiny_llama_dir, dtype="float32", attention="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    talks = examples(tokenizer)
    longest = max(len(ids) for ids, _ in talks)
    ids_BT = torch.full((len(talks), longest), 2)
    labels_BT = torch.full_like(ids_BT, -100)
    for i, (ids, cut) in enumerate(talks):
        ids_BT[i, : len(ids)] = torch.tensor(ids)
        labels_BT[i, cut : len(ids)] = torch.tensor(ids[cut:])
    for _ in range(40):
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    out = tmp_path_factory.mktemp("trained")
    model.save_pretrained(out)
    return out
