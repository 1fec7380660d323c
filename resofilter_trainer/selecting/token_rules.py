"""Rules for which tokens are learnt, and how much: functions from what is known of tokens to weights. Knows arrays.

    losses and statistics of tokens -> rule -> a weight in [0, 1] for each; a mask has the weights 0 and 1

A rule says what it needs. Whatever it returns is checked here. The rules that have names are in `named_rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import InputError, check_kind, with_known_keywords
from ..scores.token_scores import MEASURED, MESSAGE_WEIGHT, STATISTICS, TokenScores

ENTROPY, RANK, TOP_ENTROPY = STATISTICS
REFERENCE_LOSS, EARLIER_LOSS, PROMPT_ATTENTION = "reference_loss", "earlier_loss", "prompt_attention"
KNOWN = (*STATISTICS, REFERENCE_LOSS, EARLIER_LOSS, PROMPT_ATTENTION, MESSAGE_WEIGHT)  # beside the loss
OF_OTHERS = (REFERENCE_LOSS, EARLIER_LOSS)  # the losses of another model


@dataclass(frozen=True, eq=False)
class TokenInputs:
    """What is known of the N learnt tokens of R rows, row after row. With p_t the probability of token t:

    Attributes:
        offsets: (R + 1,) the start of each row, and the end.
        loss: (N,) `-ln p_t`, in nats.
        vocabulary: the size V of the vocabulary.
        measured: what else was measured, (N,) each, by the names below.

    Raises:
        InputError: the lengths differ, or what is read was not measured.
    """

    offsets: np.ndarray
    loss: np.ndarray
    vocabulary: int = 0
    measured: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self.measured.items():
            if len(values) != len(self.loss):
                raise InputError(f"'{name}' has {len(values)} values for {len(self.loss)} tokens.")

    def __len__(self) -> int:
        return len(self.loss)

    @classmethod
    def of(cls, scores: TokenScores, vocabulary: int) -> TokenInputs:
        """What token scores hold. The losses of their reference count as those of an earlier model as well."""
        measured = {
            name: values for name in (*MEASURED, MESSAGE_WEIGHT) if (values := getattr(scores, name)) is not None
        }
        if scores.reference is not None:
            measured |= dict.fromkeys(OF_OTHERS, scores.reference)
        return cls(scores.offsets, scores.base, vocabulary, measured)

    @property
    def num_tokens(self) -> np.ndarray:
        """(R,) the number of learnt tokens of each row."""
        return np.diff(self.offsets)

    @property
    def probability(self) -> np.ndarray:
        """(N,) float64, `p_t`."""
        return np.exp(-self.loss.astype(np.float64))

    @property
    def entropy(self) -> np.ndarray:
        """(N,) the entropy of the distribution over the vocabulary, in nats."""
        return self._of(ENTROPY)

    @property
    def rank(self) -> np.ndarray:
        """(N,) 1 plus the number of more probable tokens."""
        return self._of(RANK)

    @property
    def top_entropy(self) -> np.ndarray:
        """(N,) the entropy of the 20 most probable tokens, their probabilities scaled to the sum 1, in nats."""
        return self._of(TOP_ENTROPY)

    @property
    def reference_loss(self) -> np.ndarray:
        """(N,) the loss under a reference model, in nats."""
        return self._of(REFERENCE_LOSS)

    @property
    def earlier_loss(self) -> np.ndarray:
        """(N,) the loss under earlier weights of the same model, in nats."""
        return self._of(EARLIER_LOSS)

    @property
    def prompt_attention(self) -> np.ndarray:
        """(N,) the attention that each token pays to the prompt in the last layer: averaged over the heads, and summed
        over the tokens before it that are not learnt."""
        return self._of(PROMPT_ATTENTION)

    @property
    def message_weight(self) -> np.ndarray:
        """(N,) the `weight` of the message that the token is of; 1 where the message has none."""
        return self._of(MESSAGE_WEIGHT)

    def _of(self, name: str) -> np.ndarray:
        if name not in self.measured:
            raise InputError(f"A token rule reads '{name}', which was not measured: name it in needs.")
        return self.measured[name]


@with_known_keywords
@dataclass(frozen=True)
class TokenRule:
    """A rule for which tokens are learnt, and how much.

    >>> TokenRule("sure", lambda tokens: tokens.entropy < 1, needs=["entropy"])

    Attributes:
        name: its name in messages and summaries.
        weigh: a function from `TokenInputs` to a weight in [0, 1] for each token, (N,). Bools, and numbers that are all
            0 or 1, are a mask. It has to be pure: the same inputs give the same weights.
        needs: what it reads beside `loss`, `probability` and `offsets`: `"entropy"`, `"rank"`, `"top_entropy"`,
            `"reference_loss"`, `"earlier_loss"`, `"prompt_attention"`, `"message_weight"`.
        soft: whether its weights are weights even where they are all 0 or 1.
        settings: the values it was made with; None for a rule that cannot be made again by its name.
        check: a function of the number of learnt tokens of each row, (R,), that raises InputError where no token would
            be kept. It is called before anything is measured.

    Raises:
        InputError: the name or a need is not a proper one.
    """

    name: str
    weigh: Callable[[TokenInputs], Any]
    needs: Collection[str] = ()
    soft: bool = False
    settings: Mapping[str, Any] | None = None
    check: Callable[[np.ndarray], None] = lambda num_tokens: None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"A token rule's name must be a text, got {self.name!r}.")
        if not callable(self.weigh):
            raise InputError(f"The token rule '{self.name}' must have a function weigh, got {self.weigh!r}.")
        check_kind("needs", self.needs, (list, tuple, set, frozenset), "a list of names")
        object.__setattr__(self, "needs", tuple(self.needs))
        for need in self.needs:
            if need not in KNOWN:
                raise InputError(
                    f"The token rule '{self.name}' needs '{need}', which nothing measures. There are: "
                    f"{', '.join(KNOWN)}."
                )

    def check_needs(self, reasons: Mapping[str, str]) -> None:
        """Raise InputError where the rule needs what is not there.

        Args:
            reasons: why something is not there, by its name.
        """
        for need in self.needs:
            if need in reasons:
                raise InputError(f"The token rule '{self.name}' needs '{need}': {reasons[need]}.")

    def weights(self, inputs: TokenInputs, some: bool = True) -> np.ndarray:
        """The weight of each token: (N,) bool for a mask, else float64.

        Args:
            inputs: what is known of the tokens.
            some: whether at least one weight has to be above 0.

        Raises:
            InputError: something it needs was not measured, or the function returns anything but a weight in [0, 1] for
                each token, or 0 for all of them.
        """
        self.check_needs({name: "it was not measured" for name in KNOWN if name not in inputs.measured})
        returned = self.weigh(inputs)
        try:
            found = np.asarray(returned)
        except (TypeError, ValueError, RuntimeError) as error:  # each kind of object raises its own
            kind, why = type(returned).__name__, str(error).partition("\n")[0]
            raise InputError(
                f"The token rule '{self.name}' returned a {kind} that is no array of numbers ({why}): return one "
                "number for each token."
            ) from error
        fault = _fault(found, len(inputs), some)
        if fault is not None:
            raise InputError(f"The token rule '{self.name}' {fault}.")
        if not self.soft and (found.dtype.kind in "bui" or ((found == 0) | (found == 1)).all()):
            return np.ascontiguousarray(found, dtype=bool)
        return np.ascontiguousarray(found, dtype=np.float64)


def _fault(found: np.ndarray, tokens: int, some: bool) -> str | None:
    """What is wrong with the weights that a rule returned for some tokens; None where nothing is."""
    if found.shape != (tokens,):
        return f"returned weights of the shape {found.shape} for {tokens} tokens: return one for each"
    if found.dtype.kind not in "buif":
        return f"returned values of the type {found.dtype}: return numbers from 0 to 1, or bools"
    if not tokens:
        return None
    if np.isnan(found).any():
        return f"returned NaN for token {int(np.flatnonzero(np.isnan(found))[0])}: return numbers from 0 to 1"
    if (outside := (found < 0) | (found > 1)).any():
        where = int(np.flatnonzero(outside)[0])
        return f"returned {found[where]:g} for token {where}: return numbers from 0 to 1"
    if some and not found.any():
        return f"gives each of the {tokens} tokens the weight 0, so nothing would be learnt: choose another bound"
    return None


def ends_of_rows(tokens: np.ndarray, offsets: np.ndarray, end: int | None) -> np.ndarray:
    """The place of the last end token of each row that has one among its learnt tokens.

    Args:
        tokens: (N,) the learnt tokens, row after row.
        offsets: (R + 1,) the start of each row, and the end.
        end: the end token; a chat's template may put it in every turn. None where there is none.
    """
    places = np.flatnonzero(tokens == end) if end is not None else np.empty(0, np.int64)
    rows = np.searchsorted(offsets, places, side="right")
    return places[np.append(np.diff(rows) != 0, True)[: len(places)]]
