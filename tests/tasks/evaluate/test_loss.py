"""The validation loss equals that of each example alone, whatever is packed or batched together."""

import math

import pytest
import torch

from regrow.tasks.evaluate.loss import validation_scores
from regrow.tasks.modeling.load import load_model
from regrow.tasks.modeling.rows import PackedRows
from regrow.tasks.stage import StageError
from tests.tasks.evaluate.prepared import Notes, examples, write_prepared


@pytest.fixture(scope="module")
def model(tiny_llama_dir):
    return load_model(tiny_llama_dir, dtype="float32").eval()


def _reference(model_dir, tokenizer) -> dict[str, float]:
    """Each example by itself, through Transformers' own attention and full logits."""
    model = load_model(model_dir, dtype="float32", attention="sdpa").eval()
    nll, right, count = 0.0, 0, 0
    for ids, cut in examples(tokenizer):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        targets = torch.tensor(ids[1:])
        log_p = torch.log_softmax(logits, dim=-1)[torch.arange(len(targets)), targets]
        nll -= log_p[cut - 1 :].sum().item()
        right += (logits.argmax(-1) == targets)[cut - 1 :].sum().item()
        count += len(ids) - cut
    return {"loss": nll / count, "token_accuracy": right / count, "supervised_tokens": count}


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_loss_is_that_of_the_examples_alone(model, prepared, tokenizer, tiny_llama_dir, batch_size):
    notes = Notes()
    scores = validation_scores(model, PackedRows(prepared, "validation"), batch_size, notes)
    expected = _reference(tiny_llama_dir, tokenizer)
    # float32: 2e-6 measured
    assert scores["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert scores["token_accuracy"] == expected["token_accuracy"]
    assert scores["supervised_tokens"] == expected["supervised_tokens"]
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert notes.progressed[-1] == (2, 2, "rows")


def test_only_supervised_tokens_count(model, tokenizer, tmp_path):
    """Another prompt's tokens change the loss through what they say, never by being counted."""
    one = write_prepared(tmp_path / "one", tokenizer, [[0]], False)
    scores = validation_scores(model, PackedRows(one, "validation"), 1, Notes())
    ids, cut = examples(tokenizer)[0]
    assert scores["supervised_tokens"] == len(ids) - cut


def test_a_diverged_model_is_named(tiny_llama_dir, prepared):
    broken = load_model(tiny_llama_dir, dtype="float32").eval()
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(StageError, match="diverged"):
        validation_scores(broken, PackedRows(prepared, "validation"), 1, Notes())
