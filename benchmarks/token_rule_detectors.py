"""What each token rule of `token_rules.py` drops first, as a detector of planted tokens. Knows arrays, no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from resofilter_trainer.selecting.token_rules import TokenInputs

Value = Callable[[TokenInputs], np.ndarray]


@dataclass(frozen=True)
class Detector:
    """What a rule drops first.

    Attributes:
        selector: whose scores it reads.
        value: a function to a value for each token; larger is dropped first.
        rule: the name of the rule with its settings, for the masks; None for a column that is no rule.
        share: whether the rule takes a share.
    """

    selector: str
    value: Value
    rule: tuple[str, dict[str, Any]] | None = None
    share: bool = False


def _place(tokens: TokenInputs) -> np.ndarray:
    return np.repeat(tokens.offsets[:-1], tokens.num_tokens) - np.arange(len(tokens))


def _certain_loss(tokens: TokenInputs) -> np.ndarray:
    return tokens.loss * (1 - tokens.entropy.astype(np.float64) / np.log(max(tokens.vocabulary, 2)))


def _mixed(tokens: TokenInputs) -> np.ndarray:
    """ssToken's value with gamma = 0.5, negated."""
    values = np.zeros(len(tokens))
    learnt = tokens.earlier_loss.astype(np.float64) - tokens.loss
    for start, stop in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True):
        own = learnt[start:stop]
        scaled = (own - own.min()) / (np.ptp(own) + 1e-8)
        values[start:stop] = (scaled + tokens.prompt_attention[start:stop]) / 2
    return -values


def _excess(tokens: TokenInputs) -> np.ndarray:
    return tokens.reference_loss.astype(np.float64) - tokens.loss


DETECTORS = {
    "token_cleaning, trusted": Detector("token_cleaning", _excess, ("token_cleaning", {}), True),
    "rho, trusted": Detector("token_cleaning", _excess, ("rho", {}), True),
    "sstoken, first fifth": Detector("sstoken", _mixed, ("sstoken", {"gamma": 0.5}), True),
    "sstoken, its losses alone": Detector("sstoken", lambda tokens: -_excess(tokens), ("sstoken", {}), True),
    "sstoken, its attention alone": Detector("sstoken", lambda tokens: -tokens.prompt_attention),
    "profit, stm": Detector("eaft", lambda tokens: tokens.loss, ("profit", {}), True),
    "profit, p < 0.1": Detector("eaft", lambda tokens: tokens.loss, ("profit", {"threshold": 0.1})),
    "stm, perplexity > 2.5": Detector("eaft", lambda tokens: tokens.loss, ("stm", {"threshold": 2.5})),
    "eaft": Detector("eaft", lambda tokens: -tokens.top_entropy, ("eaft", {})),
    "conflict": Detector("eaft", _certain_loss, ("conflict", {}), True),
    "all_but_first": Detector("eaft", _place, ("all_but_first", {})),
    "random": Detector("eaft", lambda tokens: np.zeros(len(tokens)), ("random", {}), True),
    "loss, trusted reference": Detector("token_cleaning", lambda tokens: tokens.reference_loss),
    "entropy": Detector("eaft", lambda tokens: tokens.entropy),
    "rank": Detector("eaft", lambda tokens: tokens.rank),
}
