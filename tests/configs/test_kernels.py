"""`kernels` and Axolotl's words for the same."""

from __future__ import annotations

import pytest

from regrow.configs.draft import Draft
from regrow.configs.kernels import read_kernels
from regrow.tasks.modeling.kernels import chosen_kernels

ALL = ["attention", "mlp", "experts", "rms_norm", "cross_entropy"]


def read(**data) -> Draft:
    draft = Draft(data)
    read_kernels(draft)
    return draft


@pytest.mark.parametrize(("given", "expected"), [(False, "off"), (True, "auto"), ("auto", "auto")])
def test_yaml_reads_off_as_false(given, expected):
    assert read(kernels=given).data == {"kernels": expected}


def test_what_asks_for_a_kernel_asks_for_what_auto_does():
    draft = read(lora_mlp_kernel=True, liger_rope=True, cut_cross_entropy=True)
    assert draft.data == {}
    assert [notice.keys for notice in draft.notices] == [
        ("liger_rope",),
        ("lora_mlp_kernel",),
        ("cut_cross_entropy",),
    ]
    assert all(notice.value == "kernels" for notice in draft.notices)


def test_a_kernel_is_left_out_when_all_that_names_it_is_false():
    left_out = read(liger_rms_norm=False, liger_rope=False, lora_qkv_kernel=True)
    assert left_out.data == {"kernels": ["auto", "attention", "mlp", "experts", "cross_entropy"]}


def test_leaving_one_out_turns_none_on_where_there_are_none(load, minimal):
    kernels = load(f"{minimal}liger_rms_norm: false\n").recipe.kernels
    assert chosen_kernels(kernels, "cpu") == ()
    assert "rms_norm" not in chosen_kernels(kernels[1:], "cuda")
    assert read(kernels=["auto"]).data == {"kernels": "auto"}


def test_kernels_itself_wins():
    draft = read(kernels=["mlp"], liger_rms_norm=True)
    assert draft.data == {"kernels": ["mlp"]}
    assert "ignored liger_rms_norm" in str(draft.notices[0])


def test_other_values_are_faults():
    draft = read(lora_mlp_kernel="yes")
    assert "expected true or false" in draft.faults[0].why


def test_the_names_are_those_of_the_model_side():
    from typing import get_args

    from regrow.configs.kernels import KernelName
    from regrow.tasks.modeling.kernels import KERNELS

    assert list(get_args(KernelName)) == ALL == list(KERNELS)
