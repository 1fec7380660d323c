"""What a training of a comparison is given: the rows or tokens that a selector chooses from its scores.

Knows scores and policies. Does not know how scores are made, nor how a model is trained.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import cast

import numpy as np
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer
from trl import SFTConfig

from ..config import TokenCleaning
from ..scores.score_table import ScoreTable
from ..scores.token_scores import TokenScores
from ..selecting.data_selector import DataSelector
from ..selecting.policies import Policy
from ..selecting.token_rules import TokenInputs, TokenRule
from ..selecting.token_selection import TokenSelection, TokenSelector, sums_of_rows
from ..tokens.cleaned_dataset import mask_labels
from ..tokens.losses import score_tokens
from ..training.callback import ResonanceCallback
from .config import SelectorConfig
from .data import TEXTS
from .marked import marked_tokens
from .method_scores import as_tokens
from .methods import METHODS
from .token_rules import MARKED
from .training import epochs_of, model_path, steps_per_epoch

ANNEALING = 8  # InfoBatch: with at least this many epochs, the last eighth of them trains on all rows


@dataclass(frozen=True)
class Chosen:
    """What a training is given.

    Attributes:
        rows: the rows to train on, as text or as tokens.
        size: the size of the whole dataset, in rows or in learnt tokens.
        kept: how many of these are kept.
        of_rows: (N,) how much of each row of the dataset is kept, in rows or in learnt tokens; None if unknown.
        values: (N,) a value for each row: rows with larger values are dropped first, NaN where a row has no score;
            None if the selector has no scores of rows.
        callback: the callback that selects during the training; `rows` are then all rows.
    """

    rows: Dataset
    size: int
    kept: int
    of_rows: np.ndarray | None
    values: np.ndarray | None = None
    callback: ResonanceCallback | None = None

    def decided(self, epochs: float) -> Chosen:
        """The same after a training of that many epochs, with the mean over epochs of what the callback has kept."""
        if self.callback is None:
            return self
        stages = self.callback.token_stages
        if stages:
            tokens, kept = (sum(stage[name] for stage in stages) for name in ("tokens", "tokens_kept"))
            return dataclasses.replace(self, kept=round(self.size * kept / tokens), of_rows=None)
        assert self.of_rows is not None
        of_rows, selections = np.zeros(len(self.of_rows)), self.callback.selections
        length = np.clip(epochs - np.arange(len(selections)), 1e-9, 1)  # the last epoch may be incomplete
        of_rows[self.of_rows] = np.average([each.keep for each in selections], axis=0, weights=length)
        return dataclasses.replace(self, kept=round(of_rows.sum()), of_rows=of_rows)


def choose(
    selector: SelectorConfig,
    keep: float,
    scores: ScoreTable | TokenScores,
    rows: Dataset,
    args: SFTConfig,
    model: str,
) -> Chosen:
    """What a selector gives to a training.

    Args:
        selector: the selector.
        keep: the share of the rows or of the learnt tokens to keep.
        scores: the selector's scores.
        rows: the dataset.
        args: the training arguments, whose seed the policy draws with.
        model: the name of the trained model, whose tokenizer makes the tokens.
    """
    method = METHODS[selector.method]
    policy = method.policy(keep, args.seed, selector)
    if isinstance(policy, TokenRule):
        return _choose_by_rule(scores, policy, selector, rows, args, model)
    if isinstance(policy, TokenSelector):
        return _choose_tokens(cast(TokenScores, scores), policy, rows, args, model)
    table = cast(ScoreTable, scores)
    if isinstance(policy, TokenCleaning):
        return _clean_in_run(table, policy, rows, args)
    if method.in_run:
        return _select_in_run(table, policy, rows, args)
    return _choose_rows(table, policy, rows)


def _choose_rows(scores: ScoreTable, policy: Policy, rows: Dataset) -> Chosen:
    values = row_values(scores, policy) if isinstance(policy, DataSelector) and policy.keep != 1 else None
    selection = policy.select(scores)
    kept = rows.select_columns(TEXTS).select(selection.sample_ids)
    return Chosen(kept, len(scores), len(selection.sample_ids), selection.keep, values)


def _choose_tokens(scores: TokenScores, policy: TokenSelector, rows: Dataset, args: SFTConfig, model: str) -> Chosen:
    tokenizer = AutoTokenizer.from_pretrained(model_path(model), trust_remote_code=args.trust_remote_code)
    policy.check(scores.num_tokens)
    selection, tokens = policy.select(scores), as_tokens(rows, tokenizer, args)
    of_rows, values = np.zeros(len(rows)), np.full(len(rows), np.nan)
    of_rows[scores.sample_id] = selection.kept_of_row
    values[scores.sample_id] = token_row_values(scores)
    size, kept = len(selection.keep), int(selection.keep.sum())
    return Chosen(mask_labels(tokens.dataset, selection), size, kept, of_rows, values)


def _choose_by_rule(
    scores: ScoreTable | TokenScores, rule: TokenRule, selector: SelectorConfig, rows: Dataset, args: SFTConfig,
    model: str,
) -> Chosen:  # fmt: skip
    """The rows as tokens, masked or with weights; with a `ScoreTable`, of a rule for which nothing was measured."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(model), trust_remote_code=args.trust_remote_code)
    tokens = as_tokens(rows, tokenizer, args)
    rule.check(tokens.num_tokens)
    measured = {}
    if selector.column is not None:
        measured[MARKED] = marked_tokens(rows, tokens, tokenizer, selector.column)
    if isinstance(scores, ScoreTable):
        nothing = np.zeros(int(tokens.num_tokens.sum()), dtype=np.float32)
        scores = score_tokens(tokens, nothing, None, scores.provenance)
        inputs = TokenInputs(scores.offsets, nothing, measured=measured)
    else:
        config = AutoConfig.from_pretrained(model_path(model), trust_remote_code=args.trust_remote_code)
        inputs = TokenInputs.of(scores, int(config.get_text_config().vocab_size))
    selection, of_rows = TokenSelection.of_weights(scores, rule.weights(inputs)), np.zeros(len(rows))
    of_rows[scores.sample_id] = sums_of_rows(selection.weights, scores.offsets)
    return Chosen(mask_labels(tokens.dataset, selection), len(selection), int(selection.keep.sum()), of_rows)


