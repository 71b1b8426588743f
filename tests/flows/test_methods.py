"""A method without a trainer: its data can be prepared, and nothing is begun that cannot end."""

import pytest

from regrow.flows.cli import main


@pytest.fixture
def said(place, monkeypatch, capsys):
    """Run a command on a recipe of pairs in this process; its exit code and what it said."""
    pairs = [{"prompt": f"Say {i}.", "chosen": f"yes {i}", "rejected": "no"} for i in range(12)]
    place.write_rows("pairs.jsonl", pairs)
    place.write_recipe(rl="dpo", datasets=[{"path": "pairs.jsonl"}], rl_beta=0.2)
    for name, value in place.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(place.root)

    def run(*words: str) -> tuple[int, str]:
        code = main([words[0], str(place.recipe), *words[1:]])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.mark.parametrize("command", ["run", "train", "plan"])
def test_training_is_refused_before_any_work(said, place, command):
    code, told = said(command)
    assert code == 1
    assert "rl: dpo: its data can be prepared (`regrow preprocess`)" in told
    assert not list(place.root.rglob("*.arrow"))


def test_pairs_are_prepared_and_shown(place, said):
    done = place.regrow("preprocess", str(place.recipe), "--show", "1")
    assert done.returncode == 0, done.stdout
    assert "ignored rl_beta" in done.stdout
    assert "chosen: " in done.stdout
    assert "rejected: " in done.stdout
