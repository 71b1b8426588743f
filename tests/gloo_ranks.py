"""Runs a function on several real gloo ranks, each a process of its own, for tests.

The processes are forked by a server that has the large libraries already, so that a start is a
moment; forking the test's own process would not do, since torch refuses a backward pass then.
"""

from __future__ import annotations

import multiprocessing
import queue
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PATIENCE = 300.0  # for a machine that is five times slower, beside other tests


def on_ranks(function: Callable[..., Any], ranks: int, directory: Path, *args: Any) -> list[Any]:
    """`function(*args)` on each rank, as a process group is there; what the ranks return, in order.

    Args:
        function: of a module, since the ranks import it by its name.
        directory: an empty one, where the ranks meet.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    answers: Any = context.Queue()
    meeting = (directory / "meeting").as_uri()
    started = [
        context.Process(target=_rank, args=(function, rank, ranks, meeting, answers, args))
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < ranks:
            rank, value, fault = answers.get(timeout=_PATIENCE)
            assert not fault, f"rank {rank}:\n{fault}"
            found[rank] = value
    except queue.Empty:
        raise AssertionError(f"ranks {set(range(ranks)) - found.keys()} never answered") from None
    finally:
        for process in started:
            process.kill()
            process.join()
    return [found[rank] for rank in range(ranks)]


def _rank(
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    meeting: str,
    answers: Any,
    args: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=ranks)
        answers.put((rank, function(*args), ""))
        torch.distributed.barrier()  # the others may still need this one
    except BaseException:  # noqa: BLE001 (told to the test, whatever it is)
        answers.put((rank, None, traceback.format_exc()))
