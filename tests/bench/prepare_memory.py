"""Peak memory of `prepare` for a corpus and for one twenty times as large: a table.

python tests/bench/prepare_memory.py --tokenizer DIR --gsm8k FILE --alpaca FILE
    [--rows 10000] [--times 20] [--processes 2] [--work DIR]

The rows are those of prepare_speed.py. Looked at every 20 ms: the private bytes (RssAnon) of the
stage's process and of each that tokenizes, and their largest resident size (VmHWM), which holds
mapped files too.
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
from pathlib import Path

import prepare_speed as speed
import psutil

_EVERY_SECONDS = 0.02


def main() -> None:
    """Run both sizes, print the table."""
    parser = speed.parser(__doc__ or "", rows=10_000)
    parser.add_argument("--times", type=int, default=20)
    options = parser.parse_args()
    if options.run:
        print("RESULT", speed.as_json(_watched(options)))
        return
    found = []
    for rows in (options.rows, options.rows * options.times):
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            sized = speed.changed(options, rows=rows, work=work)
            made = speed.make_rows(sized)
            found.append(made | speed.in_its_own_process("regrow", sized, __file__))
    names = [name for name in found[0] if name not in ("rows", "bytes", "seconds", "tokens")]
    print(f"{speed.machine()}, {options.processes} processes; MB")
    print(f"{'rows':>9} {'tokens':>12} " + " ".join(f"{name:>18}" for name in names))
    for each in found:
        cells = " ".join(f"{each[name]:>18,.0f}" for name in names)
        print(f"{each['rows']:>9,} {each['tokens']:>12,} {cells}")
    growth = (f"{found[1][name] / max(found[0][name], 1) - 1:>18.1%}" for name in names)
    print(f"{'growth':>22} " + " ".join(growth))


def _watched(options) -> dict[str, float]:
    watch = _Watch()
    watch.start()
    result, _ = speed.build_regrow(options)
    watch.stop.set()
    watch.join()
    return {**watch.peaks(), "seconds": result["seconds"], "tokens": result["tokens"]}


class _Watch(threading.Thread):
    """Looks at the memory of this process and its children."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self._private: dict[int, float] = {}
        self._resident: dict[int, float] = {}
        self._together = 0.0
        self._own = psutil.Process().pid

    def run(self) -> None:
        """Until `stop` is set."""
        while not self.stop.wait(_EVERY_SECONDS):
            now = 0.0
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                private, resident = _memory(process.pid)
                now += private
                self._private[process.pid] = max(self._private.get(process.pid, 0.0), private)
                self._resident[process.pid] = max(self._resident.get(process.pid, 0.0), resident)
            self._together = max(self._together, now)

    def peaks(self) -> dict[str, float]:
        """In MB."""
        others = [pid for pid in self._private if pid != self._own]
        return {
            "together private": self._together,
            "stage private": self._private[self._own],
            "worker private": max((self._private[pid] for pid in others), default=0.0),
            "stage resident": self._resident[self._own],
            "worker resident": max((self._resident[pid] for pid in others), default=0.0),
        }


def _memory(pid: int) -> tuple[float, float]:
    """(RssAnon, VmHWM) of a process in MB; zeros when it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0, 0.0
    found = dict(re.findall(r"^(RssAnon|VmHWM):\s*(\d+) kB", status, re.MULTILINE))
    return int(found.get("RssAnon", 0)) / 1e3, int(found.get("VmHWM", 0)) / 1e3


if __name__ == "__main__":
    sys.exit(main())
