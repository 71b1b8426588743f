"""A published model stops where the tokenizer and its template say that an answer ends."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from regrow.tasks.modeling.adapter import add_adapter, embedding_names
from regrow.tasks.modeling.ends import align_special_ids, stop_ids


def tiny(tokenizer, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def tokenizer(smollm2_dir):
    return AutoTokenizer.from_pretrained(smollm2_dir)


def test_configuration_names_the_tokenizers_end_and_keeps_the_models(tokenizer):
    model = tiny(tokenizer)
    assert tokenizer.eos_token_id not in (None, 0)
    align_special_ids(model, tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert set(model.generation_config.eos_token_id) == {0, tokenizer.eos_token_id}


def test_template_that_ends_turns_in_another_token_is_followed(tokenizer):
    end = "<|endoftext|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    assert tokenizer.convert_tokens_to_ids(end) in stop_ids(tokenizer, tiny(tokenizer))


def test_both_ends_of_a_tied_embedding_are_trained_as_one(tokenizer):
    model = tiny(tokenizer)
    assert embedding_names(model) == {"embed_tokens"}
    adapted = add_adapter(model, r=2, alpha=4, target_linear=True, modules_to_save=["embed_tokens"])
    adapted(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    merged = adapted.merge_and_unload()
    embedding, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert torch.equal(embedding, head)
    assert not torch.equal(head, tiny(tokenizer).get_output_embeddings().weight)


def test_an_untied_model_needs_its_head_too(tokenizer):
    assert embedding_names(tiny(tokenizer, tied=False)) == {"embed_tokens", "lm_head"}
