"""What the train matrix trains on: tiny models, plain or stored quantized, and prepared rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file

from tests.tasks.train.tiny_models import VOCABULARY, tiny_mixtral, write_llama

_WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64}


def write_model(out: Path) -> Path:
    """A random Llama, 2 layers of 64."""
    return write_llama(out, **_WIDE)


def write_mixture(out: Path) -> Path:
    """A random Mixtral, 2 layers of 64, two of its 4 experts for each token."""
    tiny_mixtral(**_WIDE).save_pretrained(out)
    return out


def _store_quantized(
    out: Path, settings: dict[str, Any], store: Callable[[torch.Tensor], dict[str, torch.Tensor]]
) -> Path:
    """A random Llama, 2 layers of 128, its linear layers as `store` gives their parts."""
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128}
    write_llama(out, **sizes, num_key_value_heads=4, quantization_config=settings)
    stored = load_file(out / "model.safetensors")
    for name in [name for name in stored if "_proj" in name]:
        layer = name.removesuffix("weight")
        stored |= {f"{layer}{part}": tensor for part, tensor in store(stored.pop(name)).items()}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _as_fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """As DeepSeek stores it: 128 x 128 numbers share a scale."""
    scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    return {
        "weight": (weight / scale).to(torch.float8_e4m3fn),
        "weight_scale_inv": scale.view(1, 1),
    }


def _as_gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """In 4 bits, 128 inputs to a group, the lowest bits first; the zero point 8 is stored as 7."""
    scale = weight.abs().amax(1) / 7
    numbers = (weight / scale[:, None]).round().int().t() + 8
    places = torch.arange(0, 32, 4, dtype=torch.int32)
    packed = (numbers.view(-1, 8, len(weight)) << places[:, None]).sum(1, dtype=torch.int32)
    zeros = torch.full((1, len(weight) // 8), 0x77777777, dtype=torch.int32)
    groups = torch.zeros(weight.shape[1], dtype=torch.int32)
    return {"qweight": packed, "qzeros": zeros, "scales": scale.half()[None], "g_idx": groups}


def write_fp8(out: Path) -> Path:
    """A model stored in FP8."""
    return _store_quantized(out, {"quant_method": "fp8", "weight_block_size": [128, 128]}, _as_fp8)


def write_gptq(out: Path) -> Path:
    """A model stored as GPTQ."""
    return _store_quantized(out, {"quant_method": "gptq", "bits": 4, "group_size": 128}, _as_gptq)


BASES: dict[str, Callable[[Path], Path]] = {
    "llama": write_model,
    "mixture": write_mixture,
    "fp8": write_fp8,
    "gptq": write_gptq,
}
"""What cases are trained on."""


def write_prepared(out: Path) -> Path:
    """24 rows to train on, 4 to validate, with a tokenizer of 97 words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    random = np.random.default_rng(7)
    lists = {"input_ids": pa.int32(), "loss_mask": pa.uint8(), "seq_lens": pa.int32()}
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in lists.items()])
    splits = {}
    for split, count in (("train", 24), ("validation", 4)):
        rows = []
        for _ in range(count):
            lengths = random.integers(4, 21, 3)
            mask = (random.random(lengths.sum()) < 0.6).astype(int)
            mask[np.concatenate([[0], lengths.cumsum()[:-1]])] = 0
            ids = random.integers(3, VOCABULARY, lengths.sum())
            rows.append({"input_ids": ids, "loss_mask": mask, "seq_lens": lengths})
        (out / split).mkdir(parents=True)
        name = f"{split}/shard-00000.arrow"
        with pa.ipc.new_file(str(out / name), schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        splits[split] = {
            "shards": [{"file": name, "rows": count}],
            "rows": count,
            "examples": 3 * count,
            "tokens": int(sum(len(row["input_ids"]) for row in rows)),
            "supervised_tokens": int(sum(row["loss_mask"].sum() for row in rows)),
        }
    (out / "index.json").write_text(json.dumps({"splits": splits}))
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        unk_token="w0",
        pad_token="w1",
        eos_token="w2",
    )
    tokenizer.save_pretrained(out / "tokenizer")
    return out
