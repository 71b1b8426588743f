"""Where the finished model goes."""

from __future__ import annotations

from typing import Literal

from regrow.configs.sections.section import Section


class PublishSection(Section):
    """Destinations of the finished model; the artifact store keeps it in any case."""

    output_dir: str | None = None
    """Directory or URL the finished model is copied to. Default: none."""

    hub_model_id: str | None = None
    """Hub id the finished model is pushed to. Default: none."""

    hub_private_repo: bool = True
    """Create that hub repository private. Default true, as Axolotl does."""

    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = "end"
    """Accepted; only the finished model is pushed (`end`)."""

    register_as: str | None = None
    """Name under which MLflow's model registry lists the model. Default: not registered."""
