"""Messages reach templates with the names, texts and flags that the recipe and the data mean."""

import json

import pytest

from regrow.configs.load import parse_recipe
from regrow.tasks.prepare.example import RowError
from regrow.tasks.prepare.formats.chat_template import Options, read
from regrow.tasks.prepare.masking import Masker, MaskRules
from regrow.tasks.prepare.rendering import ChatTemplate
from regrow.tasks.prepare.templates import TEMPLATES

CALL = {"name": "area", "arguments": {"sides": [2, 3]}}
GLAIVE = {
    "conversations": [
        {"from": "human", "value": "How large?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": '{"area": 6}'},
        {"from": "gpt", "value": "6."},
    ],
    "tools": json.dumps([{"name": "area", "parameters": {"type": "object"}}]),
}


def options(recipe: dict | None = None, **dataset) -> Options:
    """The options of a recipe with such keys."""
    parsed = parse_recipe(
        {
            "base_model": "org/model",
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-4,
            "datasets": [{"path": "rows.jsonl", "type": "chat_template", **dataset}],
            **(recipe or {}),
        }
    ).recipe
    return Options.from_recipe(parsed.datasets[0], parsed)


def said(*pairs: tuple[str, str], **columns) -> dict:
    return {"messages": [{"role": r, "content": c} for r, c in pairs], **columns}


QA = (("user", "q"), ("assistant", "a"))


def learnt(row: dict, given: Options, template: str = TEMPLATES["chatml"]) -> list[str]:
    """The trained pieces of text, and what is barred in <>."""
    masker = Masker(ChatTemplate(template, {}), MaskRules(), "<|im_end|>", ("<|im_start|>",))
    rendered = masker.render(read(row, given))
    return [rendered.text[start:stop] for start, stop in rendered.spans]


def test_glaive_calls_and_results_become_tool_messages():
    found = read(GLAIVE, options())
    assert [m["role"] for m in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": CALL}]
    assert found.trained == (False, True, False, True)
    assert found.tools == (
        {
            "type": "function",
            "function": {"name": "area", "parameters": {"type": "object"}},
        },
    )


def test_roles_of_the_recipe_are_the_only_ones():
    roles = {"assistant": ["gpt", "function_call"], "user": ["human"], "tool": ["observation"]}
    found = read(GLAIVE, options(roles=roles))
    assert [m["role"] for m in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1] == {"role": "assistant", "content": json.dumps(CALL)}
    assert read(said(("gpt", "a")), options(roles=roles)).messages[0]["role"] == "assistant"
    assert read(said(("bot", "a")), options(roles=roles)).messages[0]["role"] == "bot"


def test_tools_are_read_from_their_column_and_parameters_opened():
    tool = {"type": "function", "function": {"name": "f", "parameters": '{"type": "object"}'}}
    found = read(said(*QA, functions=[tool]), options(field_tools="functions"))
    assert found.tools is not None
    assert found.tools[0]["function"]["parameters"] == {"type": "object"}
    with pytest.raises(RowError, match="'functions' must hold a list"):
        read(said(*QA, functions={"a": 1}), options(field_tools="functions"))


def test_null_properties_are_no_properties():
    """Parquet gives every message every property."""
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    row = {"messages": [{"role": "user", "content": "q", "tool_calls": None, "name": None}]}
    assert read(row, options()).messages == ({"role": "user", "content": "q"},)
    row = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    (message,) = read(row, options()).messages
    assert message["content"] == ""
    assert message["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_column_of_the_system_message_is_used_where_there_is_none():
    assert read(said(*QA, system="s"), options()).messages[0] == {"role": "system", "content": "s"}
    own = said(("system", "own"), *QA, system="s")
    assert [m["content"] for m in read(own, options()).messages] == ["own", "q", "a"]


def test_system_messages_are_dropped_or_added_as_the_recipe_says():
    drop = options(drop_system_message=True)
    assert len(read(said(("system", "s"), *QA), drop).messages) == 2
    assert len(read(said(*QA, system="s"), drop).messages) == 2
    default = options({"default_system_message": "Be brief."})
    assert read(said(*QA), default).messages[0]["content"] == "Be brief."
    assert read(said(("system", "s"), *QA), default).messages[0]["content"] == "s"


def test_training_flag_of_a_message_comes_before_its_role():
    given = options(message_field_training="train", roles_to_train=["assistant"])
    row = {
        "messages": [
            {"role": "user", "content": "q", "train": True},
            {"role": "assistant", "content": "a", "train": False},
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": "b", "train": 1},
        ]
    }
    found = read(row, given)
    assert found.trained == (True, False, False, True)
    assert all("train" not in message for message in found.messages)
    row["messages"][0]["train"] = "no"
    with pytest.raises(RowError, match="'train' must be true or false"):
        read(row, given)


def test_train_on_inputs_trains_all_messages_but_not_their_frame():
    row = said(("system", "s"), *QA)
    assert learnt(row, options(train_on_inputs=True)) == [
        "s<|im_end|>",
        "q<|im_end|>",
        "a<|im_end|>",
    ]


# Axolotl's own example: offsets are of characters, the last one included.
WELL = "I'm doing very well, thank you!"
DETAIL = [
    {"begin_offset": 0, "end_offset": 8, "train": False},
    {"begin_offset": 9, "end_offset": 18, "train": True},
    {"begin_offset": 19, "end_offset": 30, "train": False},
]


@pytest.mark.parametrize("form", [list, json.dumps])
def test_details_choose_characters(form):
    row = said(("user", "How are you?"), ("assistant", WELL))
    row["messages"][1]["parts"] = form(DETAIL)
    given = options(message_field_training_detail="parts", roles_to_train=[])
    assert learnt(row, given) == [" very well", "<|im_end|>"]


def test_details_hold_where_the_template_strips():
    row = said(("user", "q"), ("assistant", "  one two \n"))
    row["messages"][1]["parts"] = [{"begin_offset": 5, "end_offset": 9, "train": True}]
    given = options(message_field_training_detail="parts")
    trimmed = TEMPLATES["chatml"].replace("message['content']", "message['content'] | trim")
    assert learnt(row, given, trimmed) == [" two", "<|im_end|>"]


def test_details_hold_where_the_template_puts_a_space_before_the_answer():
    row = said(("user", "q"), ("assistant", "one two"))
    row["messages"][1]["parts"] = [{"begin_offset": 0, "end_offset": 2, "train": True}]
    spaced = TEMPLATES["mistral_v1"].replace("bos_token", "''").replace("eos_token", "'<|im_end|>'")
    given = options(message_field_training_detail="parts")
    assert learnt(row, given, spaced) == ["one", "<|im_end|>"]


def test_message_whose_details_are_all_false_is_not_learnt():
    row = said(*QA)
    row["messages"][1]["parts"] = [{"begin_offset": 0, "end_offset": 0, "train": False}]
    assert learnt(row, options(message_field_training_detail="parts")) == []


def test_space_goes_with_the_word_behind_it():
    """Tokenizers make one token of the two, which cannot be learnt in half."""
    parts = [
        {"type": "text", "text": "Hm, well... ", "train": False},
        {"type": "text", "text": "four.", "train": True},
    ]
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": parts}]}
    assert learnt(row, options()) == [" four.", "<|im_end|>"]
    parts[0]["train"], parts[1]["train"] = True, False
    assert learnt(row, options()) == ["Hm, well...", "<|im_end|>"]


def test_details_of_rewritten_text_are_refused():
    row = said(*QA)
    row["messages"][1]["parts"] = [{"begin_offset": 0, "end_offset": 0, "train": True}]
    upper = TEMPLATES["chatml"].replace("message['content']", "message['content'] | upper")
    with pytest.raises(RowError, match="does not print 'content' of message 1 as it is"):
        learnt(row, options(message_field_training_detail="parts"), upper)


@pytest.mark.parametrize("detail", [[{"begin_offset": 0}], "x", [1], {"begin_offset": 0}])
def test_malformed_details_are_refused(detail):
    row = said(*QA)
    row["messages"][1]["parts"] = detail
    with pytest.raises(RowError, match="'parts' of message 1"):
        read(row, options(message_field_training_detail="parts"))


def test_text_parts_are_one_text_and_images_stay():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "content": "b"}, "c"]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "d"}]}
    assert read(row, options()).messages[0]["content"] == "a bc"
    parts[0] = {"type": "image", "path": "x.png"}
    found = read(row, options())
    assert found.messages[0]["content"] == parts
    masker = Masker(ChatTemplate(TEMPLATES["chatml"], {}), MaskRules(), "</s>", ())
    with pytest.raises(RowError, match="message 0 has a part of type 'image'"):
        masker.render(found)


