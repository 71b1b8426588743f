"""`regrow inference` and `regrow chat`: words with the finished model of a recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regrow.flows.commands import open_plan
from regrow.flows.explained import explains
from regrow.flows.progress import say
from regrow.tasks.build import stage_key
from regrow.tasks.stage import StageError

_MOST_NEW_TOKENS = 512  # an answer of a page; long enough to see how the model talks


@explains
def answer_once(recipe: str, overrides: Sequence[str], prompt: str | None) -> int:
    """Print the model's answer to one prompt (default: all of standard input)."""
    speak = _open(recipe, overrides)
    speak([{"role": "user", "content": prompt if prompt is not None else sys.stdin.read()}])
    return 0


@explains
def chat(recipe: str, overrides: Sequence[str]) -> int:
    """Talk until the end of input; `/new` forgets what was said."""
    speak = _open(recipe, overrides)
    say("Talk to the model; /new starts over, Ctrl-D ends.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return 0
        if line == "/new":
            messages = []
        elif line:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": speak(messages)})


def _open(recipe: str, overrides: Sequence[str]) -> Callable[[list[dict[str, str]]], str]:
    _, workplace, plan = open_plan(recipe, overrides)
    record = workplace.artifacts.lookup(stage_key(plan.model))
    if record is None:
        raise StageError(f"{recipe} has no finished model yet: `regrow run {recipe}` makes it")
    return _speaker(workplace.artifacts.fetch(record), plan.train.spec.dtype)


def _speaker(directory: Path, dtype: str) -> Callable[[list[dict[str, str]]], str]:
    from transformers import TextStreamer

    from regrow.tasks.modeling.load import load_model, load_tokenizer

    tokenizer: Any = load_tokenizer(directory)
    model: Any = load_model(directory, dtype=dtype, attention="sdpa")

    def speak(messages: list[dict[str, str]]) -> str:
        inputs = _inputs(tokenizer, messages).to(model.device)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        output = model.generate(
            **inputs, max_new_tokens=_MOST_NEW_TOKENS, do_sample=False, streamer=streamer
        )
        new_tokens = output[0, inputs["input_ids"].shape[1] :]
        return tokenizer.decode(new_tokens, skip_special_tokens=True).strip()

    return speak


def _inputs(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    if tokenizer.chat_template is None:
        return tokenizer(messages[-1]["content"], return_tensors="pt")
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
