"""What MLflow shows of a run: a parent run, a child run for each stage, and how they are linked.

The parent run is the flow run; each stage that ran or was found in the store is a child. Stages are
linked by their key: the child that built a key carries the tags `stage.key` and `cached=false`, a
later run that found it carries `cached=true` and `built.run_id`. Models are pointers (MLflow's
external models) with address and digest; no weights are uploaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regrow.infra.artifacts import ArtifactStore, Record
from regrow.infra.secrets import mask_secrets
from regrow.infra.tracking import RunInfo, Tracker
from regrow.tasks import lineage, pictures
from regrow.tasks.build import Outcome, stage_key
from regrow.tasks.headline import headline
from regrow.tasks.stage import Stage

# What a stage makes, as MLflow's model types; the other stages make no model.
_MODEL_TYPES = {"train": "trained", "merge": "merged"}


class Journal:
    """Writes one run of a plan into MLflow.

    Args:
        tracker: where to.
        artifacts: the store, for the addresses of artifacts.
        name: of the run, as people see it.
    """

    def __init__(self, tracker: Tracker, artifacts: ArtifactStore, name: str) -> None:
        self._tracker, self._artifacts, self._name = tracker, artifacts, name
        self._parent = ""
        self._models: dict[str, str] = {}
        self._datasets: dict[str, tuple[str, str]] = {}
        self._open: set[str] = set()

    @property
    def parent_run_id(self) -> str:
        """MLflow's id of the run that holds the stages; "" before `begin`."""
        return self._parent

    def begin(self, recipe_text: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Start the parent run and write the recipe into it."""
        self._parent = self._tracker.start_run(self._name, tags={"stage": "flow", **tags})
        self._tracker.log_params(self._parent, params)
        self._tracker.log_text(self._parent, recipe_text, "recipe.yaml")

    def start_stage(self, stage: Stage) -> str:
        """The child run of a stage that is about to be built; its id."""
        self._close_dead(stage)
        tags = {"stage": stage.name, "stage.key": stage.key, "cached": "false"}
        run_id = self._tracker.start_run(stage.title, tags, "", self._parent)
        self._open.add(run_id)
        return run_id

    def _close_dead(self, stage: Stage) -> None:
        """Runs that built this key before were killed: who starts now holds the key's lease."""
        dead = self._tracker.find_runs(
            f"tags.`stage.key` = '{stage.key}' and attributes.status = 'RUNNING'"
        )
        for run in dead:
            for run_id in (run.run_id, run.tags.get("mlflow.parentRunId")):
                if run_id and run_id != self._parent:
                    self._tracker.finish(run_id, "KILLED")

    def fail_stage(self, run_id: str, message: str, status: str) -> None:
        """End a stage's run as FAILED or KILLED, with the reason as its description."""
        self._open.discard(run_id)
        self._tracker.set_tags(run_id, {"mlflow.note.content": message, "cached": "failed"})
        self._tracker.finish(run_id, status)

    def finish_stage(self, outcome: Outcome, run_id: str | None) -> None:
        """Write a stage's figures and links; `run_id` is None for one found in the store."""
        stage, record = outcome.stage, outcome.record
        built = self._built_before(stage) if run_id is None else None
        if run_id is None:
            tags = {"stage": stage.name, "stage.key": stage.key, "cached": "true"}
            tags |= {"built.run_id": built.run_id} if built else {}
            run_id = self._tracker.start_run(stage.title, tags, "", self._parent)
        self._tracker.set_tags(run_id, {"mlflow.note.content": self._describe(outcome, built)})
        self._tracker.log_params(run_id, _flat(record.spec))
        # A section of its own on the page, apart from the curves that the worker sends.
        results = {f"result/{name}": x for name, x in _numbers(record.result).items()}
        self._tracker.log_metrics(run_id, results)
        self._log_datasets(run_id, stage, record)
        self._link_models(run_id, stage, record, built)
        if not outcome.cached:
            self._log_pictures(run_id, record)
            self._tracker.log_text(run_id, record.to_json(), "record.json")
        self._tracker.finish(run_id, "FINISHED")
        self._open.discard(run_id)

    def register(self, outcome: Outcome, name: str, model: Stage) -> str:
        """Register the published model under `name`; its version."""
        key = outcome.stage.key
        return self._tracker.register(
            self._models[model.key],
            name,
            self._parent,
            f"Published by the run `{self._name}`, stage key `{key}`.",
            {"stage.key": model.key},
        )

    def end(self, outcomes: Sequence[Outcome], status: str, final: Record | None) -> None:
        """Close the parent run with a table of the stages and the lineage page."""
        lines = ["| stage | state | seconds | key | result |", "|---|---|---|---|---|"]
        for outcome in outcomes:
            stage, result = outcome.stage, outcome.record.result
            state = "Cached" if outcome.cached else "built"
            cells = [stage.title, state, f"{outcome.seconds:.1f}", f"`{stage.key[:12]}`"]
            lines.append(f"| {' | '.join(cells)} | {headline(stage.name, result)} |")
            if stage.title == "evaluate":  # so that a table of runs compares their models
                self._tracker.log_metrics(self._parent, _numbers(result["scores"]))
        self._tracker.set_tags(self._parent, {"mlflow.note.content": "\n".join(lines)})
        if final is not None:
            page = lineage.html(final, self._artifacts.lookup)
            self._tracker.log_html(self._parent, page, "lineage.html")
        for run_id in self._open:  # begun in the moment of an interruption
            self._tracker.finish(run_id, status)
        self._tracker.finish(self._parent, status)

    def _built_before(self, stage: Stage) -> RunInfo | None:
        found = self._tracker.find_runs(
            f"tags.`stage.key` = '{stage.key}' and tags.cached = 'false'", limit=1
        )
        return found[0] if found else None

    def _describe(self, outcome: Outcome, built: RunInfo | None) -> str:
        stage, record = outcome.stage, outcome.record
        lines = [
            headline(stage.name, record.result),
            "",
            f"**Key** `{stage.key}`",
            f"**Artifact** `{self._artifacts.store.url_of(stage_key(stage))}`",
            f"**Made** {record.created} on {record.provenance.get('host', 'an unknown host')}",
        ]
        if built is not None:
            lines.append(f"**Found in the store**, built by the run `{built.run_id}`")
        lines += [f"**Input {name}** `{key}`" for name, key in record.inputs.items()]
        return "  \n".join(lines)

    def _log_datasets(self, run_id: str, stage: Stage, record: Record) -> None:
        if stage.name == "prepare":
            for digest, place in stage.placement.locations.items():
                name = place.rsplit("/", 1)[-1]
                self._tracker.log_dataset(run_id, name, mask_secrets(place), digest, "source", {})
            self._dataset(run_id, stage, "output", _numbers(record.result))
        for source in stage.inputs.values():
            if source.name == "prepare":
                context = "training" if stage.name == "train" else "validation"
                self._dataset(run_id, source, context, {})

    def _dataset(self, run_id: str, stage: Stage, context: str, profile: Mapping[str, Any]) -> None:
        name, uri = f"{self._name}-prepared", self._artifacts.store.url_of(stage_key(stage))
        self._tracker.log_dataset(run_id, name, uri, stage.key, context, profile)
        self._datasets[stage.key] = (name, stage.key)

    def _link_models(
        self, run_id: str, stage: Stage, record: Record, built: RunInfo | None
    ) -> None:
        read = [
            self._models[source.key]
            for source in stage.inputs.values()
            if source.key in self._models
        ]
        made = self._model(run_id, stage, built) if stage.name in _MODEL_TYPES else None
        self._tracker.link_models(run_id, read, [made] if made else [])
        if stage.name == "evaluate" and read:
            scores = _numbers(record.result.get("scores", {}))
            data = next((self._datasets.get(s.key) for s in stage.inputs.values()), None)
            self._tracker.log_metrics(run_id, scores, model_id=read[0], dataset=data)

    def _model(self, run_id: str, stage: Stage, built: RunInfo | None) -> str:
        known = built.tags.get("regrow.model_id") if built else None
        if known is None:
            known = self._tracker.external_model(
                f"{self._name}-{_MODEL_TYPES[stage.name]}",
                run_id,
                _MODEL_TYPES[stage.name],
                self._artifacts.store.url_of(stage_key(stage)),
                stage.key,
            )
            self._tracker.set_tags(run_id, {"regrow.model_id": known})
        self._models[stage.key] = known
        return known

    def _log_pictures(self, run_id: str, record: Record) -> None:
        for name, png in pictures.of_stage(record.stage, record.result).items():
            self._tracker.log_figure_bytes(run_id, png, f"plots/{name}.png")
        for name, page in self._pages(record).items():
            self._tracker.log_html(run_id, page, name)
        rows = record.result.get("samples", [])
        if rows:
            columns = list(rows[0])
            table = [[row.get(column) for column in columns] for row in rows]
            self._tracker.log_table(run_id, columns, table, "generations.json")

    def _pages(self, record: Record) -> dict[str, str]:
        names = [name for name in record.files if name.endswith(".html")]
        if not names:
            return {}
        folder = self._artifacts.fetch(record)
        return {name: (folder / name).read_text() for name in names}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}: MLflow's parameters are flat."""
    if not isinstance(value, Mapping):
        return {prefix or "value": value}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}.{name}" if prefix else name)
    return flat


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a result, flat, as metrics; lists and texts are left out."""
    return {
        name: float(value)
        for name, value in _flat(result).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
