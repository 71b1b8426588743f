"""`pretraining_dataset` in each of Axolotl's shapes becomes `datasets` read as a stream."""

from __future__ import annotations

import pytest


def recipe_text(minimal: str, pretraining: str, more: str = "max_steps: 5") -> str:
    kept = minimal.replace("datasets:\n  - path: org/data\n    type: alpaca\n", "")
    assert kept != minimal
    return f"{kept}pretraining_dataset: {pretraining}\n{more}\n"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("org/corpus", [("org/corpus", "completion", None)]),
        ("{path: org/corpus, type: pretrain}", [("org/corpus", "completion", None)]),
        (
            "[{path: a/b, text_column: body}, {path: c/d, type: completion, field: text}]",
            [("a/b", "completion", "body"), ("c/d", "completion", "text")],
        ),
    ],
)
def test_every_shape_is_a_list_of_streamed_texts(load, minimal, written, expected):
    loaded = load(recipe_text(minimal, written))
    assert [(d.path, d.type, d.field) for d in loaded.recipe.datasets] == expected
    assert loaded.recipe.streaming
    assert any("read as a stream" in notice.why for notice in loaded.notices)


def test_it_may_be_read_whole(load, minimal):
    assert not load(recipe_text(minimal, "a/b", "streaming: false")).recipe.streaming


@pytest.mark.parametrize(
    ("written", "more", "key", "why"),
    [
        ("a/b", "", "max_steps", "not given"),
        (
            "a/b",
            "max_steps: 5\ndatasets: [{path: c/d, type: alpaca}]",
            "pretraining_dataset",
            "already",
        ),
        ("[{path: a/b, typ: x}]", "max_steps: 5", "pretraining_dataset[0].typ", "unknown key"),
        ("[{path: a/b, shards: 2}]", "max_steps: 5", "pretraining_dataset[0].shards", "not known"),
    ],
)
def test_faults_are_told_in_the_authors_words(faults_of, minimal, written, more, key, why):
    (fault,) = faults_of(recipe_text(minimal, written, more))
    assert fault.key == key
    assert why in fault.why


@pytest.mark.parametrize("empty", ["null", "[]", "''"])
def test_an_empty_one_asks_for_nothing(load, minimal, empty):
    loaded = load(f"{minimal}pretraining_dataset: {empty}\n")
    assert not loaded.recipe.streaming


@pytest.mark.parametrize(
    ("lines", "ignored"),
    [
        ("group_by_length: true\nsample_packing: true", "group_by_length"),
        ("group_by_length: true\ncurriculum_sampling: true", "group_by_length"),
        ("sample_packing_sequentially: true", "sample_packing_sequentially"),
        ("shuffle_before_merging_datasets: true", "shuffle_before_merging_datasets"),
        ("skip_prepare_dataset: true", "skip_prepare_dataset"),
    ],
)
def test_what_has_no_effect_is_said(load, minimal, lines, ignored):
    loaded = load(f"{minimal}{lines}\n")
    keys = [key for notice in loaded.notices if notice.action == "ignored" for key in notice.keys]
    assert keys == [ignored]
    assert not getattr(loaded.recipe, ignored, False)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("", "`shuffle_merged_datasets: false`"),
        (
            "shuffle_merged_datasets: false\nsample_packing: true",
            "`sample_packing_sequentially: true`",
        ),
        ("shuffle_merged_datasets: false", ""),
    ],
)
def test_a_curriculum_says_what_still_mixes_it(load, minimal, lines, told):
    loaded = load(f"{minimal}curriculum_sampling: true\n{lines}\n")
    notes = [n.why for n in loaded.notices if n.keys == ("curriculum_sampling",)]
    assert len(notes) == bool(told)
    assert all(told in note for note in notes)
