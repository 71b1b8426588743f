"""How published recipes fare: `python tests/bench/published_recipes.py DIRECTORY ...`.

Each YAML file is read as `regrow validate` reads it. Printed: every file with its faults; how many
of each training method run; reasons by number of files; keys that nobody speaks of (there should be
none); the slowest file; and whether those that run fit the JSON Schema.
"""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

from regrow.configs.faults import Fault, Notice, RecipeError
from regrow.configs.load import load_recipe
from regrow.configs.recipe import Recipe
from regrow.configs.schema import json_schema
from regrow.configs.sections.data import Dataset
from regrow.configs.vocabulary import WORDS, Ignored, is_off, needs_no_word
from regrow.configs.yaml_lines import parse_yaml

NO_FILE = "there is no such file or directory"
"""The recipe's own data or model is not on this machine: a fault, and none of the vocabulary's."""

# By the table of training methods in axolotl_capability.md.
METHODS = {
    "reward_model": "reward model",
    "process_reward_model": "reward model",
    "diffusion": "diffusion",
    "use_eaft": "EAFT",
    "qat": "QAT",
    "relora": "ReLoRA",
    "relora_steps": "ReLoRA",
    "lisa_n_layers": "LISA",
    "llmcompressor": "sparse fine-tuning",
}


def method(data: Any) -> str:
    """The training method that a recipe asks for; "SFT, text" for most."""
    if not isinstance(data, dict) or not {"base_model", "base_model_config"} & data.keys():
        return "no recipe"
    if data.get("rl"):
        return f"rl: {data['rl']}"
    named = next((name for key, name in METHODS.items() if data.get(key)), None)
    if named:
        return named
    model = str(data.get("model_type"))
    images = data.get("processor_type") or any(
        word in model for word in ("ConditionalGeneration", "ImageText")
    )
    return "SFT, images or audio" if images else "SFT, text"


_WHAT_HAPPENS_ANYWAY = (
    *(("tensor_parallel_size", 1), ("expert_parallel_size", 1), ("push_to_hub", True)),
    *(("torch_dtype", "bfloat16"), ("resume_from_checkpoint", True)),
)


def unspoken(data: Any, notices: tuple[Notice, ...], faults: tuple[Fault, ...]) -> Iterator[str]:
    """Keys that are not off, not a field and in no line that the author reads."""
    said = "\n".join(map(str, (*notices, *faults)))
    for key, value in (data if isinstance(data, dict) else {}).items():
        ignored = isinstance(WORDS.get(str(key)), Ignored)
        off = (needs_no_word if ignored else is_off)(str(key), value)
        off = off or (key, value) in _WHAT_HAPPENS_ANYWAY
        known = key in Recipe.model_fields or key in ("extends", "plugins")
        if not off and not known and str(key) not in said:
            yield str(key)
    for kind in ("datasets", "test_datasets"):
        entries = data.get(kind) if isinstance(data, dict) else None
        for entry in entries if isinstance(entries, list) else []:
            for key, value in (entry if isinstance(entry, dict) else {}).items():
                if value and key not in Dataset.model_fields and str(key) not in said:
                    yield f"{kind}[].{key}"


def main(directories: list[str]) -> None:
    """Load every YAML file below the directories and print how they fare."""
    schema = jsonschema.Draft202012Validator(json_schema())
    reasons: collections.Counter[str] = collections.Counter()
    methods: collections.Counter[str] = collections.Counter()
    runs: collections.Counter[str] = collections.Counter()
    without_files: collections.Counter[str] = collections.Counter()
    silent: collections.Counter[str] = collections.Counter()
    unfit, slowest = 0, 0.0
    files = [(d, p) for d in directories for p in sorted(Path(d).rglob("*.y*ml"))]
    for directory, path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        data = parse_yaml(text).data
        kind = method(data)
        methods[kind] += 1
        begin = time.perf_counter()
        faults: tuple[Fault, ...] = ()
        try:
            notices = load_recipe(path).notices
        except RecipeError as error:
            faults, notices = error.faults, error.notices
        slowest = max(slowest, time.perf_counter() - begin)
        silent.update(unspoken(data, notices, faults))
        print(f"{'refused' if faults else 'runs':8} {path.relative_to(directory)} ({kind})")
        for fault in faults:
            print(f"         {fault}")
        reasons.update({f"{fault.key.partition('[')[0]}: {fault.why}" for fault in faults})
        if not faults:
            runs[kind] += 1
            unfit += bool(list(schema.iter_errors(data)))
        elif all(fault.why == NO_FILE for fault in faults):
            without_files[kind] += 1
    print(f"\n{sum(runs.values())} of {len(files)} can run; the slowest took {slowest:.2f} s")
    for kind, count in methods.most_common():
        rest = f", {without_files[kind]} more with their files" if without_files[kind] else ""
        print(f"{runs[kind]:4} of {count:4}  {kind}{rest}")
    print(f"{unfit} that run do not fit the JSON Schema")
    print(f"keys without a word: {dict(silent) or 'none'}")
    for reason, count in reasons.most_common():
        print(f"{count:4}  {reason}")


if __name__ == "__main__":
    main(sys.argv[1:])
