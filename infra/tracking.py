"""Runs, metrics and lineage in MLflow. The only importer of mlflow.

`Tracker` is for the process of the flow, or the one beside it that writes for it: it owns names,
parameters and status. `MetricsReporter` is for the training worker's rank 0: it adds metrics, and
can neither slow the training down nor end it. `import mlflow` takes seconds: on first use only.
"""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.infra import mlflow_values as form
from regrow.infra.metric_buffer import MetricBuffer, Point
from regrow.infra.mlflow_values import Dataset, RunInfo
from regrow.infra.new_database import alone, make_whole
from regrow.infra.reachable import require_answer
from regrow.infra.secrets import mask_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_logger = logging.getLogger(__name__)

# MLflow itself would retry an unreachable server for minutes (7 retries, backoff factor 2).
_ANSWER_SECONDS = 5.0
_ANSWER_KEEPS_SECONDS = 1.0  # so long a server that answered is not asked whether it is there
# SQLite refuses at once, without its busy timeout, where two writers would block each other.
_LOCKED_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)

# By this tag, which its own pages set, MLflow shows runs and models rather than chat traces.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

STATUSES = ("FINISHED", "FAILED", "KILLED")


class TrackingError(ValueError):
    """MLflow cannot be used as asked; the message names its URI and the remedy."""


class _Connection:
    """One MLflow client: made on first use, safe to share between threads, quick to give up."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.name = mask_secrets(uri)
        self._client: MlflowClient | None = None
        self._lock = threading.Lock()
        self._answered = float("-inf")

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """What the client's `method` returns.

        Raises:
            TrackingError: when the server cannot be reached (within seconds) or refuses.
        """
        from mlflow.exceptions import MlflowException

        for pause in (*_LOCKED_PAUSES, None):
            try:
                result = getattr(self._connected(), method)(*args, **kwargs)
            except MlflowException as error:
                if pause is None or "database is locked" not in str(error):
                    raise TrackingError(f"MLflow at {self.name}: {_reason(error)}") from error
                time.sleep(pause)
            else:
                self._answered = time.monotonic()
                return result
        raise AssertionError("unreachable")

    def _connected(self) -> MlflowClient:
        with self._lock:
            if self.uri.startswith(("http://", "https://")):
                self._require_answer()
            if self._client is None:
                self._client = _new_client(self.uri)
            return self._client

    def _require_answer(self) -> None:
        if time.monotonic() - self._answered < _ANSWER_KEEPS_SECONDS:
            return
        try:
            require_answer(f"{self.uri.rstrip('/')}/health", _ANSWER_SECONDS)
        except OSError as error:
            raise TrackingError(
                f"MLflow at {self.name} does not answer ({error}). Start it (`mlflow server`), or "
                "correct the recipe key `mlflow_tracking_uri` or MLFLOW_TRACKING_URI, or leave "
                "both out to track into a local SQLite file"
            ) from error
        self._answered = time.monotonic()


def _reason(error: Exception) -> str:
    """The first lines of an MLflow error: SQLAlchemy's hold whole statements after them."""
    return mask_secrets(str(error))[:500]


def _open_client(uri: str) -> MlflowClient:
    from mlflow import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return MlflowClient(uri)
    except (SQLAlchemyError, ImportError) as error:
        raise TrackingError(f"cannot open MLflow {mask_secrets(uri)}: {_reason(error)}") from error


def _new_client(uri: str) -> MlflowClient:
    if not uri.startswith("sqlite:///"):
        return _open_client(uri)
    # Else a new database greets the user with a line for each of its migrations.
    for name in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    database = Path(uri.removeprefix("sqlite:///"))
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with alone(database.with_name(database.name + ".lock")):
            if not database.exists():
                make_whole(database, _open_client)
            return _open_client(uri)
    except OSError as error:
        raise TrackingError(f"mlflow_tracking_uri {mask_secrets(uri)}: {_reason(error)}") from error


