"""A published model is whole, says where it comes from, and is noticed when it goes missing."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from regrow.tasks.publish.card import known_license
from regrow.tasks.publish.delivery import CARD, MANIFEST, deliver, why_undelivered
from regrow.tasks.publish.push import push
from regrow.tasks.publish.run import run
from regrow.tasks.publish.spec import PublishPlacement, PublishSpec
from regrow.tasks.stage import StageError, canonical
from tests.tasks.publish.conftest import Notes

MODEL = {"config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


def _names(directory: Path) -> set[str]:
    return {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}


def _recipe(**changes) -> SimpleNamespace:
    defaults = {
        "output_dir": None,
        "hub_model_id": None,
        "hub_private_repo": True,
        "register_as": None,
    }
    return SimpleNamespace(**{**defaults, **changes})


def test_model_tokenizer_and_card_are_delivered(make_job, model_dir, tmp_path):
    target = tmp_path / "deep" / "outputs"
    job = make_job(target=str(target))
    result = run(job)
    assert _names(target) == MODEL | TOKENIZER | {CARD, MANIFEST}
    for name in MODEL:
        assert (target / name).read_bytes() == (model_dir / name).read_bytes()
    assert (target / CARD).read_bytes() == (job.out / CARD).read_bytes()
    assert result["files"] == {n: (target / n).stat().st_size for n in MODEL | TOKENIZER | {CARD}}
    assert result["target"] == str(target)
    assert why_undelivered(result) is None
    canonical(result)


def test_a_url_is_delivered_to_as_well(make_job):
    result = run(make_job(target="memory://bucket/deep/model"))
    assert why_undelivered(result) is None
    assert result["target"] == "memory://bucket/deep/model"


def test_delivered_files_are_copies(make_job, model_dir, tmp_path):
    """A user may change them; the store must not change with them."""
    run(make_job(target=str(tmp_path / "out")))
    (tmp_path / "out" / "config.json").write_text("changed")
    assert (model_dir / "config.json").read_bytes() == b"c" * 20


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", CARD, "tokenizer.json"])
def test_a_missing_file_is_noticed(make_job, tmp_path, name):
    result = run(make_job(target=str(tmp_path / "out")))
    (tmp_path / "out" / name).unlink()
    why = why_undelivered(result)
    assert why is not None
    assert f"{name} is missing" in why


def test_a_cut_file_and_a_removed_directory_are_noticed(make_job, tmp_path):
    result = run(make_job(target=str(tmp_path / "out")))
    (tmp_path / "out" / "config.json").write_bytes(b"c" * 19)
    assert "19 bytes instead of 20" in (why_undelivered(result) or "")
    (tmp_path / "out").rename(tmp_path / "gone")
    assert "missing" in (why_undelivered(result) or "")


def test_without_a_destination_the_card_is_still_written(make_job):
    job = make_job()
    result = run(job)
    assert _names(job.out) == {CARD}
    assert result["output_dir"] is None
    assert why_undelivered(result) is None


def test_an_earlier_model_leaves_nothing_behind_and_other_files_stay(make_job, model_dir, tmp_path):
    target = tmp_path / "out"
    run(make_job(target=str(target)))
    (target / "my-notes.txt").write_text("mine")
    for name in MODEL - {"config.json"}:
        (model_dir / name).unlink()
    (model_dir / "model.safetensors").write_bytes(b"m" * 10)
    run(make_job(target=str(target)))
    assert _names(target) == TOKENIZER | {
        "config.json",
        "model.safetensors",
        "my-notes.txt",
        CARD,
        MANIFEST,
    }


def test_a_delivery_that_stops_half_way_has_no_card(make_job, model_dir, tmp_path):
    target = tmp_path / "out"
    run(make_job(target=str(target)))
    with pytest.raises(StageError, match="output_dir"):
        deliver(
            str(target), {"config.json": model_dir / "config.json", "x/y": Path()}, "c", Notes()
        )
    assert not (target / CARD).exists()


def test_a_place_that_cannot_be_written_is_named(make_job, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match=r"output_dir: cannot write to .*file/out"):
        run(make_job(target=str(tmp_path / "file" / "out")))


def test_the_base_model_is_never_overwritten(make_job, model_dir):
    with pytest.raises(StageError, match="base model's own directory"):
        run(
            make_job(
                target=str(model_dir / ".." / "model"), placement={"base_model": str(model_dir)}
            )
        )


def test_card_tells_scores_lineage_recipe_and_versions(make_job):
    job = make_job(placement={"datasets": ("acme/talks", "/data/local.jsonl")})
    run(job)
    card = (job.out / CARD).read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "acme/small"
    assert head["datasets"] == ["acme/talks"]
    assert "license" not in head
    assert "regrow" in head["tags"]
    assert "| loss (nats a token) | 2.0000 | 1.5000 |" in card
    assert "| exact answers | 0.0 % | 25.0 % |" in card
    for stage in job.stage.inputs.values():
        assert f"`{stage.key}`" in card
    assert f"| train | `{job.stage.inputs['model'].inputs['train'].key}` |" in card
    assert "2,112 examples in 92 rows, fill 97.2 %" in card
    assert "learning_rate: 0.0002" in card
    assert "transformers 5." in card
    assert "on acme/talks, with LoRA." in card
    assert "Built with Regrow" in card


def test_no_secret_reaches_the_card(make_job):
    job = make_job()
    run(job)
    assert "hush-hush" not in (job.out / CARD).read_text()


def test_a_local_base_model_is_not_called_a_hub_model(make_job):
    job = make_job(placement={"base_model_name": "/home/me/models/small"})
    run(job)
    card = (job.out / CARD).read_text()
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])
    assert "fine-tune of `small`" in card


def test_licence_is_told_only_if_the_base_model_tells_it(make_job, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    assert known_license(base) == {}
    (base / "README.md").write_text("# no head\nlicense: none of it\n")
    assert known_license(base) == {}
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: acme-1\n---\n# Small\n")
    assert known_license(base) == {"license": "other", "license_name": "acme-1"}
    job = make_job(placement={"base_model": str(base)})
    run(job)
    head = yaml.safe_load((job.out / CARD).read_text().split("---\n")[1])
    assert (head["license"], head["license_name"]) == ("other", "acme-1")


class _Hub:
    """What `push` asks of the hub."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.repos: list[tuple] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id, private, exist_ok) -> None:
        if self.error:
            raise self.error
        self.repos.append((repo_id, private, exist_ok))

    def create_commit(self, repo_id, operations, commit_message):
        for operation in operations:
            source = operation.path_or_fileobj
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
            self.files[operation.path_in_repo] = data
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def test_the_hub_gets_everything_in_one_commit(model_dir):
    hub = _Hub()
    files = {name: model_dir / name for name in MODEL}
    url = push("acme/talks", True, files, "the card", hub)
    assert url == "https://hub/acme/talks/commit/1"
    assert hub.repos == [("acme/talks", True, True)]
    assert hub.files == {n: (model_dir / n).read_bytes() for n in MODEL} | {CARD: b"the card"}


