"""The process environment, read in one place: where things live and what is switched off."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

# Nothing is sent anywhere unless the user asks. MLflow accepts only the word "true"
# (measured, shared reference platform.md part 0); Prefect and Hugging Face accept it too.
_TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "false",  # datasets counts each script that it loads
    "RAY_USAGE_STATS_ENABLED": "0",
    "GRADIO_ANALYTICS_ENABLED": "False",
    # Not telemetry, but said unasked: two lines on standard output for each run that ends.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

# OpenMP threads that wait by spinning take the cores from whatever else runs: a training step
# beside one other busy process took 30 times as long (measured, 2 cores, libgomp of torch for CPU).
_POLITE_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}

# A server of one run's own serves that process: its schedulers have nothing to do, and leaving
# them out shortens every start. A server that the user runs is not touched by these.
_PRIVATE_SERVER = {
    "PREFECT_SERVER_UI_ENABLED": "false",
    # Block types: our flows use none, and `regrow ui` registers them, as nobody notes that they
    # are there (1.3 s of a home's first run).
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
    "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
    "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_EVENT_LOGGER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED": "true",
    # What fails is told by us, once; Prefect would tell it again with what it knows of it.
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
}


# The shortest that Prefect allows; its own is 180 s. `regrow deploy` has runs that are silent for
# more than two of these marked as crashed.
_HEARTBEAT = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}

HOME_OF_DEPLOYMENT = "REGROW_HOME_OF_DEPLOYMENT"
"""The home of who deployed: used by workers whose own environment names no `REGROW_HOME`."""

# Address -> the variables that hold user and password (one for both: user:password).
_CREDENTIALS = {
    "MLFLOW_TRACKING_URI": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "PREFECT_API_URL": ("PREFECT_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"),
}

NO_PASSWORD = (
    "the address holds a password, and addresses are recorded and shown. Take it out, and give it "
    "to the driver by the driver's own variables or files (AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, ~/.ssh/config, ...)"
)

_PRIVATE = "REGROW_PRIVATE_PREFECT"
"""Set where `PREFECT_API_URL` is a server that we started for one run."""


class SettingError(ValueError):
    """An environment variable that cannot be used; the message names it."""


@dataclass(frozen=True)
class Settings:
    """What the environment says, once per process."""

    home: Path
    """`REGROW_HOME`, default `.regrow` in the current directory: local store, caches, databases."""
    store_url: str | None
    """`REGROW_STORE`: root URL of the artifact store; a recipe's `store` comes first."""
    tracking_uri: str | None
    """`MLFLOW_TRACKING_URI`, when MLflow is not the local SQLite file."""
    prefect_api_url: str | None
    """`PREFECT_API_URL`; None means a server of this run's own."""
    hub_offline: bool
    """`HF_HUB_OFFLINE`: no request to a model hub is made."""
    lease_seconds: float
    """`REGROW_LEASE_SECONDS`: a builder silent for this long has lost its lease."""
    cache_bytes: int | None
    """`REGROW_CACHE_GB`: how much of a remote store may lie here as copies; default: as much as the
    disk has room for."""


def load_settings() -> Settings:
    """The settings of this process; `home` is absolute."""
    env = os.environ
    gigabytes = _positive("REGROW_CACHE_GB", "gigabytes")
    return Settings(
        home=Path(env.get("REGROW_HOME") or env.get(HOME_OF_DEPLOYMENT) or ".regrow").absolute(),
        store_url=_without_password("REGROW_STORE"),
        tracking_uri=env.get("MLFLOW_TRACKING_URI") or None,
        prefect_api_url=None if _PRIVATE in env else env.get("PREFECT_API_URL") or None,
        hub_offline=env.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"},
        # Three missed heartbeats of ten seconds: the margin Kubernetes leases use by default
        # (leaseDuration is several renew periods).
        lease_seconds=_positive("REGROW_LEASE_SECONDS", "seconds") or 30.0,
        cache_bytes=int(gigabytes * 1e9) if gigabytes else None,
    )


def prefect_home() -> Path:
    """`PREFECT_HOME`: where Prefect keeps a local server's database, unless told otherwise."""
    return Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser().absolute()


def s3_endpoint() -> str | None:
    """`AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL`: an S3 server that is not Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
"""Variable: the GPUs that a process sees, by number, UUID or MIG name."""


def visible_devices() -> list[str]:
    """The GPUs that `CUDA_VISIBLE_DEVICES` names, in its words; empty where it is not set."""
    words = os.environ.get(VISIBLE_DEVICES, "").split(",")
    return [word.strip() for word in words if word.strip()]


def environment() -> dict[str, str]:
    """All variables, for the `${NAME}` of a recipe."""
    return dict(os.environ)


def _without_password(name: str) -> str | None:
    address = os.environ.get(name) or None
    if address and split_credentials(address)[1] is not None:
        raise SettingError(f"{name}: {NO_PASSWORD}")
    return address


def _positive(name: str, unit: str) -> float | None:
    """A number above 0 from a variable; None where it is not set."""
    text = os.environ.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise SettingError(f"{name}: {text!r} is not a number of {unit} above 0")
    return value


def quiet_environment(private_server: bool = False) -> None:
    """Switch telemetry off, and trim a private Prefect server, where the user said nothing.

    Call it before torch is imported: its thread library reads the environment once.
    """
    defaults = _TELEMETRY_OFF | _POLITE_THREADS | _HEARTBEAT
    defaults |= _PRIVATE_SERVER if private_server else {}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    _take_credentials_out_of_addresses()


def _take_credentials_out_of_addresses() -> None:
    """Put user and password of a server's address into variables of their own.

    Addresses are shown, on pages and in files; the programs that use them read these variables too.
    """
    for name, (user, password) in _CREDENTIALS.items():
        address = os.environ.get(name, "")
        bare, given = split_credentials(address)
        if given is None:
            continue
        if address.startswith("postgresql"):
            os.environ[name] = bare.replace("://", f"://{quote(given[0], safe='')}@", 1)
            os.environ.setdefault("PGPASSWORD", given[1])
        elif not address.startswith("http"):
            raise SettingError(f"{name}: {NO_PASSWORD}")
        elif user == password:
            os.environ[name] = bare
            os.environ.setdefault(user, ":".join(given))
        else:
            os.environ[name] = bare
            os.environ.setdefault(user, given[0])
            os.environ.setdefault(password, given[1])


def split_credentials(url: str) -> tuple[str, tuple[str, str] | None]:
    """An address without user and password, and these two, decoded; None where it has none."""
    if "@" not in url or "://" not in url:
        return url, None
    parts = urlsplit(url)
    if parts.password is None:
        return url, None
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return bare, (unquote(parts.username or ""), unquote(parts.password))


def use_private_prefect(api_url: str) -> None:
    """Make Prefect in this process use a server that was started for this run alone."""
    os.environ["PREFECT_API_URL"] = api_url
    os.environ[_PRIVATE] = "1"


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a process we launch.

    `PYTHONSAFEPATH` keeps the working directory off `sys.path`, where our `kernels/` folder would
    otherwise stand in front of the package of that name.
    """
    return {
        **_POLITE_THREADS,
        **_TELEMETRY_OFF,
        **os.environ,
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(extra or {}),
    }
