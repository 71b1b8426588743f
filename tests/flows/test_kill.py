"""Kill everything at any moment: the next run goes on, and ends with the very same bytes."""

import random
import re
import time

import pytest

from regrow.flows.workplace import Workplace
from regrow.infra.settings import load_settings
from tests.flows.conftest import Place, kill_tree
from tests.flows.test_run import STAGES

SEED = 20261121
# When to kill: as the stage starts (and a random part of its usual time later), or as a line of
# the training comes. A stage that happens to be complete by then is killed in what follows it, and
# a run that is over by then (the machine was busier when the usual times were taken) is not killed.
MOMENTS = (
    *("[prepare] starts",) * 3,
    "checkpoint of step 2 is safe",
    "checkpoint of step 4 is safe",
    "checkpoint of step 6 is safe",
    "[train] starts",
    *("[merge] starts",) * 2,
    *("[baseline] starts",) * 2,
    *("[evaluate] starts",) * 2,
    *("[publish] starts",) * 2,
)
IN_CI = tuple(dict.fromkeys(MOMENTS))


def artifacts(place: Place) -> dict[str, tuple[str, str, dict[str, str]]]:
    """{key: (stage, attempt, digests of its files)} of all complete stages."""
    store = Workplace(load_settings(), str(place.root / "home" / "store")).artifacts
    return {
        record.key: (record.stage, record.attempt, {n: f.sha256 for n, f in record.files.items()})
        for record in store.records("stages")
    }


def usual_seconds(output: str) -> dict[str, float]:
    """{stage: seconds} of the table that ends a run."""
    found = re.findall(r"^(\w+) +built +([\d.]+) s ", output, re.MULTILINE)
    return {stage: float(seconds) for stage, seconds in found}


def run_and_kill(place: Place, moment: str, delay: float) -> tuple[bool, str]:
    """Run until the moment (or until it is seen to be past), wait, kill -9 all.

    Whether it still ran when it was killed, and its output.
    """
    stage = moment[: moment.index("]") + 1] if moment.startswith("[") else "[train]"
    past = f"{stage} found in the store"
    process = place.start("run", str(place.recipe))
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if moment in line or past in line:
            break
    time.sleep(delay)
    running = process.poll() is None
    assert running or process.returncode == 0, "".join(lines)
    if running:
        kill_tree(process)
    return running, "".join(lines)


@pytest.mark.parametrize(
    ("moments", "least"),
    [
        pytest.param(IN_CI, 5, marks=pytest.mark.slow, id="once"),
        pytest.param(MOMENTS, 8, marks=pytest.mark.extended, id="often"),
    ],
)
def test_killed_at_any_moment_the_run_finishes_with_the_same_bytes(
    place, tmp_path_factory, moments, least
):
    calm = Place(tmp_path_factory.mktemp("calm"), place.recipe, dict(place.env))
    calm.env["REGROW_HOME"] = str(calm.root / "home")
    undisturbed = calm.regrow("run", str(place.recipe))
    assert undisturbed.returncode == 0, undisturbed.stdout
    usual = usual_seconds(undisturbed.stdout)
    assert set(usual) == set(STAGES)

    rng = random.Random(SEED)
    complete: dict[str, tuple] = {}
    kills, said = 0, []
    for moment in moments:
        stage = moment[1:].partition("]")[0] if moment.startswith("[") else ""
        running, output = run_and_kill(place, moment, rng.uniform(0, 0.9 * usual.get(stage, 0)))
        kills += running
        said.append(output)
        now = artifacts(place)
        for key, what in complete.items():
            assert now[key] == what, f"{what[0]} was complete and was built again"
        complete = now
    last = place.regrow("run", str(place.recipe))
    assert last.returncode == 0, last.stdout

    found, expected = artifacts(place), artifacts(calm)
    for key, what in complete.items():
        assert found[key] == what, f"{what[0]} was complete and was built again"
    assert set(found) == set(expected)
    for key, (stage, _, files) in expected.items():
        if stage in ("prepare", "train", "merge"):
            assert found[key][2] == files, f"the bytes of {stage} differ"
    resumed = re.findall(r"resuming after step (\d+) of 8", "".join(said) + last.stdout)
    # How often it still runs, and how far it comes, depends on the machine's speed of the moment.
    assert kills >= least
    assert set(resumed) - {"8"}
    print(f"{kills} kills; training resumed after steps {', '.join(resumed)}")