def test_a_hub_that_cannot_be_reached_is_named_with_the_remedy(model_dir):
    files = {"config.json": model_dir / "config.json"}
    with pytest.raises(StageError, match=r"acme/talks \(no route\).*hf auth login"):
        push("acme/talks", True, files, "card", _Hub(ConnectionError("no route\nmore")))


def test_offline_the_real_hub_client_gives_one_clear_error(model_dir):
    """HF_HUB_OFFLINE is set for all tests."""
    files = {"config.json": model_dir / "config.json"}
    with pytest.raises(StageError, match="HF_HUB_OFFLINE"):
        push("acme/talks", True, files, "card")


def test_spec_is_the_same_in_every_directory_and_the_target_is_here(tmp_path, monkeypatch):
    before = PublishSpec.from_recipe(_recipe(output_dir="./outputs/a/"), "talks")
    monkeypatch.chdir(tmp_path)
    assert PublishSpec.from_recipe(_recipe(output_dir="outputs/a"), "talks") == before
    assert _target("./outputs/a/") == str(tmp_path / "outputs" / "a")
    assert _target("s3://bucket/a/") == "s3://bucket/a"
    assert _target(None) is None


def _target(output_dir: str | None) -> str | None:
    recipe = _recipe(output_dir=output_dir, base_model="acme/small", datasets=())
    recipe.given = dict
    return PublishPlacement.from_recipe(recipe).target


def test_a_password_in_the_destination_is_refused_without_showing_it():
    with pytest.raises(StageError, match="output_dir") as caught:
        PublishSpec.from_recipe(_recipe(output_dir="ftp://me:hush@host/x"), "talks")
    assert "hush" not in str(caught.value)
