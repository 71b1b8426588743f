"""Formats of the user's: prompts written in the recipe, and Python functions it names."""

from __future__ import annotations

import sys

import pytest

from regrow.configs.faults import RecipeError
from regrow.configs.load import parse_recipe
from regrow.tasks.prepare.example import RowError
from regrow.tasks.prepare.formats import own_code
from regrow.tasks.stage import StageError, fingerprint

EOS = "<|im_end|>"
INST = {
    "system_prompt": "Be {{brief}}.",
    "system_format": "<<{system}>>\n",
    "field_system": "s",
    "field_instruction": "q",
    "field_input": "c",
    "field_output": "a",
    "format": "[INST] {instruction} | {input} [/INST]",
    "no_input_format": "[INST] {instruction} [/INST]",
}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"q": "Hi?"}, "<<Be {{brief}}.>>\n[INST] Hi? [/INST]"),
        ({"q": "Hi?", "c": "1", "s": "Sing."}, "<<Sing.>>\n[INST] Hi? | 1 [/INST]"),
        ({"q": "{input}", "c": "{a}", "s": ""}, "[INST] {input} | {a} [/INST]"),
        ({"q": "Hi?", "c": None, "s": None}, "[INST] Hi? [/INST]"),
    ],
)
def test_a_prompt_of_the_recipe(read, row, prompt):
    assert read(INST, {**row, "a": " Yes. "}).spans == [(0, prompt), (1, " Yes. " + EOS)]


def test_axolotls_defaults_end_with_a_space(read):
    given = read({"field_output": "answer"}, {"instruction": "Hi?", "answer": "Yes."})
    assert given.spans == [(0, "Hi? "), (1, "Yes." + EOS)]
    row = {"instruction": "Hi?", "input": "1", "answer": "Yes."}
    assert read({"field_output": "answer"}, row).spans[0] == (0, "Hi? 1 ")


def test_braces_written_twice_are_braces(read):
    kind = {"no_input_format": "{{{instruction}}} {{}}"}
    assert read(kind, {"instruction": "a", "output": "b"}).spans[0] == (0, "{a} {}")


def test_an_answer_column_must_be_there(read):
    with pytest.raises(RowError, match="no column 'a'"):
        read(INST, {"q": "Hi?", "output": "b"})


CODE = """
def messages(row):
    return [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]

def pieces(row):
    return [{"text": row["q"], "label": False}, {"text": row["a"], "label": True}]

def read(row):
    return {"prompt": row["q"], "completion": row["a"]}

def tokens(row):
    return {"input_ids": [5, 6], "labels": [-100, 6]}

def text(row):
    return {"text": row["a"]}

def nothing(row):
    return None

def wrong(row):
    return {"question": row["q"]}

def number(row):
    return 3

def failing(row):
    return row["absent"]

not_callable = 3
"""
ROW = {"q": "Hi?", "a": "Yes."}


@pytest.fixture
def code(tmp_path, monkeypatch):
    """The name of a package with the functions above in its module `rows`."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "rows.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield f"{name}.rows"
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


TRUSTED = {"trust_remote_code": True}


@pytest.mark.parametrize(
    ("function", "spans"),
    [
        (".pieces", [(0, "Hi?"), (1, "Yes.")]),
        (".read", [(0, "Hi?"), (1, "Yes." + EOS)]),
        ("", [(0, "Hi?"), (1, "Yes." + EOS)]),
        (".text", [(0, "Yes"), (1, "." + EOS)]),
        (".nothing", []),
    ],
)
def test_a_function_may_return_what_the_formats_know(read, code, function, spans):
    assert read(code + function, ROW, **TRUSTED).spans == spans


def test_a_function_may_return_messages_and_tokens(read, sequence_of, code):
    conversation = sequence_of(f"{code}.messages", ROW, **TRUSTED)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
    assert conversation.trained == (False, True)
    assert read(f"{code}.tokens", ROW, **TRUSTED).mask == [0, 1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("wrong", "returned a dict with 'question'; it must hold messages"),
        ("number", "returned int, not a dict"),
        ("failing", "failed on it: KeyError: 'absent'"),
    ],
)
def test_a_function_that_fails_a_row_is_named(read, code, function, message):
    with pytest.raises(RowError, match=rf"rows\.{function} {message}"):
        read(f"{code}.{function}", ROW, **TRUSTED)


@pytest.mark.parametrize("function", ["not_callable", "absent"])
def test_a_name_that_is_no_function_is_refused(read, code, function):
    with pytest.raises(StageError, match=f"has no function '{function}'"):
        read(f"{code}.{function}", ROW, **TRUSTED)


def test_a_module_that_is_not_there_is_refused(read):
    with pytest.raises(StageError, match=r"no Python module 'absent_package\.rows'"):
        read("absent_package.rows.read", ROW, **TRUSTED)


def test_code_runs_only_when_trusted(sequence_of, code):
    with pytest.raises(RecipeError, match="not trusted"):
        sequence_of(f"{code}.read", ROW)


def test_the_source_is_part_of_the_key(code, tmp_path, monkeypatch):
    options = {"type": f"{code}.read", **TRUSTED}

    def key() -> str:
        return fingerprint(own_code.Options.from_recipe(*entry(options)))

    first = key()
    assert key() == first
    source = tmp_path.joinpath(*code.split(".")).with_suffix(".py")
    source.write_text(CODE + "\n# changed\n")
    assert key() != first


def entry(options):
    recipe = parse_recipe(
        {
            "base_model": "owner/model",
            "datasets": [{"path": "owner/data", **options}],
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-4,
        }
    ).recipe
    return recipe.datasets[0], recipe


def test_a_source_that_changed_since_the_plan_is_refused(code, tmp_path):
    options = own_code.Options.from_recipe(*entry({"type": f"{code}.read", **TRUSTED}))
    source = tmp_path.joinpath(*code.split(".")).with_suffix(".py")
    source.write_text(CODE + "\n# changed\n")
    with pytest.raises(StageError, match="has changed since the run was planned"):
        own_code.read(ROW, options)
