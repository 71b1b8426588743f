"""What MLflow shows of a run: a parent run, a child run for each stage, and how they are linked.

The parent run is the flow run; each stage that ran or was found in the store is a child. Stages are
linked by their key: the child that built a key carries the tags `stage.key` and `cached=false`, a
later run that found it carries `cached=true` and `built.run_id`. Models are pointers (MLflow's
external models) with address and digest; no weights are uploaded. Every page links to the pages of
what it was made from, and says what was made from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regrow.flows import descriptions
from regrow.flows.descriptions import link
from regrow.flows.known_runs import MODEL_TYPES, KnownRuns, Page, model_name, run_title
from regrow.infra import mlflow_pages
from regrow.infra.artifacts import ArtifactStore, Record
from regrow.infra.secrets import mask_secrets
from regrow.infra.tracking import Dataset, RunInfo, Tracker
from regrow.tasks import lineage
from regrow.tasks.build import Outcome, stage_key
from regrow.tasks.headline import headline, headline_of
from regrow.tasks.stage import Stage, canonical

_MOST_FILES = 6  # source files named in a description; the others are among the run's datasets
_STORE = "regrow.store"  # tag: in which store a stage is built
FLOW_RUN = "prefect.flow_run_id"
"""Tag of a run and its stages: the flow run's id."""
_KEY_CHARACTERS = 12  # of a key or digest, as everywhere else in what people read


@dataclass(frozen=True)
class Closing:
    """What a run ends with."""

    outcomes: Sequence[Outcome]
    status: str
    """FINISHED, FAILED or KILLED."""
    report: str = ""
    """The run's report, as HTML."""


