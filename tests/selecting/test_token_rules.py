"""Each token rule against its formula in plain Python, and what a rule may not return or need."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resofilter_trainer import InputError, TokenInputs, TokenRule, token_rule
from resofilter_trainer.selecting.named_rules import RULES, rule_of
from resofilter_trainer.selecting.token_rules import KNOWN

VOCABULARY = 50
ATTENTIVE = {"sstoken": {"gamma": 0.5}}  # settings under which a rule reads everything it can


def inputs_of(counts: Sequence[int], seed: int = 0, tied: bool = False) -> TokenInputs:
    """Rows with so many learnt tokens; with `tied`, few different values."""
    draw = np.random.default_rng(seed)

    def column(most: float) -> np.ndarray:
        return draw.integers(0, 4, sum(counts)) / 3 * most if tied else draw.uniform(0, most, sum(counts))

    most = {"entropy": math.log(VOCABULARY), "rank": VOCABULARY, "top_entropy": math.log(20)}
    most |= {"prompt_attention": 1, "message_weight": 1}
    measured = {name: column(most.get(name, 6)) for name in KNOWN}
    return TokenInputs(np.cumsum([0, *counts]), column(6), VOCABULARY, measured)


def best(values: Sequence[float], count: int) -> list[bool]:
    """The largest; of equal ones, the first."""
    order = sorted(range(len(values)), key=lambda n: (-values[n], n))
    return [n in set(order[:count]) for n in range(len(values))]


def plain(name: str, tokens: TokenInputs, keep: float) -> list[float]:
    """The weights of a rule, one token after the other."""
    loss, whole = tokens.loss.tolist(), len(tokens)
    rows = [range(a, b) for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]
    if name == "token_cleaning":
        return best([a - b for a, b in zip(loss, tokens.reference_loss.tolist(), strict=True)], int(whole * keep))
    if name == "rho":
        excess = [a - b for a, b in zip(loss, tokens.reference_loss.tolist(), strict=True)]
        return [stays for row in rows for stays in best([excess[n] for n in row], int(len(row) * keep))]
    if name == "sstoken":
        found: list[float] = []
        for row in rows:
            better = [tokens.earlier_loss[n] - loss[n] for n in row]
            scaled = [(each - min(better)) / (max(better) - min(better) + 1e-8) for each in better]
            mixed = [0.5 * a + 0.5 * tokens.prompt_attention[n] for a, n in zip(scaled, row, strict=True)]
            found += best(mixed, math.ceil(len(row) * keep))
        return found
    if name in ("profit", "stm"):
        return best([-each for each in loss], int(whole * keep))
    if name == "conflict":
        sure = [1 - each / math.log(VOCABULARY) for each in tokens.entropy.tolist()]
        return best([-a * b for a, b in zip(loss, sure, strict=True)], int(whole * keep))
    if name == "eaft":
        return [each / math.log(20) for each in tokens.top_entropy.tolist()]
    if name == "messages":
        return tokens.message_weight.tolist()
    if name == "random":
        return best(np.random.default_rng(0).random(whole).tolist(), int(whole * keep))
    assert name == "all_but_first"
    return [n - row.start >= 2 for row in rows for n in row]


def settings_of(name: str, keep: float) -> dict[str, float]:
    usual = {"eaft": {}, "messages": {}, "all_but_first": {"first": 2}}
    return usual.get(name, {"keep": keep}) | ATTENTIVE.get(name, {})


# ---- the rules


@pytest.mark.parametrize("name", RULES)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda counts: max(counts) > 2),
    keep=st.sampled_from([0.3, 0.6, 0.85, 1.0]),
    seed=st.integers(0, 99),
    tied=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_rule_is_its_formula(name, counts, keep, seed, tied):
    tokens = inputs_of(counts, seed, tied)
    truth = np.array(plain(name, tokens, keep), dtype=np.float64)
    if not truth.any():
        return
    weights = token_rule(name, **settings_of(name, keep)).weights(tokens)
    assert weights.dtype == (np.float64 if name in ("eaft", "messages") else bool)
    np.testing.assert_allclose(weights.astype(np.float64), truth, rtol=0, atol=1e-12)


def test_bounds_are_those_of_the_papers_and_a_token_on_them_stays():
    tokens = TokenInputs(np.array([0, 4]), -np.log([0.1 * (1 + 1e-12), 0.0999, 0.4 * (1 + 1e-12), 0.399]))
    assert token_rule("profit").weights(tokens).tolist() == [True, False, True, True]
    assert token_rule("stm").weights(tokens).tolist() == [False, False, True, False]
    assert token_rule("profit", threshold=0.399).weights(tokens).tolist() == [False, False, True, True]
    assert token_rule("stm", threshold=10).weights(tokens).tolist() == [True, False, True, True]
    half = TokenInputs(np.array([0, 1]), np.array([math.log(2)]))
    assert token_rule("profit", threshold=0.5).weights(half).tolist() == [True]


def test_ranking_by_probability_is_the_same_for_both_papers():
    tokens = inputs_of([30, 20])
    assert np.array_equal(token_rule("profit", keep=0.4).weights(tokens), token_rule("stm", keep=0.4).weights(tokens))


def test_the_opposite_ends_are_masked():
    """Token Cleaning keeps what the reference learnt, ProFit what is probable, EAFT what is open."""
    loss = np.array([0.01, 0.01, 5.0, 5.0])  # known, known, sure of another token, open
    measured = {"entropy": np.array([0.05, 0.05, 0.05, 3.5]), "top_entropy": np.array([0.05, 0.05, 0.05, 2.9])}
    tokens = TokenInputs(np.array([0, 4]), loss, VOCABULARY, {**measured, "reference_loss": np.array([0, 0, 4.9, 1.0])})
    assert token_rule("token_cleaning", keep=0.25).weights(tokens).tolist() == [False, False, False, True]
    assert token_rule("profit", keep=0.5).weights(tokens).tolist() == [True, True, False, False]
    assert token_rule("conflict", keep=0.75).weights(tokens).tolist() == [True, True, False, True]
    assert token_rule("eaft").weights(tokens).argmax() == 3


def test_small_vocabularies_and_float32_give_weights_of_at_most_one():
    top = np.full(3, np.log(np.float32(7)) * np.float32(1.0000001), dtype=np.float32)
    tokens = TokenInputs(np.array([0, 3]), np.ones(3, np.float32), 7, {"top_entropy": top})
    assert token_rule("eaft").weights(tokens).tolist() == [1, 1, 1]


def test_another_seed_gives_other_random_tokens():
    tokens = inputs_of([40])
    one, other = (token_rule("random", keep=0.5, seed=seed).weights(tokens) for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert one.sum() == other.sum() == 20


# ---- what a rule is made of


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("bogus", {}, "rule must be one of 'token_cleaning'"),
        ("proffit", {}, "Did you mean 'profit'?"),
        ("profit", {"keep": 0}, "keep is the share of the tokens to keep, above 0"),
        ("profit", {"keep": 0.5, "threshold": 0.5}, "Pass one of keep= and threshold="),
        ("profit", {"threshold": 1.5}, "threshold must be a finite number of at least 0 and at most 1"),
        ("stm", {"threshold": 0.5}, "threshold must be a finite number of at least 1, got 0.5"),
        ("eaft", {"keep": 0.5}, "The token rule 'eaft' has no setting keep=. It has no settings."),
        ("conflict", {"gamma": 1}, "The token rule 'conflict' has no setting gamma=. It has: keep=."),
        ("sstoken", {"gamma": 2}, "gamma must be a finite number"),
        ("random", {"seed": -1}, "seed must be a whole number of at least 0"),
        ("all_but_first", {"first": 0}, "first must be a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, values, expected):
    with pytest.raises(InputError) as refused:
        token_rule(name, **values)
    assert expected in str(refused.value)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_can_be_made_again_by_its_name_and_settings(name):
    rule, tokens = token_rule(name), inputs_of([9, 9])
    again = token_rule(rule.name, **rule.settings)
    assert np.array_equal(again.weights(tokens), rule.weights(tokens))
    assert again.settings == rule.settings


@pytest.mark.parametrize("name", ["token_cleaning", "rho", "profit", "conflict", "random", "all_but_first"])
def test_a_rule_that_would_keep_nothing_says_so_without_measurements(name):
    rule = token_rule(name, **({"first": 3} if name == "all_but_first" else {"keep": 0.01}))
    with pytest.raises(InputError, match=r"keep=0\.01 keeps none|more than first=3 tokens"):
        rule.check(np.array([3, 2, 0]))
    rule.check(np.array([100, 101]))


# ---- a rule of one's own


def own(value: object, tokens: int = 3, **more: object) -> np.ndarray:
    """The weights of a rule that returns a value."""
    return TokenRule("mine", lambda inputs: value, **more).weights(TokenInputs(np.array([0, tokens]), np.ones(tokens)))


def test_bools_and_zeros_and_ones_are_masks_and_other_numbers_weights():
    assert own([True, False, True]).dtype == bool
    for mask in ([1, 0, 1], np.array([1.0, 0.0, 1.0])):
        assert own(mask).dtype == bool
        assert own(mask).tolist() == [True, False, True]
        assert own(mask, soft=True).tolist() == [1.0, 0.0, 1.0]
        assert own(mask, soft=True).dtype == np.float64
    assert own([0.5, 0, 1]).tolist() == [0.5, 0, 1]
    assert own(np.float32([0.5, 0, 1])).dtype == np.float64


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([0.5, 1.5, 0], "returned 1.5 for token 1"),
        ([0.5, -0.1, 0], "returned -0.1 for token 1"),
        ([2, 0, 1], "returned 2 for token 0"),
        ([0.5, 0.5, math.nan], "returned NaN for token 2"),
        ([0.5, 0.5], "returned weights of the shape (2,) for 3 tokens"),
        ([[0.5], [0.5, 0.5], [0.5]], "returned a list that is no array of numbers"),
        ([[0.5] * 3], "returned weights of the shape (1, 3) for 3 tokens"),
        (1.0, "returned weights of the shape () for 3 tokens"),
        (None, "returned weights of the shape () for 3 tokens"),
        (["a", "b", "c"], "returned values of the type <U1"),
        ([0, 0, 0], "gives each of the 3 tokens the weight 0, so nothing would be learnt"),
        ([False] * 3, "gives each of the 3 tokens the weight 0"),
    ],
)
def test_what_is_no_weight_is_one_line_with_the_rules_name(value, expected):
    with pytest.raises(InputError) as refused:
        own(value)
    assert str(refused.value).startswith(f"The token rule 'mine' {expected}")
    assert "\n" not in str(refused.value)


def test_no_tokens_have_no_weights():
    assert own([], 0).tolist() == []


def test_a_function_is_a_rule_of_its_name():
    def probable(tokens: TokenInputs) -> np.ndarray:
        return tokens.probability > 0.5

    rule = rule_of(probable)
    assert (rule.name, rule.needs, rule.settings) == ("probable", (), None)
    assert rule.weights(TokenInputs(np.array([0, 2]), np.array([0.1, 2.0]))).tolist() == [True, False]
    assert rule_of(rule) is rule
    with pytest.raises(InputError, match="keep= goes with the name of a rule"):
        rule_of(probable, 0.5)
    with pytest.raises(InputError, match="rule must be a name, a TokenRule or a function, got 3"):
        rule_of(3)  # type: ignore[arg-type]


def test_what_was_not_measured_is_named():
    tokens = TokenInputs(np.array([0, 2]), np.ones(2), VOCABULARY)
    with pytest.raises(InputError, match="The token rule 'eaft' needs 'top_entropy': it was not measured"):
        token_rule("eaft").weights(tokens)
    with pytest.raises(InputError, match="A token rule reads 'entropy', which was not measured: name it in needs"):
        TokenRule("mine", lambda inputs: inputs.entropy).weights(tokens)
    with pytest.raises(InputError, match=r"needs .logits., which nothing measures\. There are: entropy, rank"):
        TokenRule("mine", len, ["logits"])
    with pytest.raises(InputError, match="'rank' has 1 values for 2 tokens"):
        TokenInputs(np.array([0, 2]), np.ones(2), VOCABULARY, {"rank": np.ones(1)})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"name": ""}, "name must be a text"),
        ({"weigh": 3}, "'mine' must have a function weigh"),
        ({"needs": "entropy"}, "needs must be a list of names, got 'entropy'"),
    ],
)
def test_a_rule_without_a_name_or_a_function_is_refused(values, expected):
    with pytest.raises(InputError, match=expected):
        TokenRule(**{"name": "mine", "weigh": len, **values})
