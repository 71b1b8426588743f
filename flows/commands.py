"""What the commands do: run, plan, status, lineage. Prefect is imported only by those that run."""

from __future__ import annotations

import atexit
import gc
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TextIO

from regrow.configs.load import Loaded, load_recipe
from regrow.flows import show
from regrow.flows.prefect_server import PrivateServer, ServerFailed
from regrow.flows.progress import say
from regrow.flows.workplace import Workplace
from regrow.infra import tracking
from regrow.infra.reachable import require_answer
from regrow.infra.secrets import mask_secrets
from regrow.infra.settings import (
    SettingError,
    environment,
    load_settings,
    quiet_environment,
)
from regrow.infra.store import Store, StoreError
from regrow.tasks.build import EXPECTED, stage_key
from regrow.tasks.plan import Plan, make_plan
from regrow.tasks.stage import StageError

if TYPE_CHECKING:
    from regrow.flows.session import Session

_P = ParamSpec("_P")
_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: what waits in a queue can be started again
_ANSWER_SECONDS = 10  # a server on another continent answers in one


def explains(command: Callable[_P, int]) -> Callable[_P, int]:
    """Failures that say what is wrong end a command with their message and exit code 1."""

    @wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except (*EXPECTED, ServerFailed, SettingError) as error:
            say(f"error: {error}", sys.stderr)
            return 1

    return run


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
    return loaded, workplace, plan


@explains
def run_recipe(
    recipe: str, overrides: Sequence[str], last: str = "", show: int | None = None
) -> int:
    """Run the pipeline, up to the stage `last` if given, and print the table of its stages."""
    loaded, workplace, _ = open_plan(recipe, overrides, last)
    _open_prefect(workplace)
    from regrow.flows.finetune import finetune, stages_upto

    if last:
        state = stages_upto(loaded.recipe, last, loaded.name, return_state=True)
    else:
        state = finetune(loaded.recipe, loaded.name, return_state=True)
    if state.name == "Preempted":
        say(f"\nstopped before its end: {state.message}", sys.stderr)
        return _TRY_AGAIN
    if not state.is_completed():
        say(f"\nfailed: {state.message}", sys.stderr)
        say(
            "Nothing that was complete is lost: mend it and run the same command again.", sys.stderr
        )
        return 1
    _print_end(state.result(), workplace, show)
    return 0


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
    _require_server(settings.prefect_api_url)
    from regrow.flows.deploy import Wish, deploy
    from regrow.flows.job_variables import Resources

    names = ("pool", "pool_type", "cron", "on_event", "on_change", "every", "gpus")
    resources = Resources(args.image, args.memory, args.gpus_per_run)
    wish = Wish(**{name: getattr(args, name) for name in names}, resources=resources)
    for line in deploy(loaded, settings, wish):
        say(line)
    return 0


def _require_server(url: str) -> None:
    try:
        require_answer(f"{url.rstrip('/')}/health", _ANSWER_SECONDS)
    except OSError as error:
        raise ServerFailed(
            f"PREFECT_API_URL: nothing answers at {mask_secrets(url)} ({error}). Start it "
            "(`prefect server start`, or `regrow ui`), or unset PREFECT_API_URL"
        ) from error


def _open_prefect(workplace: Workplace) -> None:
    """Use the user's Prefect server, or one of our own that comes up while we import the rest."""
    url = workplace.settings.prefect_api_url
    if url is not None:
        _require_server(url)
        _import_the_rest()
        return
    quiet_environment(private_server=True)
    server = PrivateServer(workplace.home)
    server.start()
    _import_the_rest()
    server.wait()


def _import_the_rest() -> None:
    """Import MLflow and Prefect.

    Here, and not by the thread that first writes into MLflow: two threads that import large
    packages at once can meet each other's half-imported modules. And as what lasts until the
    process ends: searched for garbage again and again while it grows, and walked through once more
    at the end, it would take a second longer (3.2 s instead of 4.1 s, measured on 2 cores).
    """
    gc.disable()
    try:
        tracking.preload()
        from regrow.flows import finetune  # noqa: F401 (imports Prefect)
    finally:
        gc.freeze()
        gc.enable()
    atexit.register(gc.freeze)  # what the stages imported is not walked through at the end either


def _print_end(session: Session, workplace: Workplace, shown: int | None) -> None:
    say("\n" + show.end_table(session, workplace))
    if shown:
        from regrow.tasks.prepare.preview import show as show_examples

        record = session.outcomes[0].record
        say("\n" + show_examples(workplace.artifacts.fetch(record), shown))
