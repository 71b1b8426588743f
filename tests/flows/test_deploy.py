"""`regrow deploy` needs a Prefect server that stays; with one see tests/services."""

from __future__ import annotations

from pathlib import Path

from regrow.configs.load import Loaded, load_recipe
from regrow.flows.deploy import _given
from tests.flows.conftest import Place


def test_without_a_server_that_stays_it_says_so(place: Place):
    done = place.regrow("deploy", str(place.recipe))
    assert done.returncode == 1
    assert "PREFECT_API_URL" in done.stdout


def test_a_worker_finds_the_places_of_who_deployed(place: Place, monkeypatch):
    """It stands in a directory of its own, which ends with the run."""
    monkeypatch.chdir(place.root)
    place.write_recipe(output_dir="./out", store="s3://bucket/store")
    loaded: Loaded = load_recipe(place.recipe)
    given = _given(loaded)
    assert given["output_dir"] == str(Path(place.root / "out").absolute())
    assert given["store"] == "s3://bucket/store"
