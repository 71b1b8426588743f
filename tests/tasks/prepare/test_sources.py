"""A recipe's path means a list of files, and whatever is wrong with it is said with its key."""

import hashlib
import json

import fsspec
import pytest

from regrow.infra.digests import DigestMemo
from regrow.tasks.prepare import sources
from regrow.tasks.prepare.folders import file_kind
from regrow.tasks.prepare.slices import Rows, parse_splits
from regrow.tasks.prepare.sources import resolve
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


def test_a_split_does_not_choose_among_files_named_one_by_one(folder):
    root = folder("a.jsonl", "b.jsonl")
    asked = ((f"{root}/a.jsonl", ()), (f"{root}/*.jsonl", ()), (str(root), ("a.jsonl",)))
    for path, data_files in (*asked, ("json", (f"{root}/a.jsonl",))):
        with pytest.raises(StageError, match=r"datasets\.0\.split: .test. does not choose"):
            resolve(path, data_files, split="test")


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
        ("a.jsonl.zst", None, "jsonl"),
    ],
)
def test_kind_follows_the_ending_or_ds_type(place, ds_type, kind):
    assert file_kind(place, ds_type) == kind


def test_unknown_ending_asks_for_ds_type():
    with pytest.raises(StageError, match=r"datasets\.1\.path: .*'\.lz'.*datasets\.1\.ds_type"):
        file_kind("a.jsonl.lz", None, "datasets.1")


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
    ((_, rows),) = parse_splits(text)
    assert rows.bounds(200) == bounds


def test_several_slices_are_read_one_after_the_other():
    found = parse_splits("train[:10%]+train[-10%:] + validation")
    assert [name for name, _ in found] == ["train", "train", "validation"]
    assert [rows.bounds(50) for _, rows in found] == [(0, 5), (45, 50), (0, 50)]


@pytest.mark.parametrize("text", ["train[:x]", "", "train+", "train[1:2:3]", "train[:5", "a b"])
def test_what_is_no_split_is_refused(text):
    with pytest.raises(StageError, match=r"datasets\.3\.split: .* is not a split"):
        parse_splits(text, "datasets.3")


def test_skipped_rows_are_the_first_of_the_slice():
    rows = Rows("10", "20").narrowed(3, None, None)
    assert rows.bounds(100) == (13, 20)
    assert rows.bounds(12) == (12, 12)
    assert rows.limits() == (13, 20)
    assert Rows().narrowed(5, None, None).limits() == (5, None)


def test_slices_and_shards_cover_everything_once():
    cuts = [Rows(f"{p}%" if p else "", f"{p + 10}%").bounds(77) for p in range(0, 100, 10)]
    assert [n for low, high in cuts for n in range(low, high)] == list(range(77))
    parts = [Rows("3", "-4").narrowed(0, 5, i).bounds(77) for i in range(5)]
    assert [n for low, high in parts for n in range(low, high)] == list(range(3, 73))


@pytest.mark.parametrize("root", ["{tmp}", "memory://{name}"])
class TestFolders:
    """The same on this machine and on any file system that fsspec reads."""

    @pytest.fixture
    def place(self, root, tmp_path, monkeypatch):
        def write(**files: str) -> str:
            base = root.format(tmp=tmp_path, name=tmp_path.name)
            for name, text in files.items():
                path = name.replace("__", "/")
                with fsspec.open(f"{base}/{path}", "w", auto_mkdir=True) as file:
                    file.write(text)
            return base

        return write

    def ends(self, root, found):
        return [file[file.index(root.rsplit("/", 1)[-1]) :].split("/", 1)[1] for file in found]

    def test_card_says_which_files_belong_to_a_configuration_and_split(self, place):
        card = (
            "---\nlicense: mit\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n"
            "    path: a/*.jsonl\n  - split: test\n    path: [b/x.jsonl, b/y.jsonl]\n"
            "- config_name: small\n  default: true\n  data_dir: c\n  data_files: part-*\n---\nText"
        )
        files = ("a/1.jsonl", "a/2.jsonl", "b/x.jsonl", "b/y.jsonl", "c/part-1.jsonl", "d.jsonl")
        root = place(**{"README.md": card, **dict.fromkeys(files, "{}")})
        assert self.ends(root, resolve(root)) == ["c/part-1.jsonl"]
        assert self.ends(root, resolve(root, name="main")) == ["a/1.jsonl", "a/2.jsonl"]
        found = resolve(root, name="main", split="test")
        assert self.ends(root, found) == ["b/x.jsonl", "b/y.jsonl"]
        with pytest.raises(StageError, match="no split 'dev'; it has train, test"):
            resolve(root, name="main", split="dev")

    def test_several_configurations_without_a_default_ask_for_a_name(self, place):
        card = "---\nconfigs:\n- config_name: en\n- config_name: de\n---\n"
        root = place(**{"README.md": card, "a.jsonl": "{}"})
        with pytest.raises(StageError, match=r"datasets\.0\.name.* en, de"):
            resolve(root)

    def test_a_text_that_is_no_card_decides_nothing(self, place):
        root = place(**{"README.md": "---\n{[:\n---\n", "a.jsonl": "{}"})
        assert self.ends(root, resolve(root)) == ["a.jsonl"]

    def test_name_is_a_folder_where_there_is_no_card(self, place):
        files = dict.fromkeys(("en/train-0.parquet", "en/test-0.parquet", "de/train-0.parquet"), "")
        root = place(**files)
        assert self.ends(root, resolve(root, name="en")) == ["en/train-0.parquet"]

    def test_saved_to_disk_is_read_by_its_state(self, place):
        state = json.dumps({"_data_files": [{"filename": "data-0.arrow"}]})
        root = place(
            **{
                "dataset_info.json": "{}",
                "state.json": state,
                "data-0.arrow": "",
                "cache-x.arrow": "",
            }
        )
        assert self.ends(root, resolve(root)) == ["data-0.arrow"]

    def test_saved_dict_has_a_folder_for_each_split(self, place):
        state = json.dumps({"_data_files": [{"filename": "data-0.arrow"}]})
        root = place(
            **{
                "dataset_dict.json": json.dumps({"splits": ["train", "held"]}),
                "train/state.json": state,
                "train/data-0.arrow": "",
                "held/state.json": state,
                "held/data-0.arrow": "",
            }
        )
        assert self.ends(root, resolve(root)) == ["train/data-0.arrow"]
        assert self.ends(root, resolve(root, split="held")) == ["held/data-0.arrow"]
        with pytest.raises(StageError, match="splits train, held, and not 'test'"):
            resolve(root, split="test")


