"""fp16 with a loss scale, which Accelerate leaves out on a CPU: the tests put scaler and autocast in their places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.training import arguments, llama, rows
from trl import SFTTrainer

from resofilter_trainer import InputError, ResonanceCallback
from resofilter_trainer.scores.score_table import ScoreTable

COUNT = 16
ONE_OVERFLOW = {"init_scale": 2.0**40, "backoff_factor": 2.0**-24}  # the first step overflows, no other


@pytest.fixture
def train(tmp_path, tokenizer, monkeypatch):
    """A function that trains, and returns the trainer; with a scaler's settings as fp16 does on a GPU."""

    def train(callback=None, scaler=None, trainer=SFTTrainer, **changes) -> SFTTrainer:
        settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, **changes}
        trainer = trainer(
            llama(len(tokenizer)),
            arguments(tmp_path, **settings),
            train_dataset=rows(COUNT),
            processing_class=tokenizer,
            callbacks=[] if callback is None else [callback],
        )
        with monkeypatch.context() as patch:
            if scaler is not None:
                trainer.args.fp16 = True
                patch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
                trainer.accelerator.native_amp = True
                trainer.accelerator.scaler = torch.amp.GradScaler("cpu", **scaler)
            trainer.train()
        return trainer

    return train


def scores(callback: ResonanceCallback) -> np.ndarray:
    return callback.scores.column("score")


@pytest.mark.parametrize("scale", [2.0**16, 2.0**4, 1.0])
def test_scores_do_not_depend_on_the_loss_scale(scale, train):
    """At the starting weights, as the learning rate is zero. bf16 is apart by 2 % of the spread."""
    settings = {"keep": 1.0, "eps": 1e-4, "correct_drift": False}
    single, half = ResonanceCallback(**settings), ResonanceCallback(**settings)
    train(single, learning_rate=0.0, num_train_epochs=1)
    train(half, {"init_scale": scale}, learning_rate=0.0, num_train_epochs=1)
    np.testing.assert_allclose(scores(half), scores(single), rtol=0, atol=5e-3 * np.ptp(scores(single)))
    assert np.abs(scores(half) - scores(single)).max() > 0  # it was float16
    np.testing.assert_allclose(half.scores.column("loss"), single.scores.column("loss"), rtol=1e-2)
    assert half.scores.provenance.preparation["autocast"] == "float16"


def test_rows_of_a_step_that_overflows_are_measured_at_their_next_visit(train, tmp_path):
    callback = ResonanceCallback(keep=0.5)
    trainer = train(callback, ONE_OVERFLOW)
    assert trainer.accelerator.scaler.get_scale() == 2.0**16
    first = ScoreTable.load(tmp_path / "resofilter" / "scores-epoch-1.parquet")
    missed = np.array([why == "not measured yet" for why in first.reasons])
    assert missed.sum() == 4
    assert np.isfinite(first.column("score")[~missed]).all()
    assert callback.selections[1].keep[missed].all()
    assert callback.selections[1].keep.sum() == 8
    assert np.isfinite(scores(callback)).all()
    assert (callback.scores.column("epoch")[missed] == 1).all()


def test_the_weights_are_those_without_the_callback(train):
    mine, other = train(ResonanceCallback(keep=1.0), ONE_OVERFLOW), train(None, ONE_OVERFLOW)
    for name, weight in mine.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name]), name


def test_a_step_that_was_left_out_changed_no_weight_and_is_no_score(train):
    callback = ResonanceCallback(keep=1.0, update="optimizer")
    train(callback, ONE_OVERFLOW, per_device_train_batch_size=1, num_train_epochs=1)
    assert sorted({*callback.scores.reasons} - {None}) == ["not measured yet"]
    assert np.isnan(scores(callback)).sum() == 1
    assert np.nanmin(scores(callback)) > 0


def test_a_loss_with_other_terms_is_refused_all_the_same(train):
    class Regularised(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) + 1.0

    with pytest.raises(InputError, match="so it has other terms"):
        train(ResonanceCallback(), {"init_scale": 2.0**10}, trainer=Regularised)
