"""The whole platform on real servers: a run whose worker is killed goes on with another worker."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from regrow.flows.workplace import Workplace
from regrow.infra.settings import load_settings
from regrow.infra.tracking import Tracker
from tests.flows.conftest import Place
from tests.services.servers import Bucket
from tests.services.whole_platform import PATIENCE, Platform, Worker, eventually, kill_all

pytestmark = pytest.mark.services

QUICKSTART = Path(__file__).parents[2] / "configs" / "recipes" / "quickstart.yaml"
STEPS = 120
"""Long enough to be killed after a checkpoint, and not much longer."""
SMALLER = {
    "max_steps": STEPS,
    "num_epochs": "null",
    "save_steps": 20,
    "saves_per_epoch": "null",
    "eval_steps": STEPS,
    "evals_per_epoch": "null",
    "logging_steps": 20,
    "eval_table_size": 4,
    "bf16": "false",  # slow on some CPUs
}


@pytest.fixture
def deployed(place: Place, tiny_llama_dir: Path, platform: Platform, s3_bucket: Bucket) -> Place:
    """The quickstart with a tiny model, deployed to a store in an S3 bucket."""
    env = place.env | platform.env | s3_bucket.env
    here = Place(place.root, QUICKSTART, env)
    changes = SMALLER | {"base_model": tiny_llama_dir, "output_dir": place.root / "outputs"}
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    done = here.regrow("deploy", str(QUICKSTART), "--pool", "resume", *words)
    assert done.returncode == 0, done.stdout
    return here


def test_run_whose_worker_is_killed_resumes_on_another(
    deployed: Place, platform: Platform, s3_bucket: Bucket, tmp_path
):
    env = deployed.env
    with Worker(tmp_path / "first", env, "resume") as first:
        run_id = platform.start_run("quickstart")
        first.await_line("is safe")
        kill_all([first.process, *first.flows()])
        eventually(lambda: not first.survivors(), lambda: f"alive: {first.survivors()}", PATIENCE)

    store = Workplace(load_settings(), f"{s3_bucket.url}/store").artifacts
    (prepared,) = store.records("stages")
    assert prepared.stage == "prepare"

    # Nobody asks for it: the heartbeat's end marks it as crashed, and that starts it again.
    with Worker(tmp_path / "second", env, "resume") as second:
        platform.await_state(run_id, "Completed")
        said = second.said()
    resumed = int(re.findall(rf"resuming after step (\d+) of {STEPS}", said)[-1])
    assert 20 <= resumed < STEPS
    assert platform.run(run_id)["run_count"] == 2
    assert [s for s in platform.states(run_id) if s in ("Crashed", "AwaitingRetry")] == [
        "Crashed",
        "AwaitingRetry",
    ]
    stages = platform.stage_states(run_id)
    assert stages["prepare"] == ["Completed", "Cached"]
    assert stages["train"][-1] == "Completed"
    records = {record.stage: record for record in store.records("stages")}
    assert records["prepare"] == prepared
    assert records["train"].result["steps"] == STEPS

    trained = Tracker(platform.mlflow, "regrow").find_runs(
        f"tags.`stage.key` = '{records['train'].key.rsplit('/', 1)[-1]}'"
    )
    assert sorted(run.status for run in trained) == ["FINISHED", "KILLED"]
