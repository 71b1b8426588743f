"""A run's report: one HTML page that loads nothing, kept beside the run and sent to people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from regrow.infra.artifacts import Record
from regrow.infra.secrets import mask_secrets
from regrow.tasks import charts, lineage
from regrow.tasks.build import Outcome
from regrow.tasks.headline import headline
from regrow.tasks.plan import Plan
from regrow.tasks.scores import SCORES
from regrow.tasks.stage import Stage

_MOST_ANSWERS = 20  # shown in full; MLflow has the whole table
_KEY_CHARACTERS = 12  # of a key, as everywhere else in what people read


@dataclass(frozen=True)
class RunFacts:
    """What a report tells of."""

    plan: Plan
    outcomes: Sequence[Outcome]
    """Of the stages that are complete, in order."""
    status: str
    """FINISHED, FAILED or KILLED."""
    recipe: str
    """Its text."""
    ended: str
    """UTC, ISO 8601."""
    places: Mapping[str, str]
    """Where to look further: {"store": "s3://...", ...}; shown as text."""


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 32px auto; max-width: 1080px; padding: 0 24px;
  color: #1d2733; background: #fff }}
h1 {{ font-size: 22px; margin-bottom: 4px }} h2 {{ font-size: 16px; margin: 32px 0 8px }}
p {{ margin: 4px 0 }} code, pre {{ font-size: 12px }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: 5px 16px 5px 0; border-bottom: 1px solid #dde3ea;
  vertical-align: top }}
td.number, th.number {{ text-align: right }} .scores {{ width: auto }}
.FINISHED {{ color: #00664b }} .FAILED, .KILLED {{ color: #b03a00 }}
.answers td {{ white-space: pre-wrap; overflow-wrap: anywhere; width: 25% }}
.right {{ color: #00664b }} svg {{ max-width: 100%; height: auto }}
.charts {{ display: grid; grid-template-columns: 1fr 1fr; gap: 16px }}
pre {{ background: #f5f7f9; padding: 12px; overflow-x: auto }}
</style></head><body>
{body}
</body></html>
"""


def page(run: RunFacts, lookup: lineage.Lookup) -> str:
    """The report.

    Args:
        lookup: finds the record of a key, for the lineage.
    """
    results = {o.stage.title: o.record.result for o in run.outcomes}
    final = run.outcomes[-1].record if run.outcomes else None
    parts = [
        _head(run),
        _scores(results.get("evaluate", {})),
        _stages(run),
        _charts(results),
        _answers(results.get("evaluate", {})),
        _lineage(final, lookup),
        f"<h2>Recipe</h2><pre>{escape(run.recipe)}</pre>",
        _machines(run.outcomes),
    ]
    title = f"Regrow: {run.plan.name}"
    return mask_secrets(_PAGE.format(title=escape(title), body="\n".join(filter(None, parts))))


def _head(run: RunFacts) -> str:
    built = [o for o in run.outcomes if not o.cached]
    seconds = sum(o.seconds for o in run.outcomes)
    facts = [
        f'<b class="{run.status}">{run.status.lower()}</b> {run.ended[:16].replace("T", " ")} UTC',
        f"{len(built)} of {len(run.plan.stages)} stages built, "
        f"{len(run.outcomes) - len(built)} found in the store",
        f"{seconds:,.1f} s in stages",
    ]
    places = "".join(
        f"<p>{escape(name)} <code>{escape(place)}</code></p>" for name, place in run.places.items()
    )
    return f"<h1>{escape(run.plan.name)}</h1><p>{' · '.join(facts)}</p>{places}"


def _scores(result: Mapping[str, Any]) -> str:
    comparison = result.get("comparison") or {}
    before, after = comparison.get("before", {}), comparison.get("after", {})
    known = [s for s in SCORES if None not in (before.get(s.name), after.get(s.name))]
    if not known:
        return ""
    rows = [[s.title, s.show(before[s.name]), s.show(after[s.name])] for s in known]
    head = ["on held-out data", "before", "after"]
    return "<h2>Before and after</h2>" + _table(head, rows, "scores", numbers=(1, 2))


