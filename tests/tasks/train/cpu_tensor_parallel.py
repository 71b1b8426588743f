"""The worker with tensor parallelism on gloo ranks, which Accelerate takes on GPUs only.

Accelerate's check of the kind of device is the one thing between Transformers' tensor parallelism
and the CPU: what computes, trains and saves is the same. Our own refusal goes with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from accelerate.parallelism_config import ParallelismConfig

from regrow.tasks.train import parallel
from tests.tasks.train import weighing_worker


def _takes_all(self: ParallelismConfig, accelerator: object) -> None:
    """In the place of a check."""


def main(argv: Sequence[str] | None = None) -> None:
    """The worker's entry."""
    ParallelismConfig._validate_accelerator = _takes_all
    parallel._accelerate_takes_it = lambda device: True
    weighing_worker.main(argv)
