"""Where the run is recorded."""

from __future__ import annotations

from regrow.configs.sections.section import Section


class TrackingSection(Section):
    """MLflow, which records every run."""

    mlflow_tracking_uri: str | None = None
    """Address of the MLflow server or store. Default: the setting of the installation."""

    mlflow_experiment_name: str | None = None
    """MLflow experiment. Default: the setting of the installation."""

    mlflow_run_name: str | None = None
    """Name of the run in MLflow. Default: `run_name`."""

    run_name: str | None = None
    """Name of the run. Default: `mlflow_run_name`, else the recipe's file name."""
