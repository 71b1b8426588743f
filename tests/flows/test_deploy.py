"""`regrow deploy` needs a Prefect server that stays; with one see tests/services."""

from __future__ import annotations

from tests.flows.conftest import Place


def test_without_a_server_that_stays_it_says_so(place: Place):
    done = place.regrow("deploy", str(place.recipe))
    assert done.returncode == 1
    assert "PREFECT_API_URL" in done.stdout
