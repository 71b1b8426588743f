"""A small prepared artifact, written by hand as the readers expect it, and a job to run on it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from regrow.tasks.evaluate.spec import EvaluatePlacement, EvaluateSpec
from regrow.tasks.modeling.rows import SCHEMA
from regrow.tasks.stage import Stage, StageJob

TALK = [
    ("Turn on the lamp.", "lamp: on"),
    ("Turn off the radio in the kitchen, please.", "radio: off"),
    ("Hi!", "hello"),
    ("Make it two degrees warmer in the bedroom, and a little darker too.", "heat: +2"),
    ("Stop.", "ok, I stop now and wait"),
]


@dataclass
class Notes:
    """A reporter that remembers."""

    logged: list[str] = field(default_factory=list)
    progressed: list[tuple] = field(default_factory=list)

    def log(self, message: str) -> None:
        self.logged.append(message)

    def progress(self, done, total, unit, note="") -> None:
        self.progressed.append((done, total, unit))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, made in place; the first is the end of a text, the second pads."""
    letters = ["<|im_end|>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    parts = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    parts.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts.decoder = decoders.ByteLevel()
    ends = {"eos_token": letters[0], "pad_token": letters[1]}
    return PreTrainedTokenizerFast(tokenizer_object=parts, **ends)


def examples(tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], int]]:
    """(token ids, length of the prompt) of each talk; what follows the prompt is learnt."""
    found = []
    for question, answer in TALK:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt)["input_ids"]
        learnt = tokenizer(f"{answer}<|im_end|>")["input_ids"]
        found.append((ids + learnt, len(ids)))
    return found


def write_prepared(
    out: Path, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], prompts: bool
) -> Path:
    """An artifact whose validation rows hold the examples of the given numbers."""
    tokenizer.save_pretrained(out / "tokenizer")
    talks = examples(tokenizer)
    splits = {"train": {"shards": [], "rows": 0}}
    if rows:
        splits["validation"] = _write_rows(out, [[talks[i] for i in row] for row in rows])
    (out / "index.json").write_text(json.dumps({"splits": splits}))
    lines = [
        {
            "prompt_ids": ids[:cut],
            "prompt": str(tokenizer.decode(ids[:cut])),
            "expected": answer,
        }
        for (ids, cut), (_, answer) in zip(talks, TALK, strict=True)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) if prompts else ""
    (out / "prompts.jsonl").write_text(text)
    return out


def _write_rows(out: Path, rows: Sequence[Sequence[tuple[list[int], int]]]) -> dict[str, Any]:
    columns = {
        "input_ids": [[token for ids, _ in row for token in ids] for row in rows],
        "loss_mask": [[int(i >= cut) for ids, cut in row for i in range(len(ids))] for row in rows],
        "seq_lens": [[len(ids) for ids, _ in row] for row in rows],
    }
    (out / "validation").mkdir()
    name = "validation/shard-00000.arrow"
    table = pa.table(columns, schema=SCHEMA)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(str(out / name), SCHEMA, options=options) as writer:
        writer.write_table(table, max_chunksize=64)
    return {
        "shards": [{"file": name, "rows": len(rows)}],
        "rows": len(rows),
        "examples": sum(map(len, rows)),
        "tokens": sum(map(len, columns["input_ids"])),
        "supervised_tokens": sum(map(sum, columns["loss_mask"])),
    }


def make_job(
    root: Path,
    inputs: Mapping[str, Path],
    results: Mapping[str, Any] | None = None,
    placement: EvaluatePlacement | None = None,
    **spec: Any,
) -> StageJob:
    """A job of the evaluate stage in a fresh directory below `root`."""
    place = root / f"job-{len(list(root.glob('job-*')))}"
    for name in ("out", "scratch"):
        (place / name).mkdir(parents=True)
    defaults = {"model_digest": None, "dtype": "float32", "max_new_tokens": 5, "num_prompts": 8}
    stage = Stage(
        "evaluate",
        1,
        EvaluateSpec(**{**defaults, **spec}),
        "regrow.tasks.evaluate.run:run",
        placement=placement or EvaluatePlacement(device="cpu"),
    )
    units: Any = None
    return StageJob(stage, inputs, results or {}, place / "out", place / "scratch", Notes(), units)
