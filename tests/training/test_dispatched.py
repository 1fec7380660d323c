"""`dispatch_batches` and `split_batches`: the same rows, scores and weights as without. Two processes: see beside."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.training import assert_same_end, assert_same_weights, train
from helpers.versions import takes_its_own_batch_size

from resofilter_trainer import InputError, ResonanceCallback
from resofilter_trainer.training.trainer_access import batching_of

HOW = {
    "dispatched": {"dispatch_batches": True},
    "split": {"split_batches": True},
    "both": {"dispatch_batches": True, "split_batches": True},
}


@pytest.mark.parametrize("how", HOW)
def test_where_everything_stays_nothing_changes(how, tmp_path, tokenizer):
    changes = {"accelerator_config": HOW[how], "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    without = train(tmp_path / "without", tokenizer, **changes)
    with_callback = train(tmp_path / "with", tokenizer, ResonanceCallback(keep=1.0), **changes)
    assert_same_weights(with_callback, without)
    assert list(with_callback.seen) == list(without.seen)


@pytest.mark.parametrize("how", HOW)
def test_rows_scores_and_weights_are_those_without(how, tmp_path, tokenizer):
    changes = {"gradient_accumulation_steps": 3, "num_train_epochs": 2}
    usual = train(tmp_path / "usual", tokenizer, ResonanceCallback(keep=0.6), **changes)
    own = train(tmp_path / "own", tokenizer, ResonanceCallback(keep=0.6), accelerator_config=HOW[how], **changes)
    assert_same_end(own, usual)
    assert not own.callback.selections[1].keep.all()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dispatched", "split", "both"])
def test_the_end_is_the_same_from_every_checkpoint(how, tmp_path, tokenizer):
    changes = {"accelerator_config": HOW[how], "num_train_epochs": 2, "per_device_train_batch_size": 5}
    whole = train(tmp_path, tokenizer, ResonanceCallback(keep=0.5), save_strategy="steps", save_steps=1, **changes)
    checkpoints = list(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == whole.trainer.state.global_step
    for checkpoint in checkpoints:
        resumed = train(tmp_path / "resumed", tokenizer, ResonanceCallback(keep=0.5), resume=str(checkpoint), **changes)
        assert_same_end(resumed, whole)


@pytest.mark.parametrize("setting", ["padding_free", "packing"])
def test_samples_that_share_a_row_are_not_dispatched(setting, tmp_path, tokenizer):
    changes = {"padding_free": {"padding_free": True, "max_length": None}, "packing": {"packing": True}}[setting]
    with pytest.raises(InputError, match=f"{setting}=True and dispatch_batches=True, which divides the rows"):
        train(tmp_path, tokenizer, ResonanceCallback(), accelerator_config=HOW["dispatched"], **changes)


@takes_its_own_batch_size
def test_a_dispatched_run_resumes_with_another_division_of_its_steps(tmp_path, tokenizer):
    changes = {"accelerator_config": HOW["dispatched"], "num_train_epochs": 2, "max_grad_norm": 0.0}
    there = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    here = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path, tokenizer, ResonanceCallback(keep=0.5), **changes, **there, **saving)
    checkpoint = str(tmp_path / "checkpoint-3")
    resumed = train(tmp_path / "resumed", tokenizer, ResonanceCallback(keep=0.5), resume=checkpoint, **changes, **here)
    assert resumed.trainer.state.global_step == whole.trainer.state.global_step
    assert [each.keep.tolist() for each in resumed.callback.selections] == [
        each.keep.tolist() for each in whole.callback.selections
    ]
    for name, value in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], value, rtol=1e-4, atol=1e-6)


def test_batches_that_cannot_be_divided_are_refused():
    config = SimpleNamespace(split_batches=True)
    args = SimpleNamespace(world_size=2, accelerator_config=config, dataloader_drop_last=False)
    with pytest.raises(InputError, match="divides batches of 3 rows among 2 processes: set per_device_train_batch"):
        batching_of(SimpleNamespace(args=args, _train_batch_size=3), SimpleNamespace(dataset=range(9)), repeats=False)
