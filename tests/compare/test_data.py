"""What a comparison makes of the columns and splits of the user's files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset

from resofilter_trainer import InputError
from resofilter_trainer.compare.config import ComparisonConfig, SelectorConfig
from resofilter_trainer.compare.data import make_data
from resofilter_trainer.compare.run import _between, save_settings

ROWS = [{"q": f"what is {i} + 1 ?", "a": f"#### {i + 1}"} for i in range(4)]
TESTS = [{"q": f"what is {i} + 2 ?", "a": f"#### {i + 2}"} for i in range(2)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Dataset.from_list(TESTS).to_csv("tests.csv")

    def make(rows: list[dict], **changes):
        Dataset.from_list(rows).to_csv("rows.csv")
        settings = {"prompt_column": "q", "completion_column": "a", "test_dataset": "tests.csv", **changes}
        return make_data(ComparisonConfig([SelectorConfig("random")], dataset="rows.csv", **settings), 0)

    return make


@pytest.mark.parametrize("flags", [["true", "False", "TRUE", "false"], ["1", "0", "1", "0"], ["1.0", "0.0", " 1", "0"]])
def test_flags_of_csv_are_text(flags, data):
    rows = [{**row, "bad": flag} for row, flag in zip(ROWS, flags, strict=True)]
    assert np.array_equal(data(rows, wrong_column="bad").wrong, [True, False, True, False])


@pytest.mark.parametrize("flag", ["", "yes", "2"])
def test_other_text_is_no_flag(flag, data):
    rows = [{**row, "bad": "1"} for row in ROWS[:3]] + [{**ROWS[3], "bad": flag}]
    with pytest.raises(InputError, match=f"row 3 has '{flag}'"):
        data(rows, wrong_column="bad")


def test_the_default_split_of_a_single_file_is_all_of_it(data):
    found = data(ROWS, validation_dataset="rows.csv")
    assert list(found.answers) == [row["a"] for row in TESTS]
    assert found.validation["completion"][:] == [row["a"] for row in ROWS]


def test_a_split_of_a_single_file_that_was_asked_for_is_refused(data):
    with pytest.raises(InputError, match="has no split 'held_out'"):
        data(ROWS, test_split="held_out")
    assert list(data(ROWS, test_split="train[:1]").answers) == ["#### 2"]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(("columns", "between"), [(("prompt", "completion"), ""), (("q", "a"), "\n")])
def test_rows_under_trls_names_are_trained_on_as_they_are(columns, between, listed, data, tmp_path):
    def renamed(rows: list[dict]) -> list[dict]:
        return [dict(zip(columns, row.values(), strict=True)) for row in rows]

    Dataset.from_list(renamed(TESTS)).to_csv("tests.csv")
    prompt = [columns[0]] if listed else columns[0]
    settings = {"prompt_column": prompt, "completion_column": columns[1], "loss_dataset": "tests.csv"}
    found = data(renamed(ROWS), **settings)
    assert found.rows["prompt"][0] == ROWS[0]["q"] + between
    assert found.prompts[0] == found.loss_rows["prompt"][0] == TESTS[0]["q"] + between


def test_a_comparison_of_an_earlier_version_goes_on_with_its_new_line(tmp_path):
    assert _between(tmp_path) == ""
    path, config = tmp_path / "settings.json", ComparisonConfig([SelectorConfig("random")])
    save_settings(tmp_path, config, "\n")
    assert _between(tmp_path) == "\n"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: settings[name] for name in settings if name != "between_prompt_and_completion"}))
    assert _between(tmp_path) == "\n"
    save_settings(tmp_path, config, "\n")
    path.unlink()
    save_settings(tmp_path, config)
    assert _between(tmp_path) == ""
