"""Prompts for generation, with the answer that the data expects: `prompts.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from regrow.tasks.prepare.examples import Corpus, Examples
from regrow.tasks.prepare.ordering import mixed

LIMIT = 512
"""Prompts kept: with 512 answers a rate is known to about two per cent (binomial, one sigma)."""


def write_prompts(
    path: Path,
    corpus: Corpus,
    held_out: Examples,
    tokenizer: Tokenizer,
    ends: Collection[str],
    seed: int,
) -> int:
    """Write up to `LIMIT` prompts of held-out examples; returns how many.

    An example's prompt is all that stands before its last trained message; plain text has none.

    Args:
        ends: tokens that end an answer and are no part of it.
    """
    end_ids = {tokenizer.token_to_id(end) for end in ends}
    usable = held_out.take(held_out.prompt_len > 0)
    order = np.argsort(mixed(usable.digest, seed), kind="stable")
    chosen = usable.take(np.sort(order[:LIMIT]))
    with path.open("w", encoding="utf-8") as out:
        for prompt in _prompts(corpus, chosen, tokenizer, end_ids):
            out.write(json.dumps(prompt, ensure_ascii=False) + "\n")
    return len(chosen)


def _prompts(
    corpus: Corpus, examples: Examples, tokenizer: Tokenizer, end_ids: Collection[int | None]
) -> Iterator[dict]:
    for i in range(len(examples)):
        ids, mask = corpus.tokens(*examples.place(i))
        cut = int(examples.prompt_len[i])
        prompt = ids[:cut].tolist()
        unlearnt = np.flatnonzero(mask[cut:] == 0)
        answer = (ids[cut:][: unlearnt[0]] if len(unlearnt) else ids[cut:]).tolist()
        while answer and answer[-1] in end_ids:
            answer.pop()
        yield {
            "prompt_ids": prompt,
            "prompt": tokenizer.decode(prompt, skip_special_tokens=False),
            "expected": tokenizer.decode(answer, skip_special_tokens=True),
        }
