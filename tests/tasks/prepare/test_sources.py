"""A recipe's path means a list of files, and whatever is wrong with it is said with its key."""

import pytest

from regrow.tasks.prepare.sources import Rows, file_kind, parse_split, resolve
from regrow.tasks.stage import StageError


@pytest.fixture
def folder(tmp_path):
    def make(*names: str):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("{}")
        return tmp_path

    return make


def names(root, found):
    return [place.removeprefix(f"{root}/") for place in found]


def test_file_is_itself(folder):
    root = folder("a.jsonl")
    assert names(root, resolve(f"{root}/a.jsonl")) == ["a.jsonl"]


def test_directory_gives_its_data_files_in_order(folder):
    root = folder("b.jsonl", "a.jsonl.gz", "README.md", ".cache/x.jsonl", "dataset_info.json")
    assert names(root, resolve(str(root))) == ["a.jsonl.gz", "b.jsonl"]


def test_glob_and_data_files_give_what_they_match(folder):
    root = folder("a-1.json", "a-2.json", "b.json", "c.txt")
    assert names(root, resolve(f"{root}/a-*.json")) == ["a-1.json", "a-2.json"]
    assert names(root, resolve(str(root), ("b.json", "a-*"))) == ["b.json", "a-1.json", "a-2.json"]
    assert names(root, resolve("json", (f"{root}/b.json",))) == ["b.json"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ["data/train-00000-of-2.parquet", "data/train-00001-of-2.parquet"]),
        ("train[:10%]", ["data/train-00000-of-2.parquet", "data/train-00001-of-2.parquet"]),
        ("test", ["data/test-00000.parquet"]),
        ("validation", ["data/dev.parquet"]),
    ],
)
def test_split_chooses_among_files_named_after_splits(folder, split, expected):
    root = folder(
        "data/train-00000-of-2.parquet",
        "data/train-00001-of-2.parquet",
        "data/test-00000.parquet",
        "data/dev.parquet",
    )
    assert names(root, resolve(str(root), split=split)) == expected


def test_test_files_are_never_trained_on(folder):
    root = folder("gsm8k_train.jsonl", "gsm8k_test.jsonl", "more.jsonl")
    assert names(root, resolve(str(root))) == ["gsm8k_train.jsonl"]
    root = folder("other/a.jsonl", "other/a_test.jsonl") / "other"
    assert names(root, resolve(str(root))) == ["a.jsonl"]


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("{root}/missing.jsonl", {}, r"datasets\.3\.path: there is no file .*missing\.jsonl"),
        ("{root}/nowhere", {}, r"datasets\.3\.path: .*nowhere is empty or is not there"),
        ("{root}/*.csv", {}, r"datasets\.3\.path: there is no file"),
        ("{root}", {"data_files": ("x.json",)}, r"datasets\.3\.data_files: there is no file"),
        ("{root}/docs", {}, r"datasets\.3\.path: none of the 1 files"),
        ("{root}", {"split": "nightly"}, r"datasets\.3\.split: no file .* split 'nightly'"),
        ("{root}/mixed", {}, r"several kinds \(csv, json\).*datasets\.3\.data_files"),
        ("{root}", {"split": "train[:x]"}, r"datasets\.3\.split: 'train\[:x\]' is not a split"),
    ],
)
def test_what_is_not_there_is_said_with_the_key(folder, path, options, message):
    root = folder("a.jsonl", "docs/readme.md", "mixed/a.csv", "mixed/b.json")
    with pytest.raises(StageError, match=message):
        resolve(path.format(root=root), key="datasets.3", **options)


def test_hub_name_without_a_hub_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"datasets\.0\.path: 'nobody/nothing-here' is neither"):
        resolve("nobody/nothing-here")


@pytest.mark.parametrize(
    ("place", "ds_type", "kind"),
    [
        ("a.json", None, "json"),
        ("a.jsonl", "json", "jsonl"),
        ("s3://bucket/a.jsonl.gz", None, "jsonl"),
        ("https://host/a.parquet?token=1.x", None, "parquet"),
        ("a.TSV", "csv", "tsv"),
        ("part-000", "text", "text"),
    ],
)
def test_kind_follows_the_ending_or_ds_type(place, ds_type, kind):
    assert file_kind(place, ds_type) == kind


def test_unknown_ending_asks_for_ds_type():
    with pytest.raises(StageError, match=r"datasets\.1\.path: .*'\.zst'.*datasets\.1\.ds_type"):
        file_kind("a.jsonl.zst", None, "datasets.1")


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("train", (0, 200)),
        ("train[:10%]", (0, 20)),
        ("train[10%:20%]", (20, 40)),
        ("train[5:7]", (5, 7)),
        ("train[-10:]", (190, 200)),
        ("train[:-50%]", (0, 100)),
        ("train[150:9999]", (150, 200)),
        ("train[50:10]", (50, 50)),
        ("train[:33%]", (0, 66)),
    ],
)
def test_slice_bounds(text, bounds):
    assert parse_split(text)[1].bounds(200) == bounds


def test_slices_and_shards_cover_everything_once():
    cuts = [Rows(f"{p}%" if p else "", f"{p + 10}%").bounds(77) for p in range(0, 100, 10)]
    assert [n for low, high in cuts for n in range(low, high)] == list(range(77))
    parts = [Rows("3", "-4").sharded(5, i).bounds(77) for i in range(5)]
    assert [n for low, high in parts for n in range(low, high)] == list(range(3, 73))
