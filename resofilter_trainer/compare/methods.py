"""The methods of a comparison: how each one scores rows, and which policy then decides.

    full, random, longest, shortest                       no model
    response_ratio, repetition, rarity                    texts and tokens only
    low_loss, high_loss, perplexity, entropy, el2n, ...   one criterion, one end
    signal                                                any column of the scoring pass, by `settings: {by: loss_sum}`
                                                          (see `signals`); all signals of one forward share a pass
    dynamics                                              how rows are learnt in one training on all rows, which all
                                                          such selectors share, by `{dynamics: loss_slope}`
    selectit, nuggets, less, column                       a rating by the model, validation rows, the user's own scores
    resonance, resonance_sgd, resonance_l2                how far a step moves W_up (ResoFilter)
    resonance_and_loss, resonance_residual                the same together with the loss, or beyond loss and length
    token_fixed, token_rho, token_self_evolving           Token Cleaning: `keep` is the share of the learnt tokens
    token_rule                                            any rule for which tokens are learnt, by `{token_rule: eaft}`
    infobatch                                             selects inside the run, again after every epoch; `keep` is the
                                                          share of the rows below the mean; of eight epochs or more, the
                                                          last eighth trains on all rows

To add a method, write how it scores (`method_scores`) and add a line to `METHODS`. Knows policies; does not know how
anything is measured, trained or tested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from ..config import InputError, Norm, Ranking, TokenCleaning, UpdateName
from ..scores.score_table import LENGTH, ScoreTable
from ..scores.token_scores import TokenScores
from ..scoring.less import LessConfig, projection_flops
from ..selecting.data_selector import DataSelector
from ..selecting.policies import Policy, RandomSelector, SoftPruning
from ..selecting.token_rules import PROMPT_ATTENTION, TokenRule
from ..selecting.token_selection import TokenSelector
from .config import DEMO, ComparisonConfig, SelectorConfig
from .dynamics import DynamicsSettings
from .method_scores import (
    REFERENCE_SHARE,
    Request,
    by_column,
    by_criterion,
    by_less,
    by_nuggets,
    by_resonance,
    by_selectit,
    by_signal,
    by_token_losses,
    by_token_progress,
    by_token_statistics,
)
from .published import Needs
from .recorded import by_dynamics
from .signals import SignalSettings
from .token_rules import TokenRuleSettings

RESONANCE_FORWARDS = 1.2  # a forward, and the backward through the last layers, counted (benchmarks/RESULTS.md)
MakePolicy = Callable[[float, int, SelectorConfig], "Policy | TokenSelector | TokenCleaning | TokenRule"]
Forwards = Callable[[ComparisonConfig, SelectorConfig, float], float]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to score and to decide.

    Attributes:
        score: a function that measures every row, or every learnt token.
        policy: a function that makes the policy from the share to keep, a seed and the selector. A policy decides on
            rows, on tokens (`TokenSelector`, `TokenRule`) or, as `TokenCleaning`, on tokens inside the run.
        scores: the name of the folder of the scores. Methods with the same name share their scores.
        forwards: the cost of measuring one row, in forwards of the scoring model: a number, or a function of the
            comparison, the selector and the epochs of the training.
        needs: what the method needs before it runs, as the survey counts it.
        model: the model that scores: the trained model or the selector's `score_model` (`"own"`), always the trained
            model (`"trained"`), or the small model of the comparison (`"proxy"`).
        in_run: whether the policy decides inside the training.
        validated: whether the method selects for validation rows.
        by_reference: whether the method scores with a reference model as well.
        tunes: whether the reference model is always the trained model, tuned on the first rows, whatever the
            comparison's `reference_model`.
        whole: whether the share to keep changes nothing, so that one training is enough.
        trains: whether scoring trains something, so that the scores depend on the seed.
        settings: the dataclass of the settings that a selector can have; None if there are none.
        variant: a function from a selector to the fields of the method that its settings change (see
            `method_of`), the folder of the scores among them; None if they change none.
        flops: the FLOPs of measuring besides forwards, by the scoring model, the number of rows and the selector.
        epochs: the least length of the training that scores are made from, in epochs.
    """

    score: Callable[[Request], ScoreTable | TokenScores]
    policy: MakePolicy
    scores: str
    forwards: float | Forwards
    needs: Needs
    model: Literal["own", "proxy", "trained"] = "own"
    in_run: bool = False
    validated: bool = False
    by_reference: bool = False
    tunes: bool = False
    whole: bool = False
    trains: bool = False
    settings: type[Any] | None = None
    variant: Callable[[SelectorConfig], dict[str, Any]] | None = None
    flops: Callable[[PreTrainedModel, int, SelectorConfig], float] = lambda model, rows, selector: 0.0
    epochs: int = 0

    def cost(self, config: ComparisonConfig, selector: SelectorConfig, epochs: float) -> float:
        """The cost of measuring one row, in forwards of the scoring model."""
        return self.forwards(config, selector, epochs) if callable(self.forwards) else self.forwards