@pytest.mark.parametrize(
    ("content", "thinking", "answer"),
    [
        ("<think>\n hm \n</think>\n\nfour", "hm", "four"),
        ("<reasoning>hm</reasoning>four\n", "hm", "four\n"),
        (
            "<|begin_of_thought|>hm<|end_of_thought|> <|begin_of_solution|> 4 <|end_of_solution|>",
            "hm",
            "4",
        ),
        ("no thinking", None, "no thinking"),
        ("words <think>hm</think> kept", None, "words <think>hm</think> kept"),
        ("<think>never closed", None, "<think>never closed"),
    ],
)
def test_thinking_is_split_from_the_answer(content, thinking, answer):
    row = said(("user", content), ("assistant", content))
    user, message = read(row, options(split_thinking=True)).messages
    assert user == {"role": "user", "content": content}
    assert message.get("reasoning_content") == thinking
    assert message["content"] == answer


def test_thinking_has_the_names_of_data_and_template():
    row = said(*QA)
    row["messages"][1]["thoughts"] = "hm"
    given = options(field_thinking="thoughts", template_thinking_key="thinking")
    assert read(row, given).messages[1] == {"role": "assistant", "content": "a", "thinking": "hm"}
    row = said(("user", "q"), ("assistant", "<think>hm</think>a"))
    given = options(template_thinking_key="thinking", split_thinking=True)
    assert read(row, given).messages[1]["thinking"] == "hm"


def test_thinking_alone_is_an_answer():
    row = {"messages": [{"role": "assistant", "reasoning_content": "hm"}]}
    assert read(row, options()).messages[0]["content"] == ""
    with pytest.raises(RowError, match="message 0 has no text in 'content'"):
        read({"messages": [{"role": "assistant"}]}, options())


def test_thinking_is_learnt_from_the_end_of_the_prompt():
    row = said(*QA)
    row["messages"][1]["reasoning_content"] = "hm"
    assert learnt(row, options(), TEMPLATES["qwen3"]) == ["<think>\nhm\n</think>\n\na<|im_end|>"]


def test_further_variables_reach_the_template():
    given = options({"chat_template_kwargs": {"shout": True}})
    text = TEMPLATES["chatml"] + "{{ 'HEY' if shout }}"
    masker = Masker(
        ChatTemplate(text, {}),
        MaskRules(chat_template_kwargs=given.chat_template_kwargs),
        "<|im_end|>",
        (),
    )
    assert masker.render(read(said(*QA), given)).text.endswith("HEY")
