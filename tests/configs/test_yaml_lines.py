"""YAML text becomes plain data with lines, or faults with lines; never an exception."""

from __future__ import annotations

import pytest

from regrow.configs.yaml_lines import parse_value, parse_yaml


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        ("1.5e-05", 1.5e-5),
        ("-3", -3),
        ("1_000", 1000),
        ("0x10", 16),
        (".5", 0.5),
        ("0", 0),
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ('"8"', "8"),
        ("train[:10%]", "train[:10%]"),
        ("<|im_end|>", "<|im_end|>"),
    ],
)
def test_scalars_mean_what_people_mean(written, meant):
    value = parse_yaml(f"key: {written}").data["key"]
    assert value == meant
    assert type(value) is type(meant)


def test_every_key_and_item_knows_its_line():
    lines = parse_yaml("a: 1\n\nb:\n  - c: 2\n    d: 3\n  - e\n").lines
    assert lines[("a",)] == 1
    assert lines[("b",)] == 3
    assert lines[("b", 0, "c")] == 4
    assert lines[("b", 0, "d")] == 5
    assert lines[("b", 1)] == 6


def test_of_a_value_written_twice_the_last_counts_and_both_lines_are_told():
    document = parse_yaml("a: 1\nb:\n  c: 2\n  d: 3\n  c: 4\na: 5\n")
    assert document.data == {"a": 5, "b": {"c": 4, "d": 3}}
    assert document.faults == []
    assert [str(notice).partition(" because")[0] for notice in document.notices] == [
        "set b.c: 4",
        "set a: 5",
    ]
    assert "the last counts: line 5, not line 3" in str(document.notices[0])


@pytest.mark.parametrize("text", ["a: [1]\na: [2]\n", "a: 1\na: {b: 1}\n", "a: {b: 1}\na: 1\n"])
def test_a_list_or_map_written_twice_is_a_fault_that_names_both_lines(text):
    (fault,) = parse_yaml(text).faults
    assert (fault.key, fault.line) == ("a", 2)
    assert "first in line 1" in fault.why


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a:\na: 3\n", 3),
        ("a: false\na:\n", False),
        ("a: 3\na: 3\n", 3),
        ("a: 3\na:\n", 3),
        ("a:\na: [1]\n", [1]),
    ],
)
def test_a_key_that_is_empty_once_says_nothing_there(text, value):
    document = parse_yaml(text)
    assert (document.data, document.faults) == ({"a": value}, [])
    assert len(document.notices) == (text == "a: 3\na:\n")


def test_anchors_and_merges_work():
    text = "x: &x {a: 1, b: 2}\ny:\n  <<: *x\n  b: 3\nz: *x\n"
    assert parse_yaml(text).data == {
        "x": {"a": 1, "b": 2},
        "y": {"a": 1, "b": 3},
        "z": {"a": 1, "b": 2},
    }


_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 9) + "]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only a comment",
        "- a list",
        "just text",
        "a: b: c",
        "a: [1, 2",
        "a: 'open",
        "\ttab: 1",
        "--- 1\n--- 2",
        "a: *nothing",
        "%YAML 9.0\n---\na: 1",
        "a: \x00",
        "a: \ud800",
        "[" * 3000 + "]" * 3000,
        "a: " + "{b: " * 3000 + "1" + "}" * 3000,
        _LAUGHS,
        # PyYAML's C binding would end the process here (found 2026-11-22).
        "a: " + "[" * 400_000,
        "a: " + "{a: " * 200_000,
        "- " * 400_000,
        "? " * 400_000,
        "".join(f"key{i}: 1\n" for i in range(60_000)),
    ],
    ids=str.__len__,
)
def test_what_is_no_map_is_one_clear_fault(text):
    document = parse_yaml(text)
    assert not document.readable
    assert document.data == {}
    assert len(document.faults) == 1
    assert document.faults[0].why


@pytest.mark.parametrize(
    "text",
    [
        "1: a",
        "true: a",
        "? [a]\n: b",
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a: !!python/object/apply:os.system [ls]",
        "a: !!int abc",
        "a: !!bool abc",
        "a: !!binary aGk=",
        "a: !mine 1",
        "a: " + "9" * 5000,
        "<<: 3",
    ],
)
def test_what_is_no_plain_value_is_a_fault_with_its_line(text):
    document = parse_yaml(f"ok: 1\n{text}\n")
    assert document.readable
    assert document.data["ok"] == 1
    assert [fault.line for fault in document.faults] == [2]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-4", 1e-4),
        ("-1", -1),
        ("null", None),
        ("no", False),
        ("a: b", "a: b"),
        ("#x", "#x"),
        ("<|im_end|>", "<|im_end|>"),
        ("@x", "@x"),
        ("[a, 1]", ["a", 1]),
        ("{a: 1}", {"a": 1}),
        ("[a", "[a"),
        ("'8'", "8"),
        ("\n", "\n"),
    ],
)
def test_command_line_words_are_yaml_scalars_or_themselves(word, value):
    assert parse_value(word) == value
