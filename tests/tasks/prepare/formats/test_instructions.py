"""Instruction formats, written by hand from their published meaning: prompt, answer, eos."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regrow.tasks.prepare.example import RowError

EOS = "<|im_end|>"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
CONCISE = (
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response "
    "that appropriately and concisely completes the request."
)
CONTEXT = "SYSTEM: Use the following contextual information to concisely answer the question.\n\n"
QA = {"instruction": "Add.", "input": "1 1", "output": "2"}
BARE = {"instruction": "Hi?", "output": "Yes."}
CHOICES = {"question": "Which?", "choices": ["red", "blue"], "solution": "red"}
ORCA = {"system_prompt": "Be brief.", "question": "Why?", "response": "So."}
ACR = {
    "instruction": "Sing.",
    "answer": "La.",
    "revision": "La la.",
    "scores": {"refusal": 9, "creativity": 2},
    "critiques": {"refusal": {"improvements": "none", "explanation": "né"}},
}

# (type, row, prompt, answer)
GOLDEN = [
    (
        "alpaca",
        QA,
        f"{ALPACA_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n",
        "2",
    ),
    ("alpaca", BARE, f"{ALPACA}\n\n### Instruction:\nHi?\n\n### Response:\n", "Yes."),
    ("alpaca:instruct", BARE, f"{ALPACA}\n\n### Instruction:\nHi?\n\n### Response:\n", "Yes."),
    ("alpaca_instruct", BARE, f"{ALPACA}\n\n### Instruction:\nHi?\n\n### Response:\n", "Yes."),
    ("alpaca_instruct.load_no_prompt", BARE, "### Instruction:\nHi?\n\n### Response:\n", "Yes."),
    ("alpaca:chat", QA, f"SYSTEM: {ALPACA_INPUT}\nUSER: Add.\n1 1\nASSISTANT:", "2"),
    ("alpaca_chat", BARE, f"SYSTEM: {ALPACA}\nUSER: Hi?\nASSISTANT:", "Yes."),
    ("alpaca_chat.load_no_prompt", QA, "USER: Add.\n1 1\nASSISTANT:", "2"),
    ("alpaca_chat.load_concise", BARE, f"SYSTEM: {CONCISE}\n\n\nUSER: Hi?\nASSISTANT:", "Yes."),
    (
        "alpaca_chat.load_qa",
        {"question": "Hi?", "answer": "Yes."},
        f"SYSTEM: {CONCISE}\n\n\nUSER: Hi?\nASSISTANT:",
        "Yes.",
    ),
    (
        "alpaca_chat.load_camel_ai",
        {"message_1": "Hi?", "message_2": "Yes."},
        f"SYSTEM: {CONCISE}\n\n\nUSER: Hi?\nASSISTANT:",
        "Yes.",
    ),
    (
        "alpaca:chatml",
        QA,
        f"<|im_start|>system\n{ALPACA_INPUT}<|im_end|>\n"
        "<|im_start|>user\nAdd.\n1 1<|im_end|>\n<|im_start|>assistant\n",
        "2",
    ),
    (
        "alpaca:phi",
        BARE,
        f"<|system|>\n{ALPACA}<|end|>\n<|user|>\nHi?<|end|>\n<|assistant|>\n",
        "Yes.",
    ),
    (
        "alpaca:phi",
        QA,
        f"<|system|>\n{ALPACA_INPUT}<|end|>\n<|user|>\nAdd.<|end|>1 1<|assistant|>",
        "2",
    ),
    (
        "gpteacher",
        {"instruction": "Hi?", "response": "Yes."},
        f"{ALPACA}\n\n### Instruction:\nHi?\n\n### Response:\n",
        "Yes.",
    ),
    (
        "oasst:chat",
        {"INSTRUCTION": "Hi?", "RESPONSE": "Yes."},
        f"SYSTEM: {ALPACA}\nUSER: Hi?\nASSISTANT:",
        "Yes.",
    ),
    (
        "jeopardy",
        {"question": "It is red", "category": "COLOURS", "answer": "red"},
        f"{ALPACA_INPUT}\n\n### Instruction:\nIt is red\n\n### Input:\nCOLOURS\n\n### Response:\n",
        "what is red",
    ),
    (
        "summarizetldr",
        {"article": "Long.", "summary": "L."},
        "USER: Summarize the following article as a TL;DR.\nLong.\nASSISTANT:",
        "L.",
    ),
    (
        "explainchoice",
        CHOICES,
        "Choose the answer that best answers the question. Explain your reasoning.\n\n\n"
        '### Instruction:\nWhich?\n\n### Input:\n- "red"\n- "blue"\n\n### Response:\n',
        "red",
    ),
    (
        "explainchoice:chat",
        {**CHOICES, "solution": None, "explanation": "It glows."},
        "SYSTEM: Choose the answer that best answers the question. Explain your reasoning.\n\n"
        'USER: Which?\n- "red"\n- "blue"\nASSISTANT:',
        "It glows.",
    ),
    (
        "concisechoice",
        CHOICES,
        "Choose the answer that best answers the question. Be concise in your response.\n\n"
        'USER: Which?\n- "red"\n- "blue"\nASSISTANT:',
        "red",
    ),
    ("alpaca_w_system", {**BARE, "system": "Be."}, "SYSTEM: Be.\nUSER: Hi?\nASSISTANT:", "Yes."),
    ("alpaca_w_system", {**BARE, "system": ""}, "USER: Hi?\nASSISTANT:", "Yes."),
    ("alpaca_w_system", {**BARE, "system": None}, "USER: Hi?\nASSISTANT:", "Yes."),
    (
        "alpaca_w_system.load_instruct",
        {**QA, "system": "Be."},
        "Be.\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n",
        "2",
    ),
    (
        "alpaca_w_system.load_open_orca",
        ORCA,
        "### System:\nBe brief.\n### Human:\nWhy?\n### Assistant:\n",
        "So.",
    ),
    (
        "alpaca_w_system.load_open_orca_chatml",
        ORCA,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "So.",
    ),
    ("orcamini", ORCA, "### System:\nBe brief.\n\n### User:\nWhy?\n\n### Response:\n", "So."),
    (
        "context_qa",
        {"article": "A {b}.", "question": "Who?", "answer": "I."},
        CONTEXT + "USER: A {b}.\n===\nWho?\nASSISTANT:",
        "I.",
    ),
    (
        "context_qa.load_404",
        {"article": "A.", "unanswerable_question": "Who?"},
        CONTEXT + "USER: A.\n===\nWho?\nASSISTANT:",
        "The context provided does not contain any information about your inquiry. Therefore, I'm "
        "unable to answer your question based on the given context.",
    ),
    (
        "context_qa.load_v2",
        {"context": "A.", "question": "Who?", "answer": "I."},
        "Context: A.\nQuestion: Who?\n",
        "Answer: I.",
    ),
    (
        "creative_acr.load_answer",
        ACR,
        "Answer the following question in a comprehensive, in-depth, and creative way. "
        "Additionally your response should be relevant, accurate, and free of any ambiguity.\n"
        "USER: Sing.\nASSISTANT:",
        "La la.",
    ),
]


@pytest.mark.parametrize(("kind", "row", "prompt", "answer"), GOLDEN)
def test_prompt_and_answer_are_the_formats_words(read, kind, row, prompt, answer):
    assert read(kind, row).spans == [(0, prompt), (1, answer + EOS)]


def test_tokens_of_prompt_and_answer_are_made_apart(read, tokenizer):
    # As one text ":" and what follows could be one token, which no prompt ends with.
    row = {"instruction": "Hi?", "output": " \n"}
    given = read("alpaca_chat.load_no_prompt", row)
    parts = [tokenizer.encode(text).ids for text in ("USER: Hi?\nASSISTANT:", " \n", EOS)]
    assert given.ids == [token for part in parts for token in part]
    assert given.mask == [0] * len(parts[0]) + [1] * (len(parts[1]) + 1)


def test_golden_token_ids(read):
    given = read("alpaca_chat.load_no_prompt", {"instruction": "Hi?", "output": "Yes."})
    assert given.ids == [23824, 42, 21041, 47, 198, 15844, 9814, 17321, 42, 10539, 30, 2]
    assert given.mask == [0] * 9 + [1] * 3


def test_critique_shows_scores_and_critiques_as_yaml(read):
    given = read("creative_acr.load_critique", ACR)
    assert given.learnt == (
        'creativity: 2\nrefusal: 9\nrefusal:\n  explanation: "n\\xE9"\n  improvements: none\n' + EOS
    )
    prompt = given.spans[0][1]
    assert prompt.startswith("USER: Given the following Question and Response, critique the")
    assert "0 means there is prescriptive bias.\n" in prompt
    assert prompt.endswith("    improvements: ...\n\nQuestion: Sing.\nAnswer: La.\n\nASSISTANT:")


def test_revision_is_asked_for_with_the_evaluation(read):
    given = read("creative_acr.load_revise", ACR)
    assert given.learnt == "La la." + EOS
    assert given.spans[0][1].endswith(
        "Question: Sing.\nAnswer: La.\nEvaluation:\ncreativity: 2\nrefusal: 9\n"
        'refusal:\n  explanation: "n\\xE9"\n  improvements: none\n\n\nASSISTANT:'
    )


def test_a_tokenizers_bos_stands_before_the_prompt_only(read_as_llama):
    given = read_as_llama("alpaca_chat.load_no_prompt", {"instruction": "Hi?", "output": "Yes."})
    assert given.spans == [(0, "<s>USER: Hi?\nASSISTANT:"), (1, "Yes.</s>")]
    assert read_as_llama("completion", {"text": "Once"}).text == "<s>Once</s>"
    pieces = {"segments": [{"label": False, "text": "a"}, {"label": True, "text": "b"}]}
    assert read_as_llama("input_output", pieces).text == "ab"
    with_persona = [{"role": "system", "value": "A"}, {"role": "bot", "value": "B"}]
    spans = read_as_llama("pygmalion", {"conversations": with_persona}).spans
    assert spans == [(0, "<s><|system|>Persona: A<|model|>"), (1, " B</s>")]


def test_metharme_answers_end_with_three_eos_tokens(read):
    given = read("metharme", {"prompt": "<|user|>Hi<|model|>", "generation": "Ho"})
    assert given.spans == [(0, "<|user|>Hi<|model|>"), (1, "Ho" + EOS * 3)]
    ended = read("metharme", {"prompt": "a", "generation": "Ho" + EOS})
    assert ended.learnt == "Ho" + EOS * 3


def test_an_eos_token_that_is_there_is_not_repeated(read):
    assert read("alpaca", {"instruction": "a", "output": "b" + EOS}).learnt == "b" + EOS


@pytest.mark.parametrize("kind", ["alpaca", "alpaca_chat.load_no_prompt", "metharme"])
@pytest.mark.parametrize("empty", ["", None])
def test_an_answer_without_text_teaches_nothing(read, kind, empty):
    row = {"instruction": "a", "prompt": "a", "output": empty, "generation": empty}
    assert read(kind, row).learnt == ""


AWKWARD = [
    "naïve 🙂 日本語 \u200d👩‍👩‍👧",
    "  spaces at both ends \n\n",
    "{instruction} {} {{input}} }{",
    "### Response:\n<|im_end|> in the text",
    "\ttabs\r\nand returns",
    "x" * 20_000,
]


@pytest.mark.parametrize("text", AWKWARD)
def test_texts_come_through_as_they_are(read, text):
    row = {"instruction": text, "input": text, "output": text + "."}
    prompt = f"{ALPACA_INPUT}\n\n### Instruction:\n{text}\n\n### Input:\n{text}\n\n### Response:\n"
    assert read("alpaca", row).spans == [(0, prompt), (1, text + "." + EOS)]


# SmolLM2 has no tokens for control characters and for bytes of unassigned ones.
_KNOWN = st.characters(exclude_categories=["Cs", "Cn", "Co", "Cc"], include_characters="\n\r\t")
TEXT = st.text(_KNOWN, max_size=60)


@settings(
    max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(instruction=TEXT, context=TEXT, answer=TEXT.filter(bool))
def test_what_is_learnt_is_the_answer(read, instruction, context, answer):
    row = {"instruction": instruction, "input": context, "output": answer}
    for kind in ("alpaca", "alpaca:chatml", "alpaca_chat.load_no_prompt"):
        learnt = read(kind, row).learnt
        assert learnt == (answer if answer.endswith(EOS) else answer + EOS)


@pytest.mark.parametrize(("number", "text"), [(4, "4"), (0, "0"), (-2.5, "-2.5")])
def test_numbers_are_answers_too(read, number, text):
    assert read("alpaca", {"instruction": 7, "output": number}).learnt == text + EOS


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_input_is_none(read, empty):
    assert read("alpaca", {**BARE, "input": empty}).ids == read("alpaca", BARE).ids


def test_train_on_inputs_learns_all_but_the_first_token(read, encoder):
    given = read("alpaca", QA, train_on_inputs=True)
    assert given.ids == read("alpaca", QA).ids
    assert given.mask == [0] + [1] * (len(given.ids) - 1)


def test_columns_can_be_named(read):
    row = {"q": "Hi?", "c": "", "a": "Yes.", "s": "Be."}
    named = {"field_instruction": "q", "field_input": "c", "field_output": "a"}
    assert read("alpaca", row, **named).ids == read("alpaca", BARE).ids
    with_system = read("alpaca_w_system", row, **named, field_system="s")
    assert with_system.text.startswith("SYSTEM: Be.\n")


def test_alpaca_chat_takes_a_style(read):
    row = {"instruction": "Hi?", "output": "Yes."}
    assert read("alpaca_chat", row, conversation="chatml").ids == read("alpaca:chatml", row).ids


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("alpaca", {"instruction": "a", "answer": "b"}, "'output'.*'answer'.*`field_output`"),
        ("alpaca", {"output": "a"}, "no column 'instruction'.*`field_instruction`"),
        ("alpaca", {"instruction": "a", "output": [5]}, "'output' must hold text, not list"),
        ("alpaca", {"instruction": None, "output": "b"}, "'instruction' must hold text, not null"),
        ("alpaca", {"instruction": "a", "output": True}, "'output' must hold text, not bool"),
        ("alpaca_w_system", BARE, "no column 'system'.*`field_system`"),
        ("explainchoice", {"question": "a", "solution": "b"}, "no column 'choices'"),
        ("explainchoice", {**CHOICES, "choices": "red"}, "must hold a list of choices"),
        ("context_qa", {"article": "a", "answer": "b"}, "no column 'question'.*fixes"),
        ("creative_acr.load_critique", {**ACR, "scores": 3}, "'scores' must hold an object"),
        ("creative_acr.load_critique", {"instruction": "a", "answer": "b"}, "no column 'scores'"),
    ],
)
def test_a_row_of_another_form_is_explained(read, kind, row, message):
    with pytest.raises(RowError, match=message):
        read(kind, row)
