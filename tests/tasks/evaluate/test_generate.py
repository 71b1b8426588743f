"""Answers are the most likely tokens up to the end, whatever is padded or batched with them."""

import pytest
import torch
from transformers import GenerationConfig

from regrow.tasks.evaluate.generate import (
    _batches,
    answers,
    fixed_prompts,
    held_out_prompts,
    stop_ids,
)
from regrow.tasks.modeling.load import load_model
from tests.tasks.evaluate.prepared import TALK, Notes


@pytest.fixture(scope="module")
def model(trained_dir):
    return load_model(trained_dir, dtype="float32", attention="sdpa").eval()


def _greedy(model, tokenizer, ids, most: int) -> str:
    """One token at a time, without padding, batch or cache."""
    made, stops = [], stop_ids(tokenizer, model)
    while len(made) < most:
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *made]]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in stops:
            break
        made.append(token)
    return tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_answers_are_greedy_and_in_order(model, tokenizer, prepared, batch_size):
    prompts = held_out_prompts(prepared, 99)
    assert [prompt.expected for prompt in prompts] == [answer for _, answer in TALK]
    notes = Notes()
    made = answers(model, tokenizer, prompts, 12, batch_size, notes)
    assert made == [_greedy(model, tokenizer, prompt.ids, 12) for prompt in prompts]
    assert made == [answer for _, answer in TALK]  # which it has learnt, up to <|im_end|>
    assert notes.progressed[-1] == (5, 5, "prompts")


def test_batches_hold_each_prompt_once_and_stay_within_memory():
    lengths = [5, 40_000, 9, 20_000, 7, 10_000, 8, 9_000, *[100] * 70]
    batches = list(_batches(lengths, 64))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert [len(batch) for batch in batches] == [1, 1, 3, 64, 9]
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= 2**15 or len(batch) == 1


def test_an_answer_ends_at_any_end_that_the_model_names(model, tokenizer, prepared, trained_dir):
    prompt = held_out_prompts(prepared, 1)
    first, second, *_ = tokenizer(TALK[0][1])["input_ids"]
    stopping = load_model(trained_dir, dtype="float32", attention="sdpa").eval()
    stopping.generation_config = GenerationConfig(eos_token_id=[2, second])
    assert answers(stopping, tokenizer, prompt, 12, 8, Notes()) == [tokenizer.decode([first])]


def test_an_answer_has_at_most_the_tokens_allowed(model, tokenizer, prepared):
    prompt = held_out_prompts(prepared, 1)
    ids = tokenizer(TALK[0][1])["input_ids"]
    assert answers(model, tokenizer, prompt, 2, 8, Notes()) == [tokenizer.decode(ids[:2])]


def test_settings_of_the_model_do_not_change_the_answers(model, tokenizer, prepared, trained_dir):
    prompts = held_out_prompts(prepared, 3)
    other = load_model(trained_dir, dtype="float32", attention="sdpa").eval()
    other.generation_config = GenerationConfig(
        do_sample=True, temperature=3.0, top_k=3, repetition_penalty=2.0, max_new_tokens=1
    )
    made = answers(other, tokenizer, prompts, 6, 8, Notes())
    assert made == answers(model, tokenizer, prompts, 6, 8, Notes())


def test_fixed_prompts_go_through_the_chat_template(tokenizer):
    (prompt,) = fixed_prompts(["Hi there"], tokenizer)
    shown = tokenizer.decode(prompt.ids)
    assert "<|im_start|>user\nHi there<|im_end|>" in shown
    assert shown.endswith("<|im_start|>assistant\n")
    assert prompt.text == "Hi there"
    assert prompt.expected is None


def test_fixed_prompts_without_a_template_are_plain_text(tokenizer):
    from copy import deepcopy

    plain = deepcopy(tokenizer)
    plain.chat_template = None
    (prompt,) = fixed_prompts(["Hi there"], plain)
    assert plain.decode(prompt.ids) == "Hi there"


def test_the_token_that_ends_a_turn_is_found_in_the_template(model, tokenizer):
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    other.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}<end_of_turn>\n{% endfor %}"
    )
    assert stop_ids(tokenizer, model) == [2]
    assert stop_ids(other, model) == [2, other.convert_tokens_to_ids("<end_of_turn>")]
