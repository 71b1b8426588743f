"""What the process of an evaluation says, prints and ends with reaches the run whole."""

import errno
import fcntl
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from regrow.tasks.build import place_fault
from regrow.tasks.evaluate.alone import _as_error, _as_told, run_alone
from regrow.tasks.stage import StageError
from tests.tasks.evaluate.prepared import make_job


class Code:
    """Python that runs where the job arrives."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self):
        return exec, (self.text,)


def _job(root, code: str):
    return replace(make_job(root, {}), logs=root / "logs", tracking=Code(code))


def _log(root) -> str:
    return next((root / "logs").glob("evaluate-*.log")).read_text()


def test_an_error_comes_with_its_causes_and_so_with_the_remedy():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/x")
        except OSError as full:
            raise RuntimeError("cannot write") from full
    except RuntimeError as error:
        there, remedy = _as_error(_as_told(error)), place_fault(error)
    assert type(there) is RuntimeError
    assert remedy == place_fault(there)
    assert remedy is not None
    assert "test_an_error_comes_with_its_causes" in there.__notes__[-1]


def test_an_error_whose_class_is_not_known_here_keeps_its_name_and_words(monkeypatch):
    theirs = types.ModuleType("transformers_modules_x")
    exec("class Odd(Exception): pass", theirs.__dict__)
    with monkeypatch.context() as there:
        there.setitem(sys.modules, "transformers_modules_x", theirs)
        told = _as_told(theirs.Odd("no such expert"))
    assert told[0][0]
    error = _as_error(told)
    assert type(error) is StageError
    assert str(error) == "Odd: no such expert"


def test_an_error_that_cannot_be_made_again_keeps_its_words():
    class PickyError(StageError):
        def __init__(self, key: str, what: str) -> None:
            super().__init__(f"{key}: {what}")

    error = _as_error(_as_told(PickyError("dtype", "too odd")))
    assert (type(error), str(error)) == (StageError, "dtype: too odd")


def test_an_error_before_the_evaluation_begins_is_told_as_it_is(tmp_path):
    with pytest.raises(ImportError, match="no_such_library"):
        run_alone(_job(tmp_path, "import no_such_library"))
    assert "no_such_library" in _log(tmp_path)


def test_an_end_without_a_word_is_told_truly_and_output_is_masked(tmp_path, capfd):
    code = "import os; print('token=hf_' + 'a' * 34); print('last', flush=True); os._exit(3)"
    with pytest.raises(StageError, match=r"ended without a word \(exit code 3\)\n") as ended:
        run_alone(_job(tmp_path, code))
    assert "last\n" in str(ended.value)
    assert "memory" not in str(ended.value)
    assert "last\n" in _log(tmp_path)
    assert "hf_" not in _log(tmp_path) + str(ended.value)
    assert capfd.readouterr() == ("", "")


def test_an_end_in_the_middle_of_a_message_is_told(tmp_path):
    # A message of 100 bytes is announced; four of them come.
    code = "import os, sys; os.write(int(sys.argv[1]), b'\\0\\0\\0\\x64abcd'); os.abort()"
    with pytest.raises(StageError, match=r"ended without a word \(SIGABRT\)"):
        run_alone(_job(tmp_path, code))


def test_a_broken_connection_of_the_evaluation_is_its_own_error(tmp_path):
    with pytest.raises(ConnectionError, match="the hub"):
        run_alone(_job(tmp_path, "raise ConnectionError('the hub hung up')"))


_PARENT = """
import fcntl, os, sys
from pathlib import Path
from regrow.infra.device_files import Devices
from regrow.tasks.evaluate.alone import run_alone
from regrow.tasks.stage import Stage, StageJob

class Sleep:
    def __reduce__(self):
        code = f"import os, time; open({sys.argv[1]!r} + '/at-work', 'w').write(str(os.getpid()))"
        return exec, (code + "; time.sleep(100)",)

folder = Path(sys.argv[1])
lock = os.open(folder / "gpu", os.O_RDWR)
fcntl.flock(lock, fcntl.LOCK_EX)
stage = Stage("evaluate", 1, {}, "")
job = StageJob(stage, {}, {}, folder, folder, None, None, tracking=Sleep(),
               devices=Devices((), (lock,)))
run_alone(job)
"""


def _until(holds, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_it_ends_with_a_run_that_is_killed_and_the_gpu_is_free(tmp_path: Path):
    (tmp_path / "gpu").touch()
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path)])
    told = tmp_path / "at-work"
    try:
        _until(lambda: told.exists() and told.read_text())
        assert psutil.pid_exists(int(told.read_text()))
        with (tmp_path / "gpu").open() as gpu:
            with pytest.raises(BlockingIOError):
                fcntl.flock(gpu, fcntl.LOCK_EX | fcntl.LOCK_NB)
            parent.kill()
            parent.wait()
            _until(lambda: _is_free(gpu.fileno()), 10)
    finally:
        parent.kill()
        parent.wait()


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
