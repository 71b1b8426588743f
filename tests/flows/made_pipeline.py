"""A pipeline whose stages say at once what real ones say after minutes, run through a real session.

Plan, keys, store, records, MLflow and pages are the real ones; only the work is not done.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from regrow.flows.journal import FLOW_RUN
from regrow.flows.session import Origin, Session
from regrow.flows.workplace import Workplace
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import load_settings
from regrow.infra.tracking import Tracker
from regrow.tasks.plan import Plan
from regrow.tasks.stage import Stage, StageJob

DATA, TOKENIZER, BASE = "a1" * 32, "b2" * 32, "c3" * 32
ROWS, TOKENS = 1234, 567_890
SCORES = {"loss": 1.25, "perplexity": 3.49, "token_accuracy": 0.75, "exact": 0.5, "prompts": 2}
BEFORE = {"loss": 2.5, "perplexity": 12.18, "token_accuracy": 0.5, "exact": 0.0}
CHANGE = {name: {"absolute": SCORES[name] - BEFORE[name]} for name in BEFORE}
ANSWER = "device=blinds; <b>room</b>=office"


def make_plan(name: str = "made", learning_rate: float = 1e-3, target: str = "") -> Plan:
    """The plan of a recipe; another learning rate changes what follows from prepare."""
    weights = {"base_model": "/models/SmolLM2-135M"}
    prepare = _stage(
        "prepare",
        {"datasets": [{"parts": [{"files": [{"sha256": DATA}]}]}], "tokenizer": TOKENIZER},
        placement={
            "locations": {DATA: "https://me:hush@host/data/smart_home.jsonl"},
            "tokenizer_path": "/models/SmolLM2-135M",
        },
    )
    train = _stage(
        "train",
        {"learning_rate": learning_rate, "base_model_digest": BASE},
        {"prepare": prepare},
        weights,
    )
    merge = _stage(
        "merge", {"base_model_digest": BASE}, {"prepare": prepare, "train": train}, weights
    )
    baseline = _stage("evaluate", {"model_digest": BASE}, {"prepare": prepare}, weights)
    baseline = replace(baseline, label="baseline")
    scored = {"prepare": prepare, "model": merge, "baseline": baseline}
    evaluate = _stage("evaluate", {"model_digest": None}, scored)
    shown = {"prepare": prepare, "train": train, "model": merge, "evaluate": evaluate}
    publish = _stage("publish", {"output_dir": target}, shown, {"target": target})
    return Plan(name, prepare, train, merge, baseline, evaluate, publish, f"{name}-model")


def _stage(name: str, spec: Any, inputs: Any = None, placement: Any = None) -> Stage:
    runner = f"tests.flows.made_pipeline:{name}"
    return Stage(name, 1, spec, runner, inputs or {}, placement)


def prepare(job: StageJob) -> dict[str, Any]:
    """What the stage of that name returns."""
    (job.out / "preview.html").write_text("<p>examples</p>")
    counts = {"rows": ROWS, "examples": 5000, "tokens": TOKENS, "supervised_tokens": 99_000}
    lengths = {"edges": [8, 16, 32, 64], "counts": [100, 900, 234], "sequence_len": 64}
    fill = {"edges": [0, 0.5, 1], "counts": [34, 1200], "mean": 0.97}
    train = {**counts, "fill": 0.97, "length_histogram": lengths, "fill_histogram": fill}
    return {"splits": {"train": train, "validation": counts}, "sequence_len": 64}


def train(job: StageJob) -> dict[str, Any]:
    """What the stage of that name returns."""
    (job.out / "adapter").write_text(str(job.spec))
    for step in range(1, 11):
        job.report.progress(step, 10, "steps", f"loss {3 / step:.3f}")
    history = [{"step": s, "loss": 3 / s} for s in range(1, 11)]
    history.append({"step": 10, "eval_loss": 0.4})
    return {"steps": 10, "train_loss": 0.3, "history": history}


def merge(job: StageJob) -> dict[str, Any]:
    """What the stage of that name returns."""
    (job.out / "model.safetensors").write_text(str(job.spec))
    return {"rms_logit_difference": 0.0, "adapter_effect": 1.0}


def evaluate(job: StageJob) -> dict[str, Any]:
    """What the stage of that name returns, of the base model and of the new one."""
    row = {"prompt": "Close the <blinds>", "expected": ANSWER, "answer": ANSWER, "exact": True}
    if "baseline" not in job.inputs:
        return {"scores": BEFORE, "samples": [row | {"answer": "Sure!"}], "comparison": None}
    comparison = {"before": BEFORE, "after": SCORES, "change": CHANGE}
    samples = [row | {"before": "password: hush1234"}]
    return {"scores": SCORES, "samples": samples, "comparison": comparison}


def publish(job: StageJob) -> dict[str, Any]:
    """What the stage of that name returns."""
    (job.out / "README.md").write_text("a card")
    target = job.placement["target"]
    return {"files": {}, "target": target, "output_dir": None}


def run_made(
    plan: Plan,
    home: Path,
    tracking_uri: str,
    experiment: str = "regrow",
    watch: Any = None,
    slots: Any = lambda _stage: nullcontext(),
    journal: Any = None,
) -> Session:
    """Run a whole plan, as the flow does, without Prefect; the session, closed."""
    place = Workplace(replace(load_settings(), home=home, store_url=None))
    # A publication is looked for at its target; this one has none.
    place.builder._still_valid = lambda _stage, _record: None
    recipe = mask_secrets(f"base_model: SmolLM2-135M\nname: {plan.name}\nhub_token: hush5678\n")
    origin = Origin(plan.name, recipe, {"learning_rate": 1e-3}, {FLOW_RUN: "one-two"})
    options: dict[str, Any] = {"watch": watch} if watch else {}
    options["journal"] = journal
    session = Session(plan, place, Tracker(tracking_uri, experiment), origin, _quiet, **options)
    for stage in plan.stages:
        session.run(stage, slots)
    session.close("FINISHED")
    return session


def _quiet(line: str) -> None:
    assert "warning" not in line, line
