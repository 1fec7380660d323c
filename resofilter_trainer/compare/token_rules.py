"""The settings of the method `token_rule`: a rule for which tokens are learnt, and what it needs. Knows no models."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..config import InputError, check_kind, one_of
from ..selecting.named_rules import RULES, token_rule
from ..selecting.token_rules import EARLIER_LOSS, PROMPT_ATTENTION, REFERENCE_LOSS, TokenInputs, TokenRule

UNMARKED = "unmarked"  # the rule that masks the tokens which the user has marked
COMPARED = tuple(name for name in RULES if name != "messages")  # those that measure or count
MARKED = "marked"  # what it reads: 1 for a token that is marked


@dataclass(frozen=True)
class TokenRuleSettings:
    """Which tokens are learnt.

    Attributes:
        rule: the name of a token rule (see `docs/token_rules.md`), or `unmarked`.
        threshold: for `profit` and `stm`, a bound in place of a share.
        gamma: for `sstoken`, the weight of its loss part.
        first: for `all_but_first`, the number of tokens.
        spans: for `unmarked`, a column with the marked parts of each completion: a list of pairs, the first character
            of a part and the one after it.

    A rule without a share (`eaft`, `all_but_first`, `unmarked`, and one with a threshold) is trained once, whatever the
    comparison's `keep`.

    Raises:
        InputError: a setting is unknown or cannot be used with another one.
    """

    rule: str = ""
    threshold: float | None = None
    gamma: float | None = None
    first: int | None = None
    spans: str | None = None

    def __post_init__(self) -> None:
        if not self.rule:
            raise InputError("The method 'token_rule' needs a setting 'rule', such as {rule: profit}.")
        one_of("rule", self.rule, (*COMPARED, UNMARKED))
        check_kind("spans", self.spans, (str, type(None)), "the name of a column")
        if (self.rule == UNMARKED) != (self.spans is not None):
            raise InputError(f"spans goes with the rule '{UNMARKED}', which needs one: a column with the marked parts.")
        if self.rule == UNMARKED and self._given:
            raise InputError(f"The rule '{UNMARKED}' has no setting {next(iter(self._given))}.")
        self.of_share(0.5, 0)

    @property
    def _given(self) -> dict[str, Any]:
        named = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("rule", "spans")}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def has_share(self) -> bool:
        """Whether the share to keep changes what the rule does."""
        if self.rule == UNMARKED:
            return False
        return "keep" in inspect.signature(RULES[self.rule].make).parameters and self.threshold is None

    def of_share(self, keep: float, seed: int) -> TokenRule:
        """The rule that keeps a share of the tokens.

        Args:
            keep: the share, for a rule that has one.
            seed: the seed of random tokens.
        """
        if self.rule == UNMARKED:
            return TokenRule(UNMARKED, lambda tokens: ~_marked(tokens), settings={"spans": self.spans})
        more = {"keep": keep} if self.has_share else {}
        return token_rule(self.rule, **self._given, **more, **({"seed": seed} if self.rule == "random" else {}))

    @property
    def needs(self) -> tuple[str, ...]:
        """What the rule reads beside the loss."""
        return tuple(self.of_share(0.5, 0).needs)

    @property
    def of_reference(self) -> bool:
        """Whether a reference model is compared with."""
        return REFERENCE_LOSS in self.needs

    @property
    def of_progress(self) -> bool:
        """Whether the model after a first training is compared with the model before it, or read."""
        return not {EARLIER_LOSS, PROMPT_ATTENTION}.isdisjoint(self.needs)

    @property
    def measures(self) -> bool:
        """Whether a model has to run."""
        return self.rule not in ("random", "all_but_first", UNMARKED)


def _marked(tokens: TokenInputs) -> np.ndarray:
    return tokens.measured[MARKED].astype(bool)
