"""A small graph of stages that ends in a publication, with results as the stages give them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regrow.tasks.publish.spec import PublishPlacement, PublishSpec
from regrow.tasks.stage import Stage, StageJob

SCORES = {
    "scores": {"loss": 1.5, "perplexity": 4.48, "token_accuracy": 0.625, "exact": 0.25},
    "comparison": {
        "before": {"loss": 2.0, "perplexity": 7.39, "token_accuracy": 0.5, "exact": 0.0},
        "after": {"loss": 1.5, "perplexity": 4.48, "token_accuracy": 0.625, "exact": 0.25},
        "change": {},
    },
    "notes": [],
}
RECIPE = """base_model: acme/small
datasets:
- path: acme/talks
hub_token: hush-hush
learning_rate: 0.0002
"""


class Notes:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.logged: list[str] = []

    def log(self, message: str) -> None:
        self.logged.append(message)

    def progress(self, done, total, unit, note="") -> None:
        pass


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A model directory: two shards, a config, a card of somebody else's."""
    out = tmp_path / "model"
    out.mkdir()
    for name, size in {
        "config.json": 20,
        "model-00001-of-00002.safetensors": 3000,
        "model-00002-of-00002.safetensors": 2000,
        "README.md": 7,
    }.items():
        (out / name).write_bytes(name.encode()[:1] * size)
    return out


@pytest.fixture
def make_job(tmp_path: Path, model_dir: Path) -> Callable[..., StageJob]:
    """A publish job: `make_job(target=..., placement={...})`."""
    tokenizer = tmp_path / "prepared" / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer_config.json").write_text("{}")
    (tokenizer / "tokenizer.json").write_text('{"a": 1}')
    prepare = Stage("prepare", 1, {"seed": 1}, "m:f")
    train = Stage("train", 1, {"lr": 1}, "m:f", {"prepare": prepare})
    merge = Stage("merge", 1, {}, "m:f", {"train": train})
    inputs = {"prepare": prepare, "model": merge}
    evaluate = Stage("evaluate", 1, {}, "m:f", {**inputs})

    def make(
        placement: dict[str, Any] | None = None, target: str | None = None, **spec: Any
    ) -> StageJob:
        place = tmp_path / f"job-{len(list(tmp_path.glob('job-*')))}"
        for name in ("out", "scratch"):
            (place / name).mkdir(parents=True)
        told = {"target": target, "recipe_text": RECIPE, "base_model_name": "acme/small"}
        told |= placement or {}
        stage = Stage(
            "publish",
            1,
            PublishSpec(**{"model_name": "talks", "output_dir": target, **spec}),
            "regrow.tasks.publish.run:run",
            {"model": merge, "scores": evaluate, "prepare": prepare},
            PublishPlacement(**told),
        )
        split = {"examples": 2112, "rows": 92, "fill": 0.972}
        results = {
            "model": {"rms_logit_difference": 0.0, "adapter_effect": 1.0},
            "scores": SCORES,
            "prepare": {"splits": {"train": split}},
        }
        paths = {
            "model": model_dir,
            "scores": tmp_path / "nothing",
            "prepare": tmp_path / "prepared",
        }
        units: Any = None
        return StageJob(stage, paths, results, place / "out", place / "scratch", Notes(), units)

    return make
