"""How published recipes fare: `python tests/bench/published_recipes.py DIRECTORY`."""

from __future__ import annotations

import collections
import sys
import time
from pathlib import Path

from regrow.configs.faults import RecipeError
from regrow.configs.load import load_recipe


def main(directory: str) -> None:
    """Load every YAML file below a directory; print what is refused, and counts by reason."""
    files = sorted([*Path(directory).rglob("*.yaml"), *Path(directory).rglob("*.yml")])
    reasons: collections.Counter[str] = collections.Counter()
    runs, slowest = 0, 0.0
    for path in files:
        begin = time.perf_counter()
        try:
            load_recipe(path)
            runs += 1
            print(f"runs     {path.relative_to(directory)}")
        except RecipeError as error:
            print(f"refused  {path.relative_to(directory)}")
            for fault in error.faults:
                print(f"         {fault}")
            reasons.update(
                {f"{fault.key.partition('[')[0]}: {fault.why}" for fault in error.faults}
            )
        slowest = max(slowest, time.perf_counter() - begin)
    print(f"\n{runs} of {len(files)} can run; the slowest took {slowest:.2f} s")
    for reason, count in reasons.most_common():
        print(f"{count:4}  {reason}")


if __name__ == "__main__":
    main(sys.argv[1])
