"""`regrow store pin` and `verify` beside others that remove and replace what they look at."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from regrow.flows import store_commands
from regrow.infra.artifacts import ArtifactStore, Record
from regrow.infra.pins import pin, pinned
from regrow.tasks.stage import StageError

KEYS = {"data": "stages/" + "d" * 64, "model": "stages/" + "e" * 64}


def publish(artifacts: ArtifactStore, folder, name: str, **inputs: str) -> Record:
    folder.mkdir(exist_ok=True)
    (folder / "file").write_text(name)
    return artifacts.publish(KEYS[name], folder, stage=name, spec={}, inputs=inputs, result={})


@pytest.fixture
def artifacts(tmp_path) -> ArtifactStore:
    """A model made from data."""
    made = ArtifactStore.open_url(str(tmp_path / "store"), tmp_path / "cache")
    publish(made, tmp_path / "1", "data")
    publish(made, tmp_path / "2", "model", data=KEYS["data"].removeprefix("stages/"))
    return made


def test_what_is_there_is_pinned_with_all_below_it(artifacts):
    assert store_commands._pinned_now(artifacts, "best", KEYS["model"]) == 2
    assert pinned(artifacts.store) == {"best": KEYS["model"]}


@pytest.mark.parametrize("before", [{}, {"best": KEYS["data"]}])
@pytest.mark.parametrize("gone", KEYS)
def test_what_was_just_collected_is_not_pinned(artifacts, gone, before):
    for name, key in before.items():
        pin(artifacts.store, name, key)
    artifacts.remove(KEYS[gone])
    with pytest.raises(StageError, match=rf"{KEYS[gone][7:19]} is not in the store"):
        store_commands._pinned_now(artifacts, "best", KEYS["model"])
    assert pinned(artifacts.store) == before


class Meanwhile(ArtifactStore):
    """Something happens to an artifact while its bytes are read."""

    def verify(self, record: Record) -> None:
        self.happens(record)
        super().verify(record)

    def happens(self, record: Record) -> None: ...


def verified(artifacts: ArtifactStore) -> int:
    place = SimpleNamespace(artifacts=artifacts, store_url=artifacts.store.url)
    return store_commands._verify(SimpleNamespace(), place)


@pytest.fixture
def watched(artifacts, tmp_path):
    return Meanwhile(artifacts.store, tmp_path / "cache")


def test_a_checkpoint_removed_meanwhile_is_not_called_damaged(watched):
    watched.happens = lambda record: watched.remove(record.key)
    assert verified(watched) == 0


def test_an_artifact_built_anew_meanwhile_is_not_called_damaged(watched, tmp_path):
    def happens(record):
        watched.remove(record.key)
        publish(watched, tmp_path / "again", record.stage)

    watched.happens = happens
    assert verified(watched) == 0


def test_a_file_that_vanishes_under_its_record_is_damage(watched, monkeypatch, capsys):
    def verify(record):
        raise FileNotFoundError(2, "No such file or directory", f"{record.attempt}/file")

    monkeypatch.setattr(watched, "verify", verify)
    assert verified(watched) == 1
    assert "the file is missing" in capsys.readouterr().out
