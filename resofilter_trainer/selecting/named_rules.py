"""The token rules that have names: those of papers, and baselines to compare them with. Knows arrays, no model.

In formulas, p_t is the probability of learnt token t, L_t = -ln p_t, H_t the entropy of the distribution there, K_t
that of its 20 most probable tokens (scaled to the sum 1), V the size of the vocabulary. A share of the tokens is
int(N * keep) of all N; of tokens with the same value, those of earlier rows are kept first, and within a row the
earlier ones.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import InputError, at_most_one, number, one_of, share, whole_number
from .token_rules import (
    EARLIER_LOSS,
    ENTROPY,
    MESSAGE_WEIGHT,
    PROMPT_ATTENTION,
    REFERENCE_LOSS,
    TOP_ENTROPY,
    TokenInputs,
    TokenRule,
)
from .token_selection import TokenSelector, keep_by_sample, keep_globally, keep_in_rows, keep_largest

SHARE = 0.6  # of the tokens, as in Token Cleaning and ssToken
PROFIT_BOUND = 0.1  # of the probability; recommended in ProFit's repository
STM_BOUND = 2.5  # of the perplexity; the default in STM's repository
TOP = 20  # of so many tokens is the entropy of EAFT


def token_cleaning(keep: float = SHARE) -> TokenRule:
    """Keeps the share of all tokens with the largest excess loss, `L_t` minus the loss under a reference model.

    Source: Token Cleaning, arXiv 2502.01968, section 3.
    """
    selector = TokenSelector(keep)
    return TokenRule(
        "token_cleaning",
        lambda tokens: keep_globally(tokens.loss, tokens.reference_loss, selector.keep),
        (REFERENCE_LOSS,),
        settings={"keep": selector.keep},
        check=selector.check,
    )


def rho(keep: float = SHARE) -> TokenRule:
    """As `token_cleaning`, but keeps int(n * keep) of the n tokens of each row. Source: RHO-1, arXiv 2404.07965."""
    selector = TokenSelector(keep, "sample")
    return TokenRule(
        "rho",
        lambda tokens: keep_by_sample(tokens.loss, tokens.reference_loss, tokens.offsets, selector.keep),
        (REFERENCE_LOSS,),
        settings={"keep": selector.keep},
        check=selector.check,
    )


def sstoken(keep: float = SHARE, gamma: float = 1.0) -> TokenRule:
    """Keeps, of each row's n tokens, the ceil(n * keep) with the largest `gamma d_t + (1 - gamma) a_t`.

    d_t is the loss under earlier weights of the same model minus L_t, moved and scaled to [0, 1] within the row
    (`(d - min) / (max - min + 1e-8)`), and a_t the attention of the token to the prompt, summed over the prompt and
    averaged over the heads of the last layer. The paper uses gamma = 0.5; 1 is its loss part alone, which needs no
    attention.

    Source: ssToken, arXiv 2510.18250, as its repository (jianke0604/ssToken) computes it.
    """
    keep = share("keep", keep, "tokens")
    gamma = number("gamma", gamma, least=0, most=1)

    def weigh(tokens: TokenInputs) -> np.ndarray:
        values = np.zeros(len(tokens))
        if gamma > 0:
            values += gamma * _scaled_in_rows(tokens.earlier_loss.astype(np.float64) - tokens.loss, tokens.offsets)
        if gamma < 1:
            values += (1 - gamma) * tokens.prompt_attention
        counts = np.ceil(tokens.num_tokens * keep).astype(np.int64)
        return keep_in_rows(lambda span: values[span], tokens.offsets, counts)

    needs = [*([EARLIER_LOSS] if gamma > 0 else []), *([PROMPT_ATTENTION] if gamma < 1 else [])]
    return TokenRule("sstoken", weigh, needs, settings={"keep": keep, "gamma": gamma})


def profit(keep: float | None = None, threshold: float | None = None) -> TokenRule:
    """Masks improbable tokens: those with p_t below `threshold`, by default 0.1; or keeps the share with the largest.

    Source: ProFit, arXiv 2601.09195; the bound, and that a token on it is kept, from its repository (Utaotao/ProFit).
    """
    if at_most_one(keep=keep, threshold=threshold) == "keep":
        return _by_share("profit", keep, lambda tokens: -tokens.loss.astype(np.float64))
    bound = number("threshold", PROFIT_BOUND if threshold is None else threshold, least=0, most=1)
    return TokenRule("profit", lambda tokens: tokens.probability >= bound, settings={"threshold": bound})


def stm(keep: float | None = None, threshold: float | None = None) -> TokenRule:
    """Masks tokens of high perplexity, 1 / p_t above `threshold`, by default 2.5; or keeps the share with the lowest.

    By share, it is `profit`: both rank by p_t.

    Source: STM, arXiv 2501.14315; the bound from its repository (appier-research/robust-llm-finetunes).
    """
    if at_most_one(keep=keep, threshold=threshold) == "keep":
        return _by_share("stm", keep, lambda tokens: -tokens.loss.astype(np.float64))
    bound = number("threshold", STM_BOUND if threshold is None else threshold, least=1)
    return TokenRule(
        "stm", lambda tokens: np.exp(tokens.loss.astype(np.float64)) <= bound, settings={"threshold": bound}
    )


def eaft() -> TokenRule:
    """Weighs tokens by `K_t / ln min(20, V)`: little where the model is sure, whether it is right or not.

    The paper's normalised entropy; the code that its authors gave to LLaMA-Factory divides by 3 instead of
    ln 20 = 2.996.

    Source: EAFT, arXiv 2601.02151, with alpha = 1.
    """

    def weigh(tokens: TokenInputs) -> np.ndarray:
        most = math.log(max(min(TOP, tokens.vocabulary), 2))
        return np.clip(tokens.top_entropy.astype(np.float64) / most, 0, 1)

    return TokenRule("eaft", weigh, (TOP_ENTROPY,), soft=True, settings={})


def conflict(keep: float = SHARE) -> TokenRule:
    """Keeps the share of the tokens with the smallest `L_t (1 - H_t / ln V)`: masks a loss where the model is sure.

    Source: the confident conflicts of EAFT, arXiv 2601.02151, as one number. The paper's own pilot masks tokens that
    are among those of low probability and among those of low entropy; its bounds were not found.
    """

    def score(tokens: TokenInputs) -> np.ndarray:
        certainty = 1 - tokens.entropy.astype(np.float64) / math.log(max(tokens.vocabulary, 2))
        return -(tokens.loss * certainty)

    return _by_share("conflict", keep, score, (ENTROPY,))


def random(keep: float = SHARE, seed: int = 0) -> TokenRule:
    """Keeps a random share of the tokens. A baseline."""
    seed = whole_number("seed", seed, least=0)
    rule = _by_share("random", keep, lambda tokens: np.random.default_rng(seed).random(len(tokens)))
    return TokenRule(rule.name, rule.weigh, settings={**(rule.settings or {}), "seed": seed}, check=rule.check)


def all_but_first(first: int = 1) -> TokenRule:
    """Masks the first tokens of each row. A baseline.

    Args:
        first: the number of learnt tokens of a row to mask.
    """
    first = whole_number("first", first, least=1)

    def check(num_tokens: np.ndarray) -> None:
        if num_tokens.max(initial=0) <= first:
            raise InputError(f"No row has more than first={first} tokens to learn: choose a smaller number.")

    def weigh(tokens: TokenInputs) -> np.ndarray:
        place = np.arange(len(tokens)) - np.repeat(tokens.offsets[:-1], tokens.num_tokens)
        return place >= first

    return TokenRule("all_but_first", weigh, settings={"first": first}, check=check)


def messages() -> TokenRule:
    """Weighs tokens by the `weight` of their message in the user's rows; 1 where it has none."""
    return TokenRule("messages", lambda tokens: tokens.message_weight, (MESSAGE_WEIGHT,), soft=True, settings={})


