"""What a person or a program puts into a recipe or the environment by mistake is never told on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from regrow.flows.progress import say
from regrow.infra.secrets import mask_secrets, without_secrets
from tests.flows.conftest import small_recipe

TOKEN = "hf_" + "PlAnTeDpLaNtEdPlAnT0"
PASSWORD = "open-sesame-1234"


@pytest.mark.parametrize("command", ["run", "validate", "plan", "deploy", "preprocess"])
def test_a_recipe_with_a_secret_starts_nothing_and_leaves_no_trace(place, command):
    place.write_recipe(
        mlflow_tracking_uri=f"http://me:{PASSWORD}@127.0.0.1:1",
        datasets=[{"path": f"https://{TOKEN}@host/rows.jsonl", "type": "chat_template"}],
    )
    written = place.recipe.read_bytes()
    done = place.regrow(command, str(place.recipe), "--hub_token", TOKEN)
    assert done.returncode == 2, done.stdout
    assert "a recipe is recorded" in done.stdout
    assert TOKEN not in done.stdout
    assert PASSWORD not in done.stdout
    for path in place.root.rglob("*"):
        if path.is_file() and path.read_bytes() != written:
            assert PASSWORD.encode() not in path.read_bytes(), path
            assert TOKEN.encode() not in path.read_bytes(), path


def test_values_of_secret_variables_are_masked_wherever_they_stand(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", f"me:{PASSWORD}-two")
    monkeypatch.setenv("SOME_SERVER", f"https://me:{PASSWORD}-three@host")
    say(f"it said {PASSWORD}, {PASSWORD}-two and {PASSWORD}-three")
    assert capsys.readouterr().out == "it said ***, *** and ***\n"


def test_short_and_everyday_values_are_not_masked(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "train")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/etc/keys/google.json")
    monkeypatch.setenv("PAD_TOKEN", "<|endoftext|>")
    text = "train with /etc/keys/google.json and <|endoftext|>"
    assert mask_secrets(text) == text


def test_an_error_is_told_without_its_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    hushed = without_secrets(KeyError(f"no {PASSWORD} here"))
    assert PASSWORD not in str(hushed)
    assert "KeyError" in str(hushed)
    harmless = ValueError("no such file")
    assert without_secrets(harmless) is harmless


def test_a_run_that_does_not_even_begin_keeps_the_secret(monkeypatch, tmp_path):
    """Prefect shows the message of what ended a flow run on a page of its own."""
    from regrow.configs.load import parse_recipe
    from regrow.flows import run

    def broken(*_args):
        raise ValueError(f"the server said: {PASSWORD} is no key, nor is s3://key:plan/ted@bucket")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    monkeypatch.setenv("REGROW_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(run, "make_plan", broken)
    recipe = parse_recipe(small_recipe(tmp_path / "model", tmp_path / "out")).recipe
    with pytest.raises(RuntimeError, match=r"ValueError: the server said: \*\*\* is no") as caught:
        run.FlowRun(recipe, "x").__enter__()
    assert PASSWORD not in str(caught.value)
    assert "plan/ted" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_what_a_worker_says_is_masked_in_its_log_and_its_error(tmp_path, monkeypatch):
    from regrow.infra.launch import WorkerFailed, run_workers

    monkeypatch.setenv("HF_TOKEN", PASSWORD)
    (tmp_path / "tells.py").write_text(
        "import os\n"
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "@record\n"
        "def main():\n"
        "    print('my token is', os.environ['HF_TOKEN'])\n"
        "    raise ValueError('refused: ' + os.environ['HF_TOKEN'])\n"
        "main()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines, log = [], tmp_path / "logs" / "worker.log"
    with pytest.raises(WorkerFailed, match=r"refused: \*\*\*") as error:
        run_workers("tells", [], num_processes=1, on_line=lines.append, log_path=log)
    assert "my token is ***" in log.read_text()
    assert PASSWORD not in f"{lines}{log.read_text()}{error.value}{error.value.trace}"


def test_a_crash_log_is_masked(tmp_path):
    code = (
        "import sys; from regrow.flows import cli\n"
        "def broken(): raise ZeroDivisionError(sys.argv[1])\n"
        "try: broken()\n"
        "except ZeroDivisionError: print(open(cli._crash_log()).read())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"password={PASSWORD}"],
        env={"TMPDIR": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "ZeroDivisionError: password=***" in done.stdout, done.stderr
    assert PASSWORD not in done.stdout
