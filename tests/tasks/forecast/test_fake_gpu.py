"""The memory model against every tensor of whole training steps on a GPU that is not there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def counted(*options):
    words = [sys.executable, "-m", "tests.bench.fake_gpu", *options]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_peaks_of_small_trainings_are_as_computed():
    found = counted("--small")
    assert len(found) == 7
    assert {line["name"]: line["off"] for line in found if abs(line["off"]) > 0.04} == {}


@pytest.mark.extended
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_peaks_of_the_table_are_as_computed():
    found = counted()
    assert len(found) >= 15
    assert {line["name"]: line["off"] for line in found if abs(line["off"]) > 0.04} == {}
