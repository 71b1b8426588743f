"""`regrow reproduce KEY`: a record's stage run again from its recipe and inputs, and compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from regrow.configs.load import parse_recipe
from regrow.flows.explained import explains
from regrow.flows.gpu_slots import gpus_of
from regrow.flows.progress import LineReporter, say
from regrow.flows.show import differences
from regrow.flows.workplace import Workplace
from regrow.infra.artifacts import Record
from regrow.infra.digests import sha256_file
from regrow.infra.settings import load_settings, quiet_environment
from regrow.tasks.build import stage_key
from regrow.tasks.plan import make_plan
from regrow.tasks.stage import Stage, StageError, canonical


@explains
def reproduce(artifact: str, keep: bool, store: str | None = None) -> int:
    """Run the stage again, beside the store; 0 when every byte is the same, else 1.

    Args:
        keep: leave the new files where they were made, and say where.
        store: root URL of the store; default: that of the environment.
    """
    quiet_environment()
    place = Workplace(load_settings(), store)
    record = place.one_record(artifact)
    if record.stage == "publish":
        raise StageError(
            f"{artifact}: publishing delivers a model, it makes none. Reproduce the model: "
            f"{', '.join(f'{name} {key[:12]}' for name, key in record.inputs.items())}"
        )
    stage = _planned(place, record)
    report = LineReporter(stage.title)
    out = place.home / "reproduced" / stage.key[:12]
    shutil.rmtree(out, ignore_errors=True)
    place.builder.rerun(stage, out, report, gpus_of)
    found = _compared(record, out)
    for name, state in found.items():
        say(f"{state:9}  {name}")
    same = set(found.values()) == {"same"}
    say(f"{stage.title} {stage.key[:12]}: {'every byte is the same' if same else 'not the same'}")
    if keep:
        say(f"kept in {out}")
    else:
        shutil.rmtree(out)
    return 0 if same else 1


def _planned(place: Workplace, record: Record) -> Stage:
    """The stage that the record's recipe gives now; it must be the record's own."""
    text = record.provenance.get("recipe")
    if not text:
        raise StageError(
            f"{record.key} does not say of which recipe it is: it was made by an older Regrow"
        )
    loaded = parse_recipe(yaml.safe_load(text))
    name = record.provenance.get("recipe_name") or loaded.name
    plan = make_plan(loaded.recipe, name, place.memo)
    for stage in plan.stages:
        if stage_key(stage) == record.key:
            return stage
    raise StageError(f"{record.key}: {_why_not(record, plan.stages)}")


def _why_not(record: Record, stages: list[Stage] | tuple[Stage, ...]) -> str:
    """What has changed since, so that the same recipe now means something else."""
    alike = [stage for stage in stages if stage.name == record.stage]
    closest = min((differences(record.spec, canonical(s.spec)) for s in alike), key=len, default=[])
    changes = "; ".join(closest[:4]) or "an input, or Regrow's own version of the stage"
    return f"its recipe now gives another key. What differs: {changes}"


def _compared(record: Record, out: Path) -> dict[str, str]:
    """{file: same, different, missing or new}."""
    made = {p.relative_to(out).as_posix(): p for p in sorted(out.rglob("*")) if p.is_file()}
    states = {}
    for name in sorted({*record.files, *made}):
        if name not in made:
            states[name] = "missing"
        elif name not in record.files:
            states[name] = "new"
        else:
            same = sha256_file(made[name]) == record.files[name].sha256
            states[name] = "same" if same else "different"
    return states
