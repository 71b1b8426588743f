"""What the commands do that run nothing: plan, status, lineage, deploy."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from regrow.configs.load import Loaded, load_recipe
from regrow.flows import show
from regrow.flows.explained import explains
from regrow.flows.prefect_server import require_server
from regrow.flows.progress import say
from regrow.flows.workplace import Workplace
from regrow.infra.settings import SettingError, environment, load_settings, quiet_environment
from regrow.infra.store import Store, StoreError
from regrow.tasks.build import stage_key
from regrow.tasks.plan import Plan, make_plan
from regrow.tasks.stage import StageError


def open_plan(
    recipe: str, overrides: Sequence[str], last: str = "", out: TextIO | None = None
) -> tuple[Loaded, Workplace, Plan]:
    """The recipe, its places and its plan, with what the recipe's reader has to say printed.

    Args:
        last: the stage after which the command stops, if not the plan's last.
        out: where to print; None: standard output.
    """
    quiet_environment()
    loaded = load_recipe(recipe, overrides, environment=environment())
    return loaded, *planned(loaded, last, out)


def planned(loaded: Loaded, last: str = "", out: TextIO | None = None) -> tuple[Workplace, Plan]:
    """The same of a recipe that has been read."""
    for notice in loaded.notices:
        say(str(notice), out)
    workplace = Workplace(load_settings(), loaded.recipe.store)
    workplace.artifacts.store.check_writable()
    plan = make_plan(loaded.recipe, loaded.name, workplace.memo)
    plan.upto(last or plan.publish.title)
    target = plan.publish.placement.target
    if target is not None:
        try:
            Store(target)  # at the end of a long training would be too late
        except StoreError as error:
            raise StageError(f"output_dir: {error}") from error
    return workplace, plan


@explains
def show_plan(args: Namespace, overrides: Sequence[str]) -> int:
    """Print each stage, why it must run, and what the training will need."""
    from regrow.flows.plan_view import Question, plan_text

    question = Question(args.device, args.price_per_hour, args.json)
    # What is for programs stands alone on standard output.
    out = sys.stderr if args.json else None
    loaded, workplace, plan = open_plan(args.recipe, overrides, out=out)
    say(plan_text(loaded, workplace, plan, question))
    return 0


@explains
def show_status(recipe: str, overrides: Sequence[str]) -> int:
    """Print what is complete, who builds what now, and which checkpoints a resume would use."""
    _, workplace, plan = open_plan(recipe, overrides)
    say(show.status_table(workplace, plan))
    return 0


@explains
def show_lineage(
    artifact: str, overrides: Sequence[str], picture: str | None = None, store: str | None = None
) -> int:
    """Print the tree of what an artifact, or the last stage of a recipe, was made from.

    Args:
        picture: a file to draw it into: SVG, PNG or HTML, by its ending.
        store: root URL, where it is not the one of the environment or the recipe.
    """
    from regrow.tasks import lineage

    if artifact.endswith((".yaml", ".yml")):
        _, workplace, plan = open_plan(artifact, overrides)
        ready = [r for s in plan.stages if (r := workplace.artifacts.lookup(stage_key(s)))]
        record = ready[-1] if ready else None
    else:
        workplace = Workplace(load_settings(), store)
        record = workplace.record(artifact)
    if record is None:
        raise StageError(
            f"there is no artifact {artifact!r} in {workplace.store_url}; `regrow plan RECIPE` "
            "shows the keys of a recipe's stages"
        )
    say(lineage.tree(record, workplace.artifacts.lookup))
    if picture is not None:
        from regrow.tasks.lineage_picture import draw

        draw(record, workplace.artifacts.lookup, Path(picture))
        say(f"picture  {picture}")
    return 0


@explains
def deploy_recipe(args: Namespace, overrides: Sequence[str]) -> int:
    """Make the recipe a deployment of the Prefect server at `PREFECT_API_URL`."""
    quiet_environment()
    settings = load_settings()
    loaded = load_recipe(args.recipe, overrides, environment=environment())
    for notice in loaded.notices:
        say(str(notice))
    if settings.prefect_api_url is None:
        raise SettingError(
            "PREFECT_API_URL: a deployment needs a Prefect server that stays. Start one (`regrow "
            "ui`, or `prefect server start`) and set PREFECT_API_URL to its address"
        )
    require_server(settings.prefect_api_url)
    from regrow.flows.deploy import Wish, deploy
    from regrow.flows.job_variables import Resources

    names = ("pool", "pool_type", "cron", "on_event", "on_change", "every", "gpus")
    resources = Resources(args.image, args.memory, args.gpus_per_run)
    wish = Wish(**{name: getattr(args, name) for name in names}, resources=resources)
    for line in deploy(loaded, settings, wish):
        say(line)
    return 0
