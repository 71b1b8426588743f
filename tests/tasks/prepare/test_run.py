"""The whole stage: same spec, same bytes; nothing lost, nothing mixed, everything counted."""

import hashlib
import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from regrow.tasks.modeling.rows import PackedRows
from regrow.tasks.prepare import readers, units
from regrow.tasks.prepare.example import RowError
from regrow.tasks.prepare.templates import TEMPLATES
from regrow.tasks.prepare.tokenize import reason_of
from regrow.tasks.stage import StageError


def dialogues(count: int, first: int = 0) -> list[dict]:
    """Rows of very different length whose texts tell them apart."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say {i} " + "please " * (i * 7 % 31)},
                {"role": "assistant", "content": f"It is {i}." + " Yes." * (i * 5 % 17)},
            ]
        }
        for i in range(first, first + count)
    ]


def chat_row(question: str, answer: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def unpacked(prepared, split: str = "train") -> list[tuple[str, str]]:
    """(whole text, learnt text) of each example of a split, in stored order."""
    tokenizer = Tokenizer.from_file(str(prepared.out / "tokenizer" / "tokenizer.json"))
    found = []
    rows = PackedRows(prepared.out, split)
    for index in range(len(rows)):
        row = rows[index]
        ends = np.cumsum(row.seq_lens)
        for end, length in zip(ends, row.seq_lens, strict=True):
            ids, mask = row.input_ids[end - length : end], row.loss_mask[end - length : end]
            learnt = ids[mask == 1].tolist()
            found.append(
                (
                    tokenizer.decode(ids.tolist(), skip_special_tokens=False),
                    tokenizer.decode(learnt, skip_special_tokens=False),
                )
            )
    return found


def answers(prepared, split: str = "train") -> list[str]:
    return [learnt for _, learnt in unpacked(prepared, split)]


def expected_answers(rows: list[dict]) -> list[str]:
    return sorted(row["messages"][1]["content"] + "<|im_end|>" for row in rows)


def test_every_example_arrives_whole_with_its_answer_learnt(bench):
    rows = dialogues(120)
    prepared = bench.run(datasets=[{"path": bench.write("a.jsonl", rows), "type": "chat_template"}])
    assert sorted(answers(prepared)) == expected_answers(rows)
    for text, learnt in unpacked(prepared):
        assert text.endswith(f"<|im_start|>assistant\n{learnt}\n")
    packed = PackedRows(prepared.out, "train")
    assert all(
        packed[i].seq_lens.sum() == len(packed[i].input_ids) <= 256 for i in range(len(packed))
    )
    assert prepared.result["splits"]["train"]["fill"] > 0.9


def test_result_and_index_count_what_is_stored(bench):
    rows = dialogues(100)
    path = bench.write("a.jsonl", rows)
    prepared = bench.run(
        datasets=[{"path": path, "type": "chat_template"}], val_set_size=0.1, seed=3
    )
    index = json.loads((prepared.out / "index.json").read_text())["splits"]
    for split in ("train", "validation"):
        packed, told = PackedRows(prepared.out, split), prepared.result["splits"][split]
        stored = [packed[i] for i in range(len(packed))]
        assert told["rows"] == index[split]["rows"] == len(stored)
        assert told["examples"] == index[split]["examples"] == sum(len(r.seq_lens) for r in stored)
        assert told["tokens"] == index[split]["tokens"] == sum(len(r.input_ids) for r in stored)
        learnt = sum(int(r.loss_mask.sum()) for r in stored)
        assert told["supervised_tokens"] == index[split]["supervised_tokens"] == learnt
        assert told["trained_share"] == pytest.approx(learnt / told["tokens"])
        assert told["fill"] == pytest.approx(told["tokens"] / (told["rows"] * 256))
        assert sum(told["length_histogram"]["counts"]) == told["examples"]
        assert sum(told["fill_histogram"]["counts"]) == told["rows"]
        assert index[split]["shards"][0]["file"] == f"{split}/shard-00000.arrow"
    assert prepared.result["datasets"] == [
        {
            "format": "chat_template",
            "files": 1,
            "rows": 100,
            "examples": 100,
            "tokens": sum(its["tokens"] for its in prepared.result["splits"].values()),
        }
    ]
    tokenized = [step for step in prepared.report.steps if step[2] == "rows"]
    assert tokenized[-1][:2] == (100, 100)
    assert all(note.startswith("tokenized") and "tokens/s" in note for *_, note in tokenized)


def test_same_bytes_however_many_processes_and_again(bench, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 2000)
    path = bench.write("a.jsonl", dialogues(100))
    recipe = {"datasets": [{"path": path, "type": "chat_template"}], "val_set_size": 7}
    alone = bench.run({"num_proc": 1}, **recipe)
    bench.units = type(bench.units)(bench.root / "other-units")
    together = bench.run({"num_proc": 2, "pool_from_bytes": 0}, **recipe)
    cached = bench.run({"num_proc": 3}, **recipe)
    assert alone.files() == together.files() == cached.files()
    assert alone.result == together.result == cached.result
    assert {"index.json", "prompts.jsonl", "preview.html", "tokenizer/tokenizer.json"} <= set(
        alone.files()
    )


def test_golden_rows(smollm2_bench):
    """Pinned: these may change only together with the stage's VERSION."""
    path = smollm2_bench.write("a.jsonl", dialogues(40))
    prepared = smollm2_bench.run(
        datasets=[{"path": path, "type": "chat_template"}], val_set_size=0.1, sequence_len=512
    )
    digest = hashlib.sha256()
    for split in ("train", "validation"):
        rows = PackedRows(prepared.out, split)
        for i in range(len(rows)):
            row = rows[i]
            for values in (row.input_ids, row.loss_mask, row.seq_lens):
                digest.update(values.astype("<i4").tobytes())
    assert digest.hexdigest() == GOLDEN


