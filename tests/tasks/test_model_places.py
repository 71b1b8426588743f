"""What a stage reads of a model below a URL is what its key was made of, or it is told."""

import json
from pathlib import Path

import pytest

from regrow.infra.digests import DigestMemo
from regrow.infra.store import Store
from regrow.tasks import identity
from regrow.tasks.stage import StageError

WEIGHTS = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle that nobody needs",
}
TOKENIZER = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "config.json": b"{}"}
ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"adapter"}

CASES = {
    "weights": (
        WEIGHTS,
        identity.weights_digest,
        identity.weights_at,
        {"config.json", "model.safetensors"},
    ),
    "tokenizer": (
        TOKENIZER,
        identity.tokenizer_digest,
        lambda place, digest: identity.tokenizer_at(place, digest, ("tokenizer*", "config.json")),
        set(TOKENIZER),
    ),
    "adapter": (ADAPTER, identity.adapter_digest, identity.adapter_at, set(ADAPTER)),
}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """model(files) -> a URL with these files below it."""
    monkeypatch.setenv("REGROW_HOME", str(tmp_path / "home"))

    def make(files):
        store = Store(f"memory://{tmp_path.name}/model")
        for name, content in files.items():
            store.write_bytes(name, content)
        return store.url

    return make


@pytest.mark.parametrize("kind", CASES)
def test_copy_of_what_the_plan_saw_is_used_and_holds_what_is_needed(kind, model):
    files, digest_of, at, needed = CASES[kind]
    place = model(files)
    folder = at(place, digest_of(place, DigestMemo(None)))
    assert {path.name for path in Path(folder).iterdir()} == needed


@pytest.mark.parametrize("kind", CASES)
def test_what_changed_between_plan_and_stage_is_told_and_not_used(kind, model):
    files, digest_of, at, _ = CASES[kind]
    place = model(files)
    planned = digest_of(place, DigestMemo(None))
    name = next(name for name, content in files.items() if name.endswith((".safetensors", ".json")))
    Store(place).write_bytes(name, json.dumps({"another": "model"}).encode())
    with pytest.raises(StageError, match="has changed since the plan was made"):
        at(place, planned)
