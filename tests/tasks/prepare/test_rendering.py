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
    for own in (None, "tokenizer_default", "qwen3", "tokenizer_default_fallback_chatml"):
        assert template_text(own, None) is None
    assert fallback_text("tokenizer_default_fallback_llama3") == TEMPLATES["llama3"]
    assert fallback_text("qwen3") == TEMPLATES["chatml"]
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
