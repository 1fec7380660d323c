"""A warm-up before a run: a copy is tuned and scores the rows; the run itself is one without a warm-up."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.training import arguments, assert_same_end, assert_same_weights, llama, rows, train
from transformers import DataCollatorForSeq2Seq, Trainer

from resofilter_trainer import InputError, ResonanceCallback, ResonanceConfig, Selection, Warmup, score_dataset
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.scoring import tuning

SHORT = Warmup(rows=8, lr=1e-2, batch_size=2)


def before(**settings: Any) -> ResonanceCallback:
    return ResonanceCallback(**{"keep": 0.5, "when": "before", "eps": 1e-4, "warmup": SHORT, **settings})


@dataclass(frozen=True)
class Fixed:
    """The rows of another run."""

    keep: np.ndarray

    def select(self, scores: ScoreTable) -> Selection:
        return Selection(self.keep, ["kept" if kept else "fixed" for kept in self.keep], {}, "")


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """A run with a warm-up, dropout and checkpoints, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    model = llama(len(tokenizer), attention_dropout=0.1)
    return train(folder, tokenizer, before(), model=model, save_strategy="steps", save_steps=4), folder


def test_the_scores_are_those_of_a_pass_with_the_same_warm_up(run, tokenizer):
    outcome, folder = run
    args = arguments(folder / "unused")
    model = llama(len(tokenizer), attention_dropout=0.1)
    alone = score_dataset(model, rows(21), tokenizer, args, ResonanceConfig(eps=1e-4), warmup=SHORT)
    scores = outcome.callback.scores
    np.testing.assert_allclose(scores.column("score"), alone.column("score"), rtol=1e-6)
    assert scores.provenance.warmup["weights"] == alone.provenance.warmup["weights"]
    recipe = {name: value for name, value in alone.provenance.config.items() if name.startswith("warmup_")}
    assert recipe.items() <= scores.provenance.config.items()
    assert sorted(path.name for path in folder.iterdir() if "warmup" in path.name) == []


def test_the_run_is_that_of_the_same_rows_without_a_warm_up(run, tokenizer, tmp_path):
    """Bit for bit, although the warm-up drew random numbers and stepped an optimizer of its own."""
    outcome, _ = run
    keep = outcome.callback.selections[0].keep
    cold = train(tmp_path / "cold", tokenizer, before(warmup=None), model=llama(len(tokenizer), attention_dropout=0.1))
    assert not np.array_equal(cold.callback.selections[0].keep, keep)
    callback = before(warmup=None, keep=None, selector=Fixed(keep))
    other = train(tmp_path / "same", tokenizer, callback, model=llama(len(tokenizer), attention_dropout=0.1))
    assert other.seen == outcome.seen
    assert other.logs == outcome.logs
    assert_same_weights(other, outcome)


def test_a_resumed_run_is_not_tuned_again(run, tokenizer, monkeypatch):
    outcome, folder = run
    monkeypatch.setattr(tuning.Tuning, "run", lambda *args: pytest.fail("it was tuned again"))
    model = llama(len(tokenizer), attention_dropout=0.1)
    resume = str(folder / "checkpoint-8")
    resumed = train(folder, tokenizer, before(), model=model, resume=resume, save_strategy="steps", save_steps=4)
    assert resumed.callback.scores.table.equals(outcome.callback.scores.table)
    assert resumed.callback.scores.provenance == outcome.callback.scores.provenance
    assert list(resumed.seen) == list(outcome.seen)[8:]
    other = before(warmup=dataclasses.replace(SHORT, seed=1))
    with pytest.raises(InputError, match="differ in warmup"):
        train(folder, tokenizer, other, model=model, resume=resume, save_strategy="steps", save_steps=4)


def test_a_resumed_run_ends_like_an_uninterrupted_one(tokenizer, tmp_path):
    whole = train(tmp_path / "whole", tokenizer, before(), save_strategy="steps", save_steps=4)
    again = train(tmp_path / "again", tokenizer, before(), resume=str(tmp_path / "whole" / "checkpoint-8"))
    assert_same_end(again, whole)


def test_the_tuned_weights_are_kept_where_the_settings_say(tokenizer, tmp_path, monkeypatch):
    kept = dataclasses.replace(SHORT, cache=tmp_path / "kept")
    one = train(tmp_path / "one", tokenizer, before(warmup=kept))
    monkeypatch.setattr(tuning.Tuning, "run", lambda *args: pytest.fail("it was tuned again"))
    other = train(tmp_path / "other", tokenizer, before(warmup=kept))
    assert other.callback.scores.table.equals(one.callback.scores.table)


def test_accumulation_is_that_of_the_run(tokenizer, tmp_path):
    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    outcome = train(tmp_path / "run", tokenizer, before(), **changes)
    callback = before(warmup=None, keep=None, selector=Fixed(outcome.callback.selections[0].keep))
    other = train(tmp_path / "same", tokenizer, callback, **changes)
    assert other.seen == outcome.seen
    assert_same_weights(other, outcome)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"when": "training"}, "A warm-up tunes a copy that scores the rows before training: pass when='before'"),
        ({"warmup": 0}, "warmup must be a whole number of at least 1, got 0."),
        ({"warmup": "many"}, "warmup must be a whole number of at least 1, got 'many'."),
    ],
)
def test_what_cannot_work_is_refused_at_once(settings, expected):
    with pytest.raises(InputError) as refused:
        before(**settings)
    assert expected in str(refused.value)


def test_too_few_rows_are_refused_before_training(tokenizer, tmp_path):
    with pytest.raises(InputError, match="The warm-up needs 640 rows, and 21 of the rows to train on can be learnt"):
        train(tmp_path, tokenizer, before(warmup=640))


def test_another_trainer_is_refused(tokenizer, tmp_path):
    tokens = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4)
    trainer = Trainer(
        llama(len(tokenizer)), arguments(tmp_path), train_dataset=tokens, callbacks=[before(warmup=2)],
        data_collator=DataCollatorForSeq2Seq(tokenizer), processing_class=tokenizer,
    )  # fmt: skip
    with pytest.raises(InputError, match="A warm-up needs SFTTrainer, with a tokenizer"):
        trainer.train()
    assert torch.is_grad_enabled()
