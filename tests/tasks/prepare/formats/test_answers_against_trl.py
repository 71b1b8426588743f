"""Tokens and masks of preferences are those that TRL's own trainers make of the same rows."""

from types import SimpleNamespace

import pytest

from regrow.tasks.prepare.encoding import Encoder
from regrow.tasks.prepare.formats import preference, unpaired
from regrow.tasks.prepare.masking import MaskRules
from regrow.tasks.prepare.tokenize import _from_one_context
from regrow.tasks.prepare.tokenizer import save_tokenizer

pytestmark = pytest.mark.slow  # importing TRL takes half a minute


def talk(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


TEXTS = [
    ("What is 2+2?", " 4", "5"),
    ("Grüße 😀 你好 ", "Grüße ", " "),
    ("ends \n", "x\n\n", "\ty"),
    ("", "a", "b"),
    ("\n\n", "\n", "c"),
    ("done", "yes<|im_end|>", "no"),
]
PAIRS = {
    "text": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in TEXTS],
    "messages": [
        {"prompt": talk(p), "chosen": talk("", c)[1:], "rejected": talk("", r)[1:]}
        for p, c, r in TEXTS
    ],
    "dialogues": [
        {"chosen": talk("a", "b", p, c), "rejected": talk("a", "b", p, r)} for p, c, r in TEXTS
    ],
}


@pytest.fixture(scope="module")
def parts(smollm2_dir, tmp_path_factory):
    """TRL, its tokenizer, and our encoder."""
    trl = pytest.importorskip("trl")
    from transformers import AutoTokenizer

    saved = save_tokenizer(
        str(smollm2_dir),
        tmp_path_factory.mktemp("trl") / "tokenizer",
        special_tokens={},
        tokens=(),
        chat_template=None,
        fallback_template=None,
        trust_remote_code=False,
    )
    encoder = Encoder(saved, saved.chat_template, MaskRules())
    return trl, AutoTokenizer.from_pretrained(smollm2_dir), encoder


def prepared(trainer, rows, tokenizer):
    from datasets import Dataset

    holder = SimpleNamespace(
        _tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0
    )
    arguments = SimpleNamespace(
        dataset_num_proc=None, max_length=None, truncation_mode="keep_start"
    )
    return trainer._prepare_dataset(holder, Dataset.from_list(rows), tokenizer, arguments, "train")


def expected(row, answer):
    mask = [0] * len(row["prompt_ids"]) + [1] * len(row[answer])
    return row["prompt_ids"] + row[answer], [0, *mask[1:]]


@pytest.mark.parametrize("form", PAIRS)
def test_pairs(parts, form):
    trl, tokenizer, encoder = parts
    for row, theirs in zip(
        PAIRS[form], prepared(trl.DPOTrainer, PAIRS[form], tokenizer), strict=True
    ):
        item = preference.read(row, preference.Options())
        ours = _from_one_context(encoder.encode_many(item.sequences))
        for tokens, answer in zip(ours, ("chosen_ids", "rejected_ids"), strict=True):
            found = tokens.input_ids.tolist(), tokens.loss_mask.tolist()
            assert found == expected(theirs, answer), row


@pytest.mark.parametrize("form", ["text", "messages"])
def test_unpaired(parts, form):
    trl, tokenizer, encoder = parts
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
        for i, row in enumerate(PAIRS[form])
    ]
    for row, theirs in zip(rows, prepared(trl.KTOTrainer, rows, tokenizer), strict=True):
        item = unpaired.read(row, unpaired.Options())
        (tokens,) = encoder.encode_many(item.sequences)
        found = tokens.input_ids.tolist(), tokens.loss_mask.tolist()
        assert found == expected(theirs, "completion_ids"), row
