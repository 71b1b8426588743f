"""Formats without a prompt's words: pieces with flags, plain text, tokens made elsewhere."""

from __future__ import annotations

import json

import pytest

from regrow.tasks.prepare.example import RowError

EOS = "<|im_end|>"
# The example of Axolotl's docs/dataset-formats/template_free.qmd, with SmolLM2's eos token.
SEGMENTS = [
    {"label": True, "text": "Hello\n"},
    {"label": True, "text": "hi there!. "},
    {"label": False, "text": "goodbye "},
    {"label": True, "text": f"farewell{EOS}"},
]


def test_pieces_are_joined_as_they_are(read, tokenizer):
    given = read("input_output", {"segments": SEGMENTS})
    assert given.ids == [i for s in SEGMENTS for i in tokenizer.encode(s["text"]).ids]
    (hello, learnt), *rest = given.spans[0:1] + given.spans[1:2], *given.spans[2:]
    assert hello == (0, "Hello")  # the first token has no predecessor
    assert learnt == (1, "\nhi there!. ")
    assert rest == [(0, "goodbye "), (1, f"farewell{EOS}")]


def test_nothing_is_added_to_pieces(read):
    given = read("input_output", {"segments": [{"label": False, "text": "a"}]})
    assert given.spans == [(0, "a")]
    assert read("input_output", {"segments": []}).ids == []


def test_pieces_are_tokenized_apart(read, tokenizer):
    apart = read(
        "input_output", {"segments": [{"label": 0, "text": "un"}, {"label": 1, "text": "do"}]}
    )
    assert apart.ids == tokenizer.encode("un").ids + tokenizer.encode("do").ids
    assert apart.ids != tokenizer.encode("undo").ids


def test_pieces_may_be_json_text_empty_or_all_trained(read):
    whole = read("input_output", {"segments": SEGMENTS})
    assert read("input_output", {"segments": json.dumps(SEGMENTS)}).ids == whole.ids
    with_empty = [SEGMENTS[0], {"label": True, "text": ""}, *SEGMENTS[1:]]
    assert read("input_output", {"parts": with_empty}, field="parts").mask == whole.mask
    trained = read("input_output", {"segments": SEGMENTS}, train_on_inputs=True)
    assert trained.mask == [0] + [1] * (len(whole.ids) - 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "no column 'segments'.*`field`"),
        ({"segments": {"text": "a"}}, "must hold a list of pieces"),
        ({"segments": "a"}, "is not JSON"),
        ({"segments": [{"label": True}]}, "piece 0 has no text"),
        ({"segments": [*SEGMENTS, {"text": "a"}]}, "piece 4 has no `label`"),
        ({"segments": [{"text": "a", "label": "yes"}]}, "piece 0 has no `label`"),
    ],
)
def test_malformed_pieces_are_explained(read, row, message):
    with pytest.raises(RowError, match=message):
        read("input_output", row)


def test_plain_text_is_learnt_with_the_eos_token(read):
    given = read("completion", {"text": " Once {upon} 🙂\n"})
    assert given.text == " Once {upon} 🙂\n" + EOS
    assert given.mask == [0] + [1] * (len(given.ids) - 1)
    assert read("completion", {"body": "a b"}, field="body").text == "a b" + EOS
    assert read("completion", {"text": "a" + EOS}).text == "a" + EOS


def test_an_empty_text_is_no_example(read):
    assert read("completion", {"text": ""}).ids == []


def test_text_of_another_column_is_asked_for(read):
    with pytest.raises(RowError, match=r"no column 'text'; the row has 'body'.*`field`"):
        read("completion", {"body": "x"})


TOKENS = {"input_ids": [271, 299, 99], "labels": [271, -100, 99]}


def test_tokens_are_taken_as_they_are(read):
    given = read("pretokenized", TOKENS)
    assert (given.ids, given.mask) == ([271, 299, 99], [0, 0, 1])
    whole = read(None, {**TOKENS, "labels": [271, 299, 99], "attention_mask": [1, 1, 1]})
    assert whole.mask == [0, 1, 1]


@pytest.mark.parametrize(("before", "behind"), [(0, 2), (3, 0), (1, 1), (0, 0)])
def test_padding_is_left_out(read, before, behind):
    padded = {
        "input_ids": [2] * before + TOKENS["input_ids"] + [2] * behind,
        "labels": [-100] * before + TOKENS["labels"] + [-100] * behind,
        "attention_mask": [0] * before + [1] * 3 + [0] * behind,
    }
    assert read("pretokenized", padded) == read("pretokenized", TOKENS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1]}, "no column 'labels'"),
        ({"labels": [1]}, "no column 'input_ids'"),
        ({**TOKENS, "labels": [1]}, "'labels' has 1 items for 3 input_ids"),
        (
            {**TOKENS, "labels": [299, 99, -100]},
            r"label 299 at place 0 .*\(271\) nor -100.*shifted",
        ),
        ({**TOKENS, "attention_mask": [1, 0, 1]}, "0 between tokens"),
        ({**TOKENS, "attention_mask": [1]}, "'attention_mask' has 1 items"),
        ({**TOKENS, "input_ids": [1, True, 2]}, "must hold a list of whole numbers"),
        ({**TOKENS, "input_ids": "1 2"}, "must hold a list of whole numbers"),
        ({"input_ids": [-1], "labels": [-1]}, "token ids begin at 0"),
        ({"input_ids": [99_999_999], "labels": [-100]}, "none of the tokenizer's"),
    ],
)
def test_tokens_that_cannot_be_are_explained(read, row, message):
    with pytest.raises(RowError, match=message):
        read("pretokenized", row)