@contextmanager
def _default_uri(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's default for a moment, where MLflow itself reads the default.

    A registry in a database looks the source model up through the default (3.17, a TODO in
    store/model_registry/sqlalchemy_store.py), which else is a new file in the current directory.
    """
    import mlflow

    if uri.startswith(("http://", "https://")):
        yield
        return
    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # pyright: ignore[reportArgumentType] (None: unset)


def preload() -> None:
    """Import MLflow now, while this process would otherwise wait for something else."""
    import mlflow  # noqa: F401


class Tracker:
    """The runs of one experiment.

    Args:
        uri: of an MLflow server, or `sqlite:////absolute/path/mlflow.db`.
        experiment: name; made when absent.
        artifact_root: where a new experiment keeps its files; with SQLite by default the folder
            `mlartifacts` beside the database, else the server decides.

    Every method raises TrackingError when MLflow cannot be reached or refuses.
    """

    def __init__(self, uri: str, experiment: str, artifact_root: str | None = None) -> None:
        self.uri = uri
        self.experiment = experiment
        if artifact_root is None and uri.startswith("sqlite:///"):
            database = Path(uri.removeprefix("sqlite:///")).absolute()
            artifact_root = (database.parent / "mlartifacts").as_uri()
        self._artifact_root = artifact_root
        self._connection = _Connection(uri)
        self._experiment_id: str | None = None
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Import MLflow, reach the server and make the experiment, now rather than on first use."""
        with self._lock:
            if self._experiment_id is None:
                self._experiment_id = self._find_or_make_experiment()

    def _find_or_make_experiment(self) -> str:
        found = self._connection.call("get_experiment_by_name", self.experiment)
        if found is None:
            make = ("create_experiment", self.experiment, self._artifact_root, _EXPERIMENT_TAGS)
            try:
                return self._connection.call(*make)
            except TrackingError:  # another process may have been quicker
                found = self._connection.call("get_experiment_by_name", self.experiment)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"the MLflow experiment {self.experiment!r} at {self._connection.name} is deleted: "
                f"restore it with `mlflow experiments restore -x {found.experiment_id}`, or name "
                "another with the recipe key `mlflow_experiment_name`"
            )
        return found.experiment_id

    @property
    def experiment_id(self) -> str:
        """MLflow's id of the experiment."""
        self.connect()
        assert self._experiment_id is not None
        return self._experiment_id

    def start_run(
        self,
        name: str,
        tags: Mapping[str, Any] | None = None,
        description: str = "",
        parent_run_id: str | None = None,
    ) -> str:
        """A new running run; its id. `description` is markdown."""
        # https://mlflow.org/docs/latest/ml/tracking/tracking-api/ (system tags)
        system = {"mlflow.source.name": "regrow", "mlflow.source.type": "LOCAL"}
        if description:
            system["mlflow.note.content"] = description
        if parent_run_id:
            system["mlflow.parentRunId"] = parent_run_id
        values = form.texts({**system, **(tags or {})}, form.TAG_CHARACTERS)
        run = self._connection.call("create_run", self.experiment_id, tags=values, run_name=name)
        return run.info.run_id

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Parameters; what is not a string is written as JSON. A parameter cannot be changed."""
        self.log_facts(run_id, params=params)

    def set_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Add or replace tags of a run."""
        self.log_facts(run_id, tags=tags)

    def log_facts(
        self,
        run_id: str,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Parameters, metrics and tags of a run in as few requests as MLflow allows."""
        from mlflow.entities import Param, RunTag

        texts = form.texts(params or {}, form.PARAM_CHARACTERS)
        notes = form.texts(tags or {}, form.TAG_CHARACTERS)
        self._log_batches(
            run_id,
            params=[Param(*item) for item in texts.items()],
            metrics=_metrics(metrics or {}, 0),
            tags=[RunTag(*item) for item in notes.items()],
        )

    def log_metrics(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        step: int = 0,
        model_id: str | None = None,
        dataset: Dataset | None = None,
    ) -> None:
        """Metrics of a run, and, with `model_id`, of a model.

        Args:
            dataset: the logged dataset that they were measured on; with `model_id`, the model's
                page lists it.
        """
        name, digest = (dataset.name, dataset.short_digest) if dataset else (None, None)
        points = _metrics(metrics, step, model_id, name, digest, run_id)
        self._log_batches(run_id, metrics=points)

    def _log_batches(self, run_id: str, **kinds: Sequence[Any]) -> None:
        parts = {kind: list(form.parts(x, form.PER_REQUEST[kind])) for kind, x in kinds.items()}
        for i in range(max(map(len, parts.values()))):
            batch = {kind: part[i] for kind, part in parts.items() if i < len(part)}
            self._connection.call("log_batch", run_id, **batch)

    def log_text(self, run_id: str, text: str, path: str) -> None:
        """A text file at `path` among the run's artifacts; secrets in it are masked."""
        self._connection.call("log_text", run_id, mask_secrets(text), path)

    def log_html(self, run_id: str, html: str, path: str) -> None:
        """A page that MLflow shows in place; `path` ends in .html."""
        assert path.endswith(".html"), path
        self.log_text(run_id, html, path)

    def log_table(
        self, run_id: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], path: str
    ) -> None:
        """Rows that MLflow shows as a table, runs side by side; `path` ends in .json."""
        data = {name: [form.masked(row[i]) for row in rows] for i, name in enumerate(columns)}
        self._connection.call("log_table", run_id, data, path)

    def log_figure_bytes(self, run_id: str, png_bytes: bytes, path: str) -> None:
        """A PNG image at `path` among the run's artifacts."""
        self._connection.call("log_stream", run_id, io.BytesIO(png_bytes), path)

    def log_datasets(self, run_id: str, datasets: Sequence[Dataset]) -> None:
        """Datasets that the run read or made."""
        from mlflow.entities import Dataset as Entity
        from mlflow.entities import DatasetInput, InputTag

        uses = []
        for data in datasets:
            uri = mask_secrets(data.uri)
            kind, source = form.dataset_source(uri)
            facts = json.dumps({**data.facts, "uri": uri}, ensure_ascii=False, default=str)
            entity = Entity(data.name, data.short_digest, kind, source, profile=facts)
            # "mlflow.data.context" is the tag that mlflow.log_input(context=...) sets.
            uses.append(DatasetInput(entity, [InputTag("mlflow.data.context", data.context)]))
        for part in form.parts(uses, form.PER_REQUEST["datasets"]):
            self._connection.call("log_inputs", run_id, datasets=part)

    def external_model(
        self,
        name: str,
        run_id: str | None,
        model_type: str,
        uri: str,
        digest: str,
        params: Mapping[str, Any] | None = None,
    ) -> str:
        """A model whose bytes stay where they are (`uri`), made by a run if by any; its id."""
        place = {"uri": uri, "digest": digest}
        # The tag by which MLflow knows a model without bytes of its own (create_external_model).
        tags = form.texts({"mlflow.model.isExternal": "true", **place}, form.TAG_CHARACTERS)
        facts = form.texts({**place, **(params or {})}, form.PARAM_CHARACTERS)
        made = (self.experiment_id, form.model_name(name), run_id, tags, facts, model_type)
        model = self._connection.call("create_logged_model", *made)
        self._connection.call("finalize_logged_model", model.model_id, "READY")
        return model.model_id

    def find_model(self, digest: str) -> str | None:
        """The id of the experiment's external model of that digest."""
        query = f"tags.digest = {form.quoted(digest)}"
        options = {"filter_string": query, "max_results": 1}
        found = self._connection.call("search_logged_models", [self.experiment_id], **options)
        return found[0].model_id if found else None

    def set_model_tags(self, model_id: str, tags: Mapping[str, Any]) -> None:
        """Add or replace tags of a logged model."""
        values = form.texts(tags, form.TAG_CHARACTERS)
        self._connection.call("set_logged_model_tags", model_id, values)

    def link_models(
        self, run_id: str, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
    ) -> None:
        """Show models, by id, as what the run read and what it made."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        if inputs:
            read = [LoggedModelInput(model_id) for model_id in inputs]
            self._connection.call("log_inputs", run_id, models=read)
        if outputs:
            made = [LoggedModelOutput(model_id, step=0) for model_id in outputs]
            self._connection.call("log_outputs", run_id, made)

    def register(
        self,
        model_id: str,
        name: str,
        run_id: str,
        description: str = "",
        tags: Mapping[str, Any] | None = None,
    ) -> str:
        """The version of the registered model `name` that stands for this model.

        A version that has the same tags already (give the model's digest as one) is returned
        instead of making another of the same bytes.
        """
        values = form.texts(tags or {}, form.TAG_CHARACTERS)
        for version in self._versions(name):
            if values and values.items() <= version.tags.items():
                return str(version.version)
        with _default_uri(self.uri):
            made = self._connection.call(
                "create_model_version",
                name,
                source=f"models:/{model_id}",
                run_id=run_id,
                model_id=model_id,
                tags=values,
                description=mask_secrets(description),
                await_creation_for=0,  # nothing is copied: it is ready at once
            )
        return str(made.version)

    def _versions(self, name: str) -> list[Any]:
        """Versions of a registered model, which is made when absent."""
        try:
            self._connection.call("create_registered_model", name)
        except TrackingError as error:
            if getattr(error.__cause__, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                raise
        return list(self._connection.call("search_model_versions", f"name={form.quoted(name)}"))

    def finish(self, run_id: str, status: str) -> None:
        """End a run with one of `STATUSES`."""
        assert status in STATUSES, status
        self._connection.call("set_terminated", run_id, status)

    def find_runs(
        self, filter_string: str, limit: int = 100, everywhere: bool = False
    ) -> list[RunInfo]:
        """Runs, newest first, by MLflow's filter (`tags.stage = 'train'`).

        Args:
            everywhere: in all experiments, not only in this one.
        """
        places = [self.experiment_id]
        if everywhere:
            places = [e.experiment_id for e in self._connection.call("search_experiments")]
        found = self._connection.call("search_runs", places, filter_string, max_results=limit)
        return [_run_info(run) for run in found]

    def url(self, page: str) -> str | None:
        """The full address of one of `mlflow_pages`; None where no server shows it (SQLite)."""
        if not self.uri.startswith(("http://", "https://")):
            return None
        return f"{form.without_user(self.uri).rstrip('/')}/{page}"


def _metrics(values: Mapping[str, float], step: int, *rest: Any) -> list[Any]:
    """MLflow's entities; `rest` is model id, dataset name, dataset digest and run id."""
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    return [
        Metric(form.metric_name(name), float(value), now, step, *rest)
        for name, value in values.items()
    ]


def _run_info(run: Run) -> RunInfo:
    info, data = run.info, run.data
    facts = (data.tags, data.params, data.metrics, info.experiment_id)
    return RunInfo(info.run_id, info.run_name or "", info.status, *facts)


class MetricsReporter:
    """Live metrics of one run, for the process that trains. Touches neither status nor parameters.

    A run that already has a metric up to some step takes only later steps of it, so a worker that
    starts again from a checkpoint does not write the replayed steps twice.

    Args:
        uri: as for `Tracker`.
        run_id: of a run that the flow has started.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self._connection = _Connection(uri)
        self._run_id = run_id
        self._last_steps: dict[str, int] | None = None
        try:
            # Here and not in the thread: two threads that import large packages at once can meet
            # each other's half-imported modules.
            import mlflow  # noqa: F401
        except ImportError as error:
            _logger.warning("metrics are not recorded: %s; pip install mlflow", error)
            self._buffer = None
        else:
            self._buffer = MetricBuffer(
                self._send, TrackingError, largest=form.PER_REQUEST["metrics"]
            )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take metrics of one step; returns at once, whatever the server does."""
        if self._buffer is not None:
            self._buffer.add({form.metric_name(k): float(v) for k, v in metrics.items()}, step)

    def close(self) -> None:
        """Send the rest, for some seconds at most; what could not be sent is warned about."""
        if self._buffer is not None:
            self._buffer.close()

    def _send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        if self._last_steps is None:
            self._last_steps = self._recorded_steps()
        last = self._last_steps
        new = [p for p in points if p.step > last.get(p.name, -1)]
        if new:
            metrics = [Metric(p.name, p.value, p.time_ms, p.step) for p in new]
            self._connection.call("log_batch", self._run_id, metrics=metrics)

    def _recorded_steps(self) -> dict[str, int]:
        """The last step of each metric that an earlier attempt has recorded in this run."""
        run = self._connection.call("get_run", self._run_id)
        return {
            name: max(
                point.step
                for point in self._connection.call("get_metric_history", self._run_id, name)
            )
            for name in run.data.metrics
        }
