"""Each format reads the rows people have, and says what is wrong with the others."""

import json
from types import SimpleNamespace

import pytest

from regrow.tasks.prepare.example import Conversation, RowError, Segment
from regrow.tasks.prepare.formats import alpaca, chat_template, completion
from regrow.tasks.prepare.formats.registry import FORMATS, format_name
from regrow.tasks.stage import StageError


def read(row, **options) -> Conversation:
    return chat_template.read(row, chat_template.Options(**options))


def pairs(conversation: Conversation) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in conversation.messages]


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"conversations": MESSAGES},
        {"messages": SHAREGPT},
        {"conversations": SHAREGPT},
        {"messages": json.dumps(MESSAGES)},
        {
            "messages": [
                MESSAGES[0],
                {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            ]
        },
    ],
)
def test_usual_forms_of_messages(row):
    conversation = read(row)
    assert pairs(conversation) == [("user", "q"), ("assistant", "a")]
    assert conversation.trained == (False, True)


def test_properties_and_roles_can_be_named():
    row = {"talk": [{"who": "Bob", "says": "q"}, {"who": "bot", "says": "a"}]}
    options = {
        "messages": "talk",
        "properties": {"role": "who", "content": "says"},
        "roles": {"Bob": "user", "bot": "assistant"},
    }
    assert pairs(read(row, **options)) == [("user", "q"), ("assistant", "a")]


def test_unknown_roles_stay_and_can_be_trained():
    row = {"conversations": [*SHAREGPT, {"from": "function_call", "value": "{}"}]}
    conversation = read(row, roles_to_train=("function_call",))
    assert conversation.messages[2]["role"] == "function_call"
    assert conversation.trained == (False, False, True)


def test_system_column_goes_first_unless_there_is_one():
    assert pairs(read({"system": "s", "messages": MESSAGES}))[0] == ("system", "s")
    assert len(read({"system": "", "messages": MESSAGES}).messages) == 2
    own = [{"role": "system", "content": "own"}, *MESSAGES]
    assert pairs(read({"system": "s", "messages": own}))[0] == ("system", "own")


def test_tool_calls_are_opened():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": '[{"name": "f"}]',
    }
    conversation = read(row)
    assert conversation.messages[1]["content"] == ""
    assert conversation.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert conversation.tools == ({"name": "f"},)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chat": MESSAGES}, "no column 'messages'; the row has 'chat'.*field_messages"),
        ({"messages": None}, "must hold a list of messages, not 'None'"),
        ({"messages": ["hello"]}, "must hold a list of messages"),
        ({"messages": "hello"}, "not JSON"),
        (
            {"messages": [{"author": "x", "content": "y"}]},
            "message 0 has no role.*'author'.*mappings",
        ),
        ({"messages": [{"role": "user", "text": "y"}]}, "message 0 has no text in 'content'"),
        ({"messages": [{"role": "user", "content": 3}]}, "no text in 'content'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "parts that are not text",
        ),
        ({"messages": MESSAGES, "tools": {"a": 1}}, "column 'tools' must hold a list"),
    ],
)
def test_malformed_conversation_is_explained(row, message):
    with pytest.raises(RowError, match=message):
        read(row)


def test_alpaca_with_and_without_input():
    row = {"instruction": "Add {input}.", "input": "1 {instruction}", "output": "2"}
    with_input = alpaca.read(row, alpaca.Options())
    assert with_input.segments[0].text.endswith(
        "### Instruction:\nAdd {input}.\n\n### Input:\n1 {instruction}\n\n### Response:\n"
    )
    assert with_input.segments[1] == Segment("2", True)
    for absent in ("", None):
        prompt = alpaca.read({**row, "input": absent}, alpaca.Options()).segments[0]
        assert not prompt.trained
        assert prompt.text.startswith("Below is an instruction that describes a task. Write")
        assert "### Input" not in prompt.text
    assert all(s.trained for s in alpaca.read(row, alpaca.Options(train_on_inputs=True)).segments)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"instruction": "a", "answer": "b"},
            "no column 'output'; the row has 'instruction', 'answer'",
        ),
        ({"instruction": "a", "output": [5]}, "column 'output' must hold text, not"),
        ({"instruction": None, "output": "b"}, "column 'instruction' must hold text, not null"),
    ],
)
def test_malformed_alpaca_row_is_explained(row, message):
    with pytest.raises(RowError, match=message):
        alpaca.read(row, alpaca.Options())


def test_completion_reads_its_column():
    assert completion.read({"body": "x"}, completion.Options("body")).segments == (
        Segment("x", True),
    )
    with pytest.raises(RowError, match=r"no column 'text'; the row has 'body'.*`field`"):
        completion.read({"body": "x"}, completion.Options())


def test_every_format_offers_what_the_registry_says():
    for module in FORMATS.values():
        assert module.Options()
        assert callable(module.read)
    assert format_name("chat_template.default", "datasets.0") == "chat_template"
    with pytest.raises(StageError, match=r"datasets\.0\.type: 'sharegpt'.*alpaca, chat_template"):
        format_name("sharegpt", "datasets.0")


def test_dataset_setting_comes_before_the_recipes():
    dataset = SimpleNamespace(
        train_on_inputs=False, field_instruction="i", field_input="c", field_output="o"
    )
    recipe = SimpleNamespace(train_on_inputs=True)
    assert alpaca.Options.from_recipe(dataset, recipe) == alpaca.Options("i", "c", "o", False)
    dataset.train_on_inputs = None
    assert alpaca.Options.from_recipe(dataset, recipe).train_on_inputs
