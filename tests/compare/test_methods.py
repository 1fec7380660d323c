"""What holds for every method of a comparison: its policy, its cost, its needs, and what is refused."""

from __future__ import annotations

import math

import pytest

from resofilter_trainer import InputError
from resofilter_trainer.compare.config import COLUMN, DEMO, ComparisonConfig, SelectorConfig
from resofilter_trainer.compare.methods import METHODS, check
from resofilter_trainer.config import TokenCleaning
from resofilter_trainer.criteria.criterion import CRITERIA
from resofilter_trainer.selecting.token_rules import TokenRule
from resofilter_trainer.selecting.token_selection import TokenSelector

NEEDED = {  # the settings that some methods need
    "signal": {"by": "loss_sum"},
    "dynamics": {"by": "mean_loss"},
    "token_rule": {"rule": "profit"},
}
every_method = pytest.mark.parametrize("name", METHODS)


def selector(method: str, **fields) -> SelectorConfig:
    needed = {"settings": NEEDED[method]} if method in NEEDED else {}
    return SelectorConfig(method, score_column="quality" if method == COLUMN else None, **{**needed, **fields})


def comparison(chosen: SelectorConfig, **changes) -> ComparisonConfig:
    """A comparison with everything that some method needs."""
    needed = {"proxy_model": "small", "validation_dataset": "validation.jsonl", "dataset": "rows.jsonl"}
    return ComparisonConfig([chosen], **{**needed, **changes})


@every_method
def test_every_method_can_be_compared(name):
    check(comparison(selector(name)))


@every_method
def test_the_policy_decides_where_the_method_says(name):
    method = METHODS[name]
    policy = method.policy(0.5, 0, selector(name))
    assert isinstance(policy, TokenSelector) == method.by_reference
    assert isinstance(policy, TokenRule) == (name == "token_rule")
    decides_first = hasattr(policy, "select") or isinstance(policy, TokenRule)
    assert decides_first or (isinstance(policy, TokenCleaning) and method.in_run)
    assert not method.in_run or method.model == "trained"
    assert (policy.settings["keep"] if isinstance(policy, TokenRule) else policy.keep) == (1 if name == "full" else 0.5)


@every_method
def test_the_cost_is_a_number_that_does_not_fall_with_the_epochs(name):
    chosen = selector(name)
    costs = [METHODS[name].cost(comparison(chosen), chosen, epochs) for epochs in (0, 1, 3)]
    assert costs == sorted(costs)
    assert costs[0] >= 0
    assert all(map(math.isfinite, costs))


@every_method
def test_needs_count_a_model_that_is_trained_and_validation_rows(name):
    method = METHODS[name]
    assert method.needs.steps >= 1
    assert method.needs.llms == int(method.trains)
    assert method.needs.data_free == (not method.validated)


@every_method
def test_methods_that_share_scores_measure_alike(name):
    method = METHODS[name]
    others = [each for each in METHODS.values() if each.scores == method.scores and not each.in_run]
    costs = {each.cost(comparison(selector(name)), selector(name), 1) for each in others}
    assert len(costs) == 1
    assert {each.by_reference for each in others} == {method.by_reference}


@every_method
def test_an_unknown_setting_is_refused(name):
    with pytest.raises(InputError, match=f"'{selector(name).name}' has no setting 'magic'"):
        check(comparison(selector(name, settings={"magic": 1})))


@every_method
def test_a_score_model_is_for_methods_that_measure_with_a_model_before_the_run(name):
    method, chosen = METHODS[name], selector(name, name=name, score_model="x")
    if method.model == "own" and method.forwards != 0:
        check(comparison(chosen))
    else:
        with pytest.raises(InputError, match="cannot use a score_model"):
            check(comparison(chosen))


@every_method
def test_what_a_method_needs_is_asked_for(name):
    method, chosen = METHODS[name], selector(name)
    refusals = {"validation_dataset": method.validated, "proxy_model": method.model == "proxy"}
    for setting, refused in refusals.items():
        if refused:
            with pytest.raises(InputError, match=f"name (a|one as) {setting}"):
                check(comparison(chosen, **{setting: None}))
        else:
            check(comparison(chosen, **{setting: None}))


def test_the_demo_has_validation_rows_and_no_column():
    for name in METHODS:
        config = comparison(selector(name), dataset=DEMO, validation_dataset=None)
        if name == COLUMN:
            with pytest.raises(InputError, match="The demo's problems have no column 'quality'"):
                check(config)
        else:
            check(config)


def test_every_criterion_has_a_method():
    assert set(CRITERIA) <= {method.scores for method in METHODS.values()}
