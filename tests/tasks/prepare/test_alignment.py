"""Tokens found by their lengths are those found by the tokenizer's offsets, whatever the text."""

import functools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from regrow.tasks.prepare import alignment
from regrow.tasks.prepare.alignment import Aligner, Text
from regrow.tasks.prepare.byte_level import is_byte_level
from regrow.tasks.prepare.tokenizer import load_backend

WORDS = [
    "the quick brown fox says: hello, world! 12345 don't\n\n",
    "Grüße 한국어 🦊🦊 e\u0301 naïve \u212b",
]


def byte_level(*, alphabet: bool = True, **changes) -> Tokenizer:
    """A small tokenizer of GPT-2's kind; `changes` are attributes set afterwards."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def llama3_like() -> Tokenizer:
    """Split first, bytes then; a bos token before every text."""
    pattern = Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+| ?\p{L}+")
    split = pre_tokenizers.Split(pattern, "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(
        pre_tokenizer=pre_tokenizers.Sequence([split, plain]),
        post_processor=processors.TemplateProcessing("<|start|> $A", None, [("<|start|>", 1)]),
    )


def swallowing() -> Tokenizer:
    """An added token that takes the white space beside it along."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<hole>", lstrip=True, rstrip=True), "Straße"])
    return tokenizer


def sentencepiece(unigram: bool) -> Tokenizer:
    """Words that carry a mark for the space before them."""
    if unigram:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<unk>", "<|end|>"], unk_token="<unk>"
        )
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        named = ["<unk>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=named)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    tokenizer.decoder = decoders.Metaspace()
    if unigram:
        return tokenizer
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(data))


TOKENIZERS = {
    "gpt2": byte_level,
    "llama3": llama3_like,
    "qwen": lambda: byte_level(normalizer=normalizers.NFC()),
    "some bytes missing": lambda: byte_level(alphabet=False),
    "swallowing": swallowing,
    "lower case": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "prefix space": lambda: byte_level(pre_tokenizer=pre_tokenizers.ByteLevel()),
    "dropped space": lambda: byte_level(
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "unigram": lambda: sentencepiece(unigram=True),
    "byte fallback": lambda: sentencepiece(unigram=False),
}
BYTE_LEVEL = {"gpt2", "llama3", "qwen", "some bytes missing", "swallowing", "smollm2"}
"""Those whose tokens are counted by their bytes."""


@pytest.fixture(scope="module")
def backend_of(smollm2_dir, tmp_path_factory):
    """Name -> tokenizer with untrimmed offsets."""

    @functools.cache
    def make(name: str) -> Tokenizer:
        if name == "smollm2":
            return load_backend(smollm2_dir / "tokenizer.json")
        path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        TOKENIZERS[name]().save(str(path))
        return load_backend(path)

    return make


# fmt: off
PIECES = st.sampled_from([
    "<|end|>", "<|im_end|>", "<hole>", " <hole>  ", "Straße", "\n", "  ", "\r\n", "🦊", "e\u0301",
    "한", "\u212b", "\u0958", "the quick", "12345", "don't", "\u00a0", "\u3000", "\x00", "ﬁ",
])
# fmt: on
CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
STRINGS = st.lists(st.one_of(PIECES, CHARACTERS), max_size=8).map("".join)


@st.composite
def texts(draw) -> Text:
    """A text with spans in order, empty ones among them, and perhaps an answer."""
    text = draw(STRINGS)
    place = st.integers(0, len(text))
    edges = sorted(draw(st.lists(place, max_size=8)))
    spans = list(zip(edges[::2], edges[1::2], strict=False))
    somewhere = st.tuples(place, place).map(sorted).map(tuple)
    barred = draw(st.lists(somewhere, max_size=2))
    return Text(text, spans, draw(st.one_of(st.none(), somewhere)), barred)


def by_offsets(backend: Tokenizer, text: Text) -> tuple[list[int], list[int], int]:
    """Ids, flags and answer as the offsets of one encoding tell them."""
    encoding = backend.encode(text.text, add_special_tokens=False)
    held = [0] * len(encoding.ids)
    for spans, value in ((text.spans, 1), (text.barred, 0)):
        for span in spans:
            first, stop = alignment.token_range(encoding, span)
            held[first:stop] = [value] * (stop - first)
    answer = 0 if text.answer is None else alignment.token_range(encoding, text.answer)[0]
    return encoding.ids, held, answer


@pytest.mark.parametrize("name", [*TOKENIZERS, "smollm2"])
def test_lengths_tell_what_offsets_tell(backend_of, name):
    backend = backend_of(name)
    align = Aligner(backend)
    assert is_byte_level(json.loads(backend.to_str())) == (name in BYTE_LEVEL)

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(texts(), max_size=4))
    def check(some):
        for text, aligned in zip(some, align(some), strict=True):
            ids, held, answer = by_offsets(backend, text)
            assert aligned.ids.tolist() == ids
            assert aligned.held.tolist() == held
            assert aligned.answer == answer

    check()


@pytest.mark.parametrize("name", sorted(BYTE_LEVEL))
def test_ordinary_texts_need_no_offsets(backend_of, name, monkeypatch):
    def never(*_):
        raise AssertionError("offsets were asked for")

    monkeypatch.setattr(alignment, "_by_offsets", never)
    some = [Text(text * 2, [(3, 9)], (9, 12)) for text in WORDS if "\u212b" not in text]
    assert len(Aligner(backend_of(name))(some)) == len(some)


def test_text_that_normalizing_changes_is_traced_by_offsets(backend_of):
    """e and an accent become one character: other bytes than those of the text."""
    text = "abc e\u0301 def"
    aligned = Aligner(backend_of("qwen"))([Text(text, [(4, 6)], (4, 6))])[0]
    assert backend_of("qwen").decode(aligned.ids[aligned.held == 1].tolist()).strip() == "é"


def test_batches_do_not_change_the_tokens(backend_of, monkeypatch):
    some = [Text(word * n, [(n, 4 * n)], (n, n)) for n in range(1, 30) for word in WORDS]
    whole = Aligner(backend_of("gpt2"))(some)
    monkeypatch.setattr(alignment, "_BATCH_CHARS", 300)
    for one, other in zip(whole, Aligner(backend_of("gpt2"))(some), strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.held, other.held)
        assert one.answer == other.answer


def test_no_texts_are_no_tokens(backend_of):
    assert Aligner(backend_of("gpt2"))([]) == []
    nothing = Aligner(backend_of("gpt2"))([Text("", [(0, 0)], (0, 0)), Text("a")])
    assert [len(aligned.ids) for aligned in nothing] == [0, 1]
