"""Many runs at once on one Prefect server, one MLflow server and one store build each key once."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from regrow.flows.workplace import Workplace
from regrow.infra.lease import Lease
from regrow.infra.settings import load_settings
from tests.flows.conftest import Place
from tests.services.servers import Bucket
from tests.services.whole_platform import Platform

RUNS = 8
RECIPES = {
    "one": {},
    "two": {"learning_rate": 0.02},  # shares its prepared data and the baseline with the first
    "three": {"sequence_len": 64},  # shares nothing but the base model
}


@pytest.mark.extended
def test_eight_runs_of_three_recipes_build_each_key_once(
    place: Place, platform: Platform, s3_bucket: Bucket
):
    here = Place(place.root, place.recipe, place.env | platform.env | s3_bucket.env)
    recipe = here.recipe.read_text()
    places = []
    for name, changes in RECIPES.items():
        own = Place(here.root, here.root / f"{name}.yaml", here.env)
        own.recipe.write_text(recipe)
        own.write_recipe(**changes, output_dir=f"{s3_bucket.url}/published/{name}")
        places.append(own)
    chosen = [places[number % len(places)] for number in range(RUNS)]
    homes = [here.env | {"REGROW_HOME": str(here.root / f"home{n}")} for n in range(RUNS)]
    processes = [
        Place(own.root, own.recipe, env).start("run", str(own.recipe))
        for own, env in zip(chosen, homes, strict=True)
    ]
    outputs = [process.communicate(timeout=3600)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-5000:]

    begun = Counter(re.findall(r"\[\w+\] starts \(key (\w+)\)", "\n".join(outputs)))
    artifacts = Workplace(load_settings(), f"{s3_bucket.url}/store").artifacts
    keys = [record.key.rsplit("/", 1)[-1] for record in artifacts.records("stages")]
    assert begun == Counter(key[:12] for key in keys)
    # prepare and baseline of two kinds; training, merge, evaluation and publication of three.
    assert Counter(record.stage for record in artifacts.records("stages")) == {
        "prepare": 2,
        "train": 3,
        "merge": 3,
        "evaluate": 5,
        "publish": 3,
    }
    for key in keys:
        attempts = {name.split("/")[0] for name in artifacts.store.sizes(f"stages/{key}")}
        assert len([name for name in attempts if name.startswith("attempt-")]) == 1
        assert Lease(artifacts.store, f"stages/{key}", 30).holder() is None
    print(f"{RUNS} runs of {len(RECIPES)} recipes at once: {len(keys)} keys, each built once")
