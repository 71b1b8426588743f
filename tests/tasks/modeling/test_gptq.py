"""Bases stored as GPTQ are read to the number, whichever form their files have."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from regrow.tasks.modeling.gptq import dequantized
from regrow.tasks.modeling.load import load_model
from regrow.tasks.modeling.quantization import Quantization
from regrow.tasks.stage import StageError
from tests.bench.matrix_bases import write_gptq

INPUTS, OUTPUTS, GROUP = 64, 96, 16


def packed(numbers, bits, axis):
    """Whole numbers of `bits` along an axis, in int32; written as text, so as to be another way."""
    columns = numbers.movedim(axis, -1).tolist()
    each = 32 // bits

    def word(values):
        value = int("".join(format(v, f"0{bits}b") for v in reversed(values)), 2)
        return value - 2**32 if value >= 2**31 else value

    rows = [[word(row[i : i + each]) for i in range(0, len(row), each)] for row in columns]
    return torch.tensor(rows, dtype=torch.int32).movedim(-1, axis)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "by activation"])
@pytest.mark.parametrize("shift", [1, 0], ids=["gptq", "gptq_v2"])
def test_each_number_is_its_group_s_scale_times_its_distance_from_zero(bits, ordered, shift):
    random = torch.Generator().manual_seed(bits)
    groups = INPUTS // GROUP
    numbers = torch.randint(0, 2**bits, (INPUTS, OUTPUTS), generator=random)
    zeros = torch.randint(shift, 2**bits, (groups, OUTPUTS), generator=random)
    scales = torch.rand(groups, OUTPUTS, generator=random).half()
    group = torch.arange(INPUTS) // GROUP
    if not ordered:
        group = group[torch.randperm(INPUTS, generator=random)]
    found = dequantized(
        packed(numbers, bits, 0), packed(zeros - shift, bits, 1), scales, group.int(), bits, shift
    )
    for output, input in ((0, 0), (95, 63), (17, 40)):
        of = group[input]
        exact = scales[of, output].float() * (numbers[input, output] - zeros[of, output])
        assert found[output, input] == exact
    assert torch.equal(found, ((numbers - zeros[group]) * scales.float()[group]).t())


@pytest.fixture
def base(tmp_path):
    return write_gptq(tmp_path / "base")


def test_such_a_base_is_loaded_in_plain_numbers_and_saved_so(base, tmp_path):
    model = load_model(base, dtype="float32")
    weight = model.model.layers[1].mlp.down_proj.weight
    steps = weight / weight.abs().amax(1, keepdim=True) * 7  # -7 to 7: 4 bits without one
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", dtype="float32")
    assert not hasattr(again.config, "quantization_config")
    for (name, ours), (same, theirs) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == same
        assert torch.equal(ours, theirs)


def test_it_may_be_held_in_other_4_bits(base):
    pytest.importorskip("bitsandbytes")
    model = load_model(base, dtype="bfloat16", quantization=Quantization(4))
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize(
    "odd", [{"bits": 3}, {"checkpoint_format": "marlin"}, {"dynamic": {"x": {"bits": 8}}}]
)
def test_other_forms_are_refused_by_name(base, odd):
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] |= odd
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match=f"{next(iter(odd))} .*Use the unquantized model"):
        load_model(base, dtype="float32")


def test_a_layer_whose_parts_are_not_all_there_is_named(base):
    weights = load_file(base / "model.safetensors")
    lost = next(name for name in sorted(weights) if name.endswith("g_idx"))
    save_file({n: t for n, t in weights.items() if n != lost}, base / "model.safetensors")
    with pytest.raises(StageError, match=f"has no {re.escape(lost)}; use the unquantized"):
        load_model(base, dtype="float32")
