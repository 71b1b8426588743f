"""Speed of `prepare` end to end, beside TRL's preparation and the bare tokenizer: a table.

python tests/bench/prepare_speed.py --tokenizer DIR --gsm8k FILE --alpaca FILE
    [--rows 200000] [--processes 2] [--rounds 1] [--work DIR] [--only regrow,limit,trl]

Each contender runs in a process of its own, one after the other, on the same rows (all distinct)
with the same number of processes:
    regrow   the stage as a run builds it: read, render, mask, tokenize, pack, write, publish
    limit    the bare tokenizer on already rendered texts: a warm process pool, `encode_batch_fast`
    trl      `load_dataset` and what `SFTTrainer` does to a dataset (assistant_only_loss, packing);
             imports and the model are not counted
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEQUENCE_LEN = 2048
CONTENDERS = ("limit", "regrow", "trl")
_TEXTS_A_TASK = 256
_PACKAGES = ("regrow", "tokenizers", "transformers", "trl", "datasets", "pyarrow", "numpy")


def main() -> None:
    """Make the rows, run the contenders, print the table."""
    options = _options()
    if options.run:
        print("RESULT", as_json(_RUNNERS[options.run](options)))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        options = changed(options, work=work)
        made = make_rows(options)
        results: dict[str, list[dict[str, Any]]] = {}
        for _ in range(options.rounds):
            for name in options.only:
                results.setdefault(name, []).append(in_its_own_process(name, options))
        _print_table(options, made, results)


def _options() -> argparse.Namespace:
    with_rounds = parser(__doc__ or "", rows=200_000)
    with_rounds.add_argument("--rounds", type=int, default=1)
    with_rounds.add_argument("--only", type=lambda text: text.split(","), default=CONTENDERS)
    return with_rounds.parse_args()


def parser(about: str, rows: int) -> argparse.ArgumentParser:
    """What the benches of prepare have in common."""
    found = argparse.ArgumentParser(description=about.splitlines()[0])
    found.add_argument("--tokenizer", required=True, help="directory of a model (SmolLM2)")
    found.add_argument("--gsm8k", required=True, help="JSON lines: question, answer")
    found.add_argument("--alpaca", required=True, help="JSON list: instruction, input, output")
    found.add_argument("--rows", type=int, default=rows)
    found.add_argument("--processes", type=int, default=2)
    found.add_argument("--work", help="directory for files of some GB; default: a temporary one")
    found.add_argument("--run", choices=CONTENDERS, help=argparse.SUPPRESS)
    return found


def changed(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """The options with some of them changed."""
    return argparse.Namespace(**{**vars(options), **changes})


def as_json(result: dict[str, Any]) -> str:
    """A result as the parent process reads it."""
    return json.dumps(result)


def in_its_own_process(
    name: str, options: argparse.Namespace, script: str = __file__
) -> dict[str, Any]:
    """What a contender returns in a fresh process."""
    arguments = [
        f"--{key}={value}"
        for key, value in vars(options).items()
        if key not in ("run", "only") and value is not None
    ]
    environment = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": f"{options.work}/hf",
        "HF_DATASETS_CACHE": f"{options.work}/datasets-{time.time_ns()}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, script, f"--run={name}", *arguments]
    told = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    found = [line for line in told.stdout.splitlines() if line.startswith("RESULT ")]
    if told.returncode or not found:
        sys.exit(f"{name} failed:\n{told.stdout[-3000:]}\n{told.stderr[-3000:]}")
    result = json.loads(found[-1].removeprefix("RESULT "))
    print(f"{name}: {result['seconds']:.1f} s", file=sys.stderr, flush=True)
    return result


# ---- the rows


def make_rows(options: argparse.Namespace) -> dict[str, int]:
    """Write the rows as JSON lines, no two alike: numbers of GSM8K's rows are replaced by others,
    Alpaca's are put together in pairs, two turns each."""
    gsm8k = [json.loads(line) for line in Path(options.gsm8k).read_text().splitlines()]
    alpaca = json.loads(Path(options.alpaca).read_text())
    chance, seen = random.Random(0), set()
    path = _rows_path(options)
    with path.open("w") as out:
        while len(seen) < options.rows:
            messages = _dialogue(gsm8k, alpaca, len(seen), chance)
            line = json.dumps({"messages": messages}, ensure_ascii=False)
            digest = hashlib.sha256(line.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                out.write(line + "\n")
    return {"rows": len(seen), "bytes": path.stat().st_size}


def _dialogue(
    gsm8k: list[dict[str, str]], alpaca: list[dict[str, str]], number: int, chance: random.Random
) -> list[dict[str, str]]:
    if number % 2:
        row = gsm8k[number // 2 % len(gsm8k)]
        pairs = [(_other_numbers(row["question"], chance), _other_numbers(row["answer"], chance))]
    else:
        some = (chance.choice(alpaca), chance.choice(alpaca))
        pairs = [(f"{r['instruction']}\n{r['input']}".strip(), r["output"]) for r in some]
    return [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _other_numbers(text: str, chance: random.Random) -> str:
    return re.sub(r"\d+", lambda found: str(chance.randrange(1, 10 ** len(found[0]))), text)


def _rows_path(options: argparse.Namespace) -> Path:
    return Path(options.work) / "rows.jsonl"


# ---- Regrow


def run_regrow(options: argparse.Namespace) -> dict[str, Any]:
    """The prepare stage of a recipe, and which sequences it made."""
    result, made = build_regrow(options)
    _keep(options, "regrow", Counter(_digests_of_artifact(made)))
    return result


def build_regrow(options: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """The prepare stage of a recipe, built into an empty store: figures, directory."""
    from regrow.configs.load import parse_recipe
    from regrow.infra.artifacts import ArtifactStore
    from regrow.infra.digests import DigestMemo
    from regrow.tasks.build import Builder
    from regrow.tasks.plan import make_plan

    home = Path(options.work) / f"regrow-{time.time_ns()}"
    recipe = parse_recipe(
        {
            "base_model": options.tokenizer,
            "datasets": [{"path": str(_rows_path(options)), "type": "chat_template"}],
            "sequence_len": SEQUENCE_LEN,
            "sample_packing": True,
            "dataset_num_proc": options.processes,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-4,
        }
    ).recipe
    stage = make_plan(recipe, "bench", DigestMemo(home / "digests.sqlite")).prepare
    artifacts = ArtifactStore.open_url(str(home / "store"), home / "cache")
    clock = _Clock()
    outcome = Builder(artifacts, home, 30).build(stage, _Silent())
    taken = clock()
    split = outcome.record.result["splits"]["train"]
    figures = {**taken, "tokens": split["tokens"], "fill": split["fill"]}
    return figures, artifacts.fetch(outcome.record)


class _Silent:
    def progress(self, done: float, total: float | None, unit: str, note: str = "") -> None:
        """Not shown."""

    def log(self, message: str) -> None:
        """Not shown."""


def _digests_of_artifact(directory: Path) -> Iterator[str]:
    import numpy as np

    from regrow.tasks.modeling.rows import PackedRows

    rows = PackedRows(directory, "train")
    for index in range(len(rows)):
        row = rows[index]
        for ids in np.split(row.input_ids, np.cumsum(row.seq_lens)[:-1]):
            yield _digest(ids.astype("<i4").tobytes())


def _digest(tokens: bytes) -> str:
    return hashlib.blake2b(tokens, digest_size=8).hexdigest()


class _Clock:
    """Wall seconds, and processor seconds of this process and of those it has waited for."""

    def __init__(self) -> None:
        self._begin, self._used = time.perf_counter(), _processor_seconds()

    def __call__(self) -> dict[str, float]:
        """Both since the beginning."""
        seconds = time.perf_counter() - self._begin
        return {"seconds": seconds, "processor": _processor_seconds() - self._used}


def _processor_seconds() -> float:
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _keep(options: argparse.Namespace, name: str, digests: Counter[str]) -> None:
    (Path(options.work) / f"{name}-digests.json").write_text(json.dumps(digests))


# ---- the limit

_tokenizer: Any = None


def _start_worker(path: str) -> None:
    global _tokenizer
    from tokenizers import Tokenizer

    _tokenizer = Tokenizer.from_file(path)
    _tokenizer.encode_batch_fast(["warm"] * 8)


def _bare(texts: list[str]) -> tuple[list[int], bytes]:
    import numpy as np

    rows = [e.ids for e in _tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    flat = np.fromiter((token for row in rows for token in row), np.int32)
    return [len(row) for row in rows], flat.tobytes()


def run_limit(options: argparse.Namespace) -> dict[str, Any]:
    """The tokenizer alone, in processes that have loaded it already."""
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(options.tokenizer)
    with _rows_path(options).open() as file:
        texts = [
            template.apply_chat_template(json.loads(line)["messages"], tokenize=False)
            for line in file
        ]
    tasks = [texts[i : i + _TEXTS_A_TASK] for i in range(0, len(texts), _TEXTS_A_TASK)]
    path = str(Path(options.tokenizer) / "tokenizer.json")
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, _start_worker, (path,)) as pool:
        pool.map(_bare, [["warm"]] * 4 * options.processes, chunksize=1)
        clock = _Clock()
        answers = pool.map(_bare, tasks, chunksize=1)
        taken = clock()
        pool.close()
        pool.join()
        taken["processor"] = clock()["processor"]
    digests: Counter[str] = Counter()
    for lengths, flat in answers:
        at = 0
        for length in lengths:
            digests[_digest(flat[at : at + 4 * length])] += 1
            at += 4 * length
    _keep(options, "limit", digests)
    return {**taken, "tokens": sum(sum(lengths) for lengths, _ in answers)}


# ---- TRL


def run_trl(options: argparse.Namespace) -> dict[str, Any]:
    """Reading and what the trainer's constructor does to the dataset."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    class Timed(SFTTrainer):
        """Says how long the preparation took; the rest of the constructor does not count."""

        taken: dict[str, float]

        def _prepare_dataset(self, *arguments: Any, **named: Any) -> Any:
            clock = _Clock()
            prepared = super()._prepare_dataset(*arguments, **named)
            self.taken = clock()
            return prepared

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    # TRL asks the template where answers are.
    tokenizer.chat_template = marked(tokenizer.chat_template)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=tokenizer.eos_token_id,
    )
    clock = _Clock()
    dataset = load_dataset("json", data_files=str(_rows_path(options)), split="train")
    reading = clock()
    trainer = Timed(
        model=LlamaForCausalLM(config),
        args=SFTConfig(
            output_dir=f"{options.work}/trl",
            assistant_only_loss=True,
            packing=True,
            max_length=SEQUENCE_LEN,
            dataset_num_proc=options.processes,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    tokens = sum(len(ids) for ids in trainer.train_dataset.with_format("numpy")["input_ids"])
    taken = {name: seconds + trainer.taken[name] for name, seconds in reading.items()}
    return {**taken, "tokens": tokens}


def marked(template: str) -> str:
    """SmolLM2's template with TRL's mark around answers and their end; the text stays the same."""
    whole = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    assert whole in template, "the bench knows SmolLM2's template only"
    answer = (
        "{% if message['role'] == 'assistant' %}{{'<|im_start|>assistant\n'}}{% generation %}"
        "{{message['content'] + '<|im_end|>'}}{% endgeneration %}{{'\n'}}{% else %}"
    )
    return template.replace(whole, f"{answer}{whole}{{% endif %}}")


# ---- the table

_RUNNERS = {"regrow": run_regrow, "limit": run_limit, "trl": run_trl}


def _print_table(
    options: argparse.Namespace, made: dict[str, int], results: dict[str, list[dict[str, Any]]]
) -> None:
    print(
        f"{made['rows']:,} distinct chat rows ({made['bytes'] / 1e6:.0f} MB) of GSM8K and Alpaca, "
        f"{options.processes} processes, {machine()}, {datetime.date.today()}"
    )
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES))
    print(f"\n{'':8} {'tokens':>12} {'seconds':>9} {'processor s':>12} {'tokens/s':>11}   of limit")
    best = {name: min(runs, key=lambda run: run["seconds"]) for name, runs in results.items()}
    rate = {name: run["tokens"] / run["seconds"] for name, run in best.items()}
    for name, run in best.items():
        share = f"{rate[name] / rate['limit']:>8.0%}" if "limit" in rate else ""
        print(
            f"{name:8} {run['tokens']:>12,} {run['seconds']:>9.1f}"
            f" {run['processor']:>12.1f} {rate[name]:>11,.0f}   {share}"
        )
    if options.rounds > 1:
        for name, runs in results.items():
            print(f"{name}: {', '.join(format(run['seconds'], '.1f') for run in runs)} s")
    if {"regrow", "trl"} <= rate.keys():
        faster = best["trl"]["seconds"] / best["regrow"]["seconds"]
        print(f"\nRegrow is {faster:.1f} times as fast as TRL (seconds for the same rows)")
    if {"regrow", "limit"} <= rate.keys():
        _compare(options)


def _compare(options: argparse.Namespace) -> None:
    """Whether both made the very same sequences of tokens."""
    kept = [
        json.loads((Path(options.work) / f"{n}-digests.json").read_text()) for n in CONTENDERS[:2]
    ]
    same = sum((Counter(kept[0]) & Counter(kept[1])).values())
    print(
        f"{same:,} of {sum(kept[0].values()):,} sequences are token by token the bare tokenizer's"
    )


def machine() -> str:
    """Cores and processor."""
    model = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        names = re.findall(r"model name\s*:\s*(.*)", cpus.read_text())
        model = names[0] if names else model
    return f"{len(os.sched_getaffinity(0))} cores of {model}"


if __name__ == "__main__":
    main()
