"""Examples to tokens, with a mask of what is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding

from regrow.tasks.prepare.example import Conversation, Document, RowError
from regrow.tasks.prepare.masking import Masker, MaskRules, Span
from regrow.tasks.prepare.rendering import ChatTemplate
from regrow.tasks.prepare.tokenizer import SavedTokenizer, load_backend


@dataclass(frozen=True)
class Tokens:
    """One example."""

    input_ids: np.ndarray
    """int32 [T]."""
    loss_mask: np.ndarray
    """uint8 [T]: 1 where the token is learnt. The first is 0: nothing predicts it."""
    prompt_len: int
    """Tokens before the last trained message; 0 when there is none."""
    unended: int = 0
    """Trained messages that no eos token or other special token ends."""


class Encoder:
    """Turns examples into tokens.

    Args:
        tokenizer: as saved.
        template: Jinja text for conversations; None when there are none.
        rules: what is trained of a conversation.
    """

    def __init__(self, tokenizer: SavedTokenizer, template: str | None, rules: MaskRules) -> None:
        self._backend = load_backend(tokenizer.path)
        self._eos_id = tokenizer.eos_id
        self._masker: Masker | None = None
        if template is not None:
            compiled = ChatTemplate(template, dict(tokenizer.special))
            self._masker = Masker(compiled, rules, tokenizer.eos_token, tokenizer.special_texts)

    def encode(self, example: Document | Conversation) -> Tokens:
        """The example's tokens and mask. Raises RowError when the mask cannot be exact."""
        if isinstance(example, Document):
            return self._document(example)
        return self._conversation(example)

    def _conversation(self, conversation: Conversation) -> Tokens:
        assert self._masker is not None, "a conversation needs a chat template"
        if not conversation.messages:
            return Tokens(np.empty(0, np.int32), np.empty(0, np.uint8), 0)
        rendered = self._masker.render(conversation)
        # The template writes the special tokens itself.
        encoding = self._encode(rendered.text, add_special_tokens=False)
        prompt = token_range(encoding, rendered.answer)[0] if rendered.answer else 0
        return Tokens(
            np.array(encoding.ids, np.int32),
            _mask(encoding, rendered.spans),
            prompt,
            rendered.unended,
        )

    def _document(self, document: Document) -> Tokens:
        text = "".join(segment.text for segment in document.segments)
        # One encoding of the whole text, as a reader of the text would make it.
        encoding = self._encode(text, add_special_tokens=True)
        spans, at = [], 0
        for segment in document.segments:
            spans += [(at, at + len(segment.text))] if segment.trained else []
            at += len(segment.text)
        ids = np.array(encoding.ids, np.int32)
        mask = _mask(encoding, spans)
        if not len(ids) or ids[-1] != self._eos_id:
            ids, mask = np.append(ids, np.int32(self._eos_id)), np.append(mask, np.uint8(0))
        mask[-1] = len(mask) > 1
        answer = (at - len(document.segments[-1].text), at)
        prompt = token_range(encoding, answer)[0] if len(document.segments) > 1 else 0
        return Tokens(ids, mask, prompt)

    def _encode(self, text: str, add_special_tokens: bool) -> Encoding:
        try:
            # One text at a time: parallel work is done by processes, which beat threads here
            # (1.12 against 0.94 M tokens/s on two cores; measured, platform.md part E).
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise RowError(
                "the text holds half a surrogate pair, which is no character; mend the row"
            ) from error


def _mask(encoding: Encoding, spans: Sequence[Span]) -> np.ndarray:
    mask = np.zeros(len(encoding.ids), np.uint8)
    for span in spans:
        first, stop = token_range(encoding, span)
        mask[first:stop] = 1
    mask[:1] = 0
    return mask


def token_range(encoding: Encoding, span: Span) -> tuple[int, int]:
    """[first, last) token that holds a character of the span.

    A token that reaches over the edge (the space a template puts before an answer, say) counts: the
    model has to write it to write the character.
    """
    start, stop = span
    first = next(
        (t for c in range(start, stop) if (t := encoding.char_to_token(c)) is not None), None
    )
    if first is None:
        # Nothing of the span became a token: an empty range, where its tokens would have been.
        begin = _first_at(encoding, stop)
        return begin, begin
    chars = range(stop - 1, start - 1, -1)
    last = next(t for c in chars if (t := encoding.char_to_token(c)) is not None)
    # Further tokens of the same character: one character may take several.
    while last + 1 < len(encoding.ids) and _begins_before(encoding, last + 1, stop):
        last += 1
    return first, last + 1


def _begins_before(encoding: Encoding, token: int, stop: int) -> bool:
    chars = encoding.token_to_chars(token)
    return chars is not None and chars[0] < stop


def _first_at(encoding: Encoding, char: int) -> int:
    for token, (begin, end) in enumerate(encoding.offsets):
        if begin >= char and end > begin:
            return token
    return len(encoding.ids)
