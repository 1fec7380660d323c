"""Datasets whose rows are made while they are read (`with_transform`, `set_format`), as the callback measures them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.training import arguments, llama, rows
from trl import SFTTrainer

from resofilter_trainer import ResonanceCallback


def tokenised(batch, tokenizer):
    """The prompt masked, the completion learnt."""
    found = {"input_ids": [], "labels": []}
    for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True):
        asked, answered = (tokenizer(text)["input_ids"] for text in (prompt, completion))
        found["input_ids"].append(asked + answered)
        found["labels"].append([-100] * len(asked) + answered)
    return found


def scores_of(folder, tokenizer, dataset, when):
    callback = ResonanceCallback(keep=0.5, when=when)
    args = arguments(folder, dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False)
    trainer = SFTTrainer(
        llama(len(tokenizer)), args, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train()
    return callback.scores.to_pandas()[["score", "num_tokens", "length"]].to_numpy(), callback.selections[-1].keep


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # of TRL's collator
@pytest.mark.parametrize("when", ["before", "training"])
@pytest.mark.parametrize("kind", ["with_transform", "torch", "numpy", "pandas"])
def test_rows_that_are_made_while_they_are_read_have_the_scores_of_the_same_rows_made_before(
    tmp_path, tokenizer, when, kind
):
    plain = rows(12).map(
        tokenised, batched=True, fn_kwargs={"tokenizer": tokenizer}, remove_columns=rows(1).column_names
    )
    if kind == "with_transform":
        dataset = rows(12).with_transform(lambda batch: tokenised(batch, tokenizer))
    else:
        dataset = plain.with_format(kind)
    (scores, kept), (expected, expected_kept) = (
        scores_of(tmp_path, tokenizer, each, when) for each in (dataset, plain)
    )
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(kept, expected_kept)
    assert kept.sum() == 6


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # of TRL's collator
@pytest.mark.parametrize("when", ["before", "training"])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_a_column_that_a_format_hides_is_not_read(tmp_path, tokenizer, when, kind):
    """The collator makes labels of all tokens where it sees none."""
    plain = rows(12).map(
        tokenised, batched=True, fn_kwargs={"tokenizer": tokenizer}, remove_columns=rows(1).column_names
    )
    hidden = plain.with_format(kind, columns=["input_ids"])
    scores, _ = scores_of(tmp_path, tokenizer, hidden, when)
    expected, _ = scores_of(tmp_path, tokenizer, plain.remove_columns("labels"), when)
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(scores[:, 1], [len(each) - 1 for each in plain["input_ids"]])