def _stages(run: RunFacts) -> str:
    done = {outcome.stage.key: outcome for outcome in run.outcomes}
    rows = [_stage_row(stage, done.get(stage.key)) for stage in run.plan.stages]
    head = ["stage", "key", "made from", "state", "seconds", "MB", "result"]
    return "<h2>Plan and stages</h2>" + _table(head, rows, numbers=(4, 5))


def _stage_row(stage: Stage, outcome: Outcome | None) -> list[str]:
    read = ", ".join(source.title for source in stage.inputs.values()) or "sources"
    row = [stage.title, stage.key[:_KEY_CHARACTERS], read]
    if outcome is None:
        return [*row, "not reached", "", "", ""]
    figures = [f"{outcome.seconds:,.1f}", f"{outcome.record.size / 1e6:,.1f}"]
    state = "found in the store" if outcome.cached else "built"
    return [*row, state, *figures, headline(stage.name, outcome.record.result)]


def _charts(results: Mapping[str, Mapping[str, Any]]) -> str:
    drawn = [svg for svg in _all_charts(results) if svg]
    return f'<h2>Charts</h2><div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _all_charts(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if "train" in results:
        history = results["train"].get("history", ())
        series = {
            "training": [(r["step"], r["loss"]) for r in history if "loss" in r],
            "validation": [(r["step"], r["eval_loss"]) for r in history if "eval_loss" in r],
        }
        yield charts.curves("Loss (nats a token)", "optimizer step", series)
    train = results.get("prepare", {}).get("splits", {}).get("train", {})
    if "length_histogram" in train:
        yield charts.bars("Length of examples", "tokens", train["length_histogram"])
    if "fill_histogram" in train:
        label = "share of sequence_len"
        yield charts.bars("Fill of packed rows", label, train["fill_histogram"], percent=True)


def _answers(result: Mapping[str, Any]) -> str:
    samples = result.get("samples") or []
    if not samples:
        return ""
    rows = []
    for sample in samples[:_MOST_ANSWERS]:
        texts = [sample.get(n) for n in ("prompt", "expected", "before", "answer")]
        cells = [f"<td>{escape(text or '')}</td>" for text in texts]
        if sample.get("exact"):
            cells[-1] = cells[-1].replace("<td>", '<td class="right">', 1)
        rows.append(f"<tr>{''.join(cells)}</tr>")
    names = ("prompt", "expected", "before", "after (green: word for word as expected)")
    head = "".join(f"<th>{name}</th>" for name in names)
    more = f" (the first {_MOST_ANSWERS} of {len(samples)})" if len(samples) > len(rows) else ""
    table = f'<table class="answers"><tr>{head}</tr>{"".join(rows)}</table>'
    return f"<h2>Answers{more}</h2>{table}"


def _lineage(final: Record | None, lookup: lineage.Lookup) -> str:
    if final is None:
        return ""
    return f"<h2>Lineage</h2>{lineage.drawing(final, lookup)}"


def _machines(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        made = outcome.record.provenance
        packages = made.get("packages") or {}
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        row = [outcome.stage.title, outcome.record.created[:16].replace("T", " ")]
        rows.append([*row, str(made.get("host", "")), versions])
    return "<h2>Made with</h2>" + _table(["stage", "when (UTC)", "host", "versions"], rows)


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "", numbers: Sequence[int] = ()
) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        marks = [' class="number"' if i in numbers else "" for i in range(len(cells))]
        inner = (f"<{tag}{m}>{escape(c)}</{tag}>" for m, c in zip(marks, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    body = line("th", head) + "".join(line("td", row) for row in rows)
    return f'<table class="{kind}">{body}</table>'