def _clean_in_run(scores: ScoreTable, policy: TokenCleaning, rows: Dataset, args: SFTConfig) -> Chosen:
    """Self-evolving cleaning; with fewer stages where an epoch has fewer steps."""
    stages = max(2, min(policy.parts, steps_per_epoch(args, len(rows))))
    callback = ResonanceCallback(token_cleaning=dataclasses.replace(policy, parts=stages))
    tokens = int(np.nansum(scores.column("num_tokens")))
    return Chosen(_scored_rows(scores, rows), tokens, tokens, scores.scored, callback=callback)


def _select_in_run(scores: ScoreTable, policy: Policy, rows: Dataset, args: SFTConfig) -> Chosen:
    """A selection before every epoch; the last epochs of a long training get all rows (InfoBatch's annealing)."""
    epochs = math.ceil(epochs_of(args, len(rows)))
    end = epochs - epochs // ANNEALING if epochs >= ANNEALING else None
    callback = ResonanceCallback(selector=policy, readmit=True, end_epoch=end)
    usable = int(scores.scored.sum())
    return Chosen(_scored_rows(scores, rows), len(scores), usable, scores.scored, callback=callback)


def _scored_rows(scores: ScoreTable, rows: Dataset) -> Dataset:
    return rows.select_columns(TEXTS).select(np.flatnonzero(scores.scored))


def row_values(scores: ScoreTable, policy: DataSelector) -> np.ndarray:
    """(N,) a value for each row: rows with larger values are dropped first; NaN where a row has no score."""
    return policy.values(scores) * (-1 if policy.end(scores) == "smallest" else 1)


def token_row_values(scores: TokenScores) -> np.ndarray:
    """(R,) a value for each row that has tokens, minus the mean of its token scores: larger is dropped first."""
    row = np.repeat(np.arange(len(scores.sample_id)), scores.num_tokens)
    sums = np.bincount(row, scores.reference_losses.astype(np.float64) - scores.base, minlength=len(scores.sample_id))
    return sums / np.maximum(scores.num_tokens, 1)
