"""A small place to run whole pipelines in: a tiny model, a few rows, a recipe, a clean home."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from regrow.infra.launch import die_with_parent

SCRIPT = Path(sys.executable).parent / "regrow"


def rows(count: int) -> list[dict]:
    """Chat rows whose answer repeats the question's number in words of very different length."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say {i} " + "please " * (i % 7)},
                {"role": "assistant", "content": f"It is {i}." + " Yes." * (i % 5)},
            ]
        }
        for i in range(count)
    ]


@dataclass(frozen=True)
class Place:
    """A directory with a recipe in it, and the environment that commands run with there."""

    root: Path
    recipe: Path
    env: dict[str, str]

    def write_recipe(self, **changes) -> None:
        data = yaml.safe_load(self.recipe.read_text()) | changes
        self.recipe.write_text(yaml.safe_dump({k: v for k, v in data.items() if v is not None}))

    def write_rows(self, name: str, items: list[dict]) -> None:
        text = "".join(json.dumps(item) + "\n" for item in items)
        (self.root / name).write_text(text)

    def start(self, *words: str) -> subprocess.Popen:
        """In a process group of its own, as a shell starts a command."""
        return subprocess.Popen(
            [SCRIPT, *words],
            cwd=self.root,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
            preexec_fn=_as_from_a_terminal,
        )

    def regrow(self, *words: str, timeout: float = 300) -> subprocess.CompletedProcess:
        """Run a command to its end; stdout and stderr together in `.stdout`."""
        process = self.start(*words)
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_tree(process)
            raise
        return subprocess.CompletedProcess(words, process.returncode, output)

    def plan(self):
        """(plan, builder) of the recipe as it is now."""
        from regrow.configs.load import load_recipe
        from regrow.flows.workplace import Workplace
        from regrow.infra.settings import load_settings
        from regrow.tasks.plan import make_plan

        loaded = load_recipe(self.recipe)
        settings = load_settings()
        place = Workplace(settings, str(self.root / "home" / "store"))
        place.home = self.root / "home"
        return make_plan(loaded.recipe, loaded.name, place.memo), place.builder


def _as_from_a_terminal() -> None:
    die_with_parent()  # a test that is broken off leaves nothing running
    # What a shell without job control starts in the background ignores Ctrl-C, and so would all
    # that these tests start, had they been started so.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def kill_tree(process: subprocess.Popen) -> None:
    """`kill -9` of a process and everything that it started, at once."""
    parent = psutil.Process(process.pid)
    family = [*parent.children(recursive=True), parent]
    for member in family:
        try:
            os.kill(member.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(30)


def small_recipe(model: Path, output_dir: Path) -> dict[str, Any]:
    """A pipeline of some seconds: LoRA on a tiny model, 8 steps, the rows in `rows.jsonl`."""
    return {
        "base_model": str(model),
        "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
        "val_set_size": 6,
        "sequence_len": 128,
        "sample_packing": True,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "lora_target_linear": True,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "learning_rate": 0.01,
        "lr_scheduler": "cosine",
        "warmup_steps": 1,
        "optimizer": "adamw_torch",
        "bf16": False,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_steps": 4,
        "eval_table_size": 3,
        "eval_max_new_tokens": 4,
        "output_dir": str(output_dir),
    }


@pytest.fixture
def place(tmp_path, tiny_llama_dir) -> Place:
    """A pipeline of some seconds: 40 rows, LoRA on the tiny model, 8 steps."""
    recipe = small_recipe(tiny_llama_dir, tmp_path / "outputs")
    env = {
        **os.environ,
        "REGROW_HOME": str(tmp_path / "home"),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "REGROW_STORE"):
        env.pop(name, None)
    made = Place(tmp_path, tmp_path / "tiny.yaml", env)
    made.recipe.write_text(yaml.safe_dump(recipe))
    made.write_rows("rows.jsonl", rows(40))
    return made
