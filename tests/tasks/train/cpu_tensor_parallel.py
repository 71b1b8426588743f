"""The worker with tensor parallelism on gloo ranks, which Accelerate takes on GPUs only.

Accelerate's check of the kind of device is the one thing between Transformers' tensor parallelism
and the CPU: what computes, trains and saves is the same. Our own refusal goes with it.
"""

from accelerate.parallelism_config import ParallelismConfig

from regrow.tasks.train import parallel
from regrow.tasks.train.worker import main


def _takes_all(self: ParallelismConfig, accelerator: object) -> None:
    """In the place of a check."""


if __name__ == "__main__":
    ParallelismConfig._validate_accelerator = _takes_all
    parallel._accelerate_takes_it = lambda device: True
    main()
