"""A token rule inside ResonanceCallback: the loss that is trained, the rows that are measured, and resuming."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import torchrun
from helpers.run_ledgers import lines, losses
from helpers.training import arguments, assert_same_end, assert_same_weights, llama, rows, train
from helpers.versions import skip_without
from helpers.weighted_steps import CALLBACKS, PLAIN, RATE, Replay, by_loss
from torch.nn import functional as F
from trl import SFTTrainer

from resofilter_trainer import (
    InputError,
    ResonanceCallback,
    SoftPruning,
    TokenCleaning,
    TokenRule,
    TokenWeights,
    token_rule,
)
from resofilter_trainer.training.resuming import check_settings

COUNT = 7


@pytest.fixture(autouse=True)
def with_log_probs() -> None:
    skip_without("log_probs")


WAYS: dict[str, dict[str, Any]] = {
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "padding-free": {"per_device_train_batch_size": 4, "padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("callback", CALLBACKS)
def test_steps_are_the_loss_written_out_bit_for_bit_in_float64(callback, way, tmp_path, tokenizer):
    model = llama(len(tokenizer)).double()
    replay = Replay(model)
    settings = {**PLAIN, **WAYS[way], "model": model, "callbacks": [replay], "dataset": rows(COUNT)}
    found = train(tmp_path, tokenizer, CALLBACKS[callback](), **settings)
    trained = copy.deepcopy(found.weights)
    assert found.trainer.state.global_step == 2
    for name, value in replay.written_out(by_loss, RATE).items():
        assert torch.equal(value, trained[name]), name


@pytest.mark.slow
def test_so_they_are_in_two_processes(tmp_path):
    torchrun("weighted_steps", tmp_path, *CALLBACKS)
    assert sorted(path.stem for path in tmp_path.glob("*.txt")) == sorted(CALLBACKS)


RULES: dict[str, dict[str, Any]] = {
    "conflict": {"token_rule": "conflict", "keep_tokens": 0.5},
    "random": {"token_rule": "random", "keep_tokens": 0.5},
    "own": {"token_rule": by_loss},
}
SMALL: dict[str, Any] = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("rule", RULES)
def test_rows_are_dropped_and_tokens_weighted_in_one_run_and_it_ends_the_same_from_a_checkpoint(
    rule, tmp_path, tokenizer
):
    """Within the second epoch. The ledger's losses are those that are logged, and its weights those of the step."""

    def callback():
        return ResonanceCallback(keep=[1.0, 0.5], eps=1e-4, **RULES[rule])

    settings = {**SMALL, "dataset": rows(9), "save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    whole = train(tmp_path / "whole", tokenizer, callback(), **settings)
    assert [int(each.keep.sum()) for each in whole.callback.selections] == [9, 5, 5]
    own = lines(tmp_path / "whole")
    logged = [each["loss"] for each in whole.logs if "loss" in each]
    np.testing.assert_allclose(losses(own), logged, rtol=1e-6)
    np.testing.assert_allclose(own.groupby("step")["weight"].sum(), 1, rtol=1e-6)
    assert 0.1 < min(whole.callback.mean_weights) <= max(whole.callback.mean_weights) < 0.6
    assert len(whole.callback.mean_weights) == whole.trainer.state.global_step
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    resumed = train(tmp_path / "resumed", tokenizer, callback(), resume=checkpoint, **settings)
    assert_same_end(resumed, whole)
    assert resumed.callback.mean_weights == whole.callback.mean_weights[4:]


def test_a_row_is_measured_by_the_tokens_that_it_learns(tmp_path, tokenizer):
    """Its loss and its step are those of the row alone: of the sum over weighted tokens, over all learnt ones."""
    rule, at_rest = token_rule("all_but_first", first=2), {"learning_rate": 0.0, "num_train_epochs": 1}
    settings = {"update": "sgd", "norm": "mean_abs", "correct_drift": False}
    found = train(tmp_path / "rule", tokenizer, ResonanceCallback(token_rule=rule, **settings), **at_rest)
    prepared = found.trainer.train_dataset.select_columns(["input_ids", "labels"])
    counts = np.array([sum(label != -100 for label in row) for row in prepared["labels"]])

    def masked(row):
        place = np.cumsum(np.array(row["labels"]) != -100)
        return {"labels": [label if at > 2 else -100 for label, at in zip(row["labels"], place, strict=True)]}

    rest = prepared.map(masked)
    plain = train(tmp_path / "masked", tokenizer, ResonanceCallback(keep=1.0, **settings), dataset=rest, **at_rest)
    some = counts > 2
    assert some.any()
    share = ((counts - 2) / counts)[some]
    for name in ("measured", "loss"):
        one, other = (each.callback.scores.column(name) for each in (found, plain))
        np.testing.assert_allclose(one[some], other[some] * share, rtol=2e-5)
    assert (found.callback.scores.column("num_tokens") == counts).all()


def test_the_callback_weighs_as_token_weights_does_on_a_dataset_and_on_a_stream(tmp_path, tokenizer):
    for name in ("dataset", "stream"):
        data = rows(9) if name == "dataset" else rows(9).to_iterable_dataset()
        settings = {"dataset": data, "max_steps": 7, "per_device_train_batch_size": 2}
        settings |= {"gradient_accumulation_steps": 2, "dataloader_num_workers": 0}
        plain = train(tmp_path / f"{name} plain", tokenizer, TokenWeights("conflict", keep=0.5), **settings)
        callback = ResonanceCallback(token_rule="conflict", keep_tokens=0.5)
        found = train(tmp_path / name, tokenizer, callback, **settings)
        assert_same_weights(found, plain)
        assert callback.mean_weights == plain.callback.mean_weights
        np.testing.assert_allclose(
            losses(lines(tmp_path / name)), [each["loss"] for each in found.logs if "loss" in each], rtol=1e-6
        )
        for one, other in zip(found.trainer.model.modules(), plain.trainer.model.modules(), strict=True):
            assert len(one._forward_hooks) == len(other._forward_hooks)


def test_the_optimizers_own_steps_are_measured_of_weighted_tokens(tmp_path, tokenizer):
    callback = ResonanceCallback(token_rule=by_loss, update="optimizer")
    found = train(tmp_path, tokenizer, callback, dataset=rows(4), num_train_epochs=1, per_device_train_batch_size=1)
    np.testing.assert_allclose(losses(lines(tmp_path)), [each["loss"] for each in found.logs], rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"token_rule": "bogus"}, "rule must be one of"),
        ({"token_rule": "rho"}, "'rho' needs 'reference_loss': a run has one model"),
        ({"keep_tokens": 0.5}, "keep_tokens= goes with token_rule="),
        ({"token_rule": by_loss, "keep_tokens": 0.5}, "keep_tokens= goes with the name of a token rule"),
        ({"token_rule": "stm", "keep_tokens": 0}, "keep_tokens is the share of the tokens to keep, above 0"),
        ({"token_rule": "stm", "token_cleaning": TokenCleaning(0.5)}, "decide on the same tokens: pass one of them"),
    ],
)
def test_what_cannot_work_is_refused_at_once(values, expected):
    with pytest.raises(InputError, match=expected):
        ResonanceCallback(**values)


