"""Prompts and answers of the formats for preferences and rewards, read from the forms they have.

A prompt is text, or messages. Messages become text in a fixed frame (ChatML, Llama 3, Zephyr), or
are rendered by the chat template; text stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regrow.configs.sections.dataset_types import is_own_code
from regrow.tasks.prepare.example import (
    Document,
    Exchange,
    RowError,
    Segment,
    TokenSource,
    no_such_column,
    text_column,
)
from regrow.tasks.prepare.formats import chat_template, own_code

Message = Mapping[str, Any]
Words = str | tuple[Message, ...]
"""Text, or messages with `role` and `content`."""


@dataclass(frozen=True)
class Frame:
    """A fixed way to write messages as text: {role} stands for the role's name."""

    head: str
    end: str
    """What ends an answer ..."""
    after: str
    """... and what stands behind the end of a message that is not the last."""

    def prompt(self, messages: Sequence[Message]) -> str:
        """The messages, and the head of an answer."""
        heads = [self.head.replace("{role}", message["role"]) for message in messages]
        turns = zip(heads, messages, strict=True)
        done = "".join(f"{head}{m['content']}{self.end}{self.after}" for head, m in turns)
        return done + self.head.replace("{role}", "assistant")


# Published forms: OpenAI's ChatML, Meta's Llama 3 model card, Hugging Face's Zephyr model card.
FRAMES = {
    "chatml": Frame("<|im_start|>{role}\n", "<|im_end|>", "\n"),
    "llama3": Frame("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", ""),
    "zephyr": Frame("<|{role}|>\n", "</s>", "\n"),
}


@dataclass(frozen=True)
class Source:
    """Where a format finds prompt and answers, and how they become text.

    Its columns may have one of several names; the first that the row has counts.
    """

    prompts: tuple[str, ...] = ("prompt",)
    frame: str | None = None
    """A name in `FRAMES`; None: messages are rendered by the chat template."""
    dialogues: bool = False
    """Answers are whole dialogues, whose last message is the answer."""
    last_message: bool = False
    """Answers are lists of messages, of which the last is the answer; the prompt is a column."""
    system: bool = True
    """Read a column with system text, which may be absent."""
    closed: bool = False
    """Nothing but an eos token may stand behind the answer: see `Exchange.closed`."""
    as_it_is: bool = False
    """Text is text, messages are messages; what is not there is found in the answers."""


def own_code_of(dataset: Any, recipe: Any) -> own_code.Options | None:
    """The function that a dataset's `type` names, if it names one."""
    named = isinstance(dataset.type, str) and is_own_code(dataset.type)
    return own_code.Options.from_recipe(dataset, recipe) if named else None


def rewritten(row: Mapping[str, Any], own: own_code.Options | None) -> Mapping[str, Any]:
    """The row as the user's function gives it, in one of TRL's forms; the row itself without one.

    Raises:
        RowError: when the function fails or returns no row.
    """
    if own is None:
        return row
    given = own_code.called(row, own)
    if not isinstance(given, Mapping):
        name = f"{own.module}.{own.function}"
        raise RowError(f"{name} returned {type(given).__name__}, and a row is a dict")
    return given


def sequence(
    prompt: Words, answer: Words, source: Source, tools: tuple[Any, ...] | None = None
) -> TokenSource:
    """What is tokenized for one answer."""
    if isinstance(prompt, str) and isinstance(answer, str) and source.as_it_is:
        return answered(prompt, answer)
    messages, answers = as_messages(prompt, "user"), as_messages(answer, "assistant")
    if source.frame is None:
        if answers[-1]["role"] != "assistant":
            raise RowError(
                f"an answer must end with a message of the assistant, not of {answers[-1]['role']}"
            )
        return Exchange(messages, answers, tools, source.closed)
    if [message["role"] for message in answers] != ["assistant"]:
        roles = ", ".join(message["role"] for message in answers)
        raise RowError(f"an answer must be text or one message of the assistant, not of {roles}")
    frame = FRAMES[source.frame]
    text = str(answers[0]["content"])
    end = "" if source.frame == "zephyr" else frame.end  # Zephyr's is its eos token, added anyway
    return answered(frame.prompt(messages), text + end)


def answered(prompt: str, answer: str) -> Document:
    """A prompt and an answer as text."""
    return Document((Segment(prompt, False), Segment(answer, True)), continues=True)


def as_messages(words: Words, role: str) -> tuple[Message, ...]:
    """Messages; text is one of that role."""
    return ({"role": role, "content": words},) if isinstance(words, str) else words


def column(row: Mapping[str, Any], names: Sequence[str], key: str) -> str:
    """The first of some names that the row has. Raises RowError when it has none."""
    found = next((name for name in names if row.get(name) is not None), None)
    if found is None and not any(name in row for name in names):
        raise no_such_column(row, names[0], key)
    return found or next(name for name in names if name in row)


def words(row: Mapping[str, Any], name: str, key: str, chat: chat_template.Options) -> Words:
    """Text, or messages, whichever the column holds. A list may be written as JSON.

    Raises:
        RowError: when it is neither.
    """
    value = row[name]
    if isinstance(value, str):
        value = _decoded(value)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return text_column(row, name, key)
    if not value:
        raise RowError(f"column {name!r} holds no message; mend the row")
    only = replace(chat, messages=name, default_system_message=None)
    return tuple(chat_template.read({name: value}, only).messages)


def _decoded(text: str) -> Any:
    """Messages in JSON, as CSV files hold them; other text as it is."""
    if not text.startswith(("[{", "{")):
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if _is_messages(value) else text


def _is_messages(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return all(isinstance(m, Mapping) and {"role", "from"} & set(m) for m in listed)


def system_text(row: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """The row's system text, or the default; empty where there is neither."""
    return text_column(row, name, "field_system", default="") or default or ""


def with_system(system: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages behind a system message, unless they begin with one or there is no text."""
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return ({"role": "system", "content": system}, *messages)


def tools_of(row: Mapping[str, Any], chat: chat_template.Options) -> tuple[Any, ...] | None:
    """The tools that the row's messages may call."""
    only = replace(chat, messages="messages")
    return chat_template.read({"messages": [], chat.tools: row.get(chat.tools)}, only).tools


def divided(dialogue: Words, name: str) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(all messages but the last, the last). Raises RowError when there are not two."""
    if isinstance(dialogue, str) or len(dialogue) < 2:
        raise RowError(
            f"column {name!r} must hold a dialogue of a prompt and an answer. Mend the row, or "
            "choose another `type`"
        )
    return dialogue[:-1], dialogue[-1:]


def shared(first: Words, second: Words) -> int:
    """How much of two dialogues is their prompt: characters, or messages, that both begin with.

    Of text in the form of Anthropic's HH data the prompt ends with the last "Assistant:" that both
    share, so that an answer is whole even where both begin alike. Of other text it ends where the
    two differ, and before a space, which belongs to the word behind it.
    """
    pairs = zip(first, second, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
    if not isinstance(first, str) or not isinstance(second, str):
        return min(same, len(first) - 1, len(second) - 1)
    turn = first.rfind(_TURN, 0, same)
    if first.startswith(_HUMAN) and turn >= 0:
        return turn + len(_TURN)
    return same - 1 if 0 < same < len(first) and first[same - 1] == " " else same


_HUMAN, _TURN = "\n\nHuman:", "\n\nAssistant:"
