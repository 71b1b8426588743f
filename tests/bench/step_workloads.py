"""The workloads of the training-step bench: model shapes, documents, random models, useful work."""

from __future__ import annotations

import bisect
import importlib.util
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

MEDIAN, MEAN, SHORTEST, LONGEST = 350, 500, 16, 4096
LEARNT = (0.45, 0.85)  # of a document
SPECIAL = 8  # the lowest ids are left to special tokens; a pad id's embedding is zero

_LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
SHAPES: dict[str, dict[str, Any]] = {
    "llama31-8b": _LLAMA
    | {"kind": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "llama32-1b": _LLAMA
    | {"kind": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
       "head_dim": 64, "tie_word_embeddings": True},
    "qwen3moe-8l": {"kind": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
                    "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
                    "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
                    "num_experts_per_tok": 8, "moe_intermediate_size": 768,
                    "norm_topk_prob": True},
}  # fmt: skip
_SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 1000,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
_SMALL_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Workload:
    """What is trained on what, and how it is measured."""

    shape: str
    lora: int = 0
    """Rank; 0: all weights are trained."""
    nf4: bool = False
    experts: bool = False
    """Whether the adapter is on the experts too."""
    rows: int = 2
    """Rows of a step."""
    seq: int = 4096
    lr: float = 1e-4
    seed: int = 42
    """Of an adapter's first values; rows come in their stored order."""
    warmup: int = 4
    timed: int = 10
    tiny: bool = False
    layers: int | None = None
    dtype: str = "bfloat16"
    kernels: str = "auto"
    gc: str = "0"
    optim: str = "adamw_torch_fused"
    profile: int = 0
    sync: int = 0
    """Whether one more step is looked at for operations that wait for the device."""
    watch: int = 0
    """Whether the card's clock and power are read while steps are timed."""
    micro: int | None = None
    """Rows of a micro-batch; None: all of a step."""
    dropout: float = 0.0
    log: int = 10
    """Steps between two lines of the log, each of which waits for the device; peers log nothing."""
    doc: int = 0
    """Tokens of every document; 0: of chat-like lengths."""
    of: int = 0
    """Tokens of longer rows whose documents these rows hold, dealt out evenly; 0: of none."""
    fp8: int = 0
    """Whether the frozen base multiplies in 8-bit floats."""
    lag: int = 0
    """Whether it is noted how far the device is behind the host."""
    blocks: int = 0
    """Whether the blocks of memory at the peak are listed by the lines that made them."""
    room: float = 0.0
    """GiB that torch may take of the GPU; 0: all of it."""

    @property
    def steps(self) -> int:
        return self.warmup + self.timed + 2 * self.profile + self.sync

    @property
    def config(self) -> dict[str, Any]:
        """The model's sizes, with `kind`."""
        found = dict(SHAPES[self.shape])
        if self.tiny:
            found |= _SMALL | (_SMALL_MOE if found["kind"] == "qwen3_moe" else {})
        if self.layers:
            found["num_hidden_layers"] = self.layers
        return found


WORKLOADS = {
    "W1": Workload("llama31-8b", lora=16),
    "W2": Workload("llama31-8b", lora=16, nf4=True),
    "W3": Workload("llama32-1b", rows=4, lr=1e-5),
    "W4": Workload("qwen3moe-8l", lora=16, experts=True),
    "W4a": Workload("qwen3moe-8l", lora=16),
    "LONG": Workload("llama31-8b", lora=32, nf4=True, rows=1, seq=400_000, gc="offload", warmup=1,
                     timed=1),
}  # fmt: skip


def workload(text: str, tiny: bool) -> Workload:
    """`W1:gc=1:layers=2` as a workload."""
    name, *options = text.split(":")
    found = replace(WORKLOADS[name], tiny=tiny)
    if tiny:
        found = replace(found, seq=256, warmup=1, timed=2, optim="adamw_torch")
        has_bits = importlib.util.find_spec("bitsandbytes") is not None
        found = replace(found, rows=min(found.rows, 2), nf4=found.nf4 and has_bits)
    for option in options:
        key, _, value = option.partition("=")
        now = getattr(found, key)
        whole = isinstance(now, int) or key in ("layers", "micro")
        typed: Any = int(value) if whole else float(value) if isinstance(now, float) else value
        found = replace(found, **{key: typed})
    return found


# ---- data ----


def documents(
    tokens: int, seq: int, vocabulary: int, length: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, loss_mask) of documents of chat-like lengths, `tokens` in all."""
    random = np.random.default_rng(0)
    sigma = math.sqrt(2 * math.log(MEAN / MEDIAN))
    found, total, given = [], 0, length
    while total < tokens:
        length = int(np.clip(random.lognormal(math.log(MEDIAN), sigma), SHORTEST, LONGEST))
        length = min(given or length, seq)
        ids = SPECIAL + ((vocabulary - SPECIAL) * random.random(length) ** 3).astype(np.int32)
        mask = np.ones(length, dtype=np.uint8)
        mask[: max(1, int(length * (1 - random.uniform(*LEARNT))))] = 0
        found.append((ids, mask))
        total += length
    return found


def pack(found: list[Any], seq: int) -> list[list[Any]]:
    """Each into the fullest row that has room, longest first; rows under 98 % full are left out."""
    rows: list[list[Any]] = []
    room: list[tuple[int, int]] = []
    for document in sorted(found, key=lambda d: -len(d[0])):
        length = len(document[0])
        at = bisect.bisect_left(room, (length, -1))
        left, row = room.pop(at) if at < len(room) else (seq, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(document)
        bisect.insort(room, (left - length, row))
    full = [row for row in rows if sum(len(ids) for ids, _ in row) >= 0.98 * seq]
    order = np.random.default_rng(0).permutation(len(full))
    return [full[i] for i in order]


def dealt(row: list[Any], parts: int) -> list[list[Any]]:
    """The row's documents in so many rows, each in the one that has the fewest tokens yet."""
    rows: list[list[Any]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for document in sorted(row, key=lambda d: -len(d[0])):
        at = tokens.index(min(tokens))
        rows[at].append(document)
        tokens[at] += len(document[0])
    return rows


def rows_of(w: Workload) -> list[list[Any]]:
    """The documents of every row, in the order of training."""
    seq = w.of or w.seq
    parts = seq // w.seq
    needed, factor = w.steps * w.rows // parts, 1.3
    rows: list[list[Any]] = []
    while len(rows) < needed:
        made = documents(int(factor * needed * seq), seq, w.config["vocab_size"], w.doc)
        rows, factor = pack(made, seq), 2 * factor
    rows = rows[:needed]
    return [part for row in rows for part in dealt(row, parts)] if w.of else rows


def write_rows(w: Workload, out: Path) -> list[dict[str, float]]:
    """A prepared artifact; returns each row's tokens, supervised tokens and sum of squares."""
    import pyarrow as pa

    from regrow.tasks.modeling.row_sizes import write_sizes
    from regrow.tasks.modeling.rows import SCHEMA

    lines = [
        {
            "input_ids": np.concatenate([ids for ids, _ in row]),
            "loss_mask": np.concatenate([mask for _, mask in row]),
            "seq_lens": np.array([len(ids) for ids, _ in row], dtype=np.int32),
        }
        for row in rows_of(w)
    ]
    (out / "train").mkdir(parents=True)
    name = "train/shard-00000.arrow"
    with pa.ipc.new_file(str(out / name), SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(lines, schema=SCHEMA), max_chunksize=64)
    counts = [
        {
            "tokens": len(line["input_ids"]),
            "supervised": int(line["loss_mask"].sum()),
            "squares": float((line["seq_lens"].astype(float) ** 2).sum()),
        }
        for line in lines
    ]
    sizes = [[int(c["tokens"]), int(c["squares"])] for c in counts]
    write_sizes(out, "train", np.array(sizes, dtype=np.int64))
    split = {
        "shards": [{"file": name, "rows": len(lines)}],
        "rows": len(lines),
        "examples": sum(len(line["seq_lens"]) for line in lines),
        "tokens": sum(int(c["tokens"]) for c in counts),
        "supervised_tokens": sum(int(c["supervised"]) for c in counts),
    }
    (out / "index.json").write_text(json.dumps({"splits": {"train": split}}))
    return counts


# ---- model ----


def model_directory(w: Workload, models: Path) -> Path:
    """Random bfloat16 weights of the shape with a tokenizer, made once."""
    cut = f"-{w.layers}" if w.layers else ""
    out = models / (f"tiny-{w.shape}{cut}" if w.tiny else f"{w.shape}{cut}")
    if not (out / "DONE").exists() and not (out / "tokenizer.json").exists():
        _make_model(w, out)
    return out


def _make_model(w: Workload, out: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    begin = time.monotonic()
    sizes = dict(w.config)
    kind = sizes.pop("kind")
    theta = 1e6 if kind == "qwen3_moe" else 5e5
    config = AutoConfig.for_model(
        kind,
        **{"tie_word_embeddings": False} | sizes,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    torch.manual_seed(0)
    with torch.device("cpu" if w.tiny else "cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size="4GB")
    words = {f"w{index}": index for index in range(1000)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")),
        unk_token="w3",
        pad_token="w2",
        bos_token="w0",
        eos_token="w1",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}",  # peers want one
    ).save_pretrained(out)
    (out / "DONE").touch()
    print(f"made {out} in {time.monotonic() - begin:.0f} s", flush=True)


def useful_flops(w: Workload, counts: dict[str, float], adapter: int) -> float:
    """The least work of the counted tokens; see the file's head."""
    c, hidden = w.config, w.config["hidden_size"]
    size = c.get("head_dim") or hidden // c["num_attention_heads"]
    queries, keys = c["num_attention_heads"] * size, c["num_key_value_heads"] * size
    attention = hidden * (queries + 2 * keys) + queries * hidden
    mlp, layers = 3 * hidden * c["intermediate_size"], c["num_hidden_layers"]
    if c["kind"] == "qwen3_moe":
        chosen = c["num_experts_per_tok"]
        mlp = 3 * hidden * c["moe_intermediate_size"] * chosen + hidden * c["num_experts"]
        if w.experts:  # only the chosen experts' adapters work
            on_attention = layers * w.lora * (2 * (hidden + queries) + 2 * (hidden + keys))
            adapter = on_attention + (adapter - on_attention) * chosen // c["num_experts"]
    factor = 4 if w.lora else 6
    return (
        factor * layers * (attention + mlp) * counts["tokens"]
        + factor * hidden * c["vocab_size"] * counts["supervised"]
        + 6 * adapter * counts["tokens"]
        + 6 * layers * queries * counts["squares"]
    )
