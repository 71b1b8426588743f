"""The process that trains: `torchrun ... -m regrow.tasks.train.rank job.json`, one for each rank.

Also by hand as `python -m regrow.tasks.train.rank job.json`, on one rank. Needs no Prefect.
"""

from __future__ import annotations

from regrow.infra.imports import importing


def main() -> None:
    """Entry of the process; the one argument is the path of `job.json`."""
    with importing():
        from regrow.tasks.train import worker
    worker.main()


if __name__ == "__main__":
    main()
