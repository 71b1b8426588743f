"""The runs and models that MLflow has for a stage's key, and the `used by` on their pages.

The page of a key is the run that built it, or, where MLflow knows none, the first that found it in
the store. MLflow links backwards only (from a run to what it read); so each page also names what
was made from it, and is written again when that changes.
"""

from __future__ import annotations

from dataclasses import dataclass

from regrow.flows import descriptions
from regrow.flows.descriptions import link
from regrow.infra import mlflow_pages
from regrow.infra.tracking import RunInfo, Tracker

MODEL_TYPES = {"train": "trained", "merge": "merged"}
"""What a stage makes, as MLflow's model types; the other stages make no model."""

_IS_PAGE = "tags.`stage.page` = 'true'"
_MOST_USERS = 200
_NOTE = "mlflow.note.content"


@dataclass(frozen=True)
class Page:
    """Where people read about a key: a run's page, a model's, or both."""

    key: str
    description: str
    run_id: str = ""
    model_id: str = ""
    model_description: str = ""
    data: bool = False
    """Whether it stands for a dataset."""


class KnownRuns:
    """What one experiment (or a neighbour of it) knows about keys."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def page_of(self, key: str) -> RunInfo | None:
        """The run whose page is that of a key; from another experiment if need be."""
        query = f"tags.`stage.key` = '{key}' and {_IS_PAGE}"
        found = self._tracker.find_runs(query, limit=1)
        found = found or self._tracker.find_runs(query, limit=1, everywhere=True)
        return found[0] if found else None

    def show_use(self, page: Page) -> None:
        """Write on the page what was made from it until now.

        Two runs may do so at once: each looks again after it has written, so the last one to write
        has seen what the other did.
        """
        shown = ""
        while (use := self._use(page)) != shown:
            shown = use
            if page.run_id:
                note = descriptions.with_use(page.description, use)
                self._tracker.set_tags(page.run_id, {_NOTE: note})
            if page.model_id:
                note = descriptions.with_use(page.model_description, use)
                self._tracker.set_model_tags(page.model_id, {_NOTE: note})

    def _use(self, page: Page) -> str:
        query = f"tags.`stage.inputs` LIKE '%{page.key}%' and {_IS_PAGE}"
        users = self._tracker.find_runs(query, limit=_MOST_USERS)
        users.sort(key=lambda run: "regrow.model_id" not in run.tags)  # models are asked for most
        everything = ""
        if page.data:
            place = mlflow_pages.runs_of_dataset(self._tracker.experiment_id, page.key[:36])
            everything = link("all runs on this data", place)
        return descriptions.used_by([_user(run) for run in users], everything)


def _user(run: RunInfo) -> str:
    """A run that used something, as a link; for one that made a model, with a link to that."""
    title = link(run_title(run), mlflow_pages.run_page(run.experiment_id, run.run_id))
    model = run.tags.get("regrow.model_id")
    if model:
        name = model_name(run.tags.get("recipe", ""), run.tags.get("stage", ""))
        page = mlflow_pages.model_page(run.experiment_id, model)
        title = f"{title}, model {link(name, page)}"
    headline = run.tags.get("headline")
    return f"{title}: {headline}" if headline else title


def run_title(run: RunInfo) -> str:
    """How links call a run: its stage, and the recipe that it was for."""
    recipe = run.tags.get("recipe")
    return f"{run.name} of {recipe}" if recipe else run.name


def model_name(recipe: str, stage: str) -> str:
    """How MLflow's pages call the model that a stage of a recipe made."""
    return f"{recipe}-{MODEL_TYPES[stage]}" if stage in MODEL_TYPES else recipe
