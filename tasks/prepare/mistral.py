"""Conversations as mistral-common writes them, token by token, with the mask of what is learnt.

mistral-common never makes a control token of text, so that control tokens tell exactly where a
message begins and ends: what stands between an opening one and its closing one ([INST] and the
like) was given to the model, and all else up to an eos token is an answer. Each answer is compared
with the text of its message all the same.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from regrow.infra import hub
from regrow.tasks.prepare.encoding import Tokens
from regrow.tasks.prepare.example import Conversation, RowError, TokenSource
from regrow.tasks.prepare.masking import MaskRules
from regrow.tasks.prepare.tokenizer import SavedTokenizer, describe, forget_place
from regrow.tasks.stage import StageError

_TEKKEN = "tekken.json"
_KEY = "tokenizer_use_mistral_common"
_GIVEN = ("INST", "SYSTEM_PROMPT", "AVAILABLE_TOOLS", "TOOL_RESULTS", "MODEL_SETTINGS")
"""Control tokens [NAME] and [/NAME] around what the model is given."""
_READ = ("role", "content", "tool_calls", "tool_call_id", "name")
"""Properties of a message that mistral-common reads."""


def save_mistral_tokenizer(place: str, out: Path) -> SavedTokenizer:
    """The tokenizer at `place` saved into `out`: as mistral-common's `tekken.json`, and converted,
    with the same numbers of tokens, so that no later stage needs mistral-common.

    Raises:
        StageError: when the package or the file is missing.
    """
    if importlib.util.find_spec("mistral_common") is None:
        raise StageError(
            f"{_KEY}: this needs the package mistral-common: pip install 'regrow[mistral]'"
        )
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    directory = hub.local_directory(place, "model", (_TEKKEN,))
    if not (directory / _TEKKEN).is_file():
        raise StageError(
            f"{_KEY}: the tokenizer at {place} has no {_TEKKEN}, the form that mistral-common's "
            "newer tokenizers have; remove the key, or name another with `tokenizer_config`"
        )
    converted: Any = convert_tekken_tokenizer(str(directory / _TEKKEN))
    converted.save_pretrained(str(out))
    forget_place(out / "tokenizer_config.json")
    shutil.copyfile(directory / _TEKKEN, out / _TEKKEN)
    return replace(describe(converted, out), tekken=str(out / _TEKKEN))


class MistralEncoder:
    """Turns conversations into tokens, as `encoding.Encoder` does with a chat template."""

    def __init__(self, tokenizer: SavedTokenizer, rules: MaskRules) -> None:
        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        self._rules = rules
        self._mistral: Any = MistralTokenizer.from_file(
            str(tokenizer.tekken), mode=ValidationMode.finetuning
        )
        self._tekken: Any = self._mistral.instruct_tokenizer.tokenizer
        self._closing = dict(self._pairs())
        self._bos, self._eos = self._tekken.bos_id, self._tekken.eos_id

    def _pairs(self) -> Iterator[tuple[int, int]]:
        for name in _GIVEN:
            try:
                yield tuple(self._tekken.get_special_token(f"[{m}{name}]") for m in ("", "/"))
            except (KeyError, ValueError, AssertionError):
                continue  # of a later version than this tokenizer

    def encode_many(self, sources: Sequence[TokenSource]) -> list[Tokens]:
        """The tokens and mask of each conversation.

        Raises:
            RowError: when mistral-common refuses one, or its mask cannot be exact.
        """
        return [self._encode(source) for source in sources]

    def _encode(self, source: TokenSource) -> Tokens:
        if not isinstance(source, Conversation):
            raise RowError(f"`{_KEY}` is for conversations: use `type: chat_template`")
        if source.details:
            raise RowError(f"`{_KEY}` trains whole messages; single characters cannot be chosen")
        if not source.messages:
            return Tokens(np.empty(0, np.int32), np.empty(0, np.uint8), 0)
        ids = self._tokens(source)
        answers = list(_answers(source))
        places = list(self._places(ids))
        if len(places) != len(answers):
            raise RowError(
                f"there are {len(answers)} answers and mistral-common writes {len(places)}, so "
                "what is learnt cannot be told; mend the row"
            )
        mask = np.zeros(len(ids), np.uint8)
        prompt_len = 0
        for number, ((start, end), numbers) in enumerate(zip(places, answers, strict=True)):
            trained = _one_flag(source, numbers)
            self._check(ids[start:end], [source.messages[n] for n in numbers])
            has_end = ids[end - 1] == self._eos
            mask[start : end - has_end] = trained
            mask[end - 1] |= has_end and self._learns_end(trained, number == len(places) - 1)
            prompt_len = start if trained else prompt_len
        mask[0] = 0
        return Tokens(np.array(ids, np.int32), mask, prompt_len)

    def _tokens(self, source: Conversation) -> list[int]:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        messages = [_as_openai(message) for message in source.messages]
        tools = list(source.tools) if source.tools else None
        try:
            request = ChatCompletionRequest.from_openai(messages=messages, tools=tools)
            return self._mistral.encode_chat_completion(request).tokens
        except (MistralCommonException, ValueError, TypeError, KeyError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RowError(f"mistral-common refuses this conversation: {first}") from error

    def _places(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """[first, last) of each answer, with its eos token."""
        at = int(ids[0] == self._bos)
        while at < len(ids):
            closing = self._closing.get(ids[at])
            wanted = self._eos if closing is None else closing
            end = next((i + 1 for i in range(at, len(ids)) if ids[i] == wanted), len(ids))
            if closing is None:
                yield at, end
            at = end

    def _check(self, ids: Sequence[int], messages: Sequence[Mapping[str, Any]]) -> None:
        """Refuse an answer that does not say what its messages do."""
        if any(message.get("tool_calls") for message in messages):
            return  # written in a form of its own
        said = "".join(_text(message) for message in messages)
        plain = [token for token in ids if not self._tekken.is_special(token)]
        if _words(self._tekken.decode(plain)) != _words(said):
            raise RowError(
                f"mistral-common writes {said[:60]!r} otherwise, so its place cannot be told; "
                "mend the row"
            )

    def _learns_end(self, trained: bool, is_last: bool) -> bool:
        wants = {"turn": trained, "all": True, "last": is_last, "none": False}
        return wants[self._rules.train_on_eos] or wants[self._rules.train_on_eot]


def _answers(source: Conversation) -> Iterator[list[int]]:
    """Numbers of the messages of each answer: those in a row are made one."""
    together: list[int] = []
    for number, message in enumerate(source.messages):
        if message["role"] == "assistant":
            together.append(number)
            continue
        if source.trained[number]:
            raise RowError(
                f"message {number} of role {message['role']!r} is to be learnt, and `{_KEY}` "
                "trains answers alone"
            )
        if together:
            yield together
        together = []
    if together:
        yield together


def _one_flag(source: Conversation, numbers: Sequence[int]) -> bool:
    flags = {source.trained[number] for number in numbers}
    if len(flags) > 1:
        raise RowError(
            f"messages {numbers[0]} to {numbers[-1]} become one answer, of which only a part is to "
            "be learnt; mend the row"
        )
    return flags.pop()


_OF_THINKING = ("think", "reason")


def _as_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in message.items():
        if name not in _READ and value and any(word in name for word in _OF_THINKING):
            raise RowError(
                f"mistral-common does not read {name!r}: thinking is a part of `content` there, "
                "{type: thinking}; write it so, or remove it (and `split_thinking`)"
            )
    found = {name: message[name] for name in _READ if message.get(name) is not None}
    if found.get("tool_calls"):
        found["tool_calls"] = [_with_text(call) for call in found["tool_calls"]]
    return found


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are JSON text."""
    function = dict(call.get("function", {}))
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
    return {**call, "function": function}


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    found = []
    for part in content:
        kind = part.get("type")
        if kind not in ("text", "thinking"):
            raise RowError(f"a message has a part of type {kind!r}; only text can be trained on")
        found.append(str(part.get(kind, "")))
    return "".join(found)


def _words(text: str) -> str:
    """Text without white space, which mistral-common strips and adds at edges."""
    return "".join(text.split())
