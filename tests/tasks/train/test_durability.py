"""A run that cannot be lost: damage, failing stores, early ends, and how the stage goes on."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from transformers import TrainerCallback

from regrow.infra.artifacts import ArtifactStore, FileEntry, Record
from regrow.infra.launch import WorkerFailed
from regrow.tasks.stage import StageError
from regrow.tasks.train.attempts import Attempts, Preempted
from regrow.tasks.train.checkpoint import Checkpoints
from regrow.tasks.train.schedule import Cadence
from regrow.tasks.train.spec import AdapterSpec
from regrow.tasks.train.worker import train
from tests.tasks.train.stage_jobs import Notes

DROPOUT = {"adapter": AdapterSpec(r=4, alpha=8, dropout=0.2, target_linear=True)}


# ---- damage ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the directory of) a store with the checkpoints of steps 3, 6, 9 and 12; made once."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def store(make_job, trained, tmp_path):
    """A copy of that store to damage."""
    kept = trained / "store"
    if not kept.exists():
        job = make_job("first", DROPOUT, {"save_total_limit": 4}, key="checkpoints/a")
        train(job)
        shutil.copytree(tmp_path / "store", kept)
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    shutil.copytree(kept, tmp_path / "store")
    return ArtifactStore.open_url((tmp_path / "store").as_uri())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def grow(path):
    path.write_bytes(path.read_bytes() + b"0")


def edit_record(folder, **changes):
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | changes))


def sign_record(folder, change):
    """Another record, whole and with the right sha256 of itself: `change(record) -> record`."""
    path = folder / "record.json"
    path.write_text(change(Record.from_json(path.read_text())).to_json())


def of_other_spec(record):
    return dataclasses.replace(record, spec=record.spec | {"learning_rate": 1})


def of_two_ranks(record):
    """As if a second rank had saved a part, which is not there."""
    extra = {"random-00001.pt": FileEntry(10, "0" * 64)}
    return dataclasses.replace(record, files={**record.files, **extra})


def of_a_stale_attempt(record):
    return dataclasses.replace(record, attempt="attempt-0123456789ab")


def swap(folder, pattern):
    """The same file of the checkpoint before, whole and of the same size."""
    ours, theirs = (one_file(f, pattern) for f in (folder, folder.parent / "step-00000009"))
    assert ours.stat().st_size == theirs.stat().st_size
    ours.write_bytes(theirs.read_bytes())


def one_file(folder, pattern):
    (path,) = folder.glob(f"attempt-*/{pattern}")
    return path


DAMAGES = {
    "no record": lambda f: (f / "record.json").unlink(),
    "half a record": lambda f: (f / "record.json").write_bytes(b'{"schema": 1, "key"'),
    "an empty record": lambda f: (f / "record.json").write_bytes(b""),
    "a flipped bit in the record": lambda f: flip(f / "record.json"),
    "an edited record": lambda f: edit_record(f, attempt="attempt-000000000000"),
    "the record of another step": lambda f: shutil.copyfile(
        f.parent / "step-00000006" / "record.json", f / "record.json"
    ),
    "no weights": lambda f: one_file(f, "shard-*.safetensors").unlink(),
    "half the weights": lambda f: os.truncate(one_file(f, "shard-*.safetensors"), 5000),
    "a flipped bit in the weights": lambda f: flip(one_file(f, "shard-*.safetensors")),
    "a flipped bit in the values": lambda f: flip(one_file(f, "values.pt")),
    "no random states": lambda f: one_file(f, "random-00000.pt").unlink(),
    "empty totals": lambda f: one_file(f, "totals.json").write_bytes(b""),
    "no files at all": lambda f: shutil.rmtree(next(f.glob("attempt-*"))),
    "the weights of another step": lambda f: swap(f, "shard-*.safetensors"),
    "a record of another spec": lambda f: sign_record(f, of_other_spec),
    "no file of the second rank": lambda f: sign_record(f, of_two_ranks),
    "the record of a stale attempt": lambda f: sign_record(f, of_a_stale_attempt),
    "weights that have grown": lambda f: grow(one_file(f, "shard-*.safetensors")),
}


def spec_of(store):
    return store.lookup("checkpoints/a/step-00000009").spec


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(store, caplog, damage):
    folder = store.store.local / "checkpoints/a/step-00000012"
    DAMAGES[damage](folder)
    with caplog.at_level(logging.INFO):
        newest = Checkpoints(store, "checkpoints/a", None, spec_of(store)).newest()
    assert newest is not None
    assert newest.step == 9
    assert "step-00000012" in caplog.text


def test_training_goes_on_from_the_newest_good_one(store, make_job, file_bytes):
    for step, damage in ((12, "half a record"), (9, "a flipped bit in the weights")):
        DAMAGES[damage](store.store.local / f"checkpoints/a/step-{step:08d}")
    calm = make_job("calm", DROPOUT)
    train(calm)
    resumed = make_job("resumed", DROPOUT, key="checkpoints/a")
    train(resumed)
    assert file_bytes(resumed.out) == file_bytes(calm.out)


def test_what_was_damaged_is_saved_anew_and_nothing_good_is_pushed_out(store, caplog):
    """Only complete checkpoints count as kept, and none of a step still to come."""
    root = store.store.local / "checkpoints/a"
    for step, damage in ((12, "no record"), (9, "a flipped bit in the weights")):
        DAMAGES[damage](root / f"step-{step:08d}")
    found = Checkpoints(store, "checkpoints/a", 2, spec_of(store))
    assert found.newest().step == 6
    part = store.fetch(store.lookup("checkpoints/a/step-00000006"))

    def save(step):
        found.make_room(step)
        found.seal(step, f"attempt-{step:012d}", found.upload(step, f"attempt-{step:012d}", part))

    def kept():
        return [int(key[-2:]) for key in store.children("checkpoints/a")]

    save(7)
    assert kept() == [6, 7, 9, 12]  # as before, the two are of no use and count for nothing
    assert Checkpoints(store, "checkpoints/a", 2, spec_of(store)).newest().step == 7
    save(9)
    save(12)
    assert kept() == [9, 12]
    assert Checkpoints(store, "checkpoints/a", 2, spec_of(store)).newest().step == 12


# ---- early ends ----


class SignalAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_ends_the_step_saves_and_the_next_run_goes_on(make_job, file_bytes):
    calm = make_job("calm", DROPOUT)
    train(calm)
    before = signal.getsignal(signal.SIGTERM)
    told = make_job("told", DROPOUT, key="checkpoints/a")
    assert train(told, [SignalAt(5)]) == {"preempted": "signal", "step": 5}
    assert not told.out.exists()
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = make_job("resumed", DROPOUT, key="checkpoints/a")
    assert train(resumed)["steps"] == 12
    assert file_bytes(resumed.out) == file_bytes(calm.out)


def test_a_deadline_ends_it_too(make_job):
    job = make_job("a", placement={"time_limit": 1e-3}, key="checkpoints/a")
    assert train(job) == {"preempted": "deadline", "step": 1}
    assert train(make_job("b", key="checkpoints/a"))["steps"] == 12


def test_a_signal_in_the_last_step_changes_nothing(make_job):
    assert train(make_job("a", key="checkpoints/a"), [SignalAt(12)])["steps"] == 12


# ---- saving in the background ----


class Slow(Checkpoints):
    """A store that takes its time."""

    seconds = 0.5

    def upload(self, step, attempt, directory):
        time.sleep(self.seconds)
        return super().upload(step, attempt, directory)


class Failing(Checkpoints):
    """A store that is away at some of the steps."""

    away: tuple[int, ...] = ()

    def upload(self, step, attempt, directory):
        if step in self.away:
            raise OSError("the store is away")
        return super().upload(step, attempt, directory)


@pytest.fixture
def use_store(monkeypatch):
    """use_store(class): what the worker keeps checkpoints with."""
    return lambda kind: monkeypatch.setattr("regrow.tasks.train.worker.Checkpoints", kind)


def test_training_goes_on_while_a_checkpoint_is_stored(make_job, use_store):
    use_store(Slow)
    result = train(make_job("a", placement={"saving": Cadence(steps=12)}, key="checkpoints/a"))
    assert result["timing"]["saving_seconds"] < Slow.seconds / 2


def test_one_failed_save_is_a_warning(make_job, use_store, monkeypatch, caplog):
    use_store(Failing)
    monkeypatch.setattr(Failing, "away", (6,))
    with caplog.at_level(logging.WARNING):
        assert train(make_job("a", key="checkpoints/a"))["steps"] == 12
    assert "step 6 could not be saved: rank 0: OSError: the store is away" in caplog.text


def test_two_failed_saves_in_a_row_stop_the_run(make_job, use_store, monkeypatch):
    use_store(Failing)
    monkeypatch.setattr(Failing, "away", (6, 9))
    with pytest.raises(StageError, match=r"2 times in a row.*the store is away"):
        train(make_job("a", key="checkpoints/a"))


def test_an_early_end_without_its_checkpoint_is_an_error(make_job, use_store, monkeypatch):
    use_store(Failing)
    monkeypatch.setattr(Failing, "away", (5,))
    with pytest.raises(StageError, match="the store is away"):
        train(make_job("a", key="checkpoints/a"), [SignalAt(5)])


# ---- evidence ----


def test_the_batch_of_a_loss_that_is_no_number_is_named_and_kept(make_job):
    spec = {"adapter": None, "learning_rate": 1e30, "max_grad_norm": 0.0}
    job = make_job("a", spec, {"logging_steps": 5})
    with pytest.raises(StageError, match=r"loss is nan at step \d, in micro-batch \d .*rows"):
        train(job)
    kept = json.loads((job.work / "non-finite-rank-00000.json").read_text())
    assert kept["step"] < 5
    assert len(kept["rows"]) == 2
    row = kept["rows"][0]
    assert sum(row["seq_lens"]) == len(row["input_ids"]) == len(row["loss_mask"])


HANGING = """
import pathlib, sys, time
from regrow.tasks.train.watchdog import Watchdog
dog = Watchdog(2.0, pathlib.Path(sys.argv[1]))
for _ in range(4):
    dog.alive()
    time.sleep(0.2)
