"""Reporters beside MLflow: W&B, TensorBoard, Trackio, Comet and SwanLab, through Transformers."""

from __future__ import annotations

from typing import Literal

from regrow.configs.sections.section import Section

PACKAGES = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "comet_ml": "comet-ml",
    "swanlab": "swanlab",
}
"""Transformers' name of a reporter -> the package to install for it."""


class ReportingSection(Section):
    """Where else the course of training is shown. Each needs its package where training runs."""

    use_wandb: bool | None = None
    """Report to Weights & Biases, too. Default: true when `wandb_project` is given."""

    wandb_project: str | None = None
    """Project in Weights & Biases. Default: none, no report goes there."""

    wandb_entity: str | None = None
    """Team in Weights & Biases. Default: the account's own."""

    wandb_name: str | None = None
    """Name of the run there. Default: the run's name."""

    wandb_run_id: str | None = None
    """Id of the run there, with which it goes on after an interruption. Default: a new one."""

    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """online, offline (kept on this machine) or disabled. Default: W&B's own, online."""

    wandb_watch: Literal["false", "gradients", "parameters", "all"] | None = None
    """What of the model W&B records at times. Default: nothing."""

    use_tensorboard: bool = False
    """Write TensorBoard's files to `runs` in `output_dir` (or here). Default false."""

    use_trackio: bool | None = None
    """Report to Trackio, too. Default: true when `trackio_project_name` is given."""

    trackio_project_name: str | None = None
    """Project in Trackio. Default: none, no report goes there."""

    trackio_run_name: str | None = None
    """Name of the run there. Default: the run's name."""

    trackio_space_id: str | None = None
    """Hub id of the Space that shows it. Default: none, it stays on this machine."""

    use_comet: bool | None = None
    """Report to Comet, too. Default: true when `comet_project_name` is given."""

    comet_project_name: str | None = None
    """Project in Comet. Default: none, no report goes there."""

    comet_workspace: str | None = None
    """Workspace in Comet. Default: the account's own."""

    comet_experiment_key: str | None = None
    """Key of the experiment there, 32 to 50 characters. Default: a new one."""

    comet_mode: Literal["get", "get_or_create", "create"] | None = None
    """Go on with an experiment, or begin one. Default: Comet's own, get_or_create."""

    comet_online: bool | None = None
    """False keeps the experiment on this machine. Default: Comet's own, true."""

    use_swanlab: bool | None = None
    """Report to SwanLab, too. Default: true when `swanlab_project` is given."""

    swanlab_project: str | None = None
    """Project in SwanLab. Default: none, no report goes there."""

    swanlab_experiment_name: str | None = None
    """Name of the run there. Default: the run's name."""

    swanlab_workspace: str | None = None
    """Workspace in SwanLab. Default: the account's own."""

    swanlab_mode: Literal["cloud", "local", "offline", "disabled"] | None = None
    """cloud, local, offline or disabled. Default: SwanLab's own, cloud."""

    swanlab_web_host: str | None = None
    """Address of a SwanLab of your own. Default: none."""

    swanlab_api_host: str | None = None
    """Address of its interface. Default: none."""

    @property
    def reporters(self) -> tuple[str, ...]:
        """Transformers' names of the reporters that are asked for."""
        asked = {
            "wandb": _asked(self.use_wandb, self.wandb_project) and self.wandb_mode != "disabled",
            "tensorboard": self.use_tensorboard,
            "trackio": _asked(self.use_trackio, self.trackio_project_name),
            "comet_ml": _asked(self.use_comet, self.comet_project_name),
            "swanlab": _asked(self.use_swanlab, self.swanlab_project)
            and self.swanlab_mode != "disabled",
        }
        return tuple(name for name, wanted in asked.items() if wanted)

    @property
    def reported_names(self) -> dict[str, str]:
        """{reporter: name of the run there}, of those that are asked for."""
        names = {
            "wandb": self.wandb_name,
            "trackio": self.trackio_run_name,
            "swanlab": self.swanlab_experiment_name,
        }
        return {key: name for key in self.reporters if (name := names.get(key))}


def _asked(use: bool | None, project: str | None) -> bool:
    return bool(project) if use is None else use