GOLDEN = "173166de4d1d29c712a7e592659c07773fcfb22d63357fe0250941cb426a8543"


def test_units_are_found_again_whatever_is_packed(bench, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)
    monkeypatch.setattr(units, "UNIT_BYTES", 4000)
    path = bench.write("a.jsonl", dialogues(100))
    dataset = {"path": path, "type": "chat_template"}
    bench.run(datasets=[dataset])
    built = list(bench.units.built)
    assert built.count("tokens") > 2
    bench.run(datasets=[dataset], sequence_len=512, sample_packing=False, val_set_size=0.2, seed=1)
    assert bench.units.built == built
    # A part of the rows shares the units that it covers whole.
    bench.run(datasets=[{**dataset, "split": "train[:90%]"}])
    assert len(bench.units.built) == len(built) + 1
    bench.run(datasets=[{**dataset, "roles_to_train": ["user"]}])
    assert len(bench.units.built) == 2 * len(built)


def test_units_do_not_depend_on_where_the_file_lies(bench):
    rows = dialogues(10)
    bench.run(datasets=[{"path": bench.write("a.jsonl", rows), "type": "chat_template"}])
    built = list(bench.units.built)
    bench.run(datasets=[{"path": bench.write("sub/b.jsonl", rows), "type": "chat_template"}])
    assert bench.units.built == built


