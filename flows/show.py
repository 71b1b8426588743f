"""Tables for the terminal: a plan, its state, and the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regrow.configs.load import Loaded
from regrow.flows.progress import duration
from regrow.flows.workplace import Workplace
from regrow.infra.lease import Lease
from regrow.tasks.build import checkpoint_prefix, stage_key
from regrow.tasks.headline import headline
from regrow.tasks.plan import Plan
from regrow.tasks.stage import Stage, canonical

if TYPE_CHECKING:
    from regrow.flows.session import Session

_MOST_CHANGES = 4  # spec fields named in one line of a plan; more is noted as "and N more"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first being the head, as aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plan_table(loaded: Loaded, workplace: Workplace, plan: Plan) -> str:
    """Per stage: its key, cached or to run, and why."""
    rows = [["stage", "key", "state", "why"]]
    rows += ([s["stage"], s["key"][:12], s["state"], s["why"]] for s in plan_rows(workplace, plan))
    recipe = loaded.recipe
    head = [
        f"recipe   {loaded.path}",
        f"store    {workplace.store_url}",
        f"batch    {recipe.global_batch_size} rows of {recipe.sequence_len} tokens a step",
        "",
    ]
    return "\n".join(head) + table(rows)


def plan_rows(workplace: Workplace, plan: Plan) -> list[dict[str, str]]:
    """Per stage: `stage`, `key`, `state` (cached, damaged or to run) and `why`."""
    rows, states = [], {}
    for stage in plan.stages:
        states[stage.key] = state = workplace.state(stage)
        why = "" if state == "cached" else why_it_runs(workplace, plan, stage, states)
        first = state.partition(":")[0]
        rows.append({"stage": stage.title, "key": stage.key, "state": first, "why": why or state})
    return rows


def why_it_runs(workplace: Workplace, plan: Plan, stage: Stage, states: Mapping[str, str]) -> str:
    """What has changed since a recipe's stage was last there; `states` by key, this stage's too."""
    state = states[stage.key]
    if state.startswith("damaged"):
        return state
    newest = workplace.newest(plan.name, stage)
    if newest is None:
        return "never run with this recipe"
    if newest.key == stage_key(stage):
        return "its artifact was removed"
    changes = differences(newest.spec, canonical(stage.spec))
    changes += [
        f"{name} is another"
        for name, source in stage.inputs.items()
        if newest.inputs.get(name) != source.key
    ]
    shown = changes[:_MOST_CHANGES]
    if len(changes) > len(shown):
        shown.append(f"and {len(changes) - len(shown)} more")
    return "; ".join(shown) or f"stage {stage.name} has a new version ({stage.version})"


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The fields in which two specs differ: ["learning_rate: 0.001 -> 0.002"]."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for name in sorted({*old, *new}):
            inner = f"{path}.{name}" if path else name
            found += differences(old.get(name), new.get(name), inner)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, f"{path}.{i}")]
    return [] if old == new else [f"{path}: {_brief(old)} -> {_brief(new)}"]


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def status_table(workplace: Workplace, plan: Plan) -> str:
    """Per stage: complete, being built (by whom), or missing, and its newest checkpoint."""
    rows = [["stage", "key", "state", "who or what"]]
    for stage in plan.stages:
        state = workplace.state(stage)
        note = ""
        if state == "cached":
            record = workplace.artifacts.lookup(stage_key(stage))
            note = headline(stage.name, record.result) if record else ""
        else:
            holder = Lease(workplace.artifacts.store, stage_key(stage), 0).holder()
            checkpoints = workplace.artifacts.children(checkpoint_prefix(stage))
            note = f"built by {holder}" if holder else ""
            note += f" checkpoint {checkpoints[-1].rsplit('/', 1)[1]}" if checkpoints else ""
        rows.append([stage.title, stage.key[:12], state, note.strip()])
    return table(rows)


def end_table(session: Session, workplace: Workplace) -> str:
    """Per stage: state, time, artifact and main figure; then where to look."""
    rows = [["stage", "state", "time", "artifact", "result"]]
    for outcome in session.outcomes:
        stage = outcome.stage
        rows.append(
            [
                stage.title,
                "Cached" if outcome.cached else "built",
                duration(outcome.seconds),
                stage.key[:12],
                headline(stage.name, outcome.record.result),
            ]
        )
    lines = [table(rows), ""]
    for outcome in session.outcomes:
        if outcome.stage.title == "evaluate":
            lines += [_scores(outcome.record.result), ""]
        if outcome.stage.name == "publish":
            lines.append(f"model    {outcome.record.result['target']}")
    lines.append(f"store    {workplace.store_url}")
    if session.report_url:
        lines.append(f"report   {session.report_url}")
    lines.append(f"MLflow   {session.run_url or 'regrow ui'}")
    lines.append(f"Prefect  {session.prefect_page or 'regrow ui'}")
    return "\n".join(lines)


def _scores(result: Mapping[str, Any]) -> str:
    from regrow.tasks.evaluate.table import scores_table

    return scores_table(result)
