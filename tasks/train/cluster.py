"""Which workers of a Ray cluster train: placement in the recipe's words, made plain. Light."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrow.configs.recipe import Recipe


@dataclass(frozen=True)
class RayWorkers:
    """A number of equal workers, each of which runs a machine's ranks."""

    count: int | None = None
    """None: one for each machine of the cluster."""
    resources: Mapping[str, float] = field(default_factory=lambda: {"GPU": 1})
    """Of each, in Ray's names."""

    @property
    def ranks(self) -> int:
        """Of each worker: one for each of its GPUs, or one on the CPU."""
        return max(1, int(self.resources.get("GPU", 0)))

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> RayWorkers | None:
        """What the recipe says of it; None: it does not ask for Ray."""
        if recipe.launcher != "ray":
            return None
        return cls(recipe.ray_num_workers, dict(recipe.resources_per_worker))

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> RayWorkers | None:
        """The inverse of canonical JSON."""
        return cls(**data) if data else None
