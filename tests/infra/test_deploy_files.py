"""The files under infra/deploy fit their published schemas, hold no secret and open no door."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "infra" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
MANIFESTS = sorted((KUBERNETES / "base").glob("*.yaml"))
TRAININGS = sorted((KUBERNETES / "training").glob("*.yaml"))
SCRIPTS = [DEPLOY / "node.sh", DEPLOY / "slurm" / "train.sbatch"]
DOCKERFILES = [DEPLOY / "Dockerfile.cpu", DEPLOY / "Dockerfile.cuda"]
KUBERNETES_VERSION = "1.33"

SECRETS = {
    "POSTGRES_PASSWORD": "pg-3141592653",
    "PREFECT_AUTH_STRING": "admin:pf-3141592653",
    "MLFLOW_ADMIN_PASSWORD": "ml-3141592653",
    "MLFLOW_SECRET_KEY": "sk-form-3141592653",
    "S3_ACCESS_KEY": "ak-3141592653",
    "S3_SECRET_KEY": "s3-3141592653",
}
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


class Missing(ValueError):  # noqa: N818 (the name says what is the matter)
    """A variable that compose would stop at."""


def filled(text: str, variables: dict[str, str]) -> str:
    """`text` with its ${VARIABLES} as docker compose fills them in."""

    def value(match: re.Match[str]) -> str:
        name, mark, rest = match.groups()
        if variables.get(name) or (name in variables and mark is None):
            return variables[name]
        if mark == "?":
            raise Missing(f"{name}: {rest}")
        return rest if mark == "-" else ""

    return _VARIABLE.sub(value, text)


def compose(name: str = "compose.yaml", variables: dict[str, str] = SECRETS) -> dict[str, Any]:
    return yaml.safe_load(filled((DEPLOY / name).read_text(), variables))


def documents(path: Path) -> list[dict[str, Any]]:
    return [item for item in yaml.safe_load_all(path.read_text()) if item]


def check_kubernetes(manifest: dict[str, Any]) -> None:
    import kubernetes_validate

    # Anchors make one object of two; the validator wants them apart.
    kubernetes_validate.validate(copy.deepcopy(manifest), KUBERNETES_VERSION, strict=True)


# --- compose ---


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_fits_the_published_schema(name):
    from compose_pydantic.models import ComposeSpecification

    # Blocks for anchors, which the specification allows at the top, are not in the model.
    given = {k: v for k, v in compose(name).items() if not k.startswith("x-")}
    ComposeSpecification.model_validate(given)


def test_a_mistake_would_not_fit_the_schema():
    from compose_pydantic.models import ComposeSpecification
    from pydantic import ValidationError

    broken = compose()
    broken["services"]["prefect"]["healtcheck"] = {}
    with pytest.raises(ValidationError, match="healtcheck"):
        ComposeSpecification.model_validate(broken)


@pytest.mark.parametrize("name", SECRETS)
def test_compose_stops_at_a_secret_that_is_not_set(name):
    with pytest.raises(Missing, match=f"{name}: set it"):
        compose(variables={key: value for key, value in SECRETS.items() if key != name})


def test_the_example_names_every_secret_and_holds_none():
    lines = (DEPLOY / "env.example").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert set(SECRETS) <= set(given)
    assert set(given.values()) == {""}


def test_ports_are_published_on_loopback_alone():
    ports = [p for service in compose()["services"].values() for p in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports), ports


def test_every_server_has_a_health_check_that_others_wait_for():
    services = compose()["services"]
    for name, service in services.items():
        assert "healthcheck" in service or name == "bucket", name
        for other, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if other == "bucket" else "service_healthy"
            assert how["condition"] == wanted
    assert set(services["worker"]["depends_on"]) == {"prefect", "mlflow"}


def test_each_container_gets_the_secrets_it_needs_and_no_other():
    services = compose()["services"]
    held = {
        name: {
            key
            for key, secret in SECRETS.items()
            if any(secret in str(value) for value in service.get("environment", {}).values())
        }
        for name, service in services.items()
    }
    s3 = {"S3_ACCESS_KEY", "S3_SECRET_KEY"}
    assert held == {
        "postgres": {"POSTGRES_PASSWORD"},
        "s3": s3,
        "bucket": s3,
        "prefect": {"POSTGRES_PASSWORD", "PREFECT_AUTH_STRING"},
        "mlflow": {"POSTGRES_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY"} | s3,
        "worker": {"PREFECT_AUTH_STRING", "MLFLOW_ADMIN_PASSWORD"} | s3,
    }
    commands = str([(s.get("command"), s.get("healthcheck")) for s in services.values()])
    assert not [secret for secret in SECRETS.values() if secret in commands]


def test_images_are_pinned_and_containers_have_no_capabilities():
    for name, service in compose()["services"].items():
        assert ":" in service["image"], name
        assert not service["image"].endswith(":latest"), name
        if service["image"].startswith("regrow:"):
            assert service["cap_drop"] == ["ALL"]
            assert service["security_opt"] == ["no-new-privileges:true"]


# --- Kubernetes ---


@pytest.mark.parametrize(
    "path", [p for p in MANIFESTS if p.name != "kustomization.yaml"], ids=lambda p: p.name
)
def test_manifests_fit_the_published_schemas(path):
    for manifest in documents(path):
        check_kubernetes(manifest)


def test_a_mistake_would_not_fit_the_schemas():
    import kubernetes_validate

    broken = documents(KUBERNETES / "base" / "prefect.yaml")[1]
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        check_kubernetes(broken)


def test_the_kustomization_names_every_manifest():
    found = documents(KUBERNETES / "base" / "kustomization.yaml")[0]
    names = {path.name for path in MANIFESTS} - {"kustomization.yaml"}
    assert set(found["resources"]) == names


def pods() -> list[tuple[str, dict[str, Any]]]:
    """Every pod that the manifests make, with the name of its file."""
    found = []
    for path in MANIFESTS:
        for item in documents(path):
            if item["kind"] in ("Deployment", "StatefulSet"):
                found.append((path.name, item["spec"]["template"]))
    found.append(("jobset.yaml", jobset_job()["template"]))
    replicas = documents(KUBERNETES / "training" / "pytorchjob.yaml")[0]["spec"]
    for replica in replicas["pytorchReplicaSpecs"].values():
        found.append(("pytorchjob.yaml", replica["template"]))
    found.append(("work-pool.json", rendered_job({})["spec"]["template"]))
    return found


def jobset_job() -> dict[str, Any]:
    jobset = documents(KUBERNETES / "training" / "jobset.yaml")[0]
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_pods_are_not_root_and_have_secrets_by_reference():
    for name, pod in pods():
        check_kubernetes(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "x", "labels": pod.get("metadata", {}).get("labels", {})},
                "spec": {"restartPolicy": "Never", **pod["spec"]},
            }
        )
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True, name
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            for variable in container.get("env", []):
                if re.search("PASSWORD|AUTH_STRING$|SECRET_ACCESS|_KEY$", variable["name"]):
                    names_one = variable["name"].startswith("PREFECT_INTEGRATIONS")
                    assert names_one or "value" not in variable, (name, variable)


def test_every_secret_and_setting_referred_to_is_named_in_the_readme():
    readme = (DEPLOY / "README.md").read_text()
    settings = documents(KUBERNETES / "base" / "settings.yaml")[0]["data"]
    for name, pod in pods():
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", []):
                source = variable.get("valueFrom", {})
                if "secretKeyRef" in source:
                    assert source["secretKeyRef"]["key"] in readme, name
                    assert source["secretKeyRef"]["name"] in readme, name
                if "configMapKeyRef" in source and not source["configMapKeyRef"].get("optional"):
                    assert source["configMapKeyRef"]["key"] in settings


def rendered_job(values: dict[str, Any]) -> dict[str, Any]:
    """The Job that a run gets, as Prefect's worker makes it of the pool's template."""
    from prefect.utilities.templating import apply_values

    template = yaml.safe_load((KUBERNETES / "work-pool.json").read_text())
    properties = template["variables"]["properties"]
    given = {name: p["default"] for name, p in properties.items() if "default" in p} | values
    given |= {"name": "run", "env": [{"name": "A", "value": "1"}], "labels": {"b": "c"}}
    given |= {"command": ["python"]}
    return apply_values(template["job_configuration"], given, remove_notset=True)["job_manifest"]


def test_the_work_pool_makes_jobs_that_kubernetes_takes():
    job = rendered_job({"gpus": 4, "memory": "128Gi", "image": "my/image:1"})
    check_kubernetes(job)
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"memory": "128Gi", "nvidia.com/gpu": 4}
    assert container["image"] == "my/image:1"
    assert {"secretRef": {"name": "regrow-runs"}} in container["envFrom"]


def test_the_work_pool_takes_what_prefects_own_template_takes():
    """The variables of the template that comes with Prefect's Kubernetes worker are all there, but
    for the four kinds of processor and memory figures, which are two here."""
    import prefect

    place = Path(prefect.__file__).parent / "server/api/collections_data/views"
    known = yaml.safe_load((place / "aggregate-worker-metadata.json").read_text())
    own = known["prefect-kubernetes"]["kubernetes"]["default_base_job_configuration"]
    ours = yaml.safe_load((KUBERNETES / "work-pool.json").read_text())
    figures = {"cpu_request", "cpu_limit", "memory_request", "memory_limit"}
    assert set(own["variables"]["properties"]) - figures <= set(ours["variables"]["properties"])
    assert set(own["job_configuration"]) <= set(ours["job_configuration"])
    used = set(re.findall(r"{{ (\w+) }}", (KUBERNETES / "work-pool.json").read_text()))
    assert used == set(ours["variables"]["properties"])


def test_the_worker_keeps_its_password_out_of_the_jobs():
    (worker,) = [i for i in documents(KUBERNETES / "base/worker.yaml") if i["kind"] == "Deployment"]
    env = {v["name"]: v for v in worker["spec"]["template"]["spec"]["containers"][0]["env"]}
    prefix = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
    reference = env["PREFECT_API_AUTH_STRING"]["valueFrom"]["secretKeyRef"]
    assert env[f"{prefix}_NAME"]["value"] == reference["name"]
    assert env[f"{prefix}_KEY"]["value"] == reference["key"]


def test_the_jobset_fits_its_published_model():
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    manifest = documents(KUBERNETES / "training" / "jobset.yaml")[0]
    read = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(manifest)).to_dict()
    assert keys(manifest) <= keys(read), "a key that the model does not know is left out by it"
    check_kubernetes(
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "x"},
            "spec": jobset_job(),
        }
    )


def keys(value: Any, path: str = "") -> set[str]:
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return {path} | {key for name, inner in items for key in keys(inner, f"{path}.{name}")}


def node_of(**variables: str):
    """What `regrow.infra.nodes` reads of a launcher's variables, in a process of its own."""
    code = "from regrow.infra.nodes import nodes_here; print(nodes_here())"
    names = ("PET_", "SLURM", "WORLD_SIZE", "RANK", "MASTER", "JOB_COMPLETION", "LOCAL_RANK")
    env = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_jobset_tells_each_machine_its_place():
    job, name = jobset_job(), "train"
    env = {v["name"]: v["value"] for v in job["template"]["spec"]["containers"][0]["env"]}
    assert job["completionMode"] == "Indexed", "it sets JOB_COMPLETION_INDEX"
    assert job["completions"] == job["parallelism"] == int(env["WORLD_SIZE"])
    # JobSet calls pods <jobset>-<replicatedJob>-<job>-<pod>, in the domain of the JobSet.
    assert env["MASTER_ADDR"] == f"{name}-node-0-0.{name}"
    here = node_of(**env, JOB_COMPLETION_INDEX="1")
    assert "count=2, rank=1" in here
    assert f"address='{env['MASTER_ADDR']}', port=29500" in here


