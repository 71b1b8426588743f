"""Ends of messages are found where the template prints them, and named ends are tokens."""

import pytest
from tokenizers import Tokenizer

from regrow.tasks.prepare.endings import Endings, check_eot_tokens
from regrow.tasks.prepare.rendering import ChatTemplate
from regrow.tasks.prepare.templates import TEMPLATES
from regrow.tasks.stage import StageError

SPECIALS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi_3": ("<|end|>", "<|user|>", "<|assistant|>"),
    "mistral_v1": ("[INST]", "[/INST]"),
    "deepseek_v2": ("<｜User｜>", "<｜Assistant｜>"),
}
ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi_3": "<|end|>",
    "mistral_v1": "</s>",
    "deepseek_v2": "</s>",
}


def endings(name: str, eot_tokens=()) -> tuple[Endings, str]:
    """Those of a template, and its text of a dialogue."""
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    made = Endings(template, "</s>", ("<s>", "</s>", *SPECIALS[name]), eot_tokens)
    pairs = [("user", "q"), ("assistant", "ANSWER"), ("user", "q")]
    return made, template.render([{"role": r, "content": c} for r, c in pairs])


@pytest.mark.parametrize("name", SPECIALS)
def test_answer_is_ended_by_the_token_its_template_prints(name):
    """Also where that is not the eos token and the recipe names no other."""
    made, text = endings(name)
    stop = text.index("ANSWER") + len("ANSWER")
    first = made.behind(text, stop, "assistant").first
    assert first is not None
    assert text[stop + first[0] : stop + first[1]] == ENDS[name]


def test_template_that_needs_a_system_message_is_asked_with_one():
    text = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    template = ChatTemplate(text + TEMPLATES["chatml"], {})
    made = Endings(template, "</s>", SPECIALS["chatml"], ())
    assert made.header == "<|im_start|>assistant\n"
    assert made.behind("<|im_start|>", 0, "assistant").first is None


def test_prompt_markers_end_nobody():
    made, text = endings("mistral_v1")
    assert made.behind(text, text.index("q") + 1, "user").first is None


def test_named_tokens_are_the_only_ends_but_eos():
    made, text = endings("mistral_v1", ("[/INST]",))
    stop = text.index("q") + 1
    found = made.behind(text, stop, "user")
    assert found.eot is not None
    assert text[stop + found.eot[0] : stop + found.eot[1]] == "[/INST]"
    assert found.eos is None
    answer = made.behind(text, text.index("ANSWER") + len("ANSWER"), "assistant")
    assert (answer.eot, answer.eos) == (None, (0, 4))


def test_named_end_is_one_token(smollm2_dir):
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    check_eot_tokens(("<|im_end|>",), tokenizer)
    with pytest.raises(StageError, match=r"eot_tokens: '\[/INST\]' is not one token"):
        check_eot_tokens(("[/INST]",), tokenizer)