def test_split_slice_gives_those_rows(bench, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    rows = dialogues(50)
    path = bench.write("a.jsonl", rows)
    prepared = bench.run(
        datasets=[{"path": path, "type": "chat_template", "split": "train[20%:-15]"}]
    )
    assert sorted(answers(prepared)) == expected_answers(rows[10:35])


def test_slice_counts_over_all_files_of_a_dataset(bench):
    rows = dialogues(30)
    for name, part in (
        ("d/a.jsonl", rows[:7]),
        ("d/b.jsonl", rows[7:10]),
        ("d/c.jsonl", rows[10:]),
    ):
        bench.write(name, part)
    dataset = {"path": str(bench.root / "d"), "type": "chat_template"}
    prepared = bench.run(datasets=[{**dataset, "split": "train[5:12]"}])
    assert sorted(answers(prepared)) == expected_answers(rows[5:12])
    parts = [bench.run(datasets=[{**dataset, "shards": 4, "shards_idx": i}]) for i in range(4)]
    assert sorted(a for part in parts for a in answers(part)) == expected_answers(rows)


def test_validation_is_chosen_by_content(bench):
    rows = dialogues(60)
    forwards = bench.run(
        datasets=[{"path": bench.write("a.jsonl", rows), "type": "chat_template"}], val_set_size=0.2
    )
    backwards = bench.run(
        datasets=[{"path": bench.write("b.jsonl", rows[::-1]), "type": "chat_template"}],
        val_set_size=0.2,
    )
    held = answers(forwards, "validation")
    assert len(held) == 12
    assert sorted(held) == sorted(answers(backwards, "validation"))
    assert sorted(held + answers(forwards)) == expected_answers(rows)
    other = bench.run(
        datasets=[{"path": bench.write("a.jsonl", rows), "type": "chat_template"}],
        val_set_size=0.2,
        seed=1,
    )
    assert sorted(answers(other, "validation")) != sorted(held)


def test_equal_examples_are_never_on_both_sides(bench):
    rows = dialogues(20) * 3
    prepared = bench.run(
        datasets=[{"path": bench.write("a.jsonl", rows), "type": "chat_template"}], val_set_size=5
    )
    held, kept = answers(prepared, "validation"), answers(prepared)
    assert len(held) == 15
    assert not set(held) & set(kept)


def test_repeats_are_dropped_when_asked(bench):
    path = bench.write("a.jsonl", dialogues(20) * 3)
    test_path = bench.write("t.jsonl", dialogues(5, first=18))
    prepared = bench.run(
        datasets=[{"path": path, "type": "chat_template"}],
        test_datasets=[{"path": test_path, "type": "chat_template"}],
        dataset_exact_deduplication=True,
    )
    assert sorted(answers(prepared)) == expected_answers(dialogues(18))
    assert sorted(answers(prepared, "validation")) == expected_answers(dialogues(5, first=18))
    assert prepared.result["dropped"]["repeated"] == 40


def test_prompts_are_held_out_and_end_where_the_answer_begins(bench):
    prepared = bench.run(
        datasets=[{"path": bench.write("a.jsonl", dialogues(40)), "type": "chat_template"}],
        val_set_size=6,
    )
    prompts = [json.loads(line) for line in (prepared.out / "prompts.jsonl").open()]
    texts = dict(unpacked(prepared, "validation"))
    assert len(prompts) == 6
    tokenizer = Tokenizer.from_file(str(prepared.out / "tokenizer" / "tokenizer.json"))
    for prompt in prompts:
        assert prompt["prompt"].endswith("<|im_start|>assistant\n")
        assert texts[f"{prompt['prompt']}{prompt['expected']}<|im_end|>\n"]
        decoded = tokenizer.decode(prompt["prompt_ids"], skip_special_tokens=False)
        assert decoded == prompt["prompt"]


def test_no_held_out_data_means_no_prompts_and_says_so(bench):
    prepared = bench.run(
        datasets=[{"path": bench.write("a.jsonl", dialogues(5)), "type": "chat_template"}]
    )
    assert (prepared.out / "prompts.jsonl").read_text() == ""
    assert any("no prompts" in line for line in prepared.report.lines)
    assert not (prepared.out / "validation").exists()


@pytest.mark.parametrize("strategy", ["drop", "truncate", "split"])
def test_too_long_examples(bench, strategy):
    rows = dialogues(20)
    long = [chat_row("Q", "word " * 300)]
    prepared = bench.run(
        datasets=[{"path": bench.write("a.jsonl", rows + long), "type": "chat_template"}],
        excess_length_strategy=strategy,
        sequence_len=128,
    )
    learnt = answers(prepared)
    short = [a for a in learnt if "word" not in a]
    pieces = [a for a in learnt if "word" in a]
    assert sorted(short) == expected_answers(rows)
    assert prepared.result["dropped"]["too_long"] == (strategy == "drop")
    words = "".join(pieces).count("word")
    if strategy == "drop":
        assert words == 0
        assert any(
            "1 examples dropped: they are too long" in line for line in prepared.report.lines
        )
    elif strategy == "truncate":
        assert len(pieces) == 1
        assert 50 < words < 128
    else:
        # The first token of each further piece has nothing before it to be predicted from.
        assert len(pieces) == 3
        assert words == 300 - 2
    packed = PackedRows(prepared.out, "train")
    for i in range(len(packed)):
        starts = np.cumsum(packed[i].seq_lens) - packed[i].seq_lens
        assert not packed[i].loss_mask[starts].any()
        assert len(packed[i].input_ids) <= 128


def test_long_documents_are_split_and_learnt(bench):
    text = " ".join(f"n{i}" for i in range(400))
    path = bench.write("a.jsonl", [{"text": text}, {"text": "short one"}])
    prepared = bench.run(datasets=[{"path": path, "type": "completion"}], sequence_len=128)
    whole = "".join(text for text, _ in sorted_by_first_number(unpacked(prepared)))
    assert whole.replace("short one<|im_end|>", "") == f"{text}<|im_end|>"
    assert not any(prepared.result["dropped"].values())
    packed = PackedRows(prepared.out, "train")
    lengths = [n for i in range(len(packed)) for n in packed[i].seq_lens]
    assert prepared.result["splits"]["train"]["supervised_tokens"] == sum(n - 1 for n in lengths)


def sorted_by_first_number(examples):
    def first(example):
        digits = "".join(c if c.isdigit() else " " for c in example[0]).split()
        return int(digits[1]) if len(digits) > 1 else -1

    return sorted(examples, key=first)


def test_one_example_a_row_without_packing(bench):
    rows = dialogues(20)
    prepared = bench.run(
        datasets=[{"path": bench.write("a.jsonl", rows), "type": "chat_template"}],
        sample_packing=False,
        shuffle_merged_datasets=False,
    )
    packed = PackedRows(prepared.out, "train")
    assert len(packed) == 20
    assert answers(prepared) == [r["messages"][1]["content"] + "<|im_end|>" for r in rows]


def test_validation_may_be_packed_otherwise(bench):
    rows = dialogues(40)
    prepared = bench.run(
        datasets=[{"path": bench.write("a.jsonl", rows), "type": "chat_template"}],
        val_set_size=10,
        sample_packing=True,
        eval_sample_packing=False,
    )
    assert len(PackedRows(prepared.out, "validation")) == 10
    assert len(PackedRows(prepared.out, "train")) < 30


def test_rows_are_mixed_over_datasets_and_lengths(bench):
    short = [chat_row(f"a{i}", "x") for i in range(60)]
    long = [chat_row(f"b{i}", "y " * 60) for i in range(60)]
    prepared = bench.run(
        datasets=[
            {"path": bench.write("a.jsonl", short), "type": "chat_template"},
            {"path": bench.write("b.jsonl", long), "type": "chat_template"},
        ],
        sample_packing=False,
    )
    packed = PackedRows(prepared.out, "train")
    first_half = [len(packed[i].input_ids) > 80 for i in range(60)]
    assert 20 <= sum(first_half) <= 40


def test_formats_may_be_mixed(bench):
    prepared = bench.run(
        datasets=[
            {"path": bench.write("a.jsonl", dialogues(3)), "type": "chat_template"},
            {
                "path": bench.write("b.jsonl", [{"instruction": "Add.", "output": "two"}]),
                "type": "alpaca",
            },
            {"path": bench.write("c.jsonl", [{"text": "plain words"}]), "type": "completion"},
        ]
    )
    learnt = answers(prepared)
    assert "two<|im_end|>" in learnt
    assert " words<|im_end|>" in learnt
    assert [its["format"] for its in prepared.result["datasets"]] == [
        "chat_template",
        "alpaca",
        "completion",
    ]


def test_tokenizer_is_saved_as_used(bench):
    prepared = bench.run(
        datasets=[{"path": bench.write("a.jsonl", dialogues(3)), "type": "chat_template"}],
        special_tokens={"pad_token": "<|endoftext|>"},
        tokens=["<new>"],
        chat_template="chatml",
    )
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(prepared.out / "tokenizer")
    assert saved.pad_token == "<|endoftext|>"
    assert len(saved("<new>")["input_ids"]) == 1
    shown = saved.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert shown == "<|im_start|>user\nx<|im_end|>\n"
    config = (prepared.out / "tokenizer" / "tokenizer_config.json").read_text()
    assert str(bench.root.parent) not in config


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([], {}, r"datasets.0: there are no rows in .*jsonl"),
        ([chat_row("q", "a " * 300)], {}, r"none of 1 .* 1 are longer than sequence_len 256"),
        ([{"messages": [{"role": "user", "content": "q"}]}], {}, "1 hold nothing to learn"),
        ([{"messages": []}], {}, "1 hold nothing to learn"),
        ([chat_row("q", "a")], {"val_set_size": 0.5}, "val_set_size: 0.5 holds back 1 of 1"),
        (
            [chat_row("q", "a " * 300), chat_row("q", "a")],
            {"excess_length_strategy": "raise"},
            "1 of 2 examples are longer than sequence_len 256.*excess_length_strategy",
        ),
        (
            [chat_row("q", "a"), {"question": "q"}],
            {},
            r"a\.jsonl:2: no column 'messages'; the row has 'question'.*field_messages",
        ),
        (
            [chat_row("q", "a")],
            {"chat_template_jinja": "{{ raise_exception('never') }}"},
            r"a\.jsonl:1: the chat template refuses.*never",
        ),
        ([chat_row("q", "a")], {"min_sample_len": 200}, "1 are shorter than `min_sample_len`"),
    ],
)
def test_data_that_cannot_be_used_is_explained(bench, rows, keys, message):
    path = bench.write("a.jsonl", rows)
    with pytest.raises(StageError, match=message):
        bench.run(datasets=[{"path": path, "type": "chat_template"}], **keys)