def test_another_rule_or_none_does_not_resume(tmp_path, tokenizer):
    settings = {**SMALL, "dataset": rows(9), "num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2}
    train(tmp_path, tokenizer, ResonanceCallback(token_rule="conflict"), **settings)
    checkpoint = str(tmp_path / "checkpoint-2")
    for other in ({"token_rule": "conflict", "keep_tokens": 0.5}, {"keep": 1.0}):
        with pytest.raises(InputError, match=r"they differ in token_rule \("):
            train(tmp_path, tokenizer, ResonanceCallback(**other), resume=checkpoint, **settings)
    changes = {**settings, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "resume": checkpoint}
    with pytest.raises(InputError, match="a token rule sees the tokens of one micro-batch at a time"):
        train(tmp_path, tokenizer, ResonanceCallback(token_rule="conflict"), **changes)


def test_a_checkpoint_without_a_rule_is_not_resumed_with_one():
    there = {"rows": 4, "per_process": 1, "processes": 1, "accumulation": 1, "drop_last": False, "repeats": False}
    there |= {"max_steps": None, "epochs": 1, "order_by_process": False, "loss_by_batch": False}
    there["loss_by_process"] = False
    check_settings(there, there, "'x' holds a checkpoint")
    with pytest.raises(InputError, match="they differ in token_rule"):
        check_settings(there, {**there, "token_rule": {"rule": "stm"}}, "'x' holds a checkpoint")


class OwnLoss(SFTTrainer):
    """Computes the loss from logits, which no rule weighs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_loss_that_no_rule_weighs_is_refused(callback, tmp_path, tokenizer):
    trainer = OwnLoss(
        llama(len(tokenizer)), arguments(tmp_path), train_dataset=rows(4), processing_class=tokenizer,
        callbacks=[CALLBACKS[callback]()],
    )  # fmt: skip
    with pytest.raises(InputError, match="computes its loss without the log-probabilities of SFTTrainer's model"):
        trainer.train()


def test_a_rule_does_not_act_in_a_later_training_without_the_callback(tmp_path, tokenizer):
    start = llama(len(tokenizer))
    settings = {"num_train_epochs": 1, "dataset": rows(4)}
    calls = []

    def fail(tokens):
        calls.append(len(tokens))
        raise KeyboardInterrupt

    callback = ResonanceCallback(token_rule=TokenRule("fail", fail))
    trainer = SFTTrainer(
        copy.deepcopy(start), arguments(tmp_path, num_train_epochs=1), train_dataset=rows(4),
        processing_class=tokenizer, callbacks=[callback],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(callback)
    trainer.train()
    plain = train(tmp_path / "plain", tokenizer, model=start, **settings)
    assert len(calls) == 1
    assert_same_weights(plain, SimpleNamespace(weights=trainer.model.state_dict()))


def test_weights_of_rows_and_of_tokens_act_together(tmp_path, tokenizer):
    """The rule sees the losses of tokens, whatever their rows weigh."""
    seen: list[float] = []

    def of_all(tokens):
        seen.append(float(tokens.loss.mean()))
        return np.full(len(tokens), 0.5)

    callback = ResonanceCallback(selector=SoftPruning(keep=0.5), readmit=True, eps=1e-4, token_rule=of_all)
    settings = {**SMALL, "dataset": rows(9), "num_train_epochs": 2, "learning_rate": 0.0}
    found = train(tmp_path, tokenizer, callback, **settings)
    own = lines(tmp_path)
    np.testing.assert_allclose(losses(own), [each["loss"] for each in found.logs], rtol=1e-6)
    second = own[own["epoch"] == 1]
    assert (second["weight"] / second["num_tokens"]).round(6).nunique() > 1
    assert max(seen) - min(seen) < 0.3  # at rest: not multiplied by a row's weight


# ---- the ends of rows


def without_ends(tokens: Any) -> np.ndarray:
    weights = np.ones(len(tokens))
    weights[tokens.offsets[1:][tokens.num_tokens > 0] - 1] = 0
    return weights


AS_RULES = {"TokenWeights": TokenWeights, "ResonanceCallback": lambda rule: ResonanceCallback(token_rule=rule)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("callback", AS_RULES)
def test_a_run_says_where_the_ends_of_rows_are_not_learnt(callback, way, stream, tmp_path, tokenizer, capsys):
    data = rows(COUNT).to_iterable_dataset() if stream else rows(COUNT)
    settings = {**WAYS[way], "max_steps": 4, "dataset": data, "dataloader_num_workers": 0}
    if stream and way == "padding-free":
        settings["padding_free"] = False
    train(tmp_path, tokenizer, AS_RULES[callback](without_ends), **settings)
    said = [line for line in capsys.readouterr().out.splitlines() if "end token" in line]
    (line,) = said
    assert "token rule 'without_ends' masked the end token in" in line
    masked, seen = line.split(" in ")[1].split(" rows")[0].split(" of ")
    assert masked == seen
    assert int(seen) >= 14


def test_it_says_nothing_where_they_are_learnt(tmp_path, tokenizer, capsys):
    train(tmp_path, tokenizer, TokenWeights(by_loss), dataset=rows(COUNT), **WAYS["accumulation"])
    assert "end token" not in capsys.readouterr().out


def test_it_says_so_soon_and_once(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("resofilter_trainer.training.rule_loss.SOON", 5)
    settings = {**WAYS["accumulation"], "num_train_epochs": 2, "dataset": rows(COUNT)}
    train(tmp_path, tokenizer, TokenWeights(without_ends), **settings)
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "end token" in each]
    assert "in 7 of 7 rows so far" in line
