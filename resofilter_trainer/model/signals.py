"""The signals of a row that cost no further forward: each is an entry of `SIGNALS`. Knows arrays, no model or batch.

A signal is one number for each row, from its learnt tokens (`of_tokens`) or its gradient of W_up (`form`), or from the
scores of all rows, in the end (`of_layers`). In formulas, p_t is the probability of learnt token t, H_t the entropy of
the model's distribution there, V the size of the vocabulary, and T the number of the row's learnt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ..config import InputError, ResonanceConfig, check_kind, one_of
from .token_statistics import ENTROPY, ERROR, HEAD_GRADIENT, RANK, TokenStatistics

ALL = "all"
MOST_RANK = 100  # of a token in RSR
OF_TOKENS = (ENTROPY, ERROR, RANK, HEAD_GRADIENT)
TOP = 10  # of so many tokens, the one with the largest loss counts as top
RESOFILTER = "ResoFilter, arXiv 2412.14809"
HIDDEN, LAYERS = "hidden", "layers"  # what a signal needs: the mean hidden states; several measured layers


@dataclass(frozen=True)
class Tokens:
    """What is known of the N learnt tokens of B rows, row after row, as float64.

    Attributes:
        counts: (B,) the number of learnt tokens of each row.
        vocabulary: the size of the vocabulary.
        hidden: (B, L + 1, H), see `HiddenMeans`; empty where not asked for.
        losses, entropy, error, rank: (N,) each, see `TokenStatistics`; empty where not asked for.
        head_gradient: (B,), likewise.
    """

    counts: np.ndarray
    vocabulary: int
    hidden: np.ndarray
    losses: np.ndarray
    entropy: np.ndarray
    error: np.ndarray
    rank: np.ndarray
    head_gradient: np.ndarray

    @classmethod
    def of(cls, found: TokenStatistics, counts: np.ndarray, vocabulary: int, hidden: np.ndarray) -> Tokens:
        """What a forward has collected, for rows with so many learnt tokens."""
        each = (found.of(name).double().cpu().numpy() for name in ("losses", *OF_TOKENS))
        return cls(counts, vocabulary, hidden, *each)

    @property
    def certainty(self) -> np.ndarray:
        """(N,) `1 - H_t / ln V`: 1 for a distribution on one token, 0 for an even one."""
        return 1 - self.entropy / np.log(max(self.vocabulary, 2))

    def total(self, values: np.ndarray) -> np.ndarray:
        """(B,) the sum of each row's values; 0 without a learnt token."""
        rows = len(self.counts)
        return np.bincount(np.repeat(np.arange(rows), self.counts), values, minlength=rows).astype(np.float64)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """(B,) the mean of each row's values; 0 without a learnt token, as the loss."""
        return self.total(values) / np.maximum(self.counts, 1)

    def each(self, of_row: Callable[[np.ndarray], Any], values: np.ndarray) -> np.ndarray:
        """(B,) a function of each row's values; 0 without a learnt token."""
        rows = np.split(values, np.cumsum(self.counts)[:-1])
        return np.array([of_row(row) if len(row) else 0.0 for row in rows], dtype=np.float64)


@dataclass(frozen=True)
class Signal:
    """What a signal is, and how it is computed: by `of_tokens` or in a `form`, if it is not measured anyway.

    Attributes:
        formula: the formula, as text.
        source: where it comes from.
        unit: the unit of its values.
        drop: the end of its values to drop by default.
        needs: what it takes beside the losses: statistics of tokens, `HIDDEN` or `LAYERS`.
        of_tokens: a function from the learnt tokens to a number for each row, (B,).
        form: settings of `ResonanceConfig` other than the pass's own under which it is the resonance.
        of_layers: whether it is made from the layers' scores of all rows, after the pass; not by the recorder.
    """

    formula: str
    source: str
    unit: str = "nats"
    drop: Literal["largest", "smallest"] = "largest"
    needs: tuple[str, ...] = ()
    of_tokens: Callable[[Tokens], np.ndarray] | None = None
    form: Mapping[str, Any] | None = None
    of_layers: bool = False

    @property
    def metadata(self) -> dict[str, str]:
        """What a table of scores says of the column."""
        return {"direction": self.drop, "unit": self.unit, "formula": self.formula, "source": self.source}


def rank_surprisal_ratio(tokens: Tokens) -> np.ndarray:
    """RSR, (B,); infinite where no token surprises at all."""
    ranks, losses = tokens.total(np.minimum(tokens.rank, MOST_RANK)), tokens.total(tokens.losses)
    return np.divide(ranks, losses, out=np.full_like(ranks, np.inf), where=losses > 0)


