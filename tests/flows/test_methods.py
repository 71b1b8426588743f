"""A method without a trainer: its data can be prepared, and nothing is begun that cannot end."""

import pytest


@pytest.fixture
def pairs(place):
    """A recipe of pairs."""
    rows = [{"prompt": f"Say {i}.", "chosen": f"yes {i}", "rejected": "no"} for i in range(12)]
    place.write_rows("pairs.jsonl", rows)
    place.write_recipe(rl="dpo", datasets=[{"path": "pairs.jsonl"}], rl_beta=0.2)
    return place


@pytest.mark.parametrize("command", ["run", "train", "plan"])
def test_training_is_refused_before_any_work(pairs, command):
    done = pairs.regrow(command, str(pairs.recipe))
    assert done.returncode == 1
    assert "rl: dpo: its data can be prepared (`regrow preprocess`)" in done.stdout
    assert not list(pairs.root.rglob("*.arrow"))


def test_pairs_are_prepared_and_shown(pairs):
    done = pairs.regrow("preprocess", str(pairs.recipe), "--show", "1")
    assert done.returncode == 0, done.stdout
    assert "ignored rl_beta" in done.stdout
    assert "chosen: " in done.stdout
    assert "rejected: " in done.stdout
