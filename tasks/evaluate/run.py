"""The evaluate stage: loss on held-out rows and answers to held-out prompts, before and after.

Inputs: `prepare` (the prepared artifact); `model` (a model directory; absent: the placement's base
model); `baseline` (this stage's result for the base model; absent: nothing to compare with).

Writes `scores.json`, `generations.jsonl` (prompt, expected, answer, exact and, with a baseline,
before) and, with a baseline, `comparison.json`. Returns `scores`, `notes` (what could not be
measured and why), `comparison` and `samples` (the first generations).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from regrow.tasks import identity
from regrow.tasks.evaluate.alone import run_alone
from regrow.tasks.evaluate.compare import compare, with_earlier_answers
from regrow.tasks.evaluate.generate import Prompt, answers, fixed_prompts, held_out_prompts
from regrow.tasks.evaluate.loss import validation_scores
from regrow.tasks.modeling.load import grow_embeddings, load_model, load_tokenizer
from regrow.tasks.modeling.rows import PackedRows
from regrow.tasks.stage import StageError, StageJob

_SAMPLES = 8  # generations kept in the result itself: as many as people read in a table
_PREPARED = ("index.json", "prompts.jsonl", "tokenizer/*", "validation/*")
_ANSWERS = "generations.jsonl"
_NO_VALIDATION = (
    "there is no validation split, so the loss is not known; set val_set_size or test_datasets"
)
_NO_PROMPTS = "there are no held-out prompts, so no answers could be compared with the right ones"


def run(job: StageJob) -> dict[str, Any]:
    """Evaluate one model. See the module's docstring for inputs, files and result.

    Raises:
        StageError: when the model cannot be loaded, or its loss is not a number.
    """
    if job.devices is None and _device(job).type == "cpu":
        return on_device(job)
    inputs = {"prepare": job.part("prepare", *_PREPARED)}
    if "baseline" in job.inputs:
        inputs["baseline"] = job.part("baseline", _ANSWERS)
    if "model" in job.inputs:
        inputs["model"] = job.inputs["model"]
    return run_alone(replace(job, inputs=inputs, fetch=None))


def on_device(job: StageJob) -> dict[str, Any]:
    """The same, in this process."""
    device = _device(job)
    if device.type == "cpu":
        return _evaluated(job, device)
    with torch.cuda.device(device):
        return _evaluated(job, device)


def _evaluated(job: StageJob, device: torch.device) -> dict[str, Any]:
    prepared = job.part("prepare", *_PREPARED)
    rows = _validation_rows(prepared)
    tokenizer = load_tokenizer(prepared / "tokenizer", job.placement.trust_remote_code)
    held_out = held_out_prompts(prepared, job.spec.num_prompts)
    prompts = [*held_out, *fixed_prompts(job.spec.eval_prompts, tokenizer)]
    scores: dict[str, Any] = dict.fromkeys(
        ("loss", "perplexity", "token_accuracy", "supervised_tokens", "exact")
    )
    generations: list[dict[str, Any]] = []
    if rows is not None or prompts:
        model = _load(job, tokenizer, device)
        if rows is not None:
            batch = job.placement.rows_per_batch
            scores.update(validation_scores(model, rows, batch, job.report))
        generations = _answer(job, model, tokenizer, prompts)
    if held_out:
        scores["exact"] = sum(bool(row["exact"]) for row in generations) / len(held_out)
    notes = [
        note
        for note, applies in ((_NO_VALIDATION, rows is None), (_NO_PROMPTS, not held_out))
        if applies
    ]
    for note in notes:
        job.report.log(note)
    return _write(job, {**scores, "prompts": len(held_out)}, generations, notes)


def _validation_rows(prepared: Path) -> PackedRows | None:
    if not PackedRows.has(prepared, "validation"):
        return None
    rows = PackedRows(prepared, "validation")
    return rows if len(rows) else None


def _load(
    job: StageJob, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> PreTrainedModel:
    if "model" in job.inputs:
        path = job.inputs["model"]
    else:
        assert job.placement.base_model is not None, "neither an input model nor a base model"
        path = identity.weights_at(job.placement.base_model, job.spec.model_digest)
    job.report.log(f"loading {path}")
    model = load_model(
        path, dtype=job.spec.dtype, trust_remote_code=job.placement.trust_remote_code
    )
    # Tokens that the recipe adds have no embedding in a base model yet.
    grow_embeddings(model, len(tokenizer))
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]


def _device(job: StageJob) -> torch.device:
    """The GPU that is the stage's own, in this process's numbers, or the first, or the CPU."""
    name = job.placement.device
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise StageError("device: cuda was asked for, but PyTorch finds no CUDA device here")
    return torch.device("cuda", job.devices.gpus[0].index if job.devices else 0)


def _answer(
    job: StageJob,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
) -> list[dict[str, Any]]:
    if not prompts:
        return []
    # Packed attention has no cache of earlier tokens, which generation lives by.
    model.set_attn_implementation("sdpa")
    texts = answers(
        model,
        tokenizer,
        prompts,
        job.spec.max_new_tokens,
        job.placement.prompts_per_batch,
        job.report,
    )
    return [_generation(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def _generation(prompt: Prompt, answer: str) -> dict[str, Any]:
    known = prompt.expected is not None
    exact = answer.strip() == (prompt.expected or "").strip() if known else None
    return {
        "prompt": prompt.text,
        "expected": prompt.expected,
        "answer": answer,
        "exact": exact,
    }


def _write(
    job: StageJob, scores: dict[str, Any], generations: list[dict[str, Any]], notes: list[str]
) -> dict[str, Any]:
    result: dict[str, Any] = {"scores": scores, "notes": notes, "comparison": None}
    if "baseline" in job.input_results:
        earlier = _read_lines(job.part("baseline", _ANSWERS) / _ANSWERS)
        generations = with_earlier_answers(generations, earlier)
        result["comparison"] = compare(job.input_results["baseline"]["scores"], scores)
        _write_json(job.out / "comparison.json", result["comparison"])
    _write_json(job.out / "scores.json", scores)
    _write_lines(job.out / _ANSWERS, generations)
    return {**result, "samples": generations[:_SAMPLES]}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    # Not str.splitlines: it also breaks at characters that JSON leaves as they are (U+2028).
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
