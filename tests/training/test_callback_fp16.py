"""fp16 with a loss scale, which Accelerate leaves out on a CPU: the tests put scaler and autocast in their places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.run_ledgers import Unrounded, lines, losses
from helpers.training import arguments, llama, rows
from trl import SFTTrainer

from resofilter_trainer import InputError, ResonanceCallback
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.training import spiking

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


def test_the_ledger_has_the_losses_of_a_step_that_overflows_but_no_measurement(train, tmp_path, monkeypatch):
    seen = []

    class Seen(SFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(Unrounded(self))

    train(ResonanceCallback(keep=1.0), ONE_OVERFLOW, trainer=Seen)
    found = lines(tmp_path)
    np.testing.assert_allclose(losses(found), seen[0].column("loss"), rtol=1e-3)  # float16 has three digits
    assert len(found) == 2 * COUNT
    assert sorted(found["sample_id"]) == sorted([*range(COUNT)] * 2)
    left_out = found["step"] == 1
    assert found["left_out"].equals(left_out.rename("left_out"))
    layers = [name for name in found if name.startswith("layer_")]
    assert not np.isfinite(found[left_out]["grad_norm"]).any()
    assert found[left_out][layers].isna().any(axis=1).all()
    assert np.isfinite(found[~left_out][["grad_norm", *layers]]).all(axis=None)


def test_an_update_that_is_left_out_leaves_the_scaled_step_out(train, monkeypatch):
    """A run of six steps whose last one is left out ends as one of five, and the scale is checked as in every step."""
    monkeypatch.setattr(spiking, "stands_out", lambda value, earlier, by_factor=False: len(earlier) == 5)
    settings = {"scaler": {"init_scale": 2.0**10, "growth_interval": 3}, "lr_scheduler_type": "constant"}
    five = train(ResonanceCallback(keep=1.0), max_steps=5, **settings)
    six = train(ResonanceCallback(keep=1.0, skip_update=True), max_steps=6, **settings)
    assert six.state.global_step == 6
    for name, weight in six.model.state_dict().items():
        assert torch.equal(weight, five.model.state_dict()[name]), name
    assert five.accelerator.scaler.get_scale() == 2.0**11
    assert six.accelerator.scaler.get_scale() == 2.0**12
    again = train(ResonanceCallback(keep=1.0, skip_update=True), max_steps=8, **settings)  # the next step is made
    assert not torch.equal(again.model.lm_head.weight, six.model.lm_head.weight)


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