def less_cost(config: LessConfig) -> float:
    """A forward and a backward of every row after every epoch, and the warm-up, in forwards per row.

    The cost of the projection is counted apart (`projection_flops`).
    """
    return 3 * config.epochs * (1 + config.share)


def token_cost(config: ComparisonConfig, epochs: float) -> float:
    """A forward of every row by two models, and the tuning of the reference model, in forwards per row."""
    return 2 if config.reference_model else tuned_cost(config, epochs)


def tuned_cost(config: ComparisonConfig, epochs: float) -> float:
    """The same, where the reference model is always tuned."""
    return 2 + trained_cost(config) * REFERENCE_SHARE * epochs


def trained_cost(config: ComparisonConfig) -> float:
    """A training on a row, in forwards: a forward and a backward, which without a gradient of weights costs half."""
    return 3 if config.lora is None else 2


def _less_settings(selector: SelectorConfig) -> LessConfig:
    return LessConfig(**selector.settings)


def _signal_settings(selector: SelectorConfig) -> SignalSettings:
    return SignalSettings(**selector.settings)


def _of_signal(selector: SelectorConfig) -> dict[str, Any]:
    """What the method `signal` takes for a selector's signal and warm-up.

    A forward of the reference model counts as one of the scoring model. The training of a warm-up is counted from its
    tokens (`selector_scores`).
    """
    own = _signal_settings(selector)
    warms_up = own.tuning is not None
    return {
        "scores": own.folder,
        "forwards": 0 if own.by == LENGTH else RESONANCE_FORWARDS + own.further_forwards,
        "by_reference": own.by_reference,
        "needs": Needs(int(warms_up), 3 if warms_up else 2, model_free=not (warms_up or own.by_reference)),
    }


def _rule_settings(selector: SelectorConfig) -> TokenRuleSettings:
    return TokenRuleSettings(**selector.settings)


def _of_rule(selector: SelectorConfig) -> dict[str, Any]:
    """What the method `token_rule` takes for a selector's rule.

    ssToken compares the model after a first training with the model before it. That training is the one of the
    reference model of token cleaning, on the same rows.
    """
    own = _rule_settings(selector)
    found: dict[str, Any] = {"whole": not own.has_share}
    if own.of_reference or own.of_progress:
        found |= {"forwards": METHODS["token_fixed"].forwards, "needs": METHODS["token_fixed"].needs}
        found |= {"score": by_token_losses, "scores": "token_losses", "by_reference": True, "trains": True}
    if own.of_progress:
        name = "token_progress_attention" if PROMPT_ATTENTION in own.needs else "token_progress"
        found |= {"score": by_token_progress, "scores": name, "tunes": True}
        found["forwards"] = lambda config, selector, epochs: tuned_cost(config, epochs)
    if not own.measures:
        found |= {"score": by_criterion("length"), "scores": "length", "forwards": 0, "needs": SELECT}
    return found


def _dynamics_settings(selector: SelectorConfig) -> DynamicsSettings:
    return DynamicsSettings(**selector.settings)


def _ranked(**settings: Any) -> MakePolicy:
    return lambda keep, seed, selector: DataSelector(keep=keep, **settings)


def _unscored(policy: MakePolicy, needs: Needs, **settings: Any) -> Method:
    """A method whose policy uses no scores; the lengths say which rows can be trained on."""
    return Method(score=by_criterion("length"), policy=policy, scores="length", forwards=0, needs=needs, **settings)


