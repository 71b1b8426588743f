"""The key holds what decides the rows and nothing else."""

import subprocess
import sys

import pytest

from regrow.tasks.stage import StageError


@pytest.fixture
def key(bench):
    path = bench.write("a.jsonl", [{"text": "x"}])

    def of(placed=None, dataset=None, **keys):
        entry = {"path": path, "type": "chat_template", **(dataset or {})}
        return bench.stage(placed, datasets=[entry], **keys).key

    return of


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_len": 100},
        {"sample_packing": False},
        {"val_set_size": 0.1},
        {"seed": 1},
        {"excess_length_strategy": "truncate"},
        {"min_sample_len": 3},
        {"sample_packing_sequentially": True},
        {"shuffle_merged_datasets": False, "shuffle_before_merging_datasets": True},
        {"dataset_shard_num": 2},
        {"streaming": True, "max_steps": 1},
        {"dataset": {"weight": 2}},
        {"dataset": {"skip": 1}},
        {"dataset": {"split": "train+train[:1]"}},
        {"dataset_exact_deduplication": True},
        {"shuffle_merged_datasets": False},
        {"chat_template": "chatml"},
        {"chat_template_jinja": "{{ messages }}"},
        {"special_tokens": {"pad_token": "<|endoftext|>"}},
        {"tokens": ["<x>"]},
        {"train_on_inputs": True},
        {"eot_tokens": ["<|im_end|>"]},
        {"dataset": {"split": "train[:1]"}},
        {"dataset": {"train_on_eos": "all"}},
        {"dataset": {"roles_to_train": ["user"]}},
        {"dataset": {"type": "completion"}},
        {"dataset": {"field_messages": "talk"}},
        {"dataset": {"ds_type": "text"}},
    ],
    ids=str,
)
def test_what_decides_the_rows_changes_the_key(key, change):
    assert key(**change) != key()


@pytest.mark.parametrize(
    "change",
    [
        {"placed": {"num_proc": 7}},
        {"placed": {"locations": {"x": "elsewhere"}}},
        {"learning_rate": 3e-4},
        {"dataset_num_proc": 3},
        {"max_steps": 3},  # decides only how far a stream is read
        {"shuffle_before_merging_datasets": True},  # all examples are mixed anyway
        {"validation_leakage": "keep"},  # there is no test_datasets
        {"dataset_shard_num": 1},
        {"chat_template": "tokenizer_default"},
    ],
    ids=str,
)
def test_where_and_how_fast_does_not_change_the_key(key, change):
    assert key(**change) == key()


def test_content_decides_and_not_the_name(bench):
    first, second = bench.write("a.jsonl", [{"text": "x"}]), bench.write("b.jsonl", [{"text": "x"}])
    other = bench.write("c.jsonl", [{"text": "y"}])
    keys = [
        bench.stage(datasets=[{"path": path, "type": "completion"}]).key
        for path in (first, second, other)
    ]
    assert keys[0] == keys[1] != keys[2]


def test_shard_beyond_the_last_is_refused(bench):
    path = bench.write("a.jsonl", [{"text": "x"}])
    with pytest.raises((StageError, ValueError), match="shards_idx"):
        bench.stage(datasets=[{"path": path, "type": "completion", "shards": 2, "shards_idx": 2}])


def test_spec_is_light():
    code = (
        "import sys, regrow.tasks.prepare.spec\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'pyarrow', 'numpy', 'jinja2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_workers_start_without_torch():
    code = (
        "import sys, regrow.tasks.prepare.tokenize\n"
        "print(sorted({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "same",
    [
        {"split": "train[:]"},
        {"split": "train[0:100%]"},
        {"split": "train[0%:]"},
        {"eval_sequence_len": 64},
        {"eval_sample_packing": False},
    ],
)
def test_what_means_the_same_has_the_same_key(bench, same):
    dataset = {"path": bench.write("a.jsonl", [{"text": "x"}]), "type": "completion"}
    datasets = [dataset | {name: same[name] for name in same if name == "split"}]
    keys = {name: value for name, value in same.items() if name != "split"}
    assert bench.stage(datasets=datasets, **keys).key == bench.stage(datasets=[dataset]).key
    if keys:  # it decides how validation is done
        held = {"datasets": datasets, "val_set_size": 0.5}
        assert bench.stage(**held, **keys).key != bench.stage(**held).key


def test_how_rows_are_filled_decides_nothing_where_none_are(bench):
    dataset = {"path": bench.write("a.jsonl", [{"text": "x"}]), "type": "completion"}
    keys = {"datasets": [dataset], "sample_packing": False}
    assert bench.stage(**keys).key == bench.stage(**keys, sample_packing_sequentially=True).key
