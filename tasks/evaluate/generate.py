"""Greedy answers to prompts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from regrow.tasks.modeling.ends import stop_ids
from regrow.tasks.stage import Reporter

# Places in the key-value cache of one batch. A model of 8 billion parameters keeps 131 kB for each
# (32 layers, 8 heads of 128, keys and values, 2 bytes): 4.3 GB.
_TOKENS = 1 << 15


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, and, if known, what it should answer."""

    text: str
    ids: tuple[int, ...]
    expected: str | None = None


def held_out_prompts(prepared: Path, most: int) -> list[Prompt]:
    """The first prompts of a prepared artifact's `prompts.jsonl`; none when it has no such file."""
    path = prepared / "prompts.jsonl"
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, most)]
    return [Prompt(row["prompt"], tuple(row["prompt_ids"]), row["expected"]) for row in rows]


def fixed_prompts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Prompts as a user would put them: through the chat template, when there is one."""
    prompts = []
    for text in texts:
        shown = _as_chat(tokenizer, text) if tokenizer.chat_template else text
        # The template writes the begin-of-text token itself, if the model wants one.
        ids = tokenizer(shown, add_special_tokens=not tokenizer.chat_template)["input_ids"]
        prompts.append(Prompt(text, tuple(ids)))
    return prompts


def _as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    messages = [{"role": "user", "content": text}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(shown, str)
    return shown


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    batch_size: int,
    report: Reporter,
) -> list[str]:
    """One answer a prompt, in their order, without special tokens.

    Args:
        model: with attention "sdpa", on its device.
        batch_size: at most so many prompts are answered side by side, padded on the left; those of
            like length are put together.
    """
    stops = stop_ids(tokenizer, model)
    config = _greedy(tokenizer, stops, max_new_tokens)
    texts = [""] * len(prompts)
    done = 0
    for chosen in _batches([len(prompt.ids) + max_new_tokens for prompt in prompts], batch_size):
        inputs = _left_padded([prompts[i].ids for i in chosen], config.pad_token_id)
        made = _generate(model, inputs, config)
        for i, ids in zip(chosen, made.tolist(), strict=True):
            end = next((n for n, token in enumerate(ids) if token in stops), len(ids))
            texts[i] = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
        done += len(chosen)
        report.progress(done, len(prompts), "prompts", "answers")
    return texts


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Positions in groups of like length, the longest first: a lack of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    while order:
        size = max(1, min(most, _TOKENS // lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def _greedy(
    tokenizer: PreTrainedTokenizerBase, stops: list[int], max_new_tokens: int
) -> GenerationConfig:
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        # Said here because what is not said comes from the model's generation_config.json: a
        # penalty there would change the answers, and the sampling values only bring warnings.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        max_new_tokens=max_new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad if pad is not None else (stops or [0])[0],
        use_cache=True,
    )


def _left_padded(rows: Sequence[Sequence[int]], pad: Any) -> dict[str, torch.Tensor]:
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), int(pad), dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, longest - len(row) :] = torch.tensor(row)
        attention_mask[i, longest - len(row) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _generate(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], config: GenerationConfig
) -> torch.Tensor:
    """New token ids, [prompts, at most max_new_tokens]."""
    on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    made = model.generate(**on_device, generation_config=config)  # pyright: ignore[reportCallIssue]
    assert isinstance(made, torch.Tensor)
    return made[:, inputs["input_ids"].shape[1] :].cpu()