def test_the_pytorchjob_has_one_master_whose_container_the_operator_knows():
    """Its schema is not in any registry: what the operator asks for is checked by hand here."""
    job = documents(KUBERNETES / "training" / "pytorchjob.yaml")[0]
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert set(job["spec"]) == {"runPolicy", "pytorchReplicaSpecs"}
    assert set(job["spec"]["runPolicy"]) == {"cleanPodPolicy", "backoffLimit"}
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        assert set(replica) == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch", "the operator sets its variables in that one"
        assert container["ports"][0]["name"] == "pytorchjob-port"
    # The variables that the operator sets (training-operator 1.9, pkg/controller.v1/pytorch).
    given = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "MASTER_ADDR": "train-master-0"}
    here = node_of(**given, MASTER_PORT="29500", PET_MASTER_ADDR="train-master-0", RANK="1")
    assert "count=2, rank=1, address='train-master-0', port=29500" in here


# --- scripts and images ---


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_clean(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "--shell=bash", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"SLURM_NODEID": "0"}, True),
        ({"SLURM_NODEID": "1"}, False),
        ({"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "2"}, False),
        ({"PET_NODE_RANK": "0", "RANK": "8"}, True),
        ({"PET_NODE_RANK": "1", "RANK": "0"}, False),
    ],
)
def test_only_machine_0_runs_the_pipeline(tmp_path, variables, first):
    for name in ("regrow", "python"):
        stub = tmp_path / name
        stub.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", **variables}
    command = ["bash", str(DEPLOY / "node.sh"), "a b.yaml", "--seed", "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    wanted = "regrow run a b.yaml --seed 1" if first else "python -m regrow.tasks.train.node"
    assert done.stdout.strip() == wanted


def test_the_operators_init_container_passes_the_restricted_standard():
    """A worker's pod is the operator's init container and ours; the namespace checks both."""
    (made,) = documents(KUBERNETES / "training" / "operator-init-container.yaml")
    (container,) = yaml.safe_load(made["data"]["initContainer.yaml"])
    assert container["name"] == "init-pytorch"
    security = container["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["runAsNonRoot"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    readme = (DEPLOY / "README.md").read_text()
    assert made["metadata"]["name"] in readme
    assert "/etc/config" in readme, "where the operator looks, with initContainer.yaml in it"


def test_the_first_commands_of_the_readme_name_what_is_there():
    readme = (DEPLOY / "README.md").read_text()
    built = re.findall(r"docker build -f (\S+) -t (\S+) \.", readme)
    assert built
    for path, tag in built:
        assert (ROOT / path).is_file()
        assert f"-t {tag} " in (ROOT / path).read_text()
    command = re.search(r"regrow deploy /recipes/(\S+) \\\n +--base_model (\S+)", readme)
    assert command is not None
    assert (ROOT / "configs" / "recipes" / command[1]).is_file()
    assert (DEPLOY / "env.example").is_file()


def test_a_slurm_step_gets_the_cpus_of_the_job(tmp_path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho srun "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    command = ["bash", str(DEPLOY / "slurm/train.sbatch"), "recipe.yaml"]
    for more, wanted in (({"SLURM_CPUS_PER_TASK": "32"}, True), ({}, False)):
        done = subprocess.run(command, env=env | more, capture_output=True, text=True, check=True)
        assert ("--cpus-per-task=32" in done.stdout) is wanted


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (75, True), (143, True)])
def test_the_slurm_job_queues_again_only_when_it_was_stopped(tmp_path, code, again):
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho srun "$@"\nexit {code}\n')
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho scontrol "$@"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_SUBMIT_DIR": "/repo",
    }
    command = ["bash", str(DEPLOY / "slurm/train.sbatch"), "recipe.yaml"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == code
    assert "/repo/infra/deploy/node.sh recipe.yaml" in done.stdout
    assert ("scontrol requeue 7" in done.stdout) is again
    last = subprocess.run(
        command, env=env | {"SLURM_RESTART_COUNT": "100"}, capture_output=True, text=True
    )
    assert "scontrol" not in last.stdout, "not for ever"


def test_slurm_gives_the_training_time_for_a_checkpoint():
    text = (DEPLOY / "slurm/train.sbatch").read_text()
    assert "#SBATCH --requeue" in text
    assert re.search(r"^#SBATCH --signal=TERM@\d{3}$", text, re.MULTILINE)
    assert "--ntasks-per-node=1" in text


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_images_are_built_cleanly_of_the_tested_versions_without_root(path):
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = path.read_text()
    installs = re.findall(r"pip install (.*(?:\\\n.*)*)", text)
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)
    assert re.findall(r"^USER (.*)", text, re.MULTILINE) == ["10001"]
    assert not re.search(r"^(ARG|ENV).*(TOKEN|PASSWORD|SECRET)", text, re.MULTILINE)
    ignored = path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
    assert ignored[1] == "*", "nothing is sent to the builder unless named"
    for copied in re.findall(r"^COPY (.*) \./\S*$", text, re.MULTILINE):
        assert all(f"!{name}" in ignored for name in copied.split())


def test_mlflow_servers_users_file_holds_no_password():
    text = (DEPLOY / "mlflow/basic_auth.ini").read_text()
    assert "admin_password" not in text
    assert "default_permission = READ" in text
    assert not re.search(r"://[^/@\s]*:[^/@\s]+@", text)
