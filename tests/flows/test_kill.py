"""Kill everything at any moment: the next run goes on, and ends with the very same bytes."""

import random
import re
import time

import pytest
from regrow.flows.workplace import Workplace
from regrow.infra.settings import load_settings

from tests.flows.conftest import Place, kill_tree

KILLS = 12
SEED = 20261121
STAGES = ("prepare", "train", "merge", "baseline", "evaluate", "publish")


def artifacts(place: Place) -> dict[str, tuple]:
    """{stage title or name: (key, attempt, digests of its files)} of all complete stages."""
    store = Workplace(load_settings(), str(place.root / "home" / "store")).artifacts
    return {
        record.key: (record.stage, record.attempt, {n: f.sha256 for n, f in record.files.items()})
        for record in store.records("stages")
    }


def kill_at(place: Place, wait_for: str, delay: float) -> str:
    """Run until a line holds `wait_for`, wait `delay` seconds, kill -9 everything; the output."""
    process = place.start("run", str(place.recipe))
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if wait_for in line:
            break
    time.sleep(delay)
    kill_tree(process)
    return "".join(lines)


@pytest.mark.slow
def test_killed_anywhere_the_run_finishes_with_the_same_bytes(place, tmp_path_factory):
    calm = Place(tmp_path_factory.mktemp("calm"), place.recipe, dict(place.env))
    calm.env["REGROW_HOME"] = str(calm.root / "home")
    undisturbed = calm.regrow("run", str(place.recipe))
    assert undisturbed.returncode == 0, undisturbed.stdout

    rng = random.Random(SEED)
    # Each stage at least once and training most often, from its first step to after its last.
    moments = [f"[{stage}] starts" for stage in STAGES]
    moments += [f"{step}/8" for step in (2, 4, 6, 8)]
    moments += ["[train] starts"] * (KILLS - len(moments))
    before: dict[str, tuple] = {}
    for moment in moments:
        kill_at(place, moment, rng.uniform(0, 1.5))
        now = artifacts(place)
        for key, what in before.items():
            assert now[key] == what, f"{what[0]} was complete and was built again"
        before = now

    last = place.regrow("run", str(place.recipe))
    assert last.returncode == 0, last.stdout
    for key, what in before.items():
        assert artifacts(place)[key] == what, f"{what[0]} was complete and was built again"
    expected = {key: (stage, files) for key, (stage, _, files) in artifacts(calm).items()}
    found = {key: (stage, files) for key, (stage, _, files) in artifacts(place).items()}
    assert set(found) == set(expected)
    for key, (stage, files) in expected.items():
        if stage in ("prepare", "train", "merge"):
            assert found[key][1] == files, f"the bytes of {stage} differ"


@pytest.mark.slow
def test_training_resumes_at_its_checkpoint(place):
    kill_at(place, " 6/8", 0.5)
    done = place.regrow("run", str(place.recipe))
    assert done.returncode == 0, done.stdout
    resumed = re.search(r"resum\w* .*?step (\d+)", done.stdout)
    assert resumed, done.stdout
    assert int(resumed[1]) >= 4
