"""The selectors of a comparison: how each one scores rows, and which policy then decides. A new one gets a line here.

    full, random, longest, shortest                       no model
    low_loss, high_loss, perplexity, entropy, el2n, ...   one criterion, one end
    resonance, resonance_sgd, resonance_l2                how far a step moves W_up (ResoFilter)
    resonance_and_loss, resonance_residual                the same, with loss or beyond loss and length
    token_fixed, token_rho, token_self_evolving           Token Cleaning: `keep` is the share of the learnt tokens
    infobatch                                             inside the run, anew after every epoch; `keep` is the share of
                                                          the rows below the mean; of eight epochs and more the last
                                                          eighth takes all

Knows policies, not how anything is measured, trained or evaluated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from ..config import InputError, Ranking, TokenCleaning
from ..scores.score_table import ScoreTable
from ..scores.token_scores import TokenScores
from ..scoring.less import LessConfig, projection_flops
from ..selecting.data_selector import DataSelector
from ..selecting.policies import Policy, RandomSelector, SoftPruning
from ..selecting.token_selection import TokenSelector
from .config import DEMO, ComparisonConfig, SelectorConfig
from .method_scores import (
    REFERENCE_SHARE,
    Request,
    by_column,
    by_criterion,
    by_less,
    by_nuggets,
    by_resonance,
    by_selectit,
    by_token_losses,
)
from .published import Needs

TOKEN_LOSSES = "token_losses"
RESONANCE_FORWARDS = 1.2  # a forward and what of its backward reaches the last layers, counted (benchmarks/RESULTS.md)


@dataclass(frozen=True)
class Method:
    """A way to select.

    Attributes:
        score: measures every row, or every token.
        policy: from the share that stays, a seed and the selector's settings, who decides: on rows, on tokens, or with
            `TokenCleaning` on tokens inside the run.
        scores: the name under which scores are kept, which methods may share.
        forwards: what measuring a row costs, in forwards of the scoring model; where that depends on it, a function of
            what is compared, of the selector's own settings and of the epochs that are trained.
        needs: before it runs, as the survey counts.
        model: which model scores: the one that is trained (or `score_model`), a small one, or only the one that is
            trained.
        in_run: whether the policy decides inside the training.
        validated: whether it selects for validation rows.
        trains: whether scores depend on the seed, as something is trained for them.
        flops: what measuring costs beside forwards; a function of the scoring model, of the number of rows and of the
            selector.
    """

    score: Callable[[Request], ScoreTable | TokenScores]
    policy: Callable[[float, int, SelectorConfig], Policy | TokenSelector | TokenCleaning]
    scores: str
    forwards: float | Callable[[ComparisonConfig, SelectorConfig, float], float]
    needs: Needs
    model: Literal["own", "proxy", "trained"] = "own"
    in_run: bool = False
    validated: bool = False
    trains: bool = False
    flops: Callable[[PreTrainedModel, int, SelectorConfig], float] = lambda model, rows, own: 0.0

    def cost(self, config: ComparisonConfig, selector: SelectorConfig, epochs: float) -> float:
        """In forwards of the scoring model, for each row."""
        return self.forwards(config, selector, epochs) if callable(self.forwards) else self.forwards


def less_cost(config: LessConfig) -> float:
    """A forward and a backward of every row after every epoch, and the warm-up, in forwards for each row.

    What is projected comes on top (`projection_flops`).
    """
    return 3 * config.epochs * (1 + config.share)


def token_cost(config: ComparisonConfig, epochs: float) -> float:
    """A forward of every row by two models, and the training of the reference, in forwards for each row."""
    return 2 + (0 if config.reference_model else 3 * REFERENCE_SHARE * epochs)


def _selector(**settings: Any) -> Callable[[float, int, SelectorConfig], Policy]:
    return lambda keep, seed, own: DataSelector(keep=keep, **settings)


def _criterion(name: str, forwards: float, needs: Needs, **settings: Any) -> Method:
    model = settings.pop("model", "own")
    return Method(by_criterion(name), _selector(**settings), name, forwards, needs, model)


def _tokens(ranking: Ranking) -> Method:
    return Method(
        by_token_losses,
        lambda keep, seed, own: TokenSelector(keep, ranking),
        TOKEN_LOSSES,
        lambda config, own, epochs: token_cost(config, epochs),
        Needs(1, 4, model_free=False),
        model="trained",
        trains=True,
    )


SCORED = Needs(0, 2)  # score, select
NOTHING = Needs(0, 1)
METHODS = {
    "full": Method(by_criterion("length"), lambda keep, seed, own: DataSelector(keep=1.0), "length", 0, NOTHING),
    "random": Method(by_criterion("length"), lambda keep, seed, own: RandomSelector(keep, seed), "length", 0, NOTHING),
    "longest": _criterion("length", 0, SCORED),
    "shortest": _criterion("length", 0, SCORED, drop="largest"),
    "response_ratio": _criterion("response_ratio", 0, SCORED),
    "repetition": _criterion("repetition", 0, SCORED),
    "rarity": _criterion("rarity", 0, SCORED),
    "low_loss": _criterion("loss", 1, SCORED),
    "high_loss": _criterion("loss", 1, SCORED, drop="smallest"),
    "perplexity": _criterion("perplexity", 1, SCORED),
    "entropy": _criterion("entropy", 1, SCORED),
    "ifd": _criterion("ifd", 2, SCORED),
    "superfiltering": _criterion("ifd", 2, Needs(0, 2, model_free=False), model="proxy"),
    "el2n": _criterion("el2n", 1, SCORED),
    "grand": _criterion("grand", 3, SCORED),
    "donod": _criterion("donod", 1, Needs(0, 3)),
    "k_center": _criterion("k_center", 1, SCORED),
    "selectit": Method(by_selectit, _selector(), "selectit", 3, SCORED),
    "nuggets": Method(
        by_nuggets,
        _selector(),
        "nuggets",
        lambda config, own, epochs: (
            2 * config.validation_rows
        ),  # each task after each row, together as long as two rows
        Needs(0, 4, data_free=False),
        validated=True,
    ),
    "less": Method(
        by_less,
        _selector(),
        "less",
        lambda config, own, epochs: less_cost(LessConfig(**own.settings)),
        Needs(1, 4, model_free=False, data_free=False),
        validated=True,
        trains=True,
        flops=lambda model, rows, own: projection_flops(model, rows, LessConfig(**own.settings)),
    ),
    "resonance": Method(by_resonance(), _selector(), "resonance", RESONANCE_FORWARDS, SCORED),
    "resonance_sgd": Method(by_resonance("sgd"), _selector(), "resonance_sgd", RESONANCE_FORWARDS, SCORED),
    "resonance_l2": Method(by_resonance(norm="l2"), _selector(), "resonance_l2", RESONANCE_FORWARDS, SCORED),
    "resonance_and_loss": Method(
        by_resonance(), _selector(by=("score", "loss"), combine="ranks"), "resonance", RESONANCE_FORWARDS, Needs(0, 3)
    ),
    "resonance_residual": Method(
        by_resonance(),
        _selector(by=("score", "loss", "num_tokens"), combine="residual"),
        "resonance",
        RESONANCE_FORWARDS,
        Needs(0, 3),
    ),
    "infobatch": Method(
        by_criterion("length"),
        lambda keep, seed, own: SoftPruning(keep, seed=seed),
        "length",
        0,
        SCORED,
        model="trained",
        in_run=True,
    ),
    "token_fixed": _tokens("global"),
    "token_rho": _tokens("sample"),
    "token_self_evolving": Method(
        by_criterion("length"),
        lambda keep, seed, own: TokenCleaning(keep),
        "length",
        lambda config, own, epochs: 1 + epochs,  # by the base once, and by the latest weights in every epoch
        SCORED,
        model="trained",
        in_run=True,
    ),
    "column": Method(by_column, lambda keep, seed, own: DataSelector(keep=keep, drop=own.drop), "column", 0, SCORED),  # type: ignore[arg-type]
}


def check(config: ComparisonConfig) -> None:
    """Raise InputError for a selector that is not known, or lacks what it needs."""
    for each in config.selectors:
        if each.score_column is not None and config.dataset == DEMO:
            raise InputError(f"The demo's problems have no column '{each.score_column}': name a dataset of your own.")
        if each.method not in METHODS:
            raise InputError(f"There is no selector '{each.method}'. There are: {', '.join(METHODS)}.")
        method = METHODS[each.method]
        if method.validated and config.dataset != DEMO and config.validation_dataset is None:
            raise InputError(f"The selector '{each.name}' selects for a validation set: name validation_dataset.")
        unknown = sorted(set(each.settings) - {one.name for one in dataclasses.fields(LessConfig)})
        if each.settings and (each.method != "less" or unknown):
            raise InputError(f"The selector '{each.name}' has no setting '{[*unknown, *each.settings][0]}'.")
        LessConfig(**each.settings)  # which says what is wrong with them
        unmeasured = method.cost(config, each, epochs=1) == 0
        if each.score_model is not None and (method.model != "own" or unmeasured):
            raise InputError(f"For '{each.method}' no score_model can score: leave it out.")
        if method.model == "proxy" and config.proxy_model is None:
            raise InputError(f"The selector '{each.name}' scores with a small model: name one as proxy_model.")