class Journal:
    """Writes one run of a plan into MLflow.

    Args:
        tracker: where to.
        artifacts: the store, for the addresses of artifacts.
        name: of the run, as people see it.
    """

    def __init__(self, tracker: Tracker, artifacts: ArtifactStore, name: str) -> None:
        self._tracker, self._artifacts, self._name = tracker, artifacts, name
        self._known = KnownRuns(tracker)
        self._parent, self._prefect, self._version = "", "", ""
        self._models: dict[str, str] = {}
        self._data: dict[str, Dataset] = {}
        self._children: dict[str, str] = {}
        self._pages: dict[str, Page] = {}
        self._links: dict[str, str] = {}
        self._headlines: dict[str, str] = {}
        self._open: set[str] = set()
        self._flow_run, self._took_over = "", False

    def memory(self) -> dict[str, Any]:
        """What it has learned of its run, for another journal to `go_on` with."""
        places = ("_tracker", "_artifacts", "_name", "_known")
        return {name: value for name, value in vars(self).items() if name not in places}

    def go_on(self, memory: Mapping[str, Any]) -> None:
        """Take over the run of another journal, whose process has ended, in a call perhaps.

        That call is made again, so what it had begun is ended.
        """
        vars(self).update(memory)
        self._took_over = True
        self._end_strays()

    def _end_strays(self) -> None:
        """End the runs that the other journal began without having told so."""
        if not self._flow_run:
            return
        begun = self._tracker.find_runs(
            f"tags.`{FLOW_RUN}` = '{self._flow_run}' and attributes.status = 'RUNNING'"
        )
        for run in begun:
            if run.run_id != self._parent and run.run_id not in self._open:
                self._close(run)

    def _close(self, run: RunInfo) -> None:
        """End a run whose process was killed."""
        self._tracker.set_tags(run.run_id, {"cached": "failed", "stage.page": "false"})
        self._tracker.finish(run.run_id, "KILLED")

    def hurry(self) -> None:
        """As `JournalProcess.hurry`: here nothing waits longer than MLflow lets it."""

    @property
    def run_url(self) -> str | None:
        """The run's page, where a server shows it."""
        return self._tracker.url(self._page(self._parent)) if self._parent else None

    def stage_url(self, stage: Stage) -> str | None:
        """The page of a finished stage, where a server shows it."""
        run_id = self._children.get(stage.key)
        return self._tracker.url(self._page(run_id)) if run_id else None

    def begin(
        self, recipe_text: str, params: Mapping[str, Any], tags: Mapping[str, str], prefect: str
    ) -> None:
        """Start the parent run and write the recipe into it; `prefect` is its page there."""
        self._prefect, self._flow_run = prefect, tags.get(FLOW_RUN, "")
        if self._took_over:
            self._end_strays()
        self._parent = self._tracker.start_run(self._name, tags={"stage": "flow", **tags})
        self._tracker.log_params(self._parent, params)
        self._tracker.log_text(self._parent, recipe_text, "recipe.yaml")

    def start_stage(self, stage: Stage, gpus: str = "") -> str:
        """The child run of a stage that is about to be built, on GPUs of its own; its id."""
        self._close_dead(stage)
        store = {_STORE: self._artifacts.store.id}
        tags = {**self._tags(stage), **store, "cached": "false", "stage.page": "true"}
        tags |= {"gpus": gpus} if gpus else {}
        run_id = self._tracker.start_run(stage.title, tags, "", self._parent)
        self._open.add(run_id)
        return run_id

    def _tags(self, stage: Stage) -> dict[str, str]:
        inputs = [source.key for source in stage.inputs.values()]
        inputs += [node.key for node in _outside(stage) if node.title != "data"]
        tags = {"stage": stage.name, "stage.key": stage.key, "recipe": self._name}
        return tags | {"stage.inputs": " ".join(inputs), FLOW_RUN: self._flow_run}

    def _close_dead(self, stage: Stage) -> None:
        """Runs that built this key before were killed: who starts now holds the key's lease.

        Of this store, that is: in another one that MLflow shows, somebody may be building it now.
        """
        dead = self._tracker.find_runs(
            f"tags.`stage.key` = '{stage.key}' and attributes.status = 'RUNNING'"
            f" and tags.`{_STORE}` = '{self._artifacts.store.id}'"
        )
        for run in dead:
            self._close(run)
            parent = run.tags.get("mlflow.parentRunId")
            if parent and parent != self._parent:
                self._tracker.finish(parent, "KILLED")

    def fail_stage(self, run_id: str, message: str, status: str) -> None:
        """End a stage's run as FAILED or KILLED, with the reason as its description."""
        self._open.discard(run_id)
        tags = {"mlflow.note.content": message, "cached": "failed", "stage.page": "false"}
        self._tracker.set_tags(run_id, tags)
        self._tracker.finish(run_id, status)

    def finish_stage(self, outcome: Outcome, run_id: str | None) -> None:
        """Write a stage's figures and links; `run_id` is None for one found in the store."""
        stage, record = outcome.stage, outcome.record
        built = self._known.page_of(stage.key) if run_id is None else None
        if run_id is None:
            found = {"built.run_id": built.run_id} if built else {"stage.page": "true"}
            tags = {**self._tags(stage), "cached": "true", **found}
            run_id = self._tracker.start_run(stage.title, tags, "", self._parent)
        self._log_datasets(run_id, stage, record, built)
        self._link_models(run_id, stage, record, built)
        self._describe(run_id, outcome, built)
        if not outcome.cached:
            self._log_pictures(run_id, record)
            self._tracker.log_text(run_id, record.to_json(), "record.json")
        self._tracker.finish(run_id, "FINISHED")
        self._open.discard(run_id)

    def register(self, outcome: Outcome, name: str, model: Stage) -> str:
        """Register the published model under `name`; its version."""
        facts = {
            title: self._links[stage.key] + self._headlines[stage.key]
            for title, stage in (
                ("Evaluated by", outcome.stage.inputs.get("evaluate")),
                ("Merged by", model if model.name == "merge" else None),
                ("Trained by", model.inputs.get("train", model)),
                ("Prepared data", model.inputs.get("prepare")),
                ("Published by", outcome.stage),
            )
            if stage is not None and stage.key in self._links
        }
        facts |= {"Whole run": " · ".join(self._run_links()), "Key": f"`{model.key}`"}
        tags, text = {"stage.key": model.key}, descriptions.lines(facts)
        model_id = self._models[model.key]
        self._version = self._tracker.register(model_id, name, self._parent, text, tags)
        place = mlflow_pages.version_page(name, self._version)
        self._version = link(f"{name}, version {self._version}", place)
        return self._version

    def end(self, closing: Closing) -> None:
        """Close the parent run with a table of the stages, the report and the lineage page."""
        try:
            self._show_end(closing)
        finally:
            for run_id in self._open:  # begun in the moment of an interruption
                self._tracker.finish(run_id, closing.status)
            self._tracker.finish(self._parent, closing.status)

    def _show_end(self, closing: Closing) -> None:
        final = closing.outcomes[-1].record if closing.outcomes else None
        if final is not None:
            page = lineage.html(final, self._artifacts.lookup)
            self._tracker.log_html(self._parent, page, "lineage.html")
        if closing.report:
            self._tracker.log_html(self._parent, closing.report, "report.html")
        for outcome in closing.outcomes:
            if outcome.stage.title == "evaluate":  # so that a table of runs compares their models
                self._tracker.log_metrics(self._parent, _compared(outcome.record.result))
        note = self._parent_note(closing)
        self._tracker.set_tags(self._parent, {"mlflow.note.content": note})

    def _parent_note(self, closing: Closing) -> str:
        pages = list(self._run_links(bool(closing.report), bool(closing.outcomes)))
        pages += [link("Prefect", self._prefect)] if self._prefect else []
        rows = [
            [
                link(outcome.stage.title, self._page(self._children[outcome.stage.key])),
                "Cached" if outcome.cached else "built",
                f"{outcome.seconds:.1f}",
                f"`{outcome.stage.key[:_KEY_CHARACTERS]}`",
                headline(outcome.stage.name, outcome.record.result),
            ]
            for outcome in closing.outcomes
            if outcome.stage.key in self._children
        ]
        facts = descriptions.lines({"Look at": " · ".join(pages), "Registered": self._version})
        table = descriptions.table(["stage", "state", "seconds", "key", "result"], rows)
        return f"{facts}\n\n{table}"

    def _run_links(self, report: bool = True, graph: bool = True) -> Iterator[str]:
        """Links to what the parent run holds."""
        files = {"report": report, "lineage": graph}
        yield link(self._name, self._page(self._parent))
        yield link("recipe", self._page(self._parent, "recipe.yaml"))
        for name, there in files.items():
            if there:
                yield link(name, self._page(self._parent, f"{name}.html"))

    def _page(self, run_id: str, artifact: str = "") -> str:
        return mlflow_pages.run_page(self._tracker.experiment_id, run_id, artifact)

    def _describe(self, run_id: str, outcome: Outcome, built: RunInfo | None) -> None:
        """Write the run's page, and into the pages of its inputs that they were used."""
        stage = outcome.stage
        self._children[stage.key] = run_id
        home = mlflow_pages.run_page(built.experiment_id, built.run_id) if built else None
        self._links[stage.key] = link(stage.title, home or self._page(run_id))
        words = headline_of(outcome.record)
        self._headlines[stage.key] = f": {words}" if words else ""
        text = self._description(outcome, built)
        model = self._models.get(stage.key, "") if stage.name in MODEL_TYPES else ""
        maker = descriptions.lines({"Made by": self._links[stage.key]})
        # The page of what was found is the builder's, which has its own words.
        words_there = (built.tags.get("mlflow.note.content") if built else None) or text
        self._pages[stage.key] = Page(
            stage.key,
            words_there,
            built.run_id if built else run_id,
            model,
            f"{maker}\n\n{words_there}",
            stage.name == "prepare",
        )
        # A section of its own on the page, apart from the curves that the worker sends.
        results = {f"result/{name}": x for name, x in _numbers(outcome.record.result).items()}
        tags = {"mlflow.note.content": text, "headline": words}
        self._tracker.log_facts(run_id, _flat(outcome.record.spec), results, tags)
        if built is None:
            for key in (stage.key, *(source.key for source in stage.inputs.values())):
                if key in self._pages:
                    self._known.show_use(self._pages[key])
            self._show_use_of_base(stage)

    def _show_use_of_base(self, stage: Stage) -> None:
        for node in _outside(stage):
            if node.title == "base model":
                facts = {"Base model": node.place, "Digest": f"`{node.key}`"}
                text = descriptions.lines(facts)
                page = Page(node.key, text, "", self._models[node.key], text)
                self._known.show_use(page)

    def _description(self, outcome: Outcome, built: RunInfo | None) -> str:
        stage, record = outcome.stage, outcome.record
        model = self._models.get(stage.key)
        facts = {
            "Built by": f"the run {self._links_to(built)}, found in the store" if built else "",
            "Made from": ", ".join(self._made_from(stage)),
            "Model": self._model_link(stage, model) if model else "",
            "Whole run": " · ".join(self._run_links()),
        }
        places = {
            "Key": f"`{stage.key}`",
            "Artifact": f"`{mask_secrets(self._artifacts.store.url_of(stage_key(stage)))}`",
            "Made": f"{record.created} on {record.provenance.get('host', 'an unknown host')}",
        }
        parts = [headline(stage.name, record.result), descriptions.lines(facts)]
        return "\n\n".join(part for part in (*parts, descriptions.lines(places)) if part)

    def _links_to(self, run: RunInfo) -> str:
        return link(run_title(run), mlflow_pages.run_page(run.experiment_id, run.run_id))

    def _model_link(self, stage: Stage, model_id: str) -> str:
        place = mlflow_pages.model_page(self._tracker.experiment_id, model_id)
        return link(model_name(self._name, stage.name), place)

    def _made_from(self, stage: Stage) -> Iterator[str]:
        yield from (self._links[s.key] for s in stage.inputs.values() if s.key in self._links)
        sources = list(_outside(stage))
        files = [node for node in sources if node.title == "data"]
        for node in files[:_MOST_FILES]:
            place = mlflow_pages.runs_of_dataset(self._tracker.experiment_id, node.key[:36])
            yield f"data {link(node.note, place)} `{node.short_key}`"
        if len(files) > _MOST_FILES:
            yield f"{len(files) - _MOST_FILES} more data files"
        for node in sources:
            if node.title == "tokenizer":
                yield f"tokenizer {node.note} `{node.short_key}`"
            elif node.title == "base model":
                place = mlflow_pages.model_page(self._tracker.experiment_id, self._models[node.key])
                yield f"base model {link(node.note, place)}"

    def _log_datasets(
        self, run_id: str, stage: Stage, record: Record, built: RunInfo | None
    ) -> None:
        if stage.name == "prepare":
            recipe = built.tags.get("recipe", self._name) if built else self._name
            uri = self._artifacts.store.url_of(stage_key(stage))
            made = Dataset(f"{recipe}-prepared", uri, stage.key, "output", _data_facts(record))
            self._data[stage.key] = made
            sources = [
                Dataset(node.note or "data", node.place, node.key, "source")
                for node in _outside(stage)
                if node.title == "data"
            ]
            self._tracker.log_datasets(run_id, [made, *sources])
        context = "training" if stage.name == "train" else "validation"
        read = [self._data[s.key] for s in stage.inputs.values() if s.key in self._data]
        if read:
            named = [Dataset(d.name, d.uri, d.digest, context, d.facts) for d in read]
            self._tracker.log_datasets(run_id, named)

    def _link_models(
        self, run_id: str, stage: Stage, record: Record, built: RunInfo | None
    ) -> None:
        read = [self._base_model(node) for node in _outside(stage) if node.title == "base model"]
        read += [
            self._models[source.key]
            for source in stage.inputs.values()
            if source.key in self._models
        ]
        made = self._model(run_id, stage, built) if stage.name in MODEL_TYPES else None
        self._tracker.link_models(run_id, read, [made] if made else [])
        if stage.name == "evaluate" and read:
            scores = _numbers(record.result.get("scores", {}))
            data = next((self._data.get(s.key) for s in stage.inputs.values()), None)
            self._tracker.log_metrics(run_id, scores, model_id=read[0], dataset=data)

    def _base_model(self, node: lineage.Node) -> str:
        """The id of a base model's page, which is made when a base is first used."""
        if node.key not in self._models:
            known = self._tracker.find_model(node.key)
            name = node.note or "base-model"
            self._models[node.key] = known or self._tracker.external_model(
                name, None, "base", node.place, node.key
            )
        return self._models[node.key]

    def _model(self, run_id: str, stage: Stage, built: RunInfo | None) -> str:
        known = built.tags.get("regrow.model_id") if built else None
        if known is None:
            made = self._tracker.find_model(stage.key) if self._took_over else None
            known = made or self._tracker.external_model(
                model_name(self._name, stage.name),
                run_id,
                MODEL_TYPES[stage.name],
                mask_secrets(self._artifacts.store.url_of(stage_key(stage))),
                stage.key,
            )
            self._tracker.set_tags(run_id, {"regrow.model_id": known})
        self._models[stage.key] = known
        return known

    def _log_pictures(self, run_id: str, record: Record) -> None:
        from regrow.tasks import pictures  # matplotlib takes half a second to import

        for name, png in pictures.of_stage(record.stage, record.result).items():
            self._tracker.log_figure_bytes(run_id, png, f"plots/{name}.png")
        for name, page in self._html_files(record).items():
            self._tracker.log_html(run_id, page, name)
        rows = record.result.get("samples", [])
        if rows:
            columns = list(rows[0])
            table = [[row.get(column) for column in columns] for row in rows]
            self._tracker.log_table(run_id, columns, table, "generations.json")

    def _html_files(self, record: Record) -> dict[str, str]:
        names = [name for name in record.files if name.endswith(".html")]
        if not names:
            return {}
        folder = self._artifacts.fetch(record, ["*.html"])
        return {name: (folder / name).read_text() for name in names}


def _outside(stage: Stage) -> list[lineage.Node]:
    """What a stage reads that no stage made."""
    return list(lineage.outside(canonical(stage.spec), canonical(stage.placement)))


def _data_facts(record: Record) -> dict[str, Any]:
    """What people ask of a dataset first, for its page."""
    names = ("rows", "examples", "tokens", "supervised_tokens")
    splits = record.result["splits"]
    facts = {
        (name if split == "train" else f"{split}_{name}"): counts.get(name)
        for split, counts in splits.items()
        for name in names
    }
    return {**facts, "sequence_len": record.result.get("sequence_len")}


def _compared(result: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a run's model, and those of its base model before: the same names each run."""
    before = (result.get("comparison") or {}).get("before", {})
    return _numbers(result["scores"]) | _numbers({"before": before})


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
