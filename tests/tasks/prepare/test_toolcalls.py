"""Tool calls are given to each template in the form that it prints."""

import pytest

from regrow.tasks.prepare.example import Conversation, RowError
from regrow.tasks.prepare.masking import Masker, MaskRules
from regrow.tasks.prepare.rendering import ChatTemplate
from regrow.tasks.prepare.toolcalls import CallForm

HEAD = "{% for m in messages %}<|{{ m.role }}|>"
# Qwen's way: an object, made JSON by the template, beside the content.
OBJECTS = HEAD + (
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}<|end|>{% endfor %}"
)
# DeepSeek V3's way: text, and only where the content is null.
TEXTS = HEAD + (
    "{% if m.content is none %}{% for c in m.tool_calls %}"
    "{{ '<call>' + c.function.name + c.function.arguments + '</call>' }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
)
# gpt-oss's way: another head and another end for calls.
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.tool_calls %}"
    "{% set f = m.tool_calls[0].function %} to={{ f.name }}"
    "<|message|>{{ f.arguments | tojson }}<|call|>{% else %}"
    "<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SPECIALS = ("<|start|>", "<|message|>", "<|channel|>", "<|call|>", "<|end|>")


def learnt(template: str, arguments, content="") -> list[str]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = (
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "one"},
    )
    masker = Masker(ChatTemplate(template, {}), MaskRules(), "<|end|>", SPECIALS)
    rendered = masker.render(Conversation(messages, (False, True, False, True)))
    return [rendered.text[start:stop] for start, stop in rendered.spans]


@pytest.mark.parametrize("template", [OBJECTS, TEXTS])
@pytest.mark.parametrize("arguments", [{"a": "é"}, '{"a": "é"}'])
def test_arguments_are_printed_alike_from_objects_and_from_text(template, arguments):
    assert learnt(template, arguments) == ['<call>f{"a": "é"}</call><|end|>', "one<|end|>"]


def test_call_may_have_a_head_and_an_end_of_its_own():
    """After the prompt the model writes whom it calls; what ends its turn is another token."""
    assert learnt(CHANNELS, {"a": 1}) == [
        ' to=f<|message|>{"a": 1}<|call|>',
        "one<|end|>",
    ]


def test_call_without_arguments_is_an_empty_object():
    assert learnt(OBJECTS, "")[0] == "<call>f{}</call><|end|>"


def test_text_that_is_no_json_is_refused_where_an_object_is_needed():
    with pytest.raises(RowError, match="tool call of message 1 holds text that is not JSON"):
        learnt(OBJECTS, "a=1")
    assert learnt(TEXTS, "a=1")[0] == "<call>fa=1</call><|end|>"


def test_calls_that_would_be_lost_are_refused():
    with pytest.raises(RowError, match="message 1 calls tools, which the chat template does not"):
        learnt(HEAD + "{{ m.content }}<|end|>{% endfor %}", {"a": 1})
    with pytest.raises(RowError, match="does not print beside its content"):
        learnt(TEXTS, {"a": 1}, content="Let me see.")


def test_object_written_by_python_is_not_json():
    """`{{ arguments }}` of an object prints single quotes: such a template wants text."""
    template = OBJECTS.replace(" | tojson", "")
    assert CallForm.of(ChatTemplate(template, {})).as_text
    assert learnt(template, {"a": "b"})[0] == '<call>f{"a": "b"}</call><|end|>'