@dataclass(frozen=True)
class NamedRule:
    """What a rule is, for people.

    Attributes:
        make: a function from its settings to the rule.
        formula: what it computes, as text.
        masks: which tokens it masks or weighs down.
        keeps: how many stay by default.
        source: where it comes from.
    """

    make: Callable[..., TokenRule]
    formula: str
    masks: str
    keeps: str
    source: str

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs beside the loss, with its default settings."""
        return tuple(self.make().needs)

    @property
    def forwards(self) -> int:
        """The number of forwards over all rows that it takes to clean them."""
        return 2 if {REFERENCE_LOSS, EARLIER_LOSS} & {*self.needs} else 1


OF_ALL, OF_ROW = "60 % of all tokens", "60 % of each row's tokens"
RULES: dict[str, NamedRule] = {
    "token_cleaning": NamedRule(
        token_cleaning,
        "L_t - L_t(reference), largest kept",
        "tokens that the reference model has not learnt better",
        OF_ALL,
        "Token Cleaning, arXiv 2502.01968",
    ),
    "rho": NamedRule(
        rho,
        "L_t - L_t(reference), largest kept",
        "tokens that the reference model has not learnt better",
        OF_ROW,
        "RHO-1, arXiv 2404.07965",
    ),
    "sstoken": NamedRule(
        sstoken,
        "gamma (L_t(earlier) - L_t) + (1 - gamma) attention to the prompt, largest kept; gamma = 1",
        "tokens on which the model has not improved on its earlier self",
        OF_ROW,
        "ssToken, arXiv 2510.18250 (gamma = 0.5 there)",
    ),
    "profit": NamedRule(
        profit,
        "p_t, largest kept",
        "improbable tokens",
        f"p_t of at least {PROFIT_BOUND:g}",
        "ProFit, arXiv 2601.09195",
    ),
    "stm": NamedRule(
        stm,
        "1 / p_t, smallest kept",
        "improbable tokens",
        f"perplexity of at most {STM_BOUND:g}",
        "STM, arXiv 2501.14315",
    ),
    "eaft": NamedRule(
        eaft,
        "weight K_t / ln 20",
        "tokens where the model is sure",
        "all, with weights",
        "EAFT, arXiv 2601.02151",
    ),
    "conflict": NamedRule(
        conflict,
        "L_t (1 - H_t / ln V), smallest kept",
        "improbable tokens where the model is sure",
        OF_ALL,
        "confident conflict, after EAFT, arXiv 2601.02151",
    ),
    "random": NamedRule(random, "a random number", "random tokens", OF_ALL, "baseline"),
    "all_but_first": NamedRule(
        all_but_first, "place in the row", "the first tokens of each row", "all but the first of each row", "baseline"
    ),
    "messages": NamedRule(
        messages,
        "the `weight` of the token's message",
        "messages that count less",
        "all, with weights",
        "the user's own weights",
    ),
}


def token_rule(name: str, **settings: Any) -> TokenRule:
    """The token rule of a name.

    Args:
        name: a name in `docs/token_rules.md`, such as `"profit"`.
        **settings: its settings: `keep`, the share of the tokens to keep; `threshold`, for `profit` and `stm`; `gamma`,
            for `sstoken`; `seed`, for `random`; `first`, for `all_but_first`.

    Raises:
        InputError: the name is not known, the rule has no such setting, or its value is not allowed.
    """
    one_of("rule", name, tuple(RULES))
    known = [*inspect.signature(RULES[name].make).parameters]
    for setting in settings:
        if setting not in known:
            has = f"It has: {', '.join(f'{each}=' for each in known)}." if known else "It has no settings."
            raise InputError(f"The token rule '{name}' has no setting {setting}=. {has}")
    return RULES[name].make(**settings)


def rule_of(
    rule: str | TokenRule | Callable[[TokenInputs], Any], keep: float | None = None, seed: int = 0
) -> TokenRule:
    """A rule from its name, from itself, or from a function that needs nothing but losses.

    Args:
        rule: the name of a rule, a rule, or a function from `TokenInputs` to weights.
        keep: the share of the tokens to keep, for a name; by default the rule's own.
        seed: the seed of the rule `"random"`.

    Raises:
        InputError: there is no such rule, or the rule has no share.
    """
    if isinstance(rule, str):
        settings = {"keep": keep, "seed": seed if rule == "random" else None}
        return token_rule(rule, **{name: value for name, value in settings.items() if value is not None})
    if keep is not None:
        raise InputError(
            "keep= goes with the name of a rule: a rule of your own decides itself how many tokens it keeps."
        )
    if isinstance(rule, TokenRule):
        return rule
    if not callable(rule):
        raise InputError(f"rule must be a name, a TokenRule or a function, got {rule!r}.")
    return TokenRule(getattr(rule, "__name__", type(rule).__name__), rule)


def _by_share(
    name: str, keep: Any, score: Callable[[TokenInputs], np.ndarray], needs: tuple[str, ...] = ()
) -> TokenRule:
    """A rule that keeps the share of all tokens with the largest scores."""
    selector = TokenSelector(keep)
    return TokenRule(
        name,
        lambda tokens: keep_largest(score(tokens), selector.keep),
        needs,
        settings={"keep": selector.keep},
        check=selector.check,
    )


def _scaled_in_rows(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(N,) values, moved and scaled to [0, 1] within each row."""
    counts = np.diff(offsets)
    some = counts > 0
    starts = offsets[:-1][some]
    least, most = (each.reduceat(values, starts) if len(starts) else values for each in (np.minimum, np.maximum))
    spread = functools.partial(np.repeat, repeats=counts[some])
    scaled: np.ndarray = (values - spread(least)) / (spread(most - least) + 1e-8)
    return scaled