def test_error_in_another_process_names_the_row(bench, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)
    path = bench.write("a.jsonl", [*dialogues(30), {"oops": 1}, *dialogues(30)])
    with pytest.raises(StageError, match=r"a\.jsonl:31: no column 'messages'"):
        bench.run(
            {"num_proc": 2, "pool_from_bytes": 0},
            datasets=[{"path": path, "type": "chat_template"}],
        )


def test_unended_answers_are_warned_of(bench):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    prepared = bench.run(
        datasets=[{"path": bench.write("a.jsonl", dialogues(4)), "type": "chat_template"}],
        chat_template_jinja=template,
    )
    assert any("4 trained messages are followed by no eos" in x for x in prepared.report.lines)


def test_many_shards_are_one_split(bench, monkeypatch):
    from regrow.tasks.prepare import shards

    path = bench.write("a.jsonl", dialogues(50))
    dataset = {"path": path, "type": "chat_template"}
    one = bench.run(datasets=[dataset])
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    monkeypatch.setattr(shards, "BATCH_ROWS", 3)
    many = bench.run(datasets=[dataset])
    assert len(list((many.out / "train").iterdir())) > 3
    assert unpacked(many) == unpacked(one)


def test_no_source_file_is_read_when_all_units_exist(bench):
    path = bench.write("a.jsonl", dialogues(10))
    dataset = {"path": path, "type": "chat_template"}
    bench.run(datasets=[dataset])
    stage_keys = {"datasets": [dataset], "sequence_len": 128}
    again = bench.run({"locations": {}}, **stage_keys)
    assert len(answers(again)) == 10