def test_hub_files_are_streamed_from_their_commit(monkeypatch):
    """The hub is not asked here: what is asked of it is."""
    asked = []
    monkeypatch.setattr(sources.hub, "pin", lambda *_: "hub://org/data@abc123")
    monkeypatch.setattr(
        sources.store, "expand", lambda path: asked.append(path) or [f"{path}/a.json"]
    )
    found = resolve("org/data", streaming=True)
    assert found == ["hf://datasets/org/data@abc123/a.json"]
    assert sources.stream_identity(found[0]) == sources.stream_identity(found[0])
    assert set(asked) == {"hf://datasets/org/data@abc123"}


def test_identity_is_content_unless_a_remote_file_is_streamed(tmp_path, monkeypatch):
    memo = DigestMemo(None)
    local = tmp_path / "a.jsonl"
    local.write_text("x")
    content = hashlib.sha256(b"x").hexdigest()
    assert sources.identity(str(local), memo, streaming=True) == content
    with fsspec.open("memory://some/a.jsonl", "w") as file:
        file.write("x")
    # This file system tells nothing that changes with the content, so it has to be read.
    assert sources.identity("memory://some/a.jsonl", memo, streaming=True) == content
    marks = iter([(1, "etag-1"), (1, "etag-1"), (1, "etag-2")])
    monkeypatch.setattr(sources.store, "identity", lambda _: next(marks))
    first, again, changed = (sources.identity("s3://b/a.jsonl", memo, True) for _ in range(3))
    assert first == again != changed
    assert first != content


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A hub with one dataset, which lies in a folder; remembers what was asked for."""
    asked: list[list[str]] = []

    def local_directory(place, kind, patterns):
        assert (place, kind) == ("hub://org/data@abc", "dataset")
        asked.append(patterns)
        return tmp_path

    monkeypatch.setattr(sources.hub, "pin", lambda *_: "hub://org/data@abc")
    monkeypatch.setattr(sources.hub, "local_directory", local_directory)
    return asked


def test_of_a_hub_dataset_only_the_files_that_its_card_names_are_fetched(folder, fake_hub):
    root = folder("en/train-0.parquet", "en/test-0.parquet")
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n"
        "    path: en/train-*\n  - split: test\n    path: en/test-*\n---\n"
    )
    assert names(root, resolve("org/data", name="en")) == ["en/train-0.parquet"]
    assert fake_hub == [["README.md"], ["README.md", "en/train-*"]]


def test_of_a_hub_dataset_without_a_card_names_of_files_decide(folder, fake_hub):
    root = folder("en/train-0.jsonl", "en/test-0.jsonl", "de/train-0.jsonl")
    assert names(root, resolve("org/data", name="en")) == ["en/train-0.jsonl"]
    _, patterns = fake_hub
    assert "en/*train*.jsonl" in patterns
    assert "data/en/*train*.parquet" in patterns
    assert all(pattern.startswith(("en/", "data/en/")) for pattern in patterns)
