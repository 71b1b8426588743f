"""Preferences, unpaired answers, steps and prompts go through the stage whole."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from regrow.tasks.modeling.rows import PackedRows
from regrow.tasks.prepare.preview import show
from regrow.tasks.stage import StageError


def sequences(prepared, split="train"):
    """(row, text, learnt text) of each sequence."""
    tokenizer = Tokenizer.from_file(str(prepared.out / "tokenizer" / "tokenizer.json"))
    rows = PackedRows(prepared.out, split)
    found = []
    for number in range(len(rows)):
        row = rows[number]
        ends = np.cumsum(row.seq_lens)[:-1]
        for ids, mask in zip(
            np.split(row.input_ids, ends), np.split(row.loss_mask, ends), strict=True
        ):
            whole = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            learnt = tokenizer.decode(ids[mask == 1].tolist(), skip_special_tokens=False)
            found.append((number, whole, learnt))
    return found


def pair_rows(count):
    return [
        {"prompt": f"Say {i}.", "chosen": f"yes {i} " * (i % 7 + 1), "rejected": f"no {i}"}
        for i in range(count)
    ]


def dataset(path, kind="passthrough", **keys):
    return {"path": path, "type": kind, **keys}


def test_pairs_stay_together_and_none_is_lost(bench):
    rows = pair_rows(40)
    prepared = bench.run(
        datasets=[dataset(bench.write("a.jsonl", rows), "chatml.prompt_pairs")],
        rl="dpo",
        sequence_len=64,
        val_set_size=5,
    )
    index = json.loads((prepared.out / "index.json").read_text())
    assert index["kind"] == "preference"
    found = []
    for split in ("train", "validation"):
        parts = sequences(prepared, split)
        assert len(parts) % 2 == 0
        for (row, better, chosen), (same_row, worse, rejected) in zip(
            parts[::2], parts[1::2], strict=True
        ):
            assert row == same_row
            prompt = better.removesuffix(chosen)
            assert prompt == worse.removesuffix(rejected)
            found.append(
                (
                    prompt.split("\n")[1].removesuffix("<|im_end|>"),
                    chosen.removesuffix("<|im_end|>"),
                    rejected.removesuffix("<|im_end|>"),
                )
            )
    assert sorted(found) == sorted((r["prompt"], r["chosen"], r["rejected"]) for r in rows)
    packed = PackedRows(prepared.out, "train")
    assert packed.kind == "preference"
    assert packed.examples == 35
    for i in range(len(packed)):
        assert len(packed[i].input_ids) <= 128
        assert packed[i].seq_lens.max() <= 64
        assert packed[i].labels.tolist() == [1, 0] * (len(packed[i].seq_lens) // 2)
    assert len(packed) < 20


@pytest.mark.parametrize(("strategy", "kept"), [("drop", 3), ("truncate", 4)])
def test_long_pairs_are_dropped_or_cut_as_pairs(bench, strategy, kept):
    rows = [*pair_rows(3), {"prompt": "Say", "chosen": "yes " * 90, "rejected": "no " * 80}]
    prepared = bench.run(
        datasets=[dataset(bench.write("a.jsonl", rows))],
        rl="dpo",
        sequence_len=48,
        excess_length_strategy=strategy,
    )
    packed = PackedRows(prepared.out, "train")
    assert packed.examples == kept
    parts = sequences(prepared)
    assert len(parts) == 2 * kept
    cut = [learnt for _, whole, learnt in parts if whole.count("yes") + whole.count("no") > 8]
    assert [text.split()[0] for text in cut] == (["yes", "no"] if kept == 4 else [])


def test_pairs_cannot_be_split(bench):
    path = bench.write("a.jsonl", [{"prompt": "", "chosen": "y " * 300, "rejected": "n"}])
    with pytest.raises(StageError, match="cannot be split"):
        bench.run(
            datasets=[dataset(path)], rl="dpo", excess_length_strategy="split", sequence_len=48
        )


def test_unpaired_answers_carry_their_labels(bench):
    rows = [
        {"prompt": f"Say {i}.", "completion": f"word {i}", "label": i % 3 == 0} for i in range(20)
    ]
    prepared = bench.run(datasets=[dataset(bench.write("a.jsonl", rows))], rl="kto")
    packed = PackedRows(prepared.out, "train")
    labels = np.concatenate([packed[i].labels for i in range(len(packed))]).tolist()
    found = [
        (whole, learnt, label)
        for (_, whole, learnt), label in zip(sequences(prepared), labels, strict=True)
    ]
    assert sorted(found) == sorted(
        (
            f"Say {i}.word {i}<|im_end|>",
            f"word {i}<|im_end|>",
            int(i % 3 == 0),
        )
        for i in range(20)
    )


def test_steps_have_a_label_for_each_learnt_token(bench):
    rows = [
        {
            "prompt": f"Add {i}",
            "completions": ["one", "two words", "three"],
            "labels": [1, i % 2, 0],
        }
        for i in range(9)
    ]
    prepared = bench.run(
        datasets=[dataset(bench.write("a.jsonl", rows), "stepwise_supervised")],
        process_reward_model=True,
    )
    packed = PackedRows(prepared.out, "train")
    for i in range(len(packed)):
        row = packed[i]
        assert len(row.labels) == row.loss_mask.sum() == 3 * len(row.seq_lens)
        assert set(map(tuple, row.labels.reshape(-1, 3).tolist())) <= {(1, 0, 0), (1, 1, 0)}
    assert {learnt for _, _, learnt in sequences(prepared)} == {"\n\n\n"}


def test_cut_steps_lose_their_labels(bench):
    rows = [{"prompt": "Add", "completions": ["one"] * 30, "labels": [1, 0] * 15}]
    prepared = bench.run(
        datasets=[dataset(bench.write("a.jsonl", rows), "stepwise_supervised")],
        process_reward_model=True,
        sequence_len=20,
        excess_length_strategy="truncate",
    )
    row = PackedRows(prepared.out, "train")[0]
    learnt = int(row.loss_mask.sum())
    assert 0 < learnt < 30
    assert row.labels.tolist() == ([1, 0] * 15)[:learnt]


def test_prompts_keep_the_other_columns(bench):
    rows = [
        {"prompt": [{"role": "user", "content": f"Add {i}"}], "answer": {"value": i}, "note": "Ü"}
        for i in range(7)
    ]
    prepared = bench.run(datasets=[dataset(bench.write("a.jsonl", rows))], rl="grpo")
    packed = PackedRows(prepared.out, "train")
    extra = [json.loads(text) for i in range(len(packed)) for text in packed[i].extra]
    found = [
        (whole.split("Add ")[1].split("<")[0], whole.endswith("<|im_start|>assistant\n"), its)
        for (_, whole, learnt), its in zip(sequences(prepared), extra, strict=True)
        if not learnt
    ]
    assert sorted(found, key=lambda f: f[0]) == [
        (str(i), True, {"answer": {"value": i}, "note": "Ü"}) for i in range(7)
    ]


def test_repeated_pairs_are_told_by_both_answers(bench):
    rows = [*pair_rows(3), *pair_rows(3), {**pair_rows(1)[0], "rejected": "other"}]
    prepared = bench.run(
        datasets=[dataset(bench.write("a.jsonl", rows))], rl="dpo", dataset_exact_deduplication=True
    )
    assert PackedRows(prepared.out, "train").examples == 4


def test_examples_of_each_kind_are_shown(bench):
    path = bench.write("a.jsonl", pair_rows(3))
    pairs = bench.run(datasets=[dataset(path)], rl="dpo")
    shown = show(pairs.out, 2)
    assert shown.count("chosen") == shown.count("rejected") == 2
    assert "Example 2" in shown
    assert "Example 3" not in shown
    page = (pairs.out / "preview.html").read_text()
    assert page.count("<h3>chosen") == page.count("<h3>rejected") == 3
    rows = [{"prompt": "Say", "completion": "word", "label": False}]
    unpaired = bench.run(datasets=[dataset(bench.write("b.jsonl", rows))], rl="kto")
    assert "undesirable" in show(unpaired.out, 1)
    rows = [{"prompt": "Add", "completions": ["a", "b"], "labels": [1, 0]}]
    steps = bench.run(
        datasets=[dataset(bench.write("c.jsonl", rows), "stepwise_supervised")],
        process_reward_model=True,
    )
    assert "steps: right, wrong" in show(steps.out, 1)
    rows = [{"prompt": "Add", "answer": "<b>4"}]
    prompts = bench.run(datasets=[dataset(bench.write("d.jsonl", rows))], rl="grpo")
    assert '{"answer": "<b>4"}' in show(prompts.out, 1)
    assert "&lt;b&gt;4" in (prompts.out / "preview.html").read_text()


def test_counts_tell_of_pairs_and_labels(bench):
    rows = pair_rows(10)
    pairs = bench.run(datasets=[dataset(bench.write("a.jsonl", rows))], rl="dpo").result
    counts = pairs["splits"]["train"]
    assert pairs["kind"] == "preference"
    assert counts["examples"] == 10
    assert counts["sequences"] == 20
    assert 0 < counts["fill"] <= 1
    assert sum(counts["length_histogram"]["counts"]) == 20
    labelled = [{"prompt": "Say", "completion": f"w {i}", "label": i < 4} for i in range(10)]
    prepared = bench.run(datasets=[dataset(bench.write("b.jsonl", labelled))], rl="kto")
    assert prepared.result["splits"]["train"]["labels"] == {"0": 6, "1": 4}


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("dpo", {"field_prompt": "q", "chosen_format": " {chosen}"}),
        ("dpo", {"field_system": "s"}),
        ("dpo", "user_defined.default"),
        ("kto", {"field_completion": "chosen", "field_label": "good"}),
    ],
)
def test_maps_go_through_the_stage(bench, method, kind):
    row = {"prompt": "p", "q": "q", "chosen": "yes"}
    row |= {"rejected": "no"} if method == "dpo" else {"good": 1}
    prepared = bench.run(datasets=[dataset(bench.write("a.jsonl", [row]), kind)], rl=method)
    prompt = "q" if "field_prompt" in kind else "p"
    assert sequences(prepared)[0][1] == f"{prompt}{' ' * (prompt == 'q')}yes<|im_end|>"


def test_one_kind_in_a_recipe(bench):
    path = bench.write("a.jsonl", [{"prompt": "Say", "chosen": "a", "rejected": "b"}])
    with pytest.raises(StageError, match=r"a\.jsonl:1: it holds a pair"):
        bench.run(datasets=[dataset(path)], rl="kto")


@pytest.mark.parametrize(("last", "kept"), [(False, [[1, 0]]), (True, [])])
def test_a_limit_cuts_steps_with_their_labels(smollm2_bench, last, kept):
    steps = {"completions": ["one", "two", "three"], "labels": [True, False, True]}
    rows = [{"prompt": "Add", **steps}, {"prompt": "", "completions": ["one"], "labels": [True]}]
    path = smollm2_bench.write("a.jsonl", rows)
    data = dataset(path, "stepwise_supervised", train_on_last_step_only=last)
    cut = smollm2_bench.run(
        datasets=[{**data, "max_completion_length": 5}],
        process_reward_model=True,
        sample_packing=False,
    )
    packed = PackedRows(cut.out, "train")
    found = sorted(packed[i].labels.tolist() for i in range(len(packed)))
    assert found == sorted([[1], *kept])


def test_framed_answers_are_one_message(bench):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = bench.write("a.jsonl", [{"prompt": "q", "chosen": talk, "rejected": talk}])
    with pytest.raises(StageError, match="one message of the assistant, not of user, assistant"):
        bench.run(datasets=[dataset(path, "chatml.prompt_pairs")], rl="dpo")


@pytest.mark.parametrize(
    ("method", "row", "message"),
    [
        ("grpo", {"prompt": [("user", "q"), ("assistant", "a")]}, "ends with a message of the ass"),
        (
            "kto",
            {"messages": [("user", "q"), ("user", "a")], "label": True},
            "must end with a mess",
        ),
        ("kto", {"prompt": "q", "completion": [("user", "a")], "label": True}, "must end with a m"),
    ],
)
def test_the_model_writes_the_answer_and_nobody_else(bench, method, row, message):
    """Not the data of a prompt, and not the user of an answer."""
    listed = {
        name: [{"role": role, "content": text} for role, text in its] if type(its) is list else its
        for name, its in row.items()
    }
    path = bench.write("a.jsonl", [listed])
    with pytest.raises(StageError, match=message):
        bench.run(datasets=[dataset(path)], rl=method)
