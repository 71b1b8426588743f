"""Templates render here exactly as in Transformers, on any day, and cannot leave the sandbox."""

import pytest

from regrow.tasks.prepare.example import RowError
from regrow.tasks.prepare.rendering import ChatTemplate
from regrow.tasks.prepare.templates import TEMPLATES, fallback_text, template_text
from regrow.tasks.stage import StageError

DIALOGUE = [
    {"role": "user", "content": " Grüße,\n<b>'quoted'</b> 🦊 "},
    {"role": "assistant", "content": "{{ not jinja }} & so on\n"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "done"},
]
AWKWARD = """
{%- for m in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {% generation %}{{ m | tojson }}{% endgeneration %}
  {# a comment #}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif -%}
{{ bos_token }}
"""


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", [*TEMPLATES, "own", "awkward"])
def test_renders_as_transformers_does(tokenizer, name, prompt):
    text = {"own": tokenizer.chat_template, "awkward": AWKWARD, **TEMPLATES}[name]
    expected = tokenizer.apply_chat_template(
        DIALOGUE, chat_template=text, tokenize=False, add_generation_prompt=prompt
    )
    template = ChatTemplate(text, tokenizer.special_tokens_map)
    assert template.render(DIALOGUE, None, prompt) == expected


def test_tools_render_as_transformers_does(tokenizer):
    tools = [{"type": "function", "function": {"name": "añadir", "parameters": {"b": 1, "a": [2]}}}]
    expected = tokenizer.apply_chat_template(
        DIALOGUE, tools=tools, chat_template=AWKWARD, tokenize=False
    )
    assert ChatTemplate(AWKWARD, tokenizer.special_tokens_map).render(DIALOGUE, tools) == expected


def test_template_does_not_read_the_clock():
    text = "{{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate(text, {}).render(DIALOGUE) == "26 Jul 2024"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_template_cannot_leave_the_sandbox(attack):
    with pytest.raises(RowError):
        ChatTemplate(attack, {}).render(DIALOGUE)


def test_refusal_names_the_roles_and_the_reason():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(RowError, match=r"roles: user, assistant, .*roles must alternate"):
        template.render(DIALOGUE)


def test_syntax_error_names_the_line():
    with pytest.raises(StageError, match="chat_template: line 2"):
        ChatTemplate("fine\n{% if %}", {})


def test_name_means_its_text_and_default_means_the_tokenizers_own(tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{{ messages }}")
    assert template_text("chatml", None) == TEMPLATES["chatml"]
    assert template_text("jinja", str(file)) == "{{ messages }}"
    assert template_text(None, "{{ 1 }}") == "{{ 1 }}"
    for own in (None, "tokenizer_default", "qwen3_5", "tokenizer_default_fallback_chatml"):
        assert template_text(own, None) is None
    assert fallback_text("tokenizer_default_fallback_llama3") == TEMPLATES["llama3"]
    assert fallback_text("qwen3_5") == TEMPLATES["qwen3"]
    assert fallback_text("tokenizer_default") is None


@pytest.mark.parametrize(
    ("name", "jinja", "message"),
    [
        ("chatlm", None, "no template named 'chatlm'.*chatml.*tokenizer_default"),
        ("jinja", None, "chat_template_jinja"),
        ("jinja", "missing.jinja", "neither Jinja text nor a file"),
    ],
)
def test_unknown_template_is_an_error_with_a_remedy(name, jinja, message):
    with pytest.raises(StageError, match=message):
        template_text(name, jinja)


PUBLISHED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
    "gemma": "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n",
    "gemma3": "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n",
    "mistral_v1": "<s> [INST] S\n\nQ [/INST] A</s>",
    "mistral_v2v3": "<s>[INST] S\n\nQ[/INST] A</s>",
    "mistral_v3_tekken": "<s>[INST]S\n\nQ[/INST]A</s>",
    "mistral_v7_tekken": "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]Q[/INST]A</s>",
    "phi_3": "<s><|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n",
    "phi_35": "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n",
    "alpaca": "<s>S\n\n### Instruction:\nQ\n\n### Response:\nA</s>",
    "vicuna": "<s>S USER: Q ASSISTANT: A</s>",
    "cohere": "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A<|END_OF_TURN_TOKEN|>",
    "deepseek_v2": "<s>S\n\n<｜User｜>Q<｜Assistant｜>A</s>",
    "deepseek_v3": "<s>S<｜User｜>Q<｜Assistant｜>A<｜end▁of▁sentence｜>",
    "exaone": "[|system|]S[|endofturn|]\n[|user|]Q\n[|assistant|]A[|endofturn|]\n",
    "falcon_h1": "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n",
    "metharme": "<s><|system|>S<|user|>Q<|model|>A</s>",
    "qwen_25": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n",
    "qwen3": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\nA<|im_end|>\n",
}
"""What the model families' own documents and tokenizers show for S, Q and A."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_bundled_template_prints_the_published_format(name):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(messages) == PUBLISHED[name]
    if not name.startswith(("qwen3", "mistral_v2v3", "mistral_v3_tekken", "metharme", "alpaca")):
        prompt = template.render(messages[:2], None, True)
        assert PUBLISHED[name].startswith(prompt)


def test_qwen3_keeps_thinking_behind_the_last_question_only():
    template = ChatTemplate(TEMPLATES["qwen3"], {})
    answer = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    call = {**answer, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    question, result = {"role": "user", "content": "q"}, {"role": "tool", "content": "r"}
    text = template.render([question, answer, question, call, result, answer])
    first, second, third = text.split("<|im_start|>assistant\n")[1:]
    assert first.startswith("a<|im_end|>")
    assert second.startswith(
        '<think>\nhm\n</think>\n\na\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}'
        "\n</tool_call>"
        "<|im_end|>\n<|im_start|>user\n<tool_response>\nr\n</tool_response><|im_end|>\n"
    )
    assert third == "<think>\nhm\n</think>\n\na<|im_end|>\n"
