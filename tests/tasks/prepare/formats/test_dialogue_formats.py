"""Formats of several turns with words of their own, by hand from their published meaning."""

from __future__ import annotations

import pytest

from regrow.tasks.prepare.example import RowError

EOS = "<|im_end|>"
TURNS = [
    {"role": "system", "value": "A cat. \n<START>"},
    {"role": "human", "value": " Hi? "},
    {"role": "bot", "value": "Miaow.\n"},
    {"role": "human", "value": "🙂"},
    {"role": "bot", "value": ""},
]


def test_pygmalion_learns_what_the_bot_says(read):
    assert read("pygmalion", {"conversations": TURNS}).spans == [
        (0, "<|system|>Persona: A cat.<|user|> Hi?<|model|>"),
        (1, " Miaow." + EOS),
        (0, "<|user|> 🙂<|model|>"),
        (1, " " + EOS),
    ]


def test_pygmalion_without_persona_or_with_all_trained(read):
    given = read("pygmalion", {"talk": TURNS[1:3]}, field="talk")
    assert given.spans == [(0, "<|user|> Hi?<|model|>"), (1, " Miaow." + EOS)]
    whole = read("pygmalion", {"conversations": TURNS[1:3]}, train_on_inputs=True)
    assert whole.mask == [0] + [1] * (len(given.ids) - 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "no column 'conversations'"),
        ({"conversations": "Hi"}, "must hold a list of turns"),
        ({"conversations": [{"role": "gpt", "value": "a"}]}, "turn 0 has the role 'gpt'"),
        ({"conversations": [{"role": "bot"}]}, r"turn 0 \(bot\) has no text"),
    ],
)
def test_malformed_turns_are_explained(read, row, message):
    with pytest.raises(RowError, match=message):
        read("pygmalion", row)


LLAMA = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": " Hi? "},
    {"from": "gpt", "value": " Ho. "},
    {"from": "human", "value": "Why?"},
    {"from": "gpt", "value": "So."},
]


def test_llama2_chat_is_metas_format(read_as_llama):
    assert read_as_llama("llama2_chat", {"conversations": LLAMA}).spans == [
        (0, "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi? [/INST]"),
        (1, " Ho. </s>"),
        (0, "<s>[INST] Why? [/INST]"),
        (1, " So. </s>"),
    ]


def test_llama2_chat_has_a_system_text_anyway(read):
    text = read("llama2_chat", {"conversations": LLAMA[1:3]}).text
    assert text.startswith("[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant.")
    assert text.endswith("\n<</SYS>>\n\nHi? [/INST] Ho. </s>" + EOS)


def test_llama2_chat_leaves_out_what_has_no_answer_and_what_answers_nothing(read):
    whole = read("llama2_chat", {"conversations": LLAMA})
    greeted = [LLAMA[0], {"from": "gpt", "value": "Welcome."}, *LLAMA[1:]]
    asked = [*LLAMA, {"from": "human", "value": "And?"}]
    assert read("llama2_chat", {"conversations": greeted}).ids == whole.ids
    assert read("llama2_chat", {"conversations": asked}).ids == whole.ids


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "no question with an answer"),
        (LLAMA[:2], "no question with an answer"),
        ([LLAMA[1], LLAMA[1], LLAMA[2]], "'human' speaks where gpt must"),
        ([LLAMA[1], {"from": "bing", "value": "a"}], "'bing' speaks where gpt must"),
        ([{"from": "human"}], "turn 0 has no text"),
        ("Hi", "must be a list of turns"),
    ],
)
def test_dialogues_llama2_does_not_know_are_explained(read, turns, message):
    with pytest.raises(RowError, match=message):
        read("llama2_chat", {"conversations": turns})


THOUGHT = {"instruction": "Add.", "output": "3", "reflection": "No.", "corrected": "2"}


def test_reflection_learns_thought_reflection_and_answer(read):
    assert read("reflection", {**THOUGHT, "input": "1 1"}).spans == [
        (0, "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n"),
        (
            1,
            "### Thought:\n3\n\n### Agent Reflection:\nNo.\n\n### Final Response:\n2" + EOS,
        ),
    ]


def test_reflection_in_a_style_tells_what_to_do(read):
    prompt, learnt = read("reflection:chat", THOUGHT).spans
    assert prompt[1].startswith(
        "Below is an instruction that describes a task. You, the Assistant,"
    )
    assert prompt[1].endswith("augmentations to the generation\n\nUSER: Add.\nASSISTANT:")
    # With the corrected answer, which Axolotl's words for this style leave out.
    assert learnt == (1, "\nTHOUGHT: 3\nASSISTANT REFLECTION: No.\nASSISTANT:2" + EOS)
    instruct = read("reflection:instruct", THOUGHT).spans[0][1]
    assert instruct.endswith("generation\n\n### Instruction:\nAdd.\n\n### Response:\n")


@pytest.mark.parametrize("part", ["output", "reflection", "corrected"])
def test_an_incomplete_reflection_teaches_nothing(read, part):
    assert read("reflection", {**THOUGHT, part: ""}).learnt == ""
    with pytest.raises(RowError, match=f"no column '{part}'"):
        read("reflection", {name: text for name, text in THOUGHT.items() if name != part})
