"""Addresses of MLflow's pages, relative to any page of the same server. Imports nothing of it.

They begin with "#", so a description that holds them works wherever the server is, also when the
runs were written into a SQLite file before any server showed them.
"""

from __future__ import annotations

from urllib.parse import quote

# Else MLflow 3 opens in its mode for chat traces, where descriptions stand last.
_MODE = "workflowType=machine_learning"


def run_page(experiment_id: str, run_id: str, artifact: str = "") -> str:
    """A run's page, or that of one of its files."""
    place = f"#/experiments/{experiment_id}/runs/{run_id}"
    return f"{place}{f'/artifacts/{quote(artifact)}' if artifact else ''}?{_MODE}"


def model_page(experiment_id: str, model_id: str) -> str:
    """A logged model's page."""
    return f"#/experiments/{experiment_id}/models/{model_id}?{_MODE}"


def version_page(name: str, version: str) -> str:
    """The page of a registered model's version."""
    return f"#/models/{quote(name, safe='')}/versions/{version}?{_MODE}"


def runs_of_dataset(experiment_id: str, digest: str) -> str:
    """The table of all runs that logged a dataset of this digest."""
    query = quote(f"dataset.digest = '{digest}'", safe="")
    return f"#/experiments/{experiment_id}/runs?{_MODE}&searchFilter={query}"
