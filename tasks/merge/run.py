"""The merge stage: adapter into base, stored as one model, and checked against base and adapter."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow.infra import hub
from regrow.tasks.merge.fidelity import compare, logits_of, probe_batch
from regrow.tasks.merge.spec import MergeSpec
from regrow.tasks.modeling.adapter import load_adapter
from regrow.tasks.modeling.ends import align_special_ids
from regrow.tasks.modeling.load import DTYPES, grow_embeddings, load_model, load_tokenizer
from regrow.tasks.modeling.rounding import round_weights
from regrow.tasks.stage import StageError, StageJob

_MODEL_FILES = ("*.safetensors", "*.json", "*.py", "*.model")  # no pickles, no second formats


def run(job: StageJob) -> dict[str, Any]:
    """Merge the adapter of input "train"; `job.out` gets model and tokenizer (of input "prepare").

    On the CPU, all arithmetic in float32, which takes 4 bytes a parameter. Returns the fields of
    `Fidelity`, and tolerance and allowed_difference.

    Raises:
        StageError: when the adapter does not fit, or the merged model is not faithful.
    """
    spec: MergeSpec = job.spec
    tokenizer_dir = job.inputs["prepare"] / "tokenizer"
    batch = probe_batch(job.inputs["prepare"])
    trust = job.placement.trust_remote_code
    base = hub.local_directory(job.placement.base_model, "model", _MODEL_FILES)
    job.report.progress(0, 3, "parts", "base and adapter")
    model: Any = load_model(base, dtype=spec.dtype, trust_remote_code=trust).float()
    tokenizer = load_tokenizer(tokenizer_dir)
    grow_embeddings(model, len(tokenizer))
    align_special_ids(model, tokenizer)
    before = _merge(model, job.inputs["train"], spec.dtype, job.out, batch)
    del model
    shutil.copytree(tokenizer_dir, job.out, dirs_exist_ok=True)
    job.report.progress(2, 3, "parts", "the merged model, as stored")
    stored = load_model(job.out, dtype=spec.dtype, trust_remote_code=trust).float()
    fidelity = compare(*before, logits_of(stored, batch))
    job.report.progress(3, 3, "parts")
    job.report.log(str(fidelity))
    fault = fidelity.fault(spec.tolerance)
    if fault:
        raise StageError(
            f"the merged model is not faithful: {fidelity}; {fault}. Use the adapter without "
            "merging it, or set bf16: false, which keeps the merged weights in float32"
        )
    return asdict(fidelity) | {
        "tolerance": spec.tolerance,
        "allowed_difference": fidelity.allowed(spec.tolerance),
    }


def _merge(
    model: Any, adapter: Path, dtype: str, out: Path, batch: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Store the merged model in `out`; returns logits of the base, of base and adapter, and of the
    merged model before it is rounded."""
    base_TV = logits_of(model, batch)
    adapted = load_adapter(model, adapter)
    adapted_TV = logits_of(adapted, batch)
    merged: Any = adapted.merge_and_unload(safe_merge=True)
    merged_TV = logits_of(merged, batch)
    round_weights(merged, DTYPES[dtype])
    merged.save_pretrained(str(out))
    return base_TV, adapted_TV, merged_TV
