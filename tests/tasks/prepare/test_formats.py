"""`chat_template` reads the rows people have, and says what is wrong with the others."""

import json

import pytest

from regrow.tasks.prepare.example import Conversation, RowError
from regrow.tasks.prepare.formats import chat_template


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
    row = {"conversations": [*SHAREGPT, {"from": "critic", "value": "{}"}]}
    conversation = read(row, roles_to_train=("critic",))
    assert conversation.messages[2]["role"] == "critic"
    assert conversation.trained == (False, False, True)


def test_system_column_goes_first_unless_there_is_one():
    assert pairs(read({"system": "s", "messages": MESSAGES}))[0] == ("system", "s")
    # Empty is not absent, as in Axolotl: templates with a system text of their own leave it out.
    assert pairs(read({"system": "", "messages": MESSAGES}))[0] == ("system", "")
    assert len(read({"system": None, "messages": MESSAGES}).messages) == 2
    own = [{"role": "system", "content": "own"}, *MESSAGES]
    assert pairs(read({"system": "s", "messages": own}))[0] == ("system", "own")


def test_tool_calls_and_tools_are_read():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": [call]}],
        "tools": '[{"name": "f"}]',
    }
    conversation = read(row)
    assert conversation.messages[1]["content"] == ""
    # Which form of the arguments the template prints is found out where it is rendered.
    assert conversation.messages[1]["tool_calls"] == [call]
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
        ({"messages": MESSAGES, "tools": {"a": 1}}, "column 'tools' must hold a list"),
    ],
)
def test_malformed_conversation_is_explained(row, message):
    with pytest.raises(RowError, match=message):
        read(row)
