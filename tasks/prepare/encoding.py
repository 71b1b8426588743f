"""What a format made of rows to tokens, with a mask of what is learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import numpy as np
from tokenizers import Tokenizer

from regrow.tasks.prepare.alignment import Aligned, Aligner, Text
from regrow.tasks.prepare.endings import check_eot_tokens
from regrow.tasks.prepare.example import (
    Conversation,
    Document,
    Exchange,
    Pieces,
    RowError,
    TokenIds,
    TokenSource,
)
from regrow.tasks.prepare.masking import Masker, MaskRules
from regrow.tasks.prepare.rendering import ChatTemplate
from regrow.tasks.prepare.tokenizer import SavedTokenizer, load_backend


@dataclass(frozen=True)
class Tokens:
    """One sequence."""

    input_ids: np.ndarray
    """int32 [T]."""
    loss_mask: np.ndarray
    """uint8 [T]: 1 where the token is learnt. The first is 0: nothing predicts it."""
    prompt_len: int
    """Tokens before the last trained message; 0 when there is none."""
    unended: int = 0
    """Trained messages that no eos token or other special token ends."""


_Join = Callable[[Sequence[Aligned]], Tokens]
"""Makes a sequence of the tokens of its texts."""
_NO_IDS = np.empty(0, np.int32)


class Encoder:
    """Turns sequences into tokens.

    Args:
        tokenizer: as saved.
        template: Jinja text for conversations; None when there are none.
        rules: what is trained of a conversation.
        align: the tokenizer, where it has been loaded already.
    """

    def __init__(
        self,
        tokenizer: SavedTokenizer,
        template: str | None,
        rules: MaskRules,
        align: Aligner | None = None,
    ) -> None:
        self._align = align or Aligner(load_backend(tokenizer.path))
        self._backend = self._align.backend
        self._before, self._behind = added_around(self._backend)
        self._vocabulary = 1 + max(
            self._backend.get_vocab(with_added_tokens=True).values(), default=-1
        )
        self._eos_id = tokenizer.eos_id
        self._bos_id = self._backend.token_to_id(dict(tokenizer.special).get("bos_token") or "")
        self._masker: Masker | None = None
        self._template: ChatTemplate | None = None
        if template is not None:
            check_eot_tokens(rules.eot_tokens, self._backend)
            compiled = ChatTemplate(template, dict(tokenizer.special))
            self._masker = Masker(compiled, rules, tokenizer.eos_token, tokenizer.special_texts)
            self._template = self._masker.template  # with the variables that the rules give it

    def encode(self, source: TokenSource) -> Tokens:
        """One sequence's tokens and mask; raises like `encode_many`."""
        return self.encode_many([source])[0]

    def encode_many(self, sources: Sequence[TokenSource]) -> list[Tokens]:
        """The tokens and mask of each sequence: all texts go to the tokenizer at once.

        Raises:
            RowError: when one cannot be tokenized, or its mask cannot be exact.
        """
        plans = [self._plan(source) for source in sources]
        try:
            aligned = self._align([text for texts, _ in plans for text in texts])
        except (TypeError, UnicodeEncodeError) as error:
            raise RowError(
                "the text holds half a surrogate pair, which is no character; mend the row"
            ) from error
        parts = iter(aligned)
        return [join(list(islice(parts, len(texts)))) for texts, join in plans]

    def _plan(self, source: TokenSource) -> tuple[list[Text], _Join]:
        """The texts of a sequence, and what makes it of their tokens."""
        if isinstance(source, Conversation):
            return self._conversation(source)
        if isinstance(source, Document):
            return self._document(source)
        if isinstance(source, Exchange):
            return self._exchange(source)
        if isinstance(source, Pieces):
            return [Text(piece.text) for piece in source.pieces], lambda its: self._glue(
                source, its
            )
        tokens = self._checked(source)
        return [], lambda _: tokens

    def _conversation(self, conversation: Conversation) -> tuple[list[Text], _Join]:
        if self._masker is None:
            raise RowError("a conversation needs a chat template; set `chat_template`")
        if not conversation.messages:
            return [], lambda _: _tokens(_NO_IDS, _flags(0, "none"), 0)
        rendered = self._masker.render(conversation)
        # The template writes the special tokens itself.
        text = Text(rendered.text, rendered.spans, rendered.answer, rendered.barred)
        return [text], lambda its: _tokens(its[0].ids, its[0].held, its[0].answer, rendered.unended)

    def _exchange(self, source: Exchange) -> tuple[list[Text], _Join]:
        """The prompt and the whole, both as texts: learnt is where their tokens differ."""
        if self._template is None:
            raise RowError("messages need a chat template; set `chat_template`")
        prompt = self._template.render(source.prompt, source.tools, True) if source.prompt else ""
        if not source.answer:
            return [Text(prompt)], lambda its: _tokens(
                its[0].ids, _flags(len(its[0].ids), "none"), len(its[0].ids)
            )
        whole = self._template.render((*source.prompt, *source.answer), source.tools)
        whole = whole.rstrip() if source.closed else whole
        return [Text(prompt), Text(whole)], lambda its: self._answered(
            source, its[1].ids, _shared(its[0].ids, its[1].ids)
        )

    def _answered(self, source: Exchange, ids: np.ndarray, prompt_len: int) -> Tokens:
        """Everything behind the prompt learnt."""
        if source.closed:
            ids = self._ended_with(ids, 1)
        mask = (np.arange(len(ids)) >= prompt_len).astype(np.uint8)
        return _tokens(ids, mask, prompt_len)

    def _document(self, document: Document) -> tuple[list[Text], _Join]:
        # One encoding of the whole text, as a reader of the text would make it.
        if document.continues:
            texts = [segment.text for segment in document.segments]
            return [Text(texts[0]), Text("".join(texts))], self._continued
        ends = list(accumulate(len(segment.text) for segment in document.segments))
        places = list(zip([0, *ends], ends, strict=False))
        spans = [
            place
            for place, segment in zip(places, document.segments, strict=True)
            if segment.trained
        ]
        answer = places[-1] if len(places) > 1 else None
        text = Text("".join(segment.text for segment in document.segments), spans, answer)
        return [text], lambda its: self._ended(its[0], answer is not None)

    def _continued(self, aligned: Sequence[Aligned]) -> Tokens:
        """A text of which all is learnt that is not its prompt's: [the prompt alone, the text]."""
        prompt, whole = (its.ids for its in aligned)
        ids = self._whole(whole)
        begin = len(self._before) + _shared(prompt, whole)
        return _tokens(ids, (np.arange(len(ids)) >= begin).astype(np.uint8), begin)

    def _whole(self, ids: np.ndarray) -> np.ndarray:
        """With what the tokenizer puts around a text, and the eos token."""
        ids = np.concatenate([self._before, ids, self._behind])
        has_eos = len(ids) and ids[-1] == self._eos_id
        return ids if has_eos else np.append(ids, np.int32(self._eos_id))

    def _ended(self, aligned: Aligned, has_prompt: bool) -> Tokens:
        """With what the tokenizer puts around a text, and the eos token, which is learnt."""
        ids = self._whole(aligned.ids)
        mask = np.zeros(len(ids), np.uint8)
        begin = len(self._before)
        mask[begin : begin + len(aligned.held)] = aligned.held
        mask[-1] = 1
        return _tokens(ids, mask, begin + aligned.answer if has_prompt else 0)

    def _glue(self, source: Pieces, aligned: Sequence[Aligned]) -> Tokens:
        """The pieces' tokens one after the other."""
        ids = [self._begun(source)]
        mask = [_flags(len(ids[0]), source.pieces[0].train if source.pieces else "none")]
        prompt_len = 0
        for number, (piece, its) in enumerate(zip(source.pieces, aligned, strict=True)):
            if piece.train != "none":
                prompt_len = sum(map(len, ids)) if number else 0
            last = number == len(source.pieces) - 1
            ids.append(self._ended_with(its.ids, max(piece.eos, source.eos and last)))
            mask.append(_flags(len(ids[-1]), piece.train))
        stop = None if source.answer_limit is None else sum(map(len, ids[:2])) + source.answer_limit
        return _tokens(np.concatenate(ids)[:stop], np.concatenate(mask)[:stop], prompt_len)

    def _begun(self, source: Pieces) -> np.ndarray:
        """What stands before the first piece."""
        if source.bos_always:
            return np.array([] if self._bos_id is None else [self._bos_id], np.int32)
        return self._before if source.bos else _NO_IDS

    def _ended_with(self, ids: np.ndarray, wanted: int) -> np.ndarray:
        """`ids` with so many eos tokens at its end, unless it has as many."""
        there = next((i for i, token in enumerate(ids[::-1]) if token != self._eos_id), len(ids))
        missing = max(wanted - there, 0)
        return np.concatenate([ids, np.full(missing, self._eos_id, np.int32)]) if missing else ids

    def _checked(self, source: TokenIds) -> Tokens:
        """Tokens made elsewhere. Raises RowError when they cannot be this tokenizer's."""
        ids, mask = np.array(source.input_ids), np.array(source.loss_mask)
        if len(ids) != len(mask):
            raise RowError(f"there are {len(ids)} tokens and {len(mask)} labels; mend the row")
        if not len(ids):
            return _tokens(_NO_IDS, _flags(0, "none"), 0)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RowError("the tokens must be whole numbers; mend the row")
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            wrong = ids[(ids < 0) | (ids >= self._vocabulary)][0]
            raise RowError(
                f"token {wrong} is none of the tokenizer's, whose numbers end at "
                f"{self._vocabulary - 1}; the rows were made with another one"
            )
        if mask.ndim != 1 or not np.isin(mask, (0, 1)).all():
            raise RowError("the mask must hold nothing but 0 and 1; mend the row")
        return _tokens(ids.astype(np.int32), mask.astype(np.uint8), _last_run(mask))


def _tokens(ids: np.ndarray, mask: np.ndarray, prompt_len: int, unended: int = 0) -> Tokens:
    mask[:1] = 0
    return Tokens(ids, mask, prompt_len, unended)


def _shared(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(len(first), len(second))
    differ = np.flatnonzero(first[:length] != second[:length])
    return int(differ[0]) if len(differ) else length


def _flags(length: int, train: str) -> np.ndarray:
    """The mask of a piece: all, last or none of its tokens."""
    mask = np.full(length, train == "all", np.uint8)
    mask[-1:] |= train == "last"
    return mask


def _last_run(mask: np.ndarray) -> int:
    """Where the last run of ones begins; 0 when there is none."""
    trained = np.flatnonzero(mask)
    if not len(trained):
        return 0
    return int(trained[np.flatnonzero(np.diff(trained, prepend=-2) > 1)[-1]])


def added_around(backend: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that a tokenizer puts before and behind every text (int32 each)."""
    bare = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    begin = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return np.array(whole[:begin], np.int32), np.array(whole[begin + len(bare) :], np.int32)