def _criterion(
    name: str, forwards: float, needs: Needs, model: Literal["own", "proxy"] = "own", **selector: Any
) -> Method:
    """A method by one criterion; `selector` are settings of DataSelector."""
    policy = _ranked(**selector)
    return Method(score=by_criterion(name), policy=policy, scores=name, forwards=forwards, needs=needs, model=model)


def _resonance(
    scores: str, needs: Needs, update: UpdateName = "adamw", norm: Norm = "mean_abs", **selector: Any
) -> Method:
    """A method by resonance; `selector` are settings of DataSelector."""
    score, policy = by_resonance(update, norm), _ranked(**selector)
    return Method(score=score, policy=policy, scores=scores, forwards=RESONANCE_FORWARDS, needs=needs)


def _tokens(ranking: Ranking) -> Method:
    """A method by token scores, of fixed-model cleaning."""
    return Method(
        score=by_token_losses,
        policy=lambda keep, seed, selector: TokenSelector(keep, ranking),
        scores="token_losses",
        forwards=lambda config, selector, epochs: token_cost(config, epochs),
        needs=Needs(1, 4, model_free=False),
        model="trained",
        by_reference=True,
        trains=True,
    )


SELECT = Needs(0, 1)  # one step
SCORE_AND_SELECT = Needs(0, 2)
METHODS = {
    "full": _unscored(lambda keep, seed, selector: DataSelector(keep=1.0), SELECT, whole=True),
    "random": _unscored(lambda keep, seed, selector: RandomSelector(keep, seed), SELECT),
    "longest": _criterion("length", 0, SCORE_AND_SELECT),
    "shortest": _criterion("length", 0, SCORE_AND_SELECT, drop="largest"),
    "response_ratio": _criterion("response_ratio", 0, SCORE_AND_SELECT),
    "repetition": _criterion("repetition", 0, SCORE_AND_SELECT),
    "rarity": _criterion("rarity", 0, SCORE_AND_SELECT),
    "low_loss": _criterion("loss", 1, SCORE_AND_SELECT),
    "high_loss": _criterion("loss", 1, SCORE_AND_SELECT, drop="smallest"),
    "perplexity": _criterion("perplexity", 1, SCORE_AND_SELECT),
    "entropy": _criterion("entropy", 1, SCORE_AND_SELECT),
    "ifd": _criterion("ifd", 2, SCORE_AND_SELECT),
    "superfiltering": _criterion("ifd", 2, Needs(0, 2, model_free=False), model="proxy"),
    "el2n": _criterion("el2n", 1, SCORE_AND_SELECT),
    "grand": _criterion("grand", 3, SCORE_AND_SELECT),
    "donod": _criterion("donod", 1, Needs(0, 3)),
    "k_center": _criterion("k_center", 1, SCORE_AND_SELECT),
    "selectit": Method(score=by_selectit, policy=_ranked(), scores="selectit", forwards=3, needs=SCORE_AND_SELECT),
    "nuggets": Method(
        score=by_nuggets,
        policy=_ranked(),
        scores="nuggets",
        # each task after each row, together as long as two rows
        forwards=lambda config, selector, epochs: 2 * config.validation_rows,
        needs=Needs(0, 4, data_free=False),
        validated=True,
    ),
    "less": Method(
        score=by_less,
        policy=_ranked(),
        scores="less",
        forwards=lambda config, selector, epochs: less_cost(_less_settings(selector)),
        needs=Needs(1, 4, model_free=False, data_free=False),
        validated=True,
        trains=True,
        settings=LessConfig,
        flops=lambda model, rows, selector: projection_flops(model, rows, _less_settings(selector)),
    ),
    "resonance": _resonance("resonance", SCORE_AND_SELECT),
    "resonance_sgd": _resonance("resonance_sgd", SCORE_AND_SELECT, update="sgd"),
    "resonance_l2": _resonance("resonance_l2", SCORE_AND_SELECT, norm="l2"),
    "resonance_and_loss": _resonance("resonance", Needs(0, 3), by=("score", "loss"), combine="ranks"),
    "resonance_residual": _resonance("resonance", Needs(0, 3), by=("score", "loss", "num_tokens"), combine="residual"),
    "signal": Method(
        score=by_signal,
        policy=lambda keep, seed, selector: _signal_settings(selector).policy(keep),
        scores="signals",
        forwards=RESONANCE_FORWARDS,
        needs=SCORE_AND_SELECT,
        settings=SignalSettings,
        variant=_of_signal,
    ),
    "dynamics": Method(
        score=by_dynamics,
        policy=lambda keep, seed, selector: _dynamics_settings(selector).policy(keep),
        scores="dynamics",
        forwards=lambda config, selector, epochs: trained_cost(config) * epochs,
        needs=Needs(1, 3, model_free=False),
        trains=True,
        settings=DynamicsSettings,
        variant=lambda selector: {"epochs": _dynamics_settings(selector).epochs},
    ),
    "infobatch": _unscored(
        lambda keep, seed, selector: SoftPruning(keep, seed=seed), SCORE_AND_SELECT, model="trained", in_run=True
    ),
    "token_fixed": _tokens("global"),
    "token_rho": _tokens("sample"),
    "token_self_evolving": Method(
        score=by_criterion("length"),
        policy=lambda keep, seed, selector: TokenCleaning(keep),
        scores="length",
        # by the base model once, and by the latest weights in every epoch
        forwards=lambda config, selector, epochs: 1 + epochs,
        needs=SCORE_AND_SELECT,
        model="trained",
        in_run=True,
    ),
    "token_rule": Method(
        score=by_token_statistics,
        policy=lambda keep, seed, selector: _rule_settings(selector).of_share(keep, seed),
        scores="token_statistics",
        forwards=1,
        needs=SCORE_AND_SELECT,
        model="trained",
        settings=TokenRuleSettings,
        variant=_of_rule,
    ),
    "column": Method(
        score=by_column,
        policy=lambda keep, seed, selector: DataSelector(keep=keep, drop=selector.drop),  # type: ignore[arg-type]
        scores="column",
        forwards=0,
        needs=SCORE_AND_SELECT,
    ),
}


