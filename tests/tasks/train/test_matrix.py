"""Every optimizer, schedule, adapter and first values takes ten steps, resumes and merges."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from regrow.tasks.train.adapter_spec import AdapterSpec
from tests.bench import train_matrix

TABLE = Path(train_matrix.__file__).with_name("train-matrix-cpu.md")
CASES = {f"{case.kind}: {case.name}": case for case in train_matrix.cases()}
# One of each way in which state is kept, weights are held or first values found.
QUICK = (
    "adapter: full",
    "adapter: unfrozen_parameters, rows",
    "adapter: qlora (nf4, double)",
    "adapter: lora on a base stored in fp8",
    "adapter: modules_to_save",
    "adapter: relora, magnitude",
    "adapter: relora on nf4, patterns",
    "first values: pissa",
    "first values: eva",
    "optimizer: adafactor",
    "optimizer: muon",
    "optimizer: adamw_bnb_8bit",
    "schedule: rex",
    "schedule: one_cycle",
    "schedule: reduce_lr_on_plateau",
    "schedule: jagged restarts",
    "stopping: early stopping, best model",
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return train_matrix.Bench(tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def gpu_bench(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return train_matrix.Bench(tmp_path_factory.mktemp("matrix"), "cuda")


def check(outcome):
    if outcome.status.startswith("needs"):
        pytest.skip(outcome.status)
    assert outcome.status == "works"
    assert outcome.resumed == "same bytes"
    error = outcome.merged.partition(" ")[0]
    assert not error or float(error) < 1e-3


@pytest.mark.parametrize("name", QUICK)
def test_it_trains_resumes_to_the_byte_and_merges(bench, name):
    check(bench.run(CASES[name]))


@pytest.mark.extended
@pytest.mark.parametrize("name", sorted(CASES.keys() - set(QUICK)))
def test_all_others_do_so_too(bench, name):
    check(bench.run(CASES[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.needs])
def test_what_needs_a_package_works_on_a_gpu(gpu_bench, name):
    outcome = gpu_bench.run(CASES[name])
    if outcome.status.startswith("needs"):
        pytest.skip(outcome.status)
    assert outcome.status == "works"
    assert outcome.last_loss < 5


def test_every_word_of_the_vocabulary_is_in_the_matrix():
    from regrow.configs.rules.adapter import FIRST_VALUES
    from regrow.configs.sections.training import TrainingSection

    def words(key):
        schema = TrainingSection.model_json_schema()["properties"][key]
        options = schema.get("anyOf", [schema])
        return {word for option in options for word in option.get("enum", [])}

    names = {case.name for case in CASES.values()}
    assert words("optimizer") <= names
    assert words("lr_scheduler") <= names
    assert {"true", "false", "pissa_niter_4", *FIRST_VALUES} <= names


def test_every_setting_of_an_adapter_is_in_the_matrix():
    cases = [case.spec.get("adapter", train_matrix.LORA) for case in CASES.values()]
    adapters = [adapter for adapter in cases if adapter]
    least = AdapterSpec(r=4, alpha=8)
    for name in (field.name for field in dataclasses.fields(AdapterSpec)):
        assert any(getattr(a, name) != getattr(least, name) for a in adapters), name


def test_the_table_in_the_repository_says_of_every_case_that_it_works():
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = {f"{kind}: {name}": cells for kind, name, *cells in rows}
    assert len(found) == len(rows)
    assert found.keys() == CASES.keys()
    for name, (device, status, losses, resumed, merged) in found.items():
        assert device == ("cuda" if CASES[name].cuda else "cpu"), name
        assert (status, resumed) == ("works", "same bytes"), name
        assert losses, name
        trains_an_adapter = CASES[name].spec.get("adapter", train_matrix.LORA) is not None
        assert bool(merged) == trains_an_adapter, name
        assert not merged or float(merged.partition(" ")[0]) < 1e-3, name
