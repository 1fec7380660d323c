"""Calls of the passes over a dataset with arguments of another kind, or of another library."""

from __future__ import annotations

import pytest
from datasets import Dataset
from transformers import TrainingArguments

from resofilter_trainer import (
    DataSelector,
    InputError,
    RandomSelector,
    SampleWeights,
    SoftPruning,
    TokenCleaning,
    TokenSelector,
    clean_dataset,
    load_rows,
    map_columns,
    score_by,
    score_dataset,
    score_layers,
    score_stream,
    self_evolve,
    unpack,
    write_report,
)

ROWS = Dataset.from_list([{"prompt": "a", "completion": "b"}])


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"tokenizer": None}, "There is no argument tokenizer=. Did you mean processing_class=?"),
        ({"batch_size": 3}, "There is no argument batch_size=. Did you mean tokens_per_batch=?"),
        ({"n_layers": 2}, "There is no argument n_layers=. Pass config=ResonanceConfig(n_layers=...)."),
        ({"max_length": 2}, "There is no argument max_length=. Pass args=SFTConfig(max_length=...)."),
        ({"model": 3}, "model must be a name, a folder as text, or a model, got 3."),
        ({"processing_class": "gpt2"}, "processing_class must be a tokenizer, got 'gpt2'."),
        ({"args": {"max_length": 3}}, "args must be an SFTConfig, got a dict."),
        ({"config": "sgd"}, "config must be a ResonanceConfig, got 'sgd'."),
    ],
)
def test_a_call_that_cannot_work_is_one_line(keywords, expected):
    with pytest.raises(InputError) as refused:
        score_dataset(**{"model": "m", "dataset": ROWS, **keywords})
    assert str(refused.value) == expected


def test_a_transformers_configuration_is_no_trl_one(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for call in (score_dataset, score_layers):
        with pytest.raises(InputError, match="args must be an SFTConfig, got a TrainingArguments"):
            call("m", ROWS, args=args)
    with pytest.raises(InputError, match="args must be an SFTConfig, got a TrainingArguments"):
        score_by("loss", "m", ROWS, args=args)


def test_a_stream_takes_what_its_pieces_take(tmp_path):
    stream = ROWS.to_iterable_dataset()
    with pytest.raises(InputError, match="no argument rows_per_peice="):
        score_stream("m", stream, tmp_path, rows_per_peice=1000)
    with pytest.raises(InputError, match="no argument tokens_per_bach="):
        score_stream("m", stream, tmp_path, tokens_per_bach=1000)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: DataSelector().select(ROWS), "scores must be a ScoreTable, as score_dataset returns, got a Dataset."),
        (
            lambda: DataSelector().select("scores/"),
            "scores must be a ScoreTable, as score_dataset returns, got 'scores/'.",
        ),
        (
            lambda: RandomSelector().select(ROWS),
            "scores must be a ScoreTable, as score_dataset returns, got a Dataset.",
        ),
        (lambda: SoftPruning().select(None), "scores must be a ScoreTable, as score_dataset returns, got None."),
        (lambda: TokenSelector().select(None), "scores must be TokenScores, got None."),
        (lambda: SampleWeights("abc"), "weight must be one number for every row, got 'abc'."),
        (lambda: SampleWeights.of(None), "selection must be a Selection, got None."),
        (lambda: load_rows(None), "source must be a file, a folder or a name on the hub, as text, got None."),
        (lambda: load_rows("x", split=3), "split must be the name of a split, such as 'train', got 3."),
        (lambda: map_columns(ROWS, {"a": "b"}), "mapping must be a ColumnMapping, got a dict."),
        (lambda: unpack(None), "dataset must be a Dataset, got None."),
        (lambda: clean_dataset("m", ROWS, 0.6), "cleaning must be a TokenCleaning, got 0.6."),
        (lambda: self_evolve("m", ROWS, TokenCleaning(), None), "args must be an SFTConfig, got None."),
        (
            lambda: write_report(None, "x"),
            "scores must be a ScoreTable, as score_dataset returns, or the result of read_contents, got None.",
        ),
    ],
)
def test_an_argument_of_another_kind_is_one_line(call, expected):
    with pytest.raises(InputError) as refused:
        call()
    assert str(refused.value) == expected


def test_a_file_has_no_configuration(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="has no configurations, unlike a dataset on the hub"):
        load_rows(str(tmp_path / "rows.jsonl"), name="main")
