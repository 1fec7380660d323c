"""Weights of rows in SFTTrainer's own loss: against the sum written out, and nothing else moved."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.tables import make_scores
from helpers.training import arguments, assert_same_weights, llama, rows, train
from helpers.versions import skip_without
from torch.nn import functional as F
from transformers import Trainer
from trl import SFTTrainer

from resofilter_trainer import (
    DiverseSelector,
    InputError,
    RandomSelector,
    ResonanceCallback,
    SampleWeights,
    ScoreTable,
    Selection,
    SoftPruning,
)
from resofilter_trainer.config import VersionError, compatibility
from resofilter_trainer.selecting.selection import KEPT
from resofilter_trainer.training.trainer_access import rows_of

WEIGHTS = np.array([0.0, 0.5, 1, 2, 3, 1.5, 0.25])
SGD = {"optim": "sgd", "learning_rate": 1e-1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}


def by_hand(model, trainer, weights, learning_rate):
    """One step on all rows at once: the loss is `sum w_s sum_t -log p / N`, N the learnt tokens of all."""
    model, held = copy.deepcopy(model), rows_of(trainer)
    total, tokens = torch.zeros(()), 0
    for row, example in zip(held.sample_ids, trainer.train_dataset, strict=True):
        ids, labels = torch.tensor(example["input_ids"])[None], torch.tensor(example["labels"])
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + weights[row] * F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        tokens += int((labels[1:] != -100).sum())
    loss = total / tokens
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= learning_rate * parameter.grad
    return model, loss.item()


@dataclass(frozen=True)
class Weighing:
    """A policy that keeps every row and weighs it."""

    weights: tuple[float, ...]

    def select(self, scores: ScoreTable) -> Selection:
        count = len(scores)
        weight = np.array(self.weights)
        return Selection(np.ones(count, bool), [KEPT] * count, {}, scores.provenance.to_json(), weight)


def one_step(tmp_path, tokenizer, weights, dataset=None, **changes):
    model = llama(len(tokenizer))
    start = copy.deepcopy(model)
    dataset = rows(len(weights)) if dataset is None else dataset
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": len(dataset), **SGD, **changes}
    outcome = train(tmp_path, tokenizer, SampleWeights(weights), dataset=dataset, model=model, **settings)
    assert outcome.trainer.state.global_step == 1
    return start, outcome


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"padding_free": True, "max_length": None},
        {"shuffle_dataset": True},
        pytest.param({"dataloader_num_workers": 1}, marks=pytest.mark.slow),
    ],
    ids=["one batch", "accumulated", "padding-free", "shuffled", "workers"],
)
def test_a_step_is_the_one_written_out(changes, tmp_path, tokenizer):
    start, outcome = one_step(tmp_path, tokenizer, WEIGHTS, **changes)
    expected, loss = by_hand(start, outcome.trainer, WEIGHTS, SGD["learning_rate"])
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(outcome.weights[name], value, msg=name)
    assert outcome.logs[0]["loss"] == pytest.approx(loss, abs=1e-4)


def test_weights_are_the_users_rows_though_one_is_dropped(tmp_path, tokenizer):
    dataset = rows(7).to_list()
    dataset[2]["prompt"] *= 20  # nothing of its completion is left within max_length
    dataset = type(rows(1)).from_list(dataset)
    start, outcome = one_step(tmp_path, tokenizer, WEIGHTS, dataset)
    assert rows_of(outcome.trainer).sample_ids.tolist() == [0, 1, 3, 4, 5, 6]
    expected, _ = by_hand(start, outcome.trainer, WEIGHTS, SGD["learning_rate"])
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(outcome.weights[name], value, msg=name)


def test_weights_of_one_change_nothing(tmp_path, tokenizer):
    plain = train(tmp_path / "plain", tokenizer)
    weighed = train(tmp_path / "weighed", tokenizer, SampleWeights(np.ones(21)))
    assert_same_weights(weighed, plain)
    assert weighed.logs == plain.logs


def test_evaluation_is_not_weighed_and_the_model_is_left_as_it_was(tmp_path, tokenizer):
    settings = {"evaluate": True, "eval_strategy": "epoch", "learning_rate": 0.0}
    plain = train(tmp_path / "plain", tokenizer, **settings)
    weighed = train(tmp_path / "weighed", tokenizer, SampleWeights(np.full(21, 7.0)), **settings)
    of_both = [[entry["eval_loss"] for entry in each.logs if "eval_loss" in entry] for each in (plain, weighed)]
    assert len(of_both[0]) == 3
    assert of_both[0] == of_both[1]
    for one, other in zip(weighed.trainer.model.modules(), plain.trainer.model.modules(), strict=True):
        assert len(one._forward_hooks) == len(other._forward_hooks)
        assert len(one._forward_pre_hooks) == len(other._forward_pre_hooks)


def test_the_expected_gradient_of_soft_pruning_is_that_of_all_rows(tmp_path, tokenizer):
    """Mean of the weighed gradient over many lots, against the plain one."""
    model = llama(len(tokenizer))
    trainer = SFTTrainer(copy.deepcopy(model), arguments(tmp_path), train_dataset=rows(12), processing_class=tokenizer)
    gradients = []
    for row in range(12):
        one = np.eye(12)[row]
        moved, _ = by_hand(model, trainer, one, 1.0)
        gradients.append((model.lm_head.weight - moved.lm_head.weight).detach())
    values = np.random.default_rng(0).normal(size=12)
    weights = [SoftPruning(by="score", seed=seed).select(make_scores(values)).weight for seed in range(400)]
    mean = np.mean(weights, axis=0)
    whole = torch.stack(gradients).sum(0)
    expected = sum(weight * gradient for weight, gradient in zip(mean, gradients, strict=True))
    assert (expected - whole).norm() < 0.1 * whole.norm()


@pytest.mark.slow
def test_a_policy_that_weighs_does_so_inside_a_run(tmp_path, tokenizer):
    weights = np.linspace(0.5, 2, 21)
    inside = train(tmp_path / "inside", tokenizer, ResonanceCallback(selector=Weighing(tuple(weights)), when="before"))
    outside = train(tmp_path / "outside", tokenizer, SampleWeights(weights))
    assert_same_weights(inside, outside)
    plain = train(tmp_path / "plain", tokenizer)
    assert any(not torch.equal(value, plain.weights[name]) for name, value in inside.weights.items())


def test_a_policy_before_training_is_asked_once(tmp_path, tokenizer):
    outcome = train(tmp_path, tokenizer, ResonanceCallback(selector=RandomSelector(0.5), when="before"))
    assert [int(each.keep.sum()) for each in outcome.callback.selections] == [11, 11, 11]


def test_a_policy_with_features_decides_inside_a_run(tmp_path, tokenizer):
    features = np.random.default_rng(0).normal(size=(21, 4))
    callback = ResonanceCallback(selector=DiverseSelector(features), readmit=True)
    train(tmp_path, tokenizer, callback, num_train_epochs=2)
    assert int(callback.selections[1].keep.sum()) == 11


def test_lots_among_what_is_left_are_refused():
    with pytest.raises(InputError, match="pass readmit=True"):
        ResonanceCallback(selector=SoftPruning())


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_row_that_stays_counts_something(weight, tmp_path, tokenizer):
    with pytest.raises(InputError, match="finite and above 0"):
        train(tmp_path, tokenizer, ResonanceCallback(selector=Weighing((1.0,) * 20 + (weight,)), when="before"))


def test_scores_are_of_the_sample_whatever_it_counts(tmp_path, tokenizer):
    """With a learning rate of 0 the second epoch, which is weighed, measures what the first did."""
    weights = tuple(np.linspace(0.5, 2, 21))
    callback = ResonanceCallback(selector=Weighing(weights), correct_drift=False, eps=1e-4)
    train(tmp_path, tokenizer, callback, num_train_epochs=2, learning_rate=0.0, weight_decay=0.0)
    first, second = (ScoreTable.load(tmp_path / "resofilter" / f"scores-epoch-{epoch}.parquet") for epoch in (1, 2))
    for name in ("score", "loss"):
        np.testing.assert_allclose(second.column(name), first.column(name), rtol=1e-5)
    assert callback.selections[1].weight.tolist() == list(weights)


def test_weights_of_a_selection():
    keep, weight = np.array([True, False, True]), np.array([2.0, 0, 1])
    assert SampleWeights.of(Selection(keep, ["kept", "x", "kept"], {}, "", weight)).weight.tolist() == [2, 1]
    assert SampleWeights.of(Selection(keep, ["kept", "x", "kept"], {}, "")).weight.tolist() == [1, 1]


@pytest.mark.parametrize("weight", [[1, -1], [1, float("nan")], [[1, 2]], [1, float("inf")]])
def test_weights_that_cannot_work_are_refused(weight):
    with pytest.raises(InputError, match="weight must be one finite number"):
        SampleWeights(weight)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss_type": "dft"}, "loss_type='dft'"),
        ({"packing": True, "max_length": 64}, "packed rows"),
        pytest.param(
            {"label_smoothing_factor": 0.1},
            "label smoothing",
            marks=pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning"),
        ),
    ],
)
def test_losses_that_cannot_be_weighed_are_refused(changes, said, tmp_path, tokenizer):
    with pytest.raises(InputError, match=said):
        train(tmp_path, tokenizer, SampleWeights(np.ones(21)), **changes)


def test_without_the_losses_of_tokens_they_are_refused(tmp_path, tokenizer, monkeypatch):
    """As with TRL before 1.15, whose model computes the loss of a whole batch only."""
    monkeypatch.setitem(compatibility.SINCE, "log_probs", ("trl", "1000"))
    with pytest.raises(VersionError, match=r"A weight for each row needs trl 1000 or later, and \S+ is installed"):
        train(tmp_path, tokenizer, SampleWeights(np.ones(21)))


def test_another_number_of_rows_is_refused(tmp_path, tokenizer):
    skip_without("log_probs")
    with pytest.raises(InputError, match="There are 3 weights and the dataset has 21 rows"):
        train(tmp_path, tokenizer, SampleWeights(np.ones(3)))


@pytest.mark.parametrize(
    ("other", "said"),
    [(SampleWeights(np.ones(4)), "added twice"), (ResonanceCallback(), "Leave out SampleWeights")],
    ids=["twice", "both callbacks"],
)
def test_a_second_callback_for_the_rows_is_refused(other, said, tmp_path, tokenizer):
    skip_without("log_probs")
    trainer = SFTTrainer(
        llama(len(tokenizer)),
        arguments(tmp_path),
        train_dataset=rows(4),
        processing_class=tokenizer,
        callbacks=[SampleWeights(np.ones(4)), other],
    )
    with pytest.raises(InputError, match=said):
        trainer.train()


def test_a_plain_trainer_is_refused(tmp_path, tokenizer):
    tokens = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 3
    trainer = Trainer(
        llama(len(tokenizer)), arguments(tmp_path), train_dataset=tokens, callbacks=[SampleWeights(np.ones(3))]
    )
    with pytest.raises(InputError, match="this is Trainer"):
        trainer.train()
