"""Failures that say what is wrong end a command with their message, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from regrow.flows.prefect_server import ServerFailed
from regrow.flows.progress import say
from regrow.infra.settings import SettingError

_P = ParamSpec("_P")


def explains(command: Callable[_P, int]) -> Callable[_P, int]:
    """Such failures become exit code 1; all others go on to who called."""

    @wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except Exception as error:
            # Only here: it brings all of the stages' machinery, and `run` begins without.
            from regrow.tasks.build import EXPECTED

            if not isinstance(error, (*EXPECTED, ServerFailed, SettingError)):
                raise
            say(f"error: {error}", sys.stderr)
            return 1

    return run
