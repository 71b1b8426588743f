"""Kill -9 the stage of a mixture again and again: units that were complete are never redone."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flows.conftest import kill_tree

FILES, ROWS, KILLS = 5, 400, 4
PREPARE = """
import sys
from pathlib import Path
from regrow.configs.load import load_recipe
from regrow.infra.artifacts import ArtifactStore
from regrow.infra.digests import DigestMemo
from regrow.tasks.build import Builder
from regrow.tasks.plan import make_plan

class Silent:
    def progress(self, *told): ...
    def log(self, message): ...

home = Path(sys.argv[2])
stage = make_plan(load_recipe(sys.argv[1]).recipe, "kills", DigestMemo(home / "digests")).prepare
builder = Builder(ArtifactStore.open_url(str(home / "store"), home / "cache"), home, 5)
record = builder.build(stage, Silent()).record
print(builder.artifacts.fetch(record))
"""


def write_data(root: Path, name: str, words: str) -> str:
    """A folder of some files, each of which is a unit."""
    folder = root / name
    folder.mkdir()
    for number in range(FILES):
        texts = (f"{words} {name} {number} {row} " * (5 + row % 40) for row in range(ROWS))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl").write_text(lines)
    return str(folder)


@pytest.fixture
def recipe(tmp_path, smollm2_dir) -> Path:
    """Three datasets with weights, de-duplication and a validation split."""
    weights = {"tales": 1.5, "letters": 0.5, "notes": 1.0}
    data = {
        "base_model": str(smollm2_dir),
        "datasets": [
            {"path": write_data(tmp_path, name, "the same"), "type": "completion", "weight": weight}
            for name, weight in weights.items()
        ],
        "sequence_len": 256,
        "sample_packing": True,
        "dataset_exact_deduplication": True,
        "val_set_size": 0.1,
        "dataset_num_proc": 2,
        "learning_rate": 1e-4,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(data))
    return path


def start(recipe: Path, home: Path) -> subprocess.Popen:
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-c", PREPARE, str(recipe), str(home)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, process_group=0, env=dict(os.environ)
    )


def finished(process: subprocess.Popen) -> Path:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return Path(output.strip().splitlines()[-1])


def units(home: Path) -> dict[str, tuple[str, int]]:
    """{key: (attempt, when its record was written)} of the complete ones."""
    found = (home / "store" / "units").glob("*/record.json")
    return {
        p.parent.name: (json.loads(p.read_text())["attempt"], p.stat().st_mtime_ns) for p in found
    }


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.mark.slow
def test_units_of_a_mixture_that_were_complete_stay_and_the_bytes_are_equal(recipe, tmp_path):
    calm, home = tmp_path / "calm", tmp_path / "home"
    undisturbed = digests(finished(start(recipe, calm)))
    everything = len(units(calm))
    rng = random.Random(20261122)
    complete: dict[str, tuple[str, int]] = {}
    for kill in range(KILLS):
        process = start(recipe, home)
        # Until a few more units are there than before, and a moment longer.
        wanted = max(len(complete) + 1, everything * (kill + 1) // (KILLS + 1))
        deadline = time.monotonic() + 120
        while len(units(home)) < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, "it ended before it was killed"
        kill_tree(process)
        now = units(home)
        assert len(now) >= wanted
        assert {key: now[key] for key in complete} == complete
        complete = now
    assert digests(finished(start(recipe, home))) == undisturbed
    final = units(home)
    assert {key: final[key] for key in complete} == complete
    assert final.keys() == units(calm).keys()