def stuck_here():
    time.sleep(3600)
stuck_here()
"""


def test_a_worker_that_hangs_writes_its_stacks_and_ends(tmp_path):
    path = tmp_path / "stacks.txt"
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGING, str(path)])
    assert done.returncode == 1
    assert time.monotonic() - begin < 600  # most of it the imports, on a loaded machine
    assert "stuck_here" in path.read_text()


# ---- what the stage does then ----


@pytest.fixture
def attempts(make_job, tmp_path):
    """attempts(placement) -> Attempts of a job that keeps checkpoints."""

    def make(**placement):
        job = make_job("a", placement=placement, key="checkpoints/a")
        job.work.mkdir(parents=True)
        return Attempts(job, Notes(), tmp_path / "logs")

    return make


def failed(tmp_path, message="boom", name=None):
    return WorkerFailed(message, 0, "", tmp_path / "log", name)


def test_too_little_memory_halves_the_micro_batch_down_to_one(attempts, tmp_path):
    course = attempts(micro_batch_size=4)
    full = failed(tmp_path, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    course.after(full)
    assert course.job.placement.micro_batch_size == 2
    course.after(full)
    assert course.job.placement.micro_batch_size == 1
    with pytest.raises(StageError, match="gradient_checkpointing: true; lower sequence_len"):
        course.after(full)


def test_what_auto_chose_is_given_up_before_the_micro_batch(attempts, tmp_path):
    course = attempts(micro_batch_size=2, gradient_checkpointing="auto", gpu_memory_limit=8.0)
    said = "INFO regrow: should memory run out, it goes on with gradient_checkpointing: "
    for policy in ("full", "offload"):
        course.hear(said + policy)
        course.after(failed(tmp_path, "out of memory"))
        placement = course.job.placement
        assert (placement.fallback, placement.micro_batch_size) == (policy, 2)
    course.after(failed(tmp_path, "out of memory"))  # whose worker named nothing
    assert course.job.placement.micro_batch_size == 1
    with pytest.raises(StageError, match=r"One of: lower sequence_len; raise gpu_memory_limit$"):
        course.after(failed(tmp_path, "out of memory"))


def test_too_little_memory_is_an_error_where_the_recipe_says_so(attempts, tmp_path):
    with pytest.raises(StageError, match="lower micro_batch_size"):
        attempts(micro_batch_size=4, retry_on_oom=False).after(failed(tmp_path, "out of memory"))


def test_a_killed_worker_is_started_again_a_few_times_without_progress(attempts, tmp_path):
    course = attempts(max_restarts=2)
    killed = failed(tmp_path, name="SIGKILL")
    course.after(killed)
    course.after(killed)
    course.hear("INFO regrow.tasks.train.saving: checkpoint of step 3 is safe")
    course.after(killed)
    course.after(killed)
    with pytest.raises(StageError, match="3 times in a row"):
        course.after(killed)


def test_a_hung_worker_is_started_again_and_its_stacks_are_kept(attempts, tmp_path):
    course = attempts()
    (course.job.work / "stacks-rank-00000.txt").write_text("Thread 0x1\n  File worker.py")
    (course.job.work / "stacks-rank-00001.txt").write_text("")
    course.after(failed(tmp_path, "it ended with exit code 1"))
    assert (tmp_path / "logs/stacks-rank-00000.txt").read_text().startswith("Thread")
    assert not (tmp_path / "logs/stacks-rank-00001.txt").exists()
    assert not list(course.job.work.glob("stacks-*"))


def test_a_deadline_is_told_and_a_signal_is_not_the_end(attempts, tmp_path):
    course = attempts(time_limit=1000.0)
    course.job.preempted_path.write_text(json.dumps({"preempted": "signal", "step": 4}))
    course.after(failed(tmp_path))
    assert course.job.placement.time_limit < 1000
    course.job.preempted_path.write_text(json.dumps({"preempted": "deadline", "step": 7}))
    with pytest.raises(Preempted, match="after step 7; run again"):
        course.after(failed(tmp_path))


@pytest.mark.parametrize(
    ("message", "error"), [("StageError: wrong", StageError), ("RuntimeError: boom", WorkerFailed)]
)
def test_any_other_failure_is_not_tried_again(attempts, tmp_path, message, error):
    with pytest.raises(error):
        attempts().after(failed(tmp_path, message))
