"""Sizes that `prepare` stored become the work of rows; an artifact without them still trains."""

import json

import numpy as np
import pytest

from regrow.tasks.modeling.row_sizes import read_sizes, write_sizes
from regrow.tasks.stage import StageError
from regrow.tasks.train.costs import row_costs, row_lengths


@pytest.fixture
def prepared(tmp_path):
    (tmp_path / "train").mkdir()
    sizes = np.array([[100, 100**2], [100, 4 * 25**2]])
    write_sizes(tmp_path, "train", sizes)
    assert read_sizes(tmp_path, "train").tolist() == sizes.tolist()
    return tmp_path


@pytest.mark.parametrize("config", [{"hidden_size": 12}, {"text_config": {"hidden_size": 12}}])
def test_attention_counts_as_much_as_the_model_is_narrow(prepared, tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = row_costs(prepared, tmp_path)
    assert found.tolist() == pytest.approx([100 + 10_000 / 144, 100 + 2500 / 144])
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 12_000}))
    assert row_costs(prepared, tmp_path)[0] == pytest.approx(100, rel=1e-3)


def test_lengths_are_tokens(prepared):
    assert row_lengths(prepared).tolist() == [100, 100]


def test_without_sizes_rows_count_as_equal_and_grouping_is_refused(tmp_path):
    assert row_costs(tmp_path, tmp_path) is None
    with pytest.raises(StageError, match=r"group_by_length: .* prepare it again"):
        row_lengths(tmp_path)
