"""The bytes that each token of a byte-level tokenizer stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer


class TokenBytes:
    """The bytes that each token of a byte-level tokenizer stands for.

    Args:
        table: token number -> its bytes; None where it stands for nothing that is known.
    """

    def __init__(self, table: list[bytes | None]) -> None:
        self._table = [b"" if token is None else token for token in table]
        # So long that no text fits it.
        self.lengths = np.array([len(token) if token else 1 << 40 for token in table], np.int64)
        """int64 [vocabulary]."""

    @classmethod
    def of(cls, backend: Tokenizer) -> TokenBytes:
        """The table of a byte-level tokenizer."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        table: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, number in backend.get_vocab(with_added_tokens=False).items():
            table[number] = _spelled(token)
        for number, token in backend.get_added_tokens_decoder().items():
            table[number] = token.content.encode()
        return cls(table)

    def fits(self, text: str, tokens: bytes, total: int) -> bool:
        """Whether the tokens, `total` bytes long, are exactly the text's bytes.

        Tokens can only be shorter than what they were made of (an added token that swallows the
        space beside it, a splitter that drops a character), so for ASCII the sum is proof. Other
        text may have been normalized: it is compared.
        """
        if text.isascii():
            return total == len(text)
        ids = np.frombuffer(tokens, np.int32).tolist()
        return b"".join(map(self._table.__getitem__, ids)) == text.encode()


def is_byte_level(settings: dict[str, Any]) -> bool:
    """Whether a tokenizer with these settings (tokenizer.json) cuts texts into runs of bytes."""
    model = settings["model"]
    splitters = flat(settings.get("pre_tokenizer"), "pretokenizers")
    byte_level = [part for part in splitters if part["type"] == "ByteLevel"]
    others = {part["type"] for part in splitters} - {"ByteLevel"}
    normalizers = {part["type"] for part in flat(settings.get("normalizer"), "normalizers")}
    return (
        model.get("type") == "BPE"
        and not model.get("byte_fallback")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        # A token for the unknown would have another length than what it stands for.
        and (model.get("unk_token") is None or _ALPHABET.keys() <= _characters(model["vocab"]))
        and len(byte_level) == 1
        and not byte_level[0].get("add_prefix_space")
        and others <= {"Split", "Digits", "Punctuation"}
        and normalizers <= {"NFC"}
    )


def _characters(vocabulary: dict[str, int]) -> set[str]:
    return {token for token in vocabulary if len(token) == 1}


def flat(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A part of a tokenizer's settings as the list of those it is made of."""
    if part is None:
        return []
    return [leaf for p in part[inner] for leaf in flat(p, inner)] if inner in part else [part]


def _alphabet() -> dict[str, int]:
    """Character -> byte, as GPT-2 writes bytes (Radford et al. 2019): printable Latin-1 characters
    for themselves, the others moved above U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    moved = {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | moved


_ALPHABET = _alphabet()
_TRANSLATION = {byte: letter for letter, byte in _ALPHABET.items()}


def spelling(text: str) -> str:
    """A text as byte-level vocabularies write it: one character a byte."""
    return text.encode().decode("latin-1").translate(_TRANSLATION)


def _spelled(token: str) -> bytes | None:
    try:
        return bytes(map(_ALPHABET.__getitem__, token))
    except KeyError:
        return None
