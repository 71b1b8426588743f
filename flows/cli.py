"""The command line: `regrow run recipe.yaml --learning_rate 1e-4`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from regrow.configs.faults import RecipeError
from regrow.flows.interruption import remembered
from regrow.flows.progress import say
from regrow.infra.secrets import mask_secrets


@dataclass(frozen=True)
class Command:
    """One word of the command line."""

    name: str
    help: str
    run: Callable[[argparse.Namespace, list[str]], int]
    options: Callable[[argparse.ArgumentParser], None]
    takes_overrides: bool = True


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file")


def _show(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument(
        "--show", type=int, metavar="N", help="print N examples, trained text marked"
    )


def _plan_options(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--device", help="GPU to plan for, such as h100 (this machine's)")
    parser.add_argument("--price-per-hour", type=float, help="of one GPU, to tell the cost")
    parser.add_argument("--json", action="store_true", help="for programs")


def _prompt(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--prompt", help="what to ask; default: standard input")


def _artifact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", help="key of an artifact (its first digits do), or a recipe")
    parser.add_argument("--picture", metavar="FILE", help="draw it: FILE.svg, .png or .html")
    _of_store(parser)


def _deployment(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--cron", help="start by the clock, such as '0 3 * * *'")
    parser.add_argument("--on-change", metavar="URL", help="start when the data there has changed")
    parser.add_argument("--every", type=float, default=60, help="seconds between looks at it (60)")
    parser.add_argument("--on-event", metavar="NAME", help="start at every event of that name")
    parser.add_argument("--pool", default="regrow", help="Prefect work pool (regrow)")
    parser.add_argument("--pool-type", default="process", choices=("process", "kubernetes"))
    parser.add_argument("--gpus", type=int, help="GPUs that all runs of the server share")
    parser.add_argument("--image", help="container image of a run (Kubernetes)")
    parser.add_argument("--memory", help="memory of a run, such as 64Gi (Kubernetes)")
    parser.add_argument("--gpus-per-run", type=int, help="GPUs of a run (Kubernetes)")


def _two(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", help="key of an artifact (its first digits do)")
    parser.add_argument("second", help="key of another")
    _of_store(parser)


def _again(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", help="key of an artifact (its first digits do)")
    parser.add_argument("--keep", action="store_true", help="keep the files that were made again")
    _of_store(parser)


def _of_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", help="root URL; default: REGROW_STORE, else the local one")


def _store_options(parser: argparse.ArgumentParser) -> None:
    from regrow.flows.store_options import add_options

    add_options(parser)


def _nothing(parser: argparse.ArgumentParser) -> None:
    """A command without arguments."""


def _ports(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mlflow-port", type=int, default=5000)
    parser.add_argument("--prefect-port", type=int, default=4200)


def _until(last: str) -> Callable[[argparse.Namespace, list[str]], int]:
    def run(args: argparse.Namespace, overrides: list[str]) -> int:
        from regrow.flows.run_command import run_recipe

        return run_recipe(args.recipe, overrides, last=last, show=getattr(args, "show", None))

    return run


def _validate(args: argparse.Namespace, overrides: list[str]) -> int:
    from regrow.flows.validate import validate

    return validate(args.recipe, overrides)


def _schema(args: argparse.Namespace, overrides: list[str]) -> int:
    from regrow.flows.validate import print_schema

    return print_schema()


def _plan(args: argparse.Namespace, overrides: list[str]) -> int:
    from regrow.flows.commands import show_plan

    return show_plan(args, overrides)


def _status(args: argparse.Namespace, overrides: list[str]) -> int:
    from regrow.flows.commands import show_status

    return show_status(args.recipe, overrides)


def _lineage(args: argparse.Namespace, overrides: list[str]) -> int:
    from regrow.flows.commands import show_lineage

    return show_lineage(args.artifact, overrides, args.picture, args.store)


def _deploy(args: argparse.Namespace, overrides: list[str]) -> int:
    from regrow.flows.commands import deploy_recipe

    return deploy_recipe(args, overrides)


def _diff(args: argparse.Namespace, overrides: list[str]) -> int:
    from regrow.flows.diff import show_diff

    return show_diff(args.first, args.second, args.store)


def _reproduce(args: argparse.Namespace, overrides: list[str]) -> int:
    from regrow.flows.reproduce import reproduce

    return reproduce(args.artifact, args.keep, args.store)


def _store(args: argparse.Namespace, overrides: list[str]) -> int:
    from regrow.flows.store_commands import store_command

    return store_command(args)


def _inference(args: argparse.Namespace, overrides: list[str]) -> int:
    from regrow.flows.talk import answer_once

    return answer_once(args.recipe, overrides, args.prompt)


def _chat(args: argparse.Namespace, overrides: list[str]) -> int:
    from regrow.flows.talk import chat

    return chat(args.recipe, overrides)


def _ui(args: argparse.Namespace, overrides: list[str]) -> int:
    from regrow.flows.pages import serve_pages

    return serve_pages(args.mlflow_port, args.prefect_port)


COMMANDS = (
    Command("run", "run the whole pipeline", _until(""), _recipe),
    Command("validate", "say whether a recipe can run, and all reasons if not", _validate, _recipe),
    Command("plan", "say what would run, and what it needs", _plan, _plan_options),
    Command("status", "say what is complete, running or missing", _status, _recipe),
    Command("preprocess", "tokenize and pack the data", _until("prepare"), _show),
    Command("train", "run up to and including training", _until("train"), _recipe),
    Command("merge-lora", "run up to and including the merge", _until("merge"), _recipe),
    Command("evaluate", "run up to and including the evaluation", _until("evaluate"), _recipe),
    Command("inference", "ask the finished model once", _inference, _prompt),
    Command("chat", "talk with the finished model", _chat, _recipe),
    Command("lineage", "where an artifact comes from", _lineage, _artifact),
    Command("deploy", "let a Prefect server start the pipeline", _deploy, _deployment),
    Command("diff", "what differs between two models", _diff, _two, takes_overrides=False),
    Command(
        "reproduce", "make an artifact again and compare", _reproduce, _again, takes_overrides=False
    ),
    Command("store", "look after the artifacts", _store, _store_options, takes_overrides=False),
    Command("schema", "print the recipe's JSON Schema", _schema, _nothing, takes_overrides=False),
    Command("ui", "serve the MLflow and Prefect pages", _ui, _ports, takes_overrides=False),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="regrow",
        description="Fine-tuning as a pipeline of cached stages.",
        epilog="Any recipe key can be given too: --learning_rate 1e-4 --datasets.0.path x.jsonl",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.options(commands.add_parser(command.name, help=command.help, allow_abbrev=False))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. What a user can mend is one message, without a traceback."""
    # Long runs write into files and pipes: every line should be there when it is said.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(line_buffering=True)
    args, rest = _parser().parse_known_args(argv)
    command = next(command for command in COMMANDS if command.name == args.command)
    if rest and not command.takes_overrides:
        say(f"regrow {command.name}: does not know {' '.join(rest)}", sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with remembered():
            return command.run(args, rest)
    except RecipeError as error:
        say(str(error), sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("stopped; run the same command again to go on from here", sys.stderr)
        return 130
    except BrokenPipeError:
        return 0  # the reader of our output left: `regrow plan x | head`
    except Exception as error:  # noqa: BLE001 (the last net: a bug of ours, told without a traceback)
        say(f"error: {type(error).__name__}: {error}", sys.stderr)
        say(f"If the input is right this is a bug; report it with {_crash_log()}", sys.stderr)
        return 70  # EX_SOFTWARE of sysexits.h


def _interrupt(_number: int, _frame: object) -> None:
    """SIGTERM ends a run as Ctrl-C does: MLflow, leases and workers hear of it."""
    raise KeyboardInterrupt


def _crash_log() -> str:
    """Write the traceback that is being handled into a file; its path."""
    with tempfile.NamedTemporaryFile("w", prefix="regrow-", suffix=".log", delete=False) as file:
        file.write(mask_secrets(traceback.format_exc()))
    return file.name


if __name__ == "__main__":
    sys.exit(main())
