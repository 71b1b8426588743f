"""Sequences of every shape become the tokens that other trainers make of them, or a clear error."""

from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from regrow.tasks.prepare.encoding import Encoder
from regrow.tasks.prepare.example import Document, Item, Piece, Pieces, RowError, Segment, TokenIds
from regrow.tasks.prepare.masking import MaskRules
from regrow.tasks.prepare.tokenize import Block, _block, _check_labels, _Encoded
from regrow.tasks.prepare.tokenizer import SavedTokenizer

BOS, EOS = 1, 2


def saved(path, template: str) -> SavedTokenizer:
    """A tokenizer of letters and spaces that puts around a text what `template` says."""
    letters = ["<unk>", "<s>", "</s>", *" abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        template, None, [("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer.save(str(path))
    special = (("bos_token", "<s>"), ("eos_token", "</s>"))
    return SavedTokenizer(str(path), "</s>", EOS, special, ("<s>", "</s>"), None)


@pytest.fixture
def encoder(tmp_path):
    """Template of the tokenizer -> encoder."""
    return lambda template="<s> $A": Encoder(
        saved(tmp_path / "tokenizer.json", template), None, MaskRules()
    )


def ids(text: str) -> list[int]:
    return [3 + " abcdefghijklmnopqrstuvwxyz".index(letter) for letter in text]


def pieces(*given: tuple, **options) -> Pieces:
    return Pieces(tuple(Piece(*piece) for piece in given), **options)


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_prompt_and_answer_are_tokenized_one_by_one(encoder, template):
    """Axolotl's way: bos before the prompt only, eos behind the answer only."""
    tokens = encoder(template).encode(pieces(("ab", "none"), ("cd", "all")))
    assert tokens.input_ids.tolist() == [BOS, *ids("ab"), *ids("cd"), EOS]
    assert tokens.loss_mask.tolist() == [0, 0, 0, 1, 1, 1]
    assert tokens.prompt_len == 3


def test_a_tokenizer_without_bos_puts_none(encoder):
    tokens = encoder("$A").encode(pieces(("ab", "none"), ("c", "all")))
    assert tokens.input_ids.tolist() == [*ids("abc"), EOS]
    always = encoder("$A").encode(pieces(("ab", "none"), ("c", "all"), bos_always=True))
    assert always.input_ids.tolist() == [BOS, *ids("abc"), EOS]


def test_pieces_can_stand_without_bos_and_eos(encoder):
    tokens = encoder().encode(pieces(("ab", "all"), ("c", "none"), bos=False, eos=False))
    assert tokens.input_ids.tolist() == ids("abc")
    assert tokens.loss_mask.tolist() == [0, 1, 0]  # nothing predicts the first
    assert tokens.prompt_len == 0


def test_eos_is_not_put_twice(encoder):
    tokens = encoder().encode(pieces(("ab", "none"), ("c</s>", "all")))
    assert tokens.input_ids.tolist() == [BOS, *ids("abc"), EOS]
    assert tokens.loss_mask.tolist() == [0, 0, 0, 1, 1]
    untrained = encoder().encode(pieces(("ab", "all"), ("c", "none")))
    assert untrained.loss_mask.tolist() == [0, 1, 1, 0, 0]


def test_steps_learn_their_last_token_only(encoder):
    tokens = encoder().encode(
        pieces(("ab", "none"), ("cd", "last"), ("e", "last"), ("", "last"), eos=False)
    )
    assert tokens.input_ids.tolist() == [BOS, *ids("abcde")]
    assert tokens.loss_mask.tolist() == [0, 0, 0, 0, 1, 1]


def test_no_pieces_at_all(encoder):
    assert encoder().encode(Pieces((), bos=False, eos=False)).input_ids.tolist() == []


def test_what_the_tokenizer_puts_around_a_document_is_kept(encoder):
    document = Document((Segment("ab", False), Segment("c", True)))
    for template, expected in {
        "<s> $A": [BOS, *ids("abc"), EOS],
        "<s> $A </s>": [BOS, *ids("abc"), EOS],
        "$A": [*ids("abc"), EOS],
    }.items():
        tokens = encoder(template).encode(document)
        assert tokens.input_ids.tolist() == expected
        assert tokens.loss_mask.sum() == 2
        assert tokens.prompt_len == len(expected) - 2


def test_many_at_once_are_as_one_by_one(encoder):
    sources = [
        TokenIds((5, 6, 7, 8), (0, 1, 0, 1)),
        Document((Segment("abc", True),)),
        pieces(("a", "none"), ("", "all"), ("bc", "all")),
        Document((Segment("", True),)),
    ]
    made = encoder()
    for one, other in zip(made.encode_many(sources), map(made.encode, sources), strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.loss_mask.tolist() == other.loss_mask.tolist()
        assert one.prompt_len == other.prompt_len
    assert made.encode_many([]) == []


def test_ready_tokens_are_taken_as_they_are(encoder):
    tokens = encoder().encode(TokenIds((5, 6, 7, 8, 9), (1, 0, 0, 1, 1)))
    assert tokens.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert tokens.loss_mask.tolist() == [0, 0, 0, 1, 1]
    assert tokens.prompt_len == 3
    assert encoder().encode(TokenIds((5, 6), (1, 1))).prompt_len == 0
    assert len(encoder().encode(TokenIds((), ())).input_ids) == 0


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ((5, 6), (1,), "2 tokens and 1 labels"),
        ((5, 30), (0, 1), "token 30 is none of the tokenizer's, whose numbers end at 29"),
        ((-1, 5), (0, 1), "token -1 is none"),
        ((5, 6.5), (0, 1), "whole numbers"),
        (("5", "6"), (0, 1), "whole numbers"),
        ((5, 1 << 70), (0, 1), "whole numbers"),
        ((5, 6), (0, -100), "nothing but 0 and 1"),
    ],
)
def test_ready_tokens_of_another_tokenizer_are_refused(encoder, ids, mask, message):
    with pytest.raises(RowError, match=message):
        encoder().encode(TokenIds(ids, mask))


