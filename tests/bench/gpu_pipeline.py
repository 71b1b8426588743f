"""The quickstart's stages on a GPU machine that has neither Prefect nor MLflow; prints the figures.

PYTHONPATH=infra/typing python tests/bench/gpu_pipeline.py RECIPE [--key value]
"""

import json
import sys
from pathlib import Path

import torch
import transformers

from regrow.configs.load import load_recipe
from regrow.flows.progress import LineReporter
from regrow.infra.artifacts import ArtifactStore
from regrow.infra.digests import DigestMemo
from regrow.infra.provenance import gpus
from regrow.tasks.build import Builder
from regrow.tasks.plan import make_plan

_FIGURES = ("tokens", "supervised_tokens", "trainable_parameters", "parameters", "timing")


def main(recipe: str, *overrides: str) -> None:
    """Build all stages but publish and print what the README's table names."""
    home = Path(".regrow-gpu").absolute()
    loaded = load_recipe(recipe, overrides)
    plan = make_plan(loaded.recipe, loaded.name, DigestMemo(home / "digests.sqlite"))
    builder = Builder(ArtifactStore.open_url(str(home / "store"), home / "cache"), home, 30)
    results = {}
    for stage in plan.stages[:-1]:
        outcome = builder.build(stage, LineReporter(stage.title))
        results[stage.title] = outcome.record.result | {"wall_seconds": outcome.seconds}
    train = results["train"]
    losses = [point["loss"] for point in train["history"] if "loss" in point]
    summary = {
        "gpus": gpus(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "steps": train["steps"],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "eval_losses": train["eval_losses"],
        **{name: train[name] for name in _FIGURES},
        "merge": {k: v for k, v in results.get("merge", {}).items() if not isinstance(v, list)},
        "before": results["baseline"]["scores"],
        "after": results["evaluate"]["scores"],
        "wall_seconds": {name: result["wall_seconds"] for name, result in results.items()},
    }
    print("SUMMARY", json.dumps(summary))


if __name__ == "__main__":
    main(*sys.argv[1:])