def chain_of_embedding(hidden: np.ndarray) -> np.ndarray:
    """CoE-C, (B,), of mean hidden states, (B, L + 1, H); 0 for a row whose first and last have no distance or angle."""
    before, after, first, last = hidden[:, :-1], hidden[:, 1:], hidden[:, :1], hidden[:, -1:]
    lengths = _over(np.linalg.norm(after - before, axis=2), np.linalg.norm(last - first, axis=2))
    turns = _over(_angles(before, after), _angles(first, last))
    return np.abs((lengths * np.exp(1j * turns)).mean(1))


def _angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The angles between vectors along the last axis, accurate for small ones, too (Kahan)."""
    a, b = (_over(each, np.linalg.norm(each, axis=-1, keepdims=True)) for each in (a, b))
    return 2 * np.arctan2(np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1))


def _over(values: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Quotients; 0 where it is divided by 0."""
    return np.divide(values, whole, out=np.zeros_like(values), where=whole != 0)


def top_mean(losses: np.ndarray) -> float:
    """The mean of the largest tenth of a row's losses, rounded down but at least one."""
    return float(np.sort(losses)[-max(len(losses) // TOP, 1) :].mean())


SIGNALS: dict[str, Signal] = {
    "resonance": Signal("the score: mean over layers of |W_up - W_up'|", RESOFILTER, "change of a weight", form={}),
    "resonance_sgd": Signal(
        "mean over layers of mean lr |g|, g the row's gradient of W_up",
        f"{RESOFILTER}, with SGD",
        "change of a weight",
        form={"update": "sgd", "norm": "mean_abs"},
    ),
    "resonance_l2": Signal(
        "mean over layers of lr ||g||_2, g the row's gradient of W_up",
        f"{RESOFILTER}, with SGD and the L2 norm",
        "norm of the change",
        form={"update": "sgd", "norm": "l2"},
    ),
    "loss": Signal("mean_t -ln p_t", "negative log-likelihood"),
    "loss_sum": Signal("sum_t -ln p_t", "negative log-likelihood", of_tokens=lambda row: row.total(row.losses)),
    "loss_median": Signal(
        "median_t -ln p_t", "negative log-likelihood", of_tokens=lambda row: row.each(np.median, row.losses)
    ),
    "loss_max": Signal("max_t -ln p_t", "negative log-likelihood", of_tokens=lambda row: row.each(np.max, row.losses)),
    "loss_top": Signal(
        f"mean of the max(1, T // {TOP}) largest -ln p_t",
        "negative log-likelihood",
        of_tokens=lambda row: row.each(top_mean, row.losses),
    ),
    "entropy": Signal(
        "mean_t H_t",
        "predictive entropy",
        needs=(ENTROPY,),
        of_tokens=lambda row: row.mean(row.entropy),
    ),
    "conflict": Signal(
        "mean_t -ln p_t (1 - H_t / ln V)",
        "confident conflict, after EAFT, arXiv 2601.02151",
        needs=(ENTROPY,),
        of_tokens=lambda row: row.mean(row.losses * row.certainty),
    ),
    "surprise": Signal(
        "mean_t (-ln p_t - H_t)",
        "surprise beyond entropy",
        needs=(ENTROPY,),
        of_tokens=lambda row: row.mean(row.losses - row.entropy),
    ),
    "rank": Signal(
        "mean_t rank_t, rank_t = 1 + the number of more probable tokens",
        "token rank",
        unit="rank",
        needs=(RANK,),
        of_tokens=lambda row: row.mean(row.rank),
    ),
    "rsr": Signal(
        f"sum_t min(rank_t, {MOST_RANK}) / sum_t -ln p_t",
        "rank-surprisal ratio, UmeanNever/RankSurprisalRatio, ACL 2026",
        unit="ranks per nat",
        needs=(RANK,),
        of_tokens=rank_surprisal_ratio,
    ),
    "el2n": Signal(
        "mean_t ||p - y_t||_2, y_t one-hot",
        "EL2N, arXiv 2107.07075",
        unit="norm of an error in probability",
        drop="smallest",
        needs=(ERROR,),
        of_tokens=lambda row: row.mean(row.error),
    ),
    "grand_head": Signal(
        "||mean_t (p_t - y_t) h_t^T||_F, h_t the input of the head, y_t one-hot (the head's own part of a tied weight)",
        "GraNd of the head, arXiv 2107.07075",
        unit="norm of a gradient",
        drop="smallest",
        needs=(HEAD_GRADIENT,),
        of_tokens=lambda row: row.head_gradient,
    ),
    "embedding_chain": Signal(
        "|mean_l M_l / Z_M exp(i A_l / Z_A)|, M_l the distance and A_l the angle between the row's mean hidden states "
        "before and after layer l, Z_M and Z_A those between the first and the last",
        "chain of embedding, CoE-C, arXiv 2410.13640",
        unit="share of the way",
        drop="smallest",
        needs=(HIDDEN,),
        of_tokens=lambda row: chain_of_embedding(row.hidden),
    ),
    "layer_vote": Signal(
        "mean over layers of the rank of the layer's resonance among all rows / the number of rows",
        "layer votes, arXiv 2511.04715",
        unit="share of the rows",
        needs=(LAYERS,),
        of_layers=True,
    ),
}


# Numbers of the one forward that signals with further forwards are made of (`scoring.further_signals`); no columns.
PARTS: dict[str, Signal] = {
    "loss_first": Signal(
        "-ln p_1", "negative log-likelihood", of_tokens=lambda row: row.each(lambda own: own[0], row.losses)
    ),
}
MEASURED = SIGNALS | PARTS  # all that a recorder can measure


def chosen_signals(
    asked: str | Iterable[str] | None, known: Iterable[str] = SIGNALS, parts: Iterable[str] = ()
) -> tuple[str, ...]:
    """The names of signals in the order of `known`, each once.

    Args:
        asked: a name, several (as a list, or as text with commas), or `"all"`; None for none.
        known: the names to choose from.
        parts: further names, which `"all"` leaves out.

    Raises:
        InputError: a name is not known.
    """
    names = [] if asked is None else names_in(asked)
    for name in names:
        if name not in [*parts]:
            one_of("signals", name, (*known, ALL))
    every = known if ALL in names else ()
    return tuple(name for name in (*known, *parts) if name in names or name in every)


def names_in(asked: str | Iterable[str]) -> list[str]:
    """The names in a list, or in text with commas. Raises InputError for anything else."""
    check_kind("signals", asked, Iterable, f"names of signals, or {ALL!r}")
    return [each.strip() for each in asked.split(",")] if isinstance(asked, str) else list(asked)


def impossible_signals(asked: Iterable[str], reasons: Mapping[str, str]) -> dict[str, str]:
    """The signals that cannot be measured, by name, with the reason.

    Args:
        asked: the names of the signals.
        reasons: why what a signal needs is not there, by the need (see `Signal`).

    Raises:
        InputError: there is such a signal, unless all signals are asked for.
    """
    asked = list(asked)
    missing = {name: reasons[need] for name in asked for need in MEASURED[name].needs if need in reasons}
    if missing and not {*SIGNALS} <= {*asked}:
        name, reason = next(iter(missing.items()))
        raise InputError(f"The signal {name!r} cannot be measured: {reason}. Leave it out of signals.")
    return missing


@dataclass(frozen=True)
class Measures:
    """What a recorder measures for its signals.

    Attributes:
        names: the signals, in the order of `MEASURED`.
        config: the recorder's own settings.
    """

    names: tuple[str, ...]
    config: ResonanceConfig

    @cached_property
    def needs(self) -> frozenset[str]:
        """What the signals need (see `Signal`)."""
        return frozenset(need for name in self.names for need in MEASURED[name].needs)

    @cached_property  # read for every call of an up-projection
    def forms(self) -> tuple[ResonanceConfig, ...]:
        """The settings under which to measure the resonance, each once; the recorder's own come first."""
        return tuple(dict.fromkeys([self.config, *self._forms.values()]))

    def statistics(self, counts: Sequence[int]) -> TokenStatistics | None:
        """A new collection of the statistics of tokens that the signals need; None if they need none.

        Args:
            counts: the number of learnt tokens of each row.
        """
        of_tokens = any(MEASURED[name].of_tokens is not None for name in self.names)
        return TokenStatistics(self.needs, counts) if of_tokens else None

    def of_rows(self, loss: np.ndarray, resonances: np.ndarray, tokens: Tokens | None) -> dict[str, np.ndarray]:
        """Each signal of the B rows, (B,) float64.

        Args:
            loss: (B,) the mean loss.
            resonances: (F, B) the resonance in each of the `forms`.
            tokens: the learnt tokens, if the signals need them.
        """
        found = {name: resonances[self.forms.index(settings)] for name, settings in self._forms.items()}
        found["loss"] = loss
        if tokens is not None:
            found |= {name: of(tokens) for name in self.names if (of := MEASURED[name].of_tokens) is not None}
        return {name: found[name] for name in self.names}

    @cached_property
    def _forms(self) -> dict[str, ResonanceConfig]:
        wanted = {name: MEASURED[name].form for name in self.names}
        return {name: replace(self.config, **form) for name, form in wanted.items() if form is not None}
