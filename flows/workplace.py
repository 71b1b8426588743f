"""Where a run works: the store, the local home, and what both remember between runs."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

from regrow.configs.recipe import Recipe
from regrow.flows.journal_process import Place
from regrow.infra.artifacts import ArtifactDamaged, ArtifactStore, Record
from regrow.infra.digests import DigestMemo
from regrow.infra.settings import Settings
from regrow.infra.store import Store, StoreError, require_reachable
from regrow.infra.tracking import Tracker
from regrow.tasks.build import Builder
from regrow.tasks.publish.delivery import why_undelivered
from regrow.tasks.stage import Stage, StageError


class Workplace:
    """The places that settings and recipe name.

    Args:
        settings: of this process.
        store_url: the recipe's `store`; default: `REGROW_STORE`, else a folder in the home.
    """

    def __init__(self, settings: Settings, store_url: str | None = None) -> None:
        self.settings = settings
        self.home: Path = settings.home
        self.store_url = store_url or settings.store_url or str(self.home / "store")

    @cached_property
    def memo(self) -> DigestMemo:
        """Remembered digests of files of this machine."""
        return DigestMemo(self.home / "digests.sqlite")

    @cached_property
    def artifacts(self) -> ArtifactStore:
        """The artifact store."""
        require_reachable(self.store_url)
        store = Store(self.store_url)
        if store.local is not None and store.local.is_file():
            raise StoreError(f"{self.store_url} is a file; a store is a directory or a URL of one")
        return ArtifactStore(store, self.home / "cache", self.memo)

    @cached_property
    def builder(self) -> Builder:
        """Builds into the store."""
        return Builder(self.artifacts, self.home, self.settings.lease_seconds, _still_valid)

    @property
    def tracking_uri(self) -> str:
        """MLflow's address when neither recipe nor environment names one: a local SQLite file."""
        return self.settings.tracking_uri or f"sqlite:///{self.home / 'mlflow.db'}"

    def tracker(self, recipe: Recipe) -> Tracker:
        """MLflow, where the recipe has it."""
        uri = recipe.mlflow_tracking_uri or self.tracking_uri
        return Tracker(uri, recipe.mlflow_experiment_name or "regrow")

    def journal_place(self, recipe: Recipe, name: str) -> Place:
        """Where the run `name` of the recipe is told of in MLflow."""
        tracker = self.tracker(recipe)
        return Place(self.settings, self.store_url, tracker.uri, tracker.experiment, name)

    def remember(self, recipe: str, stage: Stage) -> None:
        """Note that this recipe last used this key for this stage, for `newest`."""
        name = f"latest/{recipe}/{stage.title}.json"
        self.artifacts.store.write_bytes(name, json.dumps({"key": stage.key}).encode())

    def newest(self, recipe: str, stage: Stage) -> Record | None:
        """The record that this recipe's stage last had, to say what has changed since."""
        try:
            name = f"latest/{recipe}/{stage.title}.json"
            key = json.loads(self.artifacts.store.read_bytes(name))["key"]
            return self.artifacts.lookup(f"stages/{key}")
        except (FileNotFoundError, ArtifactDamaged, ValueError, KeyError, TypeError):
            return None  # it only helps to say what has changed

    def state(self, stage: Stage) -> str:
        """ "cached", "damaged: ..." or "to run"; the bytes are checked as far as that is quick."""
        try:
            return "cached" if self.builder.find(stage) is not None else "to run"
        except ArtifactDamaged as damage:
            return f"damaged: {damage.file}: {damage.why}"

    def record(self, prefix: str) -> Record | None:
        """The one stage record whose key begins with `prefix`, or None."""
        names = self._keys(prefix)
        return self.artifacts.lookup(f"stages/{names[0]}") if len(names) == 1 else None

    def one_record(self, prefix: str) -> Record:
        """The same; raises StageError where there is none, or more than one."""
        record = self.record(prefix)
        if record is not None:
            return record
        several = ", ".join(key[:12] for key in self._keys(prefix)[:4])
        if not several or not prefix:
            raise StageError(
                f"there is no artifact {prefix!r} in {self.store_url}; `regrow store ls` shows "
                "those that there are"
            )
        raise StageError(f"{prefix!r} is no one complete artifact of {self.store_url}: {several}")

    def _keys(self, prefix: str) -> list[str]:
        return [n for n in self.artifacts.store.folders("stages") if n.startswith(prefix)]


def _still_valid(stage: Stage, record: Record) -> str | None:
    if stage.name != "publish":
        return None
    target = stage.placement.target
    if record.result["output_dir"] != target:
        return f"it went to {record.result['output_dir']}, not to {target}"
    return why_undelivered(record.result)
