"""Weights of tokens in SFTTrainer's own loss: a step against the sum written out, and rows that do not fit."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.samples import plain_losses
from helpers.training import arguments, assert_same_weights, llama, rows, train
from helpers.versions import skip_without
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerState
from trl import SFTTrainer

from resofilter_trainer import (
    InputError,
    Ledger,
    ResonanceCallback,
    SampleWeights,
    TokenRule,
    TokenWeights,
    token_rule,
)
from resofilter_trainer.config import ScoreWarning
from resofilter_trainer.training.token_weighting import EARLIER_STATE, STATE

SGD = {"optim": "sgd", "learning_rate": 1e-1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
COUNT = 7


@pytest.fixture(scope="module")
def prepared(tokenizer, tmp_path_factory) -> Dataset:
    """Rows as tokens, as the trainer prepares them."""
    args = arguments(tmp_path_factory.mktemp("prepared"))
    trainer = SFTTrainer(llama(len(tokenizer)), args, train_dataset=rows(COUNT), processing_class=tokenizer)
    return trainer.train_dataset.select_columns(["input_ids", "labels"])


@pytest.fixture(scope="module")
def weighted(prepared) -> Dataset:
    """The same with random weights, some of them 0."""
    draw = np.random.default_rng(0)
    lists = [np.round(draw.uniform(-0.3, 1, len(ids)).clip(0), 3).tolist() for ids in prepared["input_ids"]]
    return prepared.add_column("token_weights", lists)


def by_hand(model, dataset, learning_rate, weigh=None):
    """One step on all rows at once: the loss is `sum_t w_t (-log p_t) / N`, N the learnt tokens of all rows.

    The weights are those of the column, or a function of the losses and entropies of a row's learnt tokens.
    """
    model = copy.deepcopy(model)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for example in dataset:
        ids, labels = torch.tensor(example["input_ids"])[None], torch.tensor(example["labels"])
        logits = model(input_ids=ids).logits[0, :-1]
        losses = F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="none")
        if weigh is None:
            weights = torch.tensor(example["token_weights"])[1:]
        else:
            learnt, p = labels[1:] != -100, logits.detach().double().softmax(-1)
            weights = torch.zeros(len(losses), dtype=torch.float64)
            weights[learnt] = weigh(losses.detach().double()[learnt], -(p * p.log()).sum(1)[learnt]).double()
        total = total + (losses * weights.to(losses)).sum()
        tokens += int((labels[1:] != -100).sum())
    loss = total / tokens
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= learning_rate * parameter.grad
    return model, loss.item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"padding_free": True, "max_length": None},
        {"shuffle_dataset": True, "pad_to_multiple_of": 8},
        pytest.param({"dataloader_num_workers": 1}, marks=pytest.mark.slow),
    ],
    ids=["one batch", "accumulated", "padding-free", "shuffled and padded", "workers"],
)
def test_a_step_is_the_one_written_out(changes, weighted, tmp_path, tokenizer):
    model = llama(len(tokenizer))
    start = copy.deepcopy(model)
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": COUNT, **SGD, **changes}
    outcome = train(tmp_path, tokenizer, TokenWeights(), dataset=weighted, model=model, **settings)
    assert outcome.trainer.state.global_step == 1
    expected, loss = by_hand(start, weighted, SGD["learning_rate"])
    plain, _ = by_hand(start, weighted.map(lambda row: {"token_weights": [1.0] * len(row["labels"])}), 0.1)
    assert not torch.allclose(plain.lm_head.weight, expected.lm_head.weight, atol=1e-4)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(outcome.weights[name], value, msg=name)
    assert outcome.logs[0]["loss"] == pytest.approx(loss, abs=1e-4)


def test_weights_of_one_change_nothing_and_the_model_is_left_as_it_was(prepared, tmp_path, tokenizer):
    ones = prepared.add_column("token_weights", [[1.0] * len(ids) for ids in prepared["input_ids"]])
    plain = train(tmp_path / "plain", tokenizer, dataset=prepared)
    weighed = train(tmp_path / "weighed", tokenizer, TokenWeights(), dataset=ones)
    assert_same_weights(weighed, plain)
    assert weighed.logs == plain.logs
    for one, other in zip(weighed.trainer.model.modules(), plain.trainer.model.modules(), strict=True):
        assert len(one._forward_hooks) == len(other._forward_hooks)


def test_rows_that_were_chosen_or_reordered_keep_their_weights(weighted, tmp_path, tokenizer):
    some = weighted.select([4, 1, 2])
    model = llama(len(tokenizer))
    start = copy.deepcopy(model)
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 3, **SGD}
    outcome = train(tmp_path, tokenizer, TokenWeights(), dataset=some, model=model, **settings)
    expected, _ = by_hand(start, some, SGD["learning_rate"])
    torch.testing.assert_close(outcome.weights["lm_head.weight"], expected.lm_head.weight)


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        (None, "The trainer's rows have no column 'token_weights'"),
        (
            lambda ids: [0.5] * (len(ids) - 1),
            "Row [0-9] has [0-9]+ weights in its column 'token_weights' and [0-9]+ tokens",
        ),
        (lambda ids: [0.5] * (len(ids) + 1), "Row [0-9] has [0-9]+ weights"),
        (lambda ids: [-0.5] * len(ids), "Row 0 has the weight -0.5"),
        (lambda ids: [float("nan")] * len(ids), "Row 0 has the weight nan"),
        (lambda ids: ["a"] * len(ids), "not lists of numbers"),
        (lambda ids: None if len(ids) % 2 else [0.5] * len(ids), "rows have no list in their column"),
    ],
)
def test_a_column_that_does_not_fit_is_refused(lists, expected, prepared, tmp_path, tokenizer):
    skip_without("log_probs")
    dataset = prepared
    if lists is not None:
        dataset = prepared.add_column("token_weights", [lists(ids) for ids in prepared["input_ids"]])
    with pytest.raises(InputError, match=expected):
        train(tmp_path, tokenizer, TokenWeights(), dataset=dataset, num_train_epochs=1)


def test_packed_rows_and_other_weights_are_refused(weighted, tmp_path, tokenizer):
    skip_without("log_probs")
    with pytest.raises(InputError, match="packed rows"):
        train(tmp_path, tokenizer, TokenWeights(), dataset=weighted, packing=True, max_length=32)
    trainer = SFTTrainer(
        llama(len(tokenizer)), arguments(tmp_path), train_dataset=weighted, processing_class=tokenizer,
        callbacks=[TokenWeights(), SampleWeights(np.ones(COUNT))],
    )  # fmt: skip
    with pytest.raises(InputError, match="TokenWeights goes with no other weights"):
        trainer.train()


RULES = {  # a rule, and its weights from the losses and entropies of a row, for a bound of the loss
    "profit": lambda bound: (token_rule("profit", threshold=math.exp(-bound)), lambda loss, entropy: loss <= bound),
    "stm": lambda bound: (token_rule("stm", threshold=math.exp(bound)), lambda loss, entropy: loss <= bound),
    "own": lambda bound: (
        TokenRule("own", lambda tokens: 1 / (1 + tokens.entropy * tokens.loss), ["entropy"]),
        lambda loss, entropy: 1 / (1 + entropy * loss),
    ),
    "of rows": lambda bound: (
        token_rule("all_but_first", first=2),
        lambda loss, entropy: torch.arange(len(loss)) >= 2,
    ),
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 64, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    ],
    ids=["one batch", "accumulated", "padding-free", "packed"],
)
@pytest.mark.parametrize("name", RULES)
def test_a_step_by_a_rule_is_the_one_written_out(name, changes, prepared, tmp_path, tokenizer):
    model = llama(len(tokenizer))
    losses = plain_losses(model, list(prepared.with_format("torch"))).sort().values
    rule, weigh = RULES[name](float(losses[len(losses) // 2 :][:2].mean()))
    start = copy.deepcopy(model)
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": COUNT, **SGD, **changes}
    weights = TokenWeights(rule)
    outcome = train(tmp_path, tokenizer, weights, dataset=prepared, model=model, **settings)
    assert outcome.trainer.state.global_step == 1
    expected, _ = by_hand(start, prepared, SGD["learning_rate"], weigh)
    for each, value in expected.state_dict().items():
        torch.testing.assert_close(outcome.weights[each], value, msg=each)
    assert 0 < weights.mean_weights[0] < 1
    assert len(weights.mean_weights) == 1


def test_a_rule_moves_the_model_as_a_column_of_its_weights_does_to_the_last_bit(prepared, tmp_path, tokenizer):
    rule = token_rule("all_but_first", first=2)
    lists = []
    for labels in prepared["labels"]:
        place = np.cumsum([label != -100 for label in labels[1:]]) - 1
        lists.append([0.0, *(1.0 if at >= 2 else 0.0 for at in place)])
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    by_rule = train(tmp_path / "rule", tokenizer, TokenWeights(rule), dataset=prepared, **settings)
    column = prepared.add_column("token_weights", lists)
    by_column = train(tmp_path / "column", tokenizer, TokenWeights(), dataset=column, **settings)
    assert_same_weights(by_rule, by_column)


@pytest.mark.parametrize("rule", ["conflict", "random"])
def test_a_share_keeps_at_least_one_token_of_each_batch(rule, prepared, tmp_path, tokenizer):
    skip_without("log_probs")
    weights = TokenWeights(rule, keep=1e-3)
    train(tmp_path, tokenizer, weights, dataset=prepared, num_train_epochs=1, per_device_train_batch_size=1)
    counts = [sum(label != -100 for label in labels[1:]) for labels in prepared["labels"]]
    assert sorted(weights.mean_weights) == pytest.approx(sorted(1 / count for count in counts))


def test_random_tokens_are_others_in_each_batch(prepared, tmp_path, tokenizer):
    skip_without("log_probs")
    seen, same = [], prepared.select([6, 6, 6, 6])

    class Seeing(TokenWeights):
        def on_train_begin(self, *args, **kwargs):
            super().on_train_begin(*args, **kwargs)
            kwargs["model"].register_forward_hook(lambda model, args, output: seen.append(output.log_probs[0] != 0))

    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    for place in ("one", "other"):
        train(tmp_path / place, tokenizer, Seeing("random", keep=0.5), dataset=same, **settings)
    tokens = sum(label != -100 for label in same["labels"][0][1:])
    assert [int(each.sum()) for each in seen] == [int(tokens * 0.5)] * 8
    assert len({tuple(each.tolist()) for each in seen[:4]}) > 1
    assert all(torch.equal(one, other) for one, other in zip(seen[:4], seen[4:], strict=True))


def test_a_share_is_one_of_each_batch(prepared, tmp_path, tokenizer):
    weights = TokenWeights("conflict", keep=0.5)
    train(tmp_path, tokenizer, weights, dataset=prepared, num_train_epochs=1, per_device_train_batch_size=COUNT)
    tokens = sum(label != -100 for labels in prepared["labels"] for label in labels[1:])
    assert weights.mean_weights == [pytest.approx(int(tokens * 0.5) / tokens)]


def test_weights_of_one_by_a_rule_change_nothing_and_evaluation_is_not_weighed(prepared, tmp_path, tokenizer):
    settings = {"dataset": prepared, "evaluate": True, "eval_strategy": "epoch"}
    plain = train(tmp_path / "plain", tokenizer, **settings)
    weighed = train(tmp_path / "weighed", tokenizer, TokenWeights(lambda tokens: tokens.loss > 0), **settings)
    assert_same_weights(weighed, plain)
    assert weighed.logs == plain.logs
    still = {**settings, "learning_rate": 0.0}
    plain = train(tmp_path / "still", tokenizer, **still)
    weighed = train(tmp_path / "half", tokenizer, TokenWeights(lambda tokens: tokens.loss * 0 + 0.5), **still)
    of_both = [[entry["eval_loss"] for entry in each.logs if "eval_loss" in entry] for each in (plain, weighed)]
    assert of_both[0] == of_both[1]
    for one, other in zip(weighed.trainer.model.modules(), plain.trainer.model.modules(), strict=True):
        assert len(one._forward_hooks) == len(other._forward_hooks)


def test_an_update_without_weights_is_left_out_and_warned_of_once(prepared, tmp_path, tokenizer):
    skip_without("log_probs")
    model = llama(len(tokenizer))
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(ScoreWarning, match="The token rule 'profit' gives each of the [0-9]+ tokens of step 1") as told:
        train(tmp_path, tokenizer, TokenWeights("profit"), dataset=prepared, model=model, num_train_epochs=1)
    assert len([each for each in told if each.category is ScoreWarning]) == 1
    for name, value in before.items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("kind", ["column", "rule", "callback"])
def test_no_momentum_moves_the_weights_in_a_step_without_weights(kind, prepared, tmp_path, tokenizer):
    """The second of three, of AdamW, with weight decay."""
    skip_without("log_probs")
    steps: list[dict[str, torch.Tensor]] = []

    class Noting(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            steps.append(copy.deepcopy(model.state_dict()))

    class Second:
        calls = 0

        def __call__(self, tokens):
            self.calls += 1
            return np.full(len(tokens), 0.0 if self.calls in (3, 4) else 0.5)

    settings = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings |= {"weight_decay": 0.1, "learning_rate": 1e-2, "callbacks": [Noting()], "dataset": prepared}
    said = "the weight 0: its update is left out"
    if kind == "column":
        zeros = [[0.0] * len(ids) for ids in prepared["input_ids"]]
        settings |= {"dataset": prepared.add_column("token_weights", zeros), "num_train_epochs": 1}
        with pytest.warns(ScoreWarning, match=f"The column 'token_weights' gives .* {said}"):
            found = train(tmp_path, tokenizer, TokenWeights(), **settings)
        assert torch.equal(steps[0]["lm_head.weight"], llama(len(tokenizer)).lm_head.weight)
        assert found.callback.mean_weights == [0.0]
        return
    callback = TokenWeights(Second()) if kind == "rule" else ResonanceCallback(token_rule=Second())
    with pytest.warns(ScoreWarning, match=f"The token rule 'Second' gives .* of step 2 {said}"):
        found = train(tmp_path, tokenizer, callback, **settings)
    for name, value in steps[0].items():
        assert torch.equal(value, steps[1][name])
    assert not torch.equal(steps[1]["lm_head.weight"], steps[2]["lm_head.weight"])
    assert callback.mean_weights == [0.5, 0.0, 0.5]
    if kind == "callback":
        assert Ledger.load(tmp_path).steps()["left_out"].tolist() == [False, True, False]
    for state in found.trainer.optimizer.state.values():
        assert int(state["step"]) == 2


RANKED = TokenRule("ranked", lambda tokens: tokens.rank == 1, ["rank"])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rule": "bogus"}, "rule must be one of"),
        ({"keep": 0.5}, "keep= goes with rule="),
        ({"rule": RANKED}, "'ranked' needs 'rank': SFTTrainer's forward does not compute it"),
        ({"rule": "rho"}, "'rho' needs 'reference_loss': a run has one model"),
        ({"rule": lambda tokens: tokens.loss, "keep": 0.5}, "keep= goes with the name of a token rule"),
        ({"rule": "stm", "keep": 1.5}, "keep is the share of the tokens to keep, above 0 and at most 1"),
    ],
)
def test_a_rule_that_a_run_cannot_follow_is_refused_at_once(values, expected):
    with pytest.raises(InputError, match=expected):
        TokenWeights(**values)


def test_what_a_rule_returns_is_checked_in_a_run(prepared, weighted, tmp_path, tokenizer):
    skip_without("log_probs")
    with pytest.raises(InputError, match="The token rule 'twice' returned"):
        train(tmp_path, tokenizer, TokenWeights(TokenRule("twice", lambda tokens: tokens.loss * 2)), dataset=prepared)
    with pytest.raises(InputError, match=r"The rows have weights \('token_weights'\): leave the token rule out"):
        train(tmp_path, tokenizer, TokenWeights("stm"), dataset=weighted)
    with pytest.raises(InputError, match="TokenWeights cannot act beside ResonanceCallback"):
        train(tmp_path, tokenizer, TokenWeights("stm"), dataset=prepared, callbacks=[ResonanceCallback()])


def test_a_run_that_would_ignore_the_weights_is_refused(weighted, tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"rows whose tokens have weights \('token_weights'\)"):
        train(tmp_path, tokenizer, ResonanceCallback(), dataset=weighted)


def test_a_run_that_an_error_ends_leaves_no_rule_on_the_model(prepared, tmp_path, tokenizer):
    skip_without("log_probs")
    settings = {"dataset": prepared, "num_train_epochs": 1, **SGD}
    start = llama(len(tokenizer))
    plain, used = copy.deepcopy(start), copy.deepcopy(start)

    def fail(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", tokenizer, TokenWeights(fail), model=used, **settings)
    train(tmp_path / "plain", tokenizer, model=plain, **settings)
    train(tmp_path / "used", tokenizer, model=used, **settings)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, used.state_dict()[name])


def test_rows_with_both_weights_are_refused(prepared, tmp_path, tokenizer):
    skip_without("log_probs")
    ones = [[1.0] * len(row["labels"]) for row in prepared]
    both = prepared.add_column("token_weights", ones).add_column("resofilter_weight", [0.5] * len(prepared))
    with pytest.raises(InputError, match="The rows have 'resofilter_weight' as well"):
        train(tmp_path, tokenizer, TokenWeights(), dataset=both, num_train_epochs=1, **SGD)


def test_row_weights_do_not_act_where_tokens_have_weights(weighted, tmp_path, tokenizer):
    skip_without("log_probs")
    both = weighted.add_column("resofilter_weight", [0.5] * COUNT)
    with pytest.raises(InputError, match="The rows have 'resofilter_weight' as well"):
        train(tmp_path, tokenizer, SampleWeights([0.5] * COUNT), dataset=both, num_train_epochs=1, **SGD)


def test_a_checkpoint_of_an_earlier_version_has_its_weights_under_another_name():
    there = {"weights": {"rule": "stm", "settings": {"threshold": 3}}}
    for rule, resumes in ((token_rule("stm", threshold=3), True), (token_rule("stm"), False)):
        state = TrainerState(global_step=3, stateful_callbacks={EARLIER_STATE: dict(there)})
        with nullcontext() if resumes else pytest.raises(InputError, match="they differ in weights"):
            TokenWeights(rule)._check_resumed(state)
        assert not resumes or state.stateful_callbacks == {STATE: there}


STEPS = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, **SGD}


@pytest.mark.parametrize("rule", [{"rule": "conflict", "keep": 0.5}, {}], ids=["rule", "column"])
def test_a_run_ends_the_same_from_a_checkpoint(rule, prepared, weighted, tmp_path, tokenizer):
    skip_without("log_probs")
    settings = {"dataset": prepared if rule else weighted, **STEPS}
    whole = train(tmp_path / "whole", tokenizer, TokenWeights(**rule), **settings)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = train(tmp_path / "resumed", tokenizer, TokenWeights(**rule), resume=checkpoint, **settings)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize("there", [None, TokenWeights("all_but_first"), TokenWeights("conflict", keep=0.4)])
def test_a_run_that_weighed_in_another_way_is_not_resumed(there, prepared, tmp_path, tokenizer):
    skip_without("log_probs")
    train(tmp_path, tokenizer, there, dataset=prepared, **STEPS)
    checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(InputError, match=r"The checkpoint of step 3 was made from something else: .* weights \("):
        train(tmp_path, tokenizer, TokenWeights("conflict", keep=0.5), resume=checkpoint, dataset=prepared, **STEPS)


def test_a_rule_does_not_act_in_the_next_training_of_the_same_trainer(prepared, tmp_path, tokenizer):
    """Which an error has ended, and from which the callback was then taken."""
    skip_without("log_probs")
    start = llama(len(tokenizer))
    settings = arguments(tmp_path, num_train_epochs=1, **SGD)
    calls = []

    def fail_once(tokens):
        calls.append(len(tokens))
        raise KeyboardInterrupt

    callback, model = TokenWeights(fail_once), copy.deepcopy(start)
    trainer = SFTTrainer(model, settings, train_dataset=prepared, processing_class=tokenizer, callbacks=[callback])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(callback)
    trainer.train()
    plain = train(tmp_path / "plain", tokenizer, model=start, dataset=prepared, num_train_epochs=1, **SGD)
    assert len(calls) == 1
    for name, value in plain.weights.items():
        assert torch.equal(value, trainer.model.state_dict()[name])


@pytest.mark.parametrize("rule", ["profit", "conflict"])
def test_losses_that_are_no_numbers_stay_so(rule, prepared, tmp_path, tokenizer):
    """As in any run, whatever the rule; a rule would rank them, or take them for improbable."""
    skip_without("log_probs")
    model = llama(len(tokenizer))
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    callback = TokenWeights(rule)
    train(tmp_path, tokenizer, callback, model=model, dataset=prepared, num_train_epochs=1, **SGD)
    assert callback.mean_weights == []