def chat(path: str, **keys) -> dict:
    return {"path": path, "type": "chat_template", **keys}


REFUSING = "{% if messages[0].content == 'no' %}{{ raise_exception('not that') }}{% endif %}"


def test_refused_rows_are_dropped_and_counted_only_when_asked(bench, monkeypatch):
    """By the format and by the template, found among rows that are encoded at once."""
    rows = dialogues(300)
    refused = [{"messages": "?"}, chat_row("no", "a"), {"messages": [{"role": "user"}]}]
    refused += [{"messages": [{}, {"role": "assistant"}]}, chat_row("no", "b")]
    mixed = list(rows)
    for place, row in zip((0, 7, 150, 151, 304), refused, strict=True):
        mixed.insert(place, row)
    keys = {
        "chat_template": "jinja",
        "chat_template_jinja": REFUSING + TEMPLATES["chatml"],
        "val_set_size": 4,
    }
    clean = bench.run(datasets=[chat(bench.write("clean.jsonl", rows))], **keys)
    path = bench.write("mixed.jsonl", mixed)
    with pytest.raises(StageError, match=r"mixed\.jsonl:1: column 'messages' holds text"):
        bench.run(datasets=[chat(path)], **keys)
    dropped = bench.run(datasets=[chat(path)], on_bad_rows="drop", **keys)
    assert dropped.result["dropped"]["refused"] == 5
    assert sum(dropped.result["refused"].values()) == 5
    assert [n for why, n in dropped.result["refused"].items() if "not that" in why] == [2]
    assert sorted(unpacked(dropped) + unpacked(dropped, "validation")) == sorted(
        unpacked(clean) + unpacked(clean, "validation")
    )
    told = [line for line in dropped.report.lines if "refuse" in line]
    assert len(told) == 1 + len(dropped.result["refused"])
    monkeypatch.setattr(readers, "CHUNK_BYTES", 4096)
    bench.units = type(bench.units)(bench.root / "other")
    again = bench.run(
        {"num_proc": 2, "pool_from_bytes": 0}, datasets=[chat(path)], on_bad_rows="drop", **keys
    )
    assert again.files() == dropped.files()
    assert again.result == dropped.result
    cached = bench.run(datasets=[chat(path)], on_bad_rows="drop", **keys)
    assert cached.result == dropped.result
    with pytest.raises(StageError, match=r"mixed\.jsonl:1:"):
        bench.run(datasets=[chat(path)], **keys)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("column 'a' must hold a list, not 'None'", "column 'a' must hold a list"),
        ("message 31 has no text in 'content'", "message ... has no text in 'content'"),
        (f"no column 'b'; the row has '{'x' * 50}'", "no column 'b'; the row has ..."),
    ],
)
def test_a_reason_is_that_of_many_rows(told, reason):
    assert reason_of(RowError(told)) == reason


def test_nothing_but_refused_rows_says_why(bench):
    path = bench.write("a.jsonl", [{"messages": "?"}, {"messages": "!"}])
    with pytest.raises(StageError, match="all 2 rows are refused: column 'messages' holds text"):
        bench.run(datasets=[chat(path)], on_bad_rows="drop")


def test_rows_nested_without_end_are_named(bench):
    row = {"messages": chat_row("a", "b")["messages"], "x": None}
    deep: list = []
    for _ in range(900):
        deep = [deep]
    row["messages"][0]["deep"] = deep
    with pytest.raises(StageError, match=r"a\.jsonl:2: its values are nested too deeply"):
        bench.run(datasets=[chat(bench.write("a.jsonl", [*dialogues(1), row]))])


def test_thinking_that_no_template_prints_is_warned_of(bench):
    path = bench.write("a.jsonl", [chat_row("a", "<think>hm</think>b")])
    told = bench.run(datasets=[chat(path, split_thinking=True)]).report.lines
    assert any("split_thinking" in line and "left out" in line for line in told)