# ---- items


def encoded(encoder: Encoder, item: Item) -> _Encoded:
    return _Encoded(item, encoder.encode_many(item.sequences))


def digest(encoder: Encoder, *items: Item) -> list[int]:
    return _block([encoded(encoder, item) for item in items], Counter()).digests.tolist()


A, B = TokenIds((5, 6, 7), (0, 1, 1)), TokenIds((8, 9), (0, 1))


def test_a_block_holds_items_one_after_the_other(encoder):
    pair, single = Item((A, B), (1, 0), '{"a": 1}'), Item((B,))
    block: Block = _block([encoded(encoder(), pair), encoded(encoder(), single)], Counter())
    assert block.input_ids.tolist() == [5, 6, 7, 8, 9, 8, 9]
    assert block.loss_mask.tolist() == [0, 1, 1, 0, 1, 0, 1]
    assert block.seq_lens.tolist() == [3, 2, 2]
    assert block.sequences.tolist() == [2, 1]
    assert block.labels.tolist() == [1, 0]
    assert block.label_counts.tolist() == [2, 0]
    assert block.extra == ['{"a": 1}', None]
    assert block.supervised.tolist() == [3, 1]
    assert len(block) == 2
    assert len(_block([], Counter())) == 0


def test_digests_tell_all_apart(encoder):
    joined = TokenIds((5, 6, 7, 8, 9), (0, 1, 1, 0, 1))
    different = [
        Item((A,)),
        Item((TokenIds((5, 6, 7), (0, 0, 1)),)),
        Item((A,), (1,)),
        Item((A,), (0,)),
        Item((A,), (), "x"),
        Item((A, B), (1, 0)),
        Item((A, B), (0, 1)),
        Item((B, A), (1, 0)),
        Item((joined,)),
        Item((joined,), (1, 0)),
    ]
    found = digest(encoder(), *different)
    assert len(set(found)) == len(different)
    assert digest(encoder(), *different) == found


@pytest.mark.parametrize(
    ("kind", "item", "message"),
    [
        ("sft", Item((A, B)), "2 sequences where sft has 1"),
        ("sft", Item((A,), (1,)), "1 labels where 0"),
        ("preference", Item((A,), (1,)), "1 sequences where preference has 2"),
        ("preference", Item((A, B)), "0 labels where 2"),
        ("unpaired", Item((A,), (256,)), "labels must be from 0 to 255"),
        ("steps", Item((A,), (1,)), "1 labels where 2 are needed, one for each step"),
    ],
)
def test_items_must_be_of_their_kind(encoder, kind, item, message):
    with pytest.raises(RowError, match=message):
        _check_labels(encoded(encoder(), item), kind)


@pytest.mark.parametrize(
    ("kind", "item"),
    [
        ("sft", Item((A,))),
        ("prompts", Item((A,), extra="{}")),
        ("preference", Item((A, B), (1, 0))),
        ("unpaired", Item((B,), (0,))),
        ("steps", Item((A,), (0, 1))),
    ],
)
def test_items_of_every_kind(encoder, kind, item):
    _check_labels(encoded(encoder(), item), kind)


def test_tokens_are_counted_by_numpy_types(encoder):
    tokens = encoder().encode(pieces(("ab", "none"), ("c", "all")))
    assert tokens.input_ids.dtype == np.int32
    assert tokens.loss_mask.dtype == np.uint8
