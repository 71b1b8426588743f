"""A pool's jobs get what the recipe needs, and nothing secret."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regrow.configs.load import parse_recipe
from regrow.flows.job_variables import (
    A_LOOK,
    JobVariables,
    Resources,
    base_job_template,
    is_reachable,
    job_variables,
)
from regrow.infra.settings import Settings, load_settings
from regrow.tasks.stage import StageError

SETTINGS = replace(
    load_settings(), home=Path("/home/me/.regrow"), store_url=None, tracking_uri=None
)


def variables(pool_type: str, settings: Settings = SETTINGS, wanted=None, **keys: Any) -> dict:
    return made(pool_type, settings, wanted, **keys).values


def made(
    pool_type: str,
    settings: Settings = SETTINGS,
    wanted: Resources | None = None,
    environment: dict[str, str] | None = None,
    **keys: Any,
) -> JobVariables:
    recipe = {"base_model": "x", "datasets": [{"path": "x", "type": "alpaca"}], **keys}
    recipe |= {"learning_rate": 1e-4, "micro_batch_size": 1, "num_epochs": 1}
    recipe["gradient_accumulation_steps"] = 1
    parsed = parse_recipe(recipe).recipe
    return job_variables(parsed, settings, pool_type, wanted or Resources(), environment or {})


def test_job_on_kubernetes_gets_the_recipes_gpus_and_the_asked_image_and_memory():
    found = variables("kubernetes", num_processes=4, wanted=Resources("regrow:1", "96Gi"))
    assert {name: found[name] for name in ("gpus", "image", "memory")} == {
        "gpus": 4,
        "image": "regrow:1",
        "memory": "96Gi",
    }
    assert variables("kubernetes", num_processes=4, wanted=Resources(gpus=8))["gpus"] == 8


def test_what_nobody_said_is_left_to_the_pools_template():
    assert set(variables("kubernetes")) == {"env"}


def test_each_variable_of_a_kubernetes_job_stands_in_the_template():
    template = base_job_template("kubernetes")
    assert template is not None
    found = variables("kubernetes", num_processes=1, wanted=Resources("regrow:1", "1Gi"))
    assert set(found | A_LOOK) <= set(template["variables"]["properties"])
    assert base_job_template("process") is None


def test_folders_of_this_machine_do_not_go_to_a_cluster():
    local = replace(SETTINGS, store_url="/data/store")
    assert "REGROW_STORE" not in variables("kubernetes", local)["env"]
    assert not any("/home/me" in value for value in variables("kubernetes")["env"].values())
    shared = replace(SETTINGS, store_url="s3://b/store")
    assert variables("kubernetes", shared)["env"]["REGROW_STORE"] == "s3://b/store"
    with pytest.raises(StageError, match="pod's disk"):
        variables("kubernetes", store="/data/store")
    with pytest.raises(StageError, match=r"output_dir: \./out is a folder"):
        variables("kubernetes", output_dir="./out")


def test_evicted_pod_has_its_run_scheduled_again():
    env = variables("kubernetes")["env"]
    assert env["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "reschedule"


def test_run_of_a_process_pool_finds_the_store_of_who_deployed():
    env = variables("process")["env"]
    assert env["REGROW_STORE"] == "/home/me/.regrow/store"
    assert env["REGROW_HOME_OF_DEPLOYMENT"] == "/home/me/.regrow"
    with pytest.raises(StageError, match="--image"):
        variables("process", wanted=Resources(image="regrow:1"))


def test_address_with_a_password_is_not_shown_on_prefects_page():
    secret = replace(SETTINGS, tracking_uri="https://me:secret@mlflow.example.com")
    for pool_type in ("process", "kubernetes"):
        assert "secret" not in str(variables(pool_type, secret))


def test_pool_that_would_drop_a_variable_is_refused():
    """Prefect ignores what a template does not name, and the run would start without its GPUs."""
    template = {"variables": {"properties": {"env": {}, "image": {}}}}
    found = made("kubernetes", num_processes=2, wanted=Resources("regrow:1", "96Gi"))
    with pytest.raises(StageError, match="no variable gpus, memory"):
        found.require_in(template, "cluster")
    found.require_in(base_job_template("kubernetes") or {}, "cluster")
    with pytest.raises(StageError, match="no variable gpus, memory"):
        found.require_in({}, "made by hand, no worker yet")
    made("process").require_in({}, "made a moment ago")


def test_addresses_of_services_go_along_and_their_keys_do_not():
    here = {
        "AWS_ENDPOINT_URL": "https://s3.example.com",
        "AWS_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "hush",
        "HF_TOKEN": "hf_hush",
    }
    for pool_type in ("process", "kubernetes"):
        env = made(pool_type, environment=here).values["env"]
        assert env["AWS_ENDPOINT_URL"] == "https://s3.example.com"
        assert env["AWS_REGION"] == "eu-central-1"
        assert not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"} & set(env)


def test_what_only_this_machine_reaches_does_not_go_to_pods_and_is_told():
    near = replace(SETTINGS, tracking_uri="http://127.0.0.1:5000")
    here = {"AWS_ENDPOINT_URL": "http://localhost:9000"}
    found = made("kubernetes", near, environment=here)
    assert not {"MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"} & set(found.values["env"])
    assert [line.partition("=")[0] for line in found.left_out] == [
        "MLFLOW_TRACKING_URI",
        "AWS_ENDPOINT_URL",
    ]
    assert made("process", near, environment=here).values["env"]["AWS_ENDPOINT_URL"]
    with pytest.raises(StageError, match="mlflow_tracking_uri"):
        variables("kubernetes", mlflow_tracking_uri="sqlite:////data/mlflow.db")
    far = replace(SETTINGS, tracking_uri="http://mlflow:5000")
    assert made("kubernetes", far).left_out == ()


@pytest.mark.parametrize(
    ("url", "far"),
    [
        ("http://127.0.0.1:5000", False),
        ("http://[::1]:5000", False),
        ("http://0.0.0.0:5000", False),
        ("http://localhost", False),
        ("sqlite:///mlflow.db", False),
        ("/data/mlruns", False),
        ("http://mlflow:5000", True),
        ("https://10.1.2.3", True),
        ("databricks", True),
        ("postgresql://me@db/mlflow", True),
    ],
)
def test_reachable_from_another_machine(url: str, far: bool):
    assert is_reachable(url) is far


def test_fewer_gpus_than_processes_are_refused():
    with pytest.raises(StageError, match="num_processes is 8"):
        variables("kubernetes", num_processes=8, wanted=Resources(gpus=4))
