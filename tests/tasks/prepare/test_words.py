"""The memory of words gives the tokenizer's own tokens, or leaves the text to the tokenizer."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from regrow.tasks.prepare import words as module
from regrow.tasks.prepare.words import Words

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+"
)
"""The patterns of Llama 3 and of GPT-4o, as their tokenizer.json files hold them."""

TEXT = "I'm here; it's 12345 o'clock, don't  wait\r\n\n\tfoo_bar(x1)==[2]  \n<|end|> 'LL been'S\n"


def after(*first) -> pre_tokenizers.PreTokenizer:
    """Splitters with bytes behind them."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not first)
    return pre_tokenizers.Sequence([*first, last]) if first else last


def digits(individual: bool) -> pre_tokenizers.PreTokenizer:
    behind = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual), behind])


SPLITTERS = {
    "gpt2": after(),
    "smollm2": digits(individual=True),
    "runs of digits": digits(individual=False),
    "llama3": after(pre_tokenizers.Split(Regex(LLAMA3), "isolated")),
    "matches kept": after(pre_tokenizers.Split(Regex(LLAMA3), "removed", invert=True)),
    "gpt4o": after(pre_tokenizers.Split(Regex(O200K), "isolated")),
    "deepseek": after(
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
        pre_tokenizers.Split(Regex("[一-龥ぁ-ゟ\u30a0-\u30ff]+"), "isolated"),
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
    ),
    "a letter": after(pre_tokenizers.Split("e", "isolated")),
}


def tokenizer(splitter: pre_tokenizers.PreTokenizer, *added: AddedToken) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = splitter
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<|end|>", "<|end|>>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT, "naïve Größe — 12,5 €"] * 3, trainer)
    made.add_tokens(list(added))
    return made


def words_of(made: Tokenizer) -> Words:
    found = Words.of(made, json.loads(made.to_str()))
    assert found is not None
    return found


def theirs(made: Tokenizer, text: str) -> list[int]:
    return made.encode(text, add_special_tokens=False).ids


def ours(words: Words, text: str) -> list[int] | None:
    tokens = words(text)
    return None if tokens is None else memoryview(tokens).cast("i").tolist()


@pytest.mark.parametrize("name", SPLITTERS)
def test_words_are_cut_as_the_tokenizer_cuts(name):
    made = tokenizer(SPLITTERS[name])
    words = words_of(made)
    for text in (
        TEXT,
        TEXT[::-1],
        " " + TEXT * 3,
        "Größe 12,5 € — “naïve”\u00a0\u017f '\u017f ½³",
        "你好\uff0c世界 25",
    ):
        for begin in range(len(text)):
            assert ours(words, text[begin:]) == theirs(made, text[begin:])


def test_added_tokens_are_found_first_and_the_longest_of_them():
    made = tokenizer(after(), AddedToken("needle", normalized=False))
    text = "a<|end|>>b<|end|><|end|> needles<|end|"
    assert ours(words_of(made), text) == theirs(made, text)


def test_texts_with_added_tokens_that_take_more_are_left_to_the_tokenizer():
    odd = [
        AddedToken("<left>", lstrip=True, normalized=False),
        AddedToken("<word>", single_word=True, normalized=False),
        AddedToken("<norm>", normalized=True),
    ]
    words = words_of(tokenizer(after(), *odd))
    assert [words(f"a {token.content} b") for token in odd] == [None] * 3
    assert words("a b") is not None


@pytest.mark.parametrize(
    "splitter",
    [
        after(pre_tokenizers.Split(" ", "merged_with_next")),
        after(pre_tokenizers.Split(Regex(r"(a)(b)"), "isolated")),
        after(pre_tokenizers.UnicodeScripts()),
    ],
)
def test_unknown_ways_of_cutting_are_left_to_the_tokenizer(splitter):
    made = tokenizer(splitter)
    assert Words.of(made, json.loads(made.to_str())) is None


def test_a_character_that_is_cut_otherwise_is_not_trusted(monkeypatch):
    """As if our engine took a currency sign for a letter."""
    made = tokenizer(after())
    wrong = module._GPT2.replace(r"?\p{L}+", r"?[\p{L}€$]+").replace(r"[^\s\p{L}", r"[^\s€$\p{L}")
    monkeypatch.setattr(module, "_GPT2", wrong)
    words = words_of(made)
    assert [words("5 € more"), words("5 $ more")] == [None, None]
    assert ours(words, "5 £ more") == theirs(made, "5 £ more")


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_WORDS", 20)
    made = tokenizer(after())
    words = words_of(made)
    text = " ".join(f"word{i}x" for i in range(500)) + " " + "long" * 100
    assert ours(words, text) == theirs(made, text)
    assert len(words._memory) <= 20
