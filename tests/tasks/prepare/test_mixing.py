"""Several datasets: each example as often as was asked, no validation example in training."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from regrow.tasks.modeling.row_sizes import read_sizes
from regrow.tasks.modeling.rows import PackedRows
from regrow.tasks.prepare import readers, units
from regrow.tasks.stage import StageError


def texts(*numbers: int, mark: str = "n") -> list[dict]:
    return [{"text": f"{mark}{i} " + "words and " * (i % 5) + "more"} for i in numbers]


def found(prepared, split: str = "train") -> list[str]:
    """The first word of each example of a split, in stored order."""
    tokenizer = Tokenizer.from_file(str(prepared.out / "tokenizer" / "tokenizer.json"))
    rows, firsts = PackedRows(prepared.out, split), []
    for i in range(len(rows)):
        row = rows[i]
        for part in np.split(row.input_ids, np.cumsum(row.seq_lens)[:-1]):
            firsts.append(tokenizer.decode(part.tolist()).split()[0])
    return firsts


@pytest.fixture
def plain(bench):
    """Runs the stage on plain texts; datasets as (rows, keys)."""

    def run(*datasets, tests=(), placed=None, **keys):
        entries = {"datasets": [], "test_datasets": []}
        for name, group in (("datasets", datasets), ("test_datasets", tests)):
            for i, (rows, more) in enumerate(group):
                path = bench.write(f"{name}-{i}.jsonl", rows)
                entries[name].append({"path": path, "type": "completion", **more})
        return bench.run(placed, **entries, **keys)

    return run


def test_weights_below_one_choose_and_above_one_repeat(plain):
    prepared = plain(
        (texts(*range(40), mark="a"), {"weight": 0.25}),
        (texts(*range(20), mark="b"), {"weight": 2}),
        (texts(*range(20), mark="c"), {"weight": 1.5}),
        (texts(*range(5), mark="d"), {}),
    )
    times = Counter(found(prepared))
    by_mark = {m: Counter(n for w, n in times.items() if w[0] == m) for m in "abcd"}
    assert by_mark == {"a": {1: 10}, "b": {2: 20}, "c": {1: 10, 2: 10}, "d": {1: 5}}
    assert prepared.result["dropped"]["not_wanted"] == 30
    assert prepared.result["splits"]["train"]["examples"] == 10 + 40 + 30 + 5


def test_what_a_weight_chooses_depends_on_content_and_seed_alone(plain):
    rows = texts(*range(30))
    chosen = set(found(plain((rows, {"weight": 0.5}))))
    assert chosen == set(found(plain((rows[::-1], {"weight": 0.5}))))
    assert chosen != set(found(plain((rows, {"weight": 0.5}), seed=1)))
    assert set(found(plain((rows, {"weight": 0.3})))) < chosen


def test_a_tiny_weight_leaves_one(plain):
    assert len(found(plain((texts(*range(9)), {"weight": 1e-6})))) == 1


def test_validation_examples_are_not_repeated_and_not_in_training(plain):
    prepared = plain((texts(*range(30)), {"weight": 3}), val_set_size=6)
    held, kept = found(prepared, "validation"), Counter(found(prepared))
    assert len(set(held)) == len(held) == 6
    assert set(kept.values()) == {3}
    assert not set(held) & set(kept)
    without = plain((texts(*range(30)), {}), val_set_size=6)
    assert sorted(found(without, "validation")) == sorted(held)


def test_equal_examples_of_two_datasets_are_kept_once_when_asked(plain):
    shared = texts(1, 2, 3)
    prepared = plain(
        (shared + texts(4), {"weight": 2}),
        (texts(5) + shared, {}),
        dataset_exact_deduplication=True,
    )
    assert Counter(found(prepared)) == {"n1": 2, "n2": 2, "n3": 2, "n4": 2, "n5": 1}
    assert prepared.result["dropped"]["repeated"] == 3


@pytest.mark.parametrize(("choice", "kept"), [("drop", 6), ("keep", 10)])
def test_training_examples_in_validation_are_counted_and_dropped(plain, choice, kept):
    leaked = texts(*range(4))
    prepared = plain(
        (texts(*range(10)), {}), tests=[(leaked, {})], validation_leakage=choice, min_sample_len=1
    )
    assert len(found(prepared)) == kept
    assert sorted(found(prepared, "validation")) == ["n0", "n1", "n2", "n3"]
    assert prepared.result["dropped"]["leaked"] == 4
    (line,) = [line for line in prepared.report.lines if "are in test_datasets too" in line]
    assert line.startswith("warning: 4 training examples")
    assert ("dropped" in line) == (choice == "drop")


def test_leakage_may_be_an_error(plain):
    with pytest.raises(StageError, match=r"validation_leakage: 1 of 3 training examples"):
        plain((texts(1, 2, 3), {}), tests=[(texts(3), {})], validation_leakage="error")
    assert plain((texts(1, 2), {}), tests=[(texts(3), {})], validation_leakage="error")


def test_nothing_but_leaked_examples_is_explained(plain):
    with pytest.raises(StageError, match=r"none would be left.*validation_leakage: keep"):
        plain((texts(1, 2), {}), tests=[(texts(1, 2, 3), {})])


def test_a_part_that_gets_no_examples_is_explained(plain):
    with pytest.raises(StageError, match=r"dataset_shard_num: part 9 of 10 is empty: there are 3"):
        plain((texts(1, 2, 3), {}), dataset_shard_num=10, dataset_shard_idx=9)


def test_slices_are_read_one_after_the_other(plain):
    keys = {"split": "train[:2]+train[-10%:]+train[3:5]", "skip": 1}
    prepared = plain((texts(*range(20)), keys), shuffle_merged_datasets=False, sample_packing=False)
    assert found(prepared) == ["n1", "n18", "n19", "n3", "n4"]
    assert prepared.result["datasets"][0]["rows"] == 5


def test_splits_of_a_folder_are_read_together(bench):
    bench.write("d/train.jsonl", texts(1, 2))
    bench.write("d/validation.jsonl", texts(3))
    dataset = {"path": str(bench.root / "d"), "type": "completion"}
    prepared = bench.run(datasets=[{**dataset, "split": "train+validation"}])
    assert sorted(found(prepared)) == ["n1", "n2", "n3"]


def test_parts_of_all_datasets_cover_them_once(plain):
    datasets = [(texts(*range(10), mark="a"), {}), (texts(*range(7), mark="b"), {})]
    parts = [found(plain(*datasets, dataset_shard_num=3, dataset_shard_idx=i)) for i in range(3)]
    assert sorted(word for part in parts for word in part) == sorted(
        [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(7)]
    )
    assert all({word[0] for word in part} == {"a", "b"} for part in parts)


def test_order_of_rows(plain):
    datasets = [(texts(*range(30), mark="a"), {}), (texts(*range(30), mark="b"), {})]
    keys = {"sample_packing": False}
    stored = found(plain(*datasets, **keys, shuffle_merged_datasets=False))
    assert stored == [f"a{i}" for i in range(30)] + [f"b{i}" for i in range(30)]
    within = found(
        plain(
            *datasets,
            **keys,
            shuffle_merged_datasets=False,
            shuffle_before_merging_datasets=True,
        )
    )
    assert within != stored
    assert sorted(within[:30]) == sorted(stored[:30])
    mixed = found(plain(*datasets, **keys))
    assert 5 < sum(word[0] == "a" for word in mixed[:30]) < 25


def test_rows_filled_in_order_hold_neighbours(plain):
    prepared = plain(
        (texts(*range(60)), {}), sample_packing_sequentially=True, shuffle_merged_datasets=False
    )
    assert found(prepared) == [f"n{i}" for i in range(60)]


def test_validation_may_be_longer_than_training(plain):
    long = [{"text": f"n{i} " + "words " * 60} for i in range(20)]
    prepared = plain((long, {}), val_set_size=5, sequence_len=32, eval_sequence_len=256)
    assert len(set(found(prepared, "validation"))) == 5
    assert len(found(prepared, "validation")) == 5  # whole, where training has several pieces each
    rows = PackedRows(prepared.out, "train")
    assert max(len(rows[i].input_ids) for i in range(len(rows))) <= 32
    held = PackedRows(prepared.out, "validation")
    assert max(len(held[i].input_ids) for i in range(len(held))) > 100


def test_datasets_of_two_kinds_are_refused(plain, monkeypatch):
    from regrow.tasks.prepare.formats import alpaca

    monkeypatch.setattr(alpaca, "KIND", "unpaired", raising=False)
    with pytest.raises(StageError, match=r"of one kind.*datasets\.0 sft, datasets\.1 unpaired"):
        plain((texts(1), {}), ([{"instruction": "a", "output": "b"}], {"type": "alpaca"}))


def pairs(count: int) -> list[dict]:
    return [
        {
            "prompt": f"Say {i} " + "please " * (i % 7),
            "chosen": f"n{i} " + "Yes. " * (i % 9 * 4),
            "rejected": "No. " * (i % 5),
        }
        for i in range(count)
    ]


def test_a_pair_stays_in_one_row_and_whole(bench):
    path = bench.write("a.jsonl", pairs(60))
    prepared = bench.run(
        datasets=[{"path": path, "type": "passthrough"}],
        rl="dpo",
        sequence_len=128,
        val_set_size=10,
    )
    for split, count in (("train", 50), ("validation", 10)):
        rows = PackedRows(prepared.out, split)
        assert rows.kind == "preference"
        lengths = [rows[i].seq_lens for i in range(len(rows))]
        assert sum(len(its) for its in lengths) == 2 * count
        assert all(len(its) % 2 == 0 for its in lengths)
        assert max(int(its.max()) for its in lengths) <= 128
        assert max(int(its.sum()) for its in lengths) <= 256
        sizes = read_sizes(prepared.out, split)
        assert [its.sum() for its in lengths] == sizes[:, 0].tolist()
        assert [(its.astype(int) ** 2).sum() for its in lengths] == sizes[:, 1].tolist()


@pytest.mark.parametrize(("strategy", "count"), [("drop", 40), ("truncate", 60)])
def test_long_pairs(bench, strategy, count):
    rows = [
        {"prompt": f"{i}", "chosen": "word " * (90 * (i % 3)), "rejected": "no"} for i in range(60)
    ]
    rows = [row | {"chosen": row["chosen"] or "yes"} for row in rows]
    kept = sum(len(row["chosen"]) < 100 for row in rows)
    assert kept == 20
    prepared = bench.run(
        datasets=[{"path": bench.write("a.jsonl", rows), "type": "passthrough"}],
        rl="dpo",
        sequence_len=100,
        excess_length_strategy=strategy,
    )
    told = prepared.result["splits"]["train"]
    assert told["examples"] == count
    assert prepared.result["dropped"]["too_long"] == 60 - count


def test_pairs_are_not_split(bench):
    rows = [{"prompt": "q", "chosen": "word " * 90, "rejected": "no"}]
    with pytest.raises(StageError, match=r"cannot be split; use drop or truncate"):
        bench.run(
            datasets=[{"path": bench.write("a.jsonl", rows), "type": "passthrough"}],
            rl="dpo",
            sequence_len=32,
            excess_length_strategy="split",
        )


def test_sizes_of_the_rows_are_stored_in_their_order(plain):
    prepared = plain((texts(*range(50)), {}), val_set_size=10)
    for split in ("train", "validation"):
        rows, sizes = PackedRows(prepared.out, split), read_sizes(prepared.out, split)
        assert sizes is not None
        for i in range(len(rows)):
            lengths = rows[i].seq_lens.astype(np.int64)
            assert sizes[i].tolist() == [lengths.sum(), (lengths**2).sum()]


def test_weighted_mixtures_are_the_same_bytes_for_any_number_of_processes(bench, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 500)
    monkeypatch.setattr(units, "UNIT_BYTES", 2000)
    recipe = {
        "datasets": [
            {
                "path": bench.write("a.jsonl", texts(*range(60))),
                "type": "completion",
                "weight": 0.7,
            },
            {
                "path": bench.write("b.jsonl", texts(*range(50, 99))),
                "type": "completion",
                "weight": 2.5,
            },
        ],
        "dataset_exact_deduplication": True,
        "val_set_size": 0.1,
    }
    results = []
    for processes in (1, 2, 8):
        bench.units = type(bench.units)(bench.root / f"units-{processes}")
        done = bench.run({"num_proc": processes, "pool_from_bytes": 0}, **recipe)
        results.append((done.files(), done.result))
    assert results[0] == results[1] == results[2]


class Stopped(BaseException):
    """Not an Exception: nothing on the way may handle it."""


@pytest.mark.parametrize("moment", [0, 3, 6])
def test_only_what_is_missing_is_done_again_after_a_kill(bench, monkeypatch, moment):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 300)
    monkeypatch.setattr(units, "UNIT_BYTES", 600)
    recipe = {
        "datasets": [
            {"path": bench.write("a.jsonl", texts(*range(60))), "type": "completion", "weight": 2},
            {"path": bench.write("b.jsonl", texts(*range(60, 99))), "type": "completion"},
        ],
        "val_set_size": 5,
    }
    whole = bench.run(**recipe)
    everything = bench.units.built.count("tokens")
    bench.units = type(bench.units)(bench.root / "other")
    write, left = units.write_unit, iter(range(moment))

    def dying(*args):
        if next(left, None) is None:
            raise Stopped
        return write(*args)

    with monkeypatch.context() as broken:
        broken.setattr(units, "write_unit", dying)
        with pytest.raises(Stopped):
            bench.run(**recipe)
    assert bench.units.built.count("tokens") == moment
    again = bench.run(**recipe)
    assert bench.units.built.count("tokens") == everything > moment
    assert again.files() == whole.files()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(0, 90), min_size=1, max_size=25),
    weight=st.sampled_from([1, 2, 3]),
    sequence_len=st.sampled_from([16, 40, 200]),
    packed=st.booleans(),
    in_order=st.booleans(),
    mixed=st.booleans(),
)
def test_rows_hold_every_piece_of_every_text_as_often_as_asked(
    bench, sizes, weight, sequence_len, packed, in_order, mixed
):
    rows = [{"text": f"n{i} " + "more " * size} for i, size in enumerate(sizes)]
    prepared = bench.run(
        datasets=[{"path": bench.write("a.jsonl", rows), "type": "completion", "weight": weight}],
        sequence_len=sequence_len,
        sample_packing=packed,
        sample_packing_sequentially=in_order,
        shuffle_merged_datasets=mixed,
    )
    tokenizer = Tokenizer.from_file(str(prepared.out / "tokenizer" / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    expected: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        ids = [*tokenizer.encode(row["text"], add_special_tokens=False).ids, end]
        pieces = [tuple(ids[at : at + sequence_len]) for at in range(0, len(ids), sequence_len)]
        for piece in pieces:
            if len(piece) > 1:  # one token alone has nothing before it to be predicted from
                expected[piece] += weight
    found: Counter[tuple[int, ...]] = Counter()
    stored = PackedRows(prepared.out, "train")
    for i in range(len(stored)):
        row = stored[i]
        assert len(row.input_ids) <= sequence_len
        assert packed or len(row.seq_lens) == 1
        parts = np.split(row.input_ids, np.cumsum(row.seq_lens)[:-1])
        found.update(tuple(part.tolist()) for part in parts)
    assert found == expected