def method_of(selector: SelectorConfig) -> Method:
    """The method of a selector whose settings are checked, as these settings make it."""
    method = METHODS[selector.method]
    return method if method.variant is None else dataclasses.replace(method, **method.variant(selector))


def check(config: ComparisonConfig) -> None:
    """Raise InputError for a selector whose method is unknown, or that lacks something its method needs."""
    for selector in config.selectors:
        if selector.method not in METHODS:
            raise InputError(f"There is no method '{selector.method}'. There are: {', '.join(METHODS)}.")
        _check_settings(selector, METHODS[selector.method])
        _check_selector(config, selector, method_of(selector))


def _check_selector(config: ComparisonConfig, selector: SelectorConfig, method: Method) -> None:
    if selector.column is not None and config.dataset == DEMO:
        raise InputError(f"The demo's problems have no column '{selector.column}': name a dataset of your own.")
    if method.validated and config.dataset != DEMO and config.validation_dataset is None:
        raise InputError(f"The selector '{selector.name}' selects for a validation set: name a validation_dataset.")
    unmeasured = method.cost(config, selector, epochs=1) == 0
    if selector.score_model is not None and (method.model != "own" or unmeasured):
        raise InputError(f"The method '{selector.method}' cannot use a score_model: leave it out.")
    if method.model == "proxy" and config.proxy_model is None:
        raise InputError(f"The selector '{selector.name}' scores with a small model: name one as proxy_model.")
    if method.by_reference and not method.trains and config.reference_model is None:
        raise InputError(f"The selector '{selector.name}' compares with a second model: name one as reference_model.")


def _check_settings(selector: SelectorConfig, method: Method) -> None:
    known = [] if method.settings is None else [each.name for each in dataclasses.fields(method.settings)]
    unknown = sorted(set(selector.settings) - set(known))
    if unknown:
        there = f" Its settings are: {', '.join(known)}." if known else ""
        raise InputError(f"The selector '{selector.name}' has no setting '{unknown[0]}'.{there}")
    if method.settings is None:
        return
    try:
        method.settings(**selector.settings)
    except InputError as error:
        raise InputError(f"In the selector '{selector.name}': {error}") from error
