"""The verdict on a dataset: how many rows are kept, why the others are dropped, and what makes it doubtful.

Knows scores and selections; knows no page, no chart and no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..scores.doubts import doubts_of, layers_of
from ..scores.score_table import ScoreTable, count_reasons
from ..selecting.selection import KEPT
from .columns import column_or_nan
from .contents import Contents

LISTED_REASONS = 50
ALMOST_LENGTH, ALMOST_LOSS = 0.9, 0.95  # rank correlations from which the score adds little to length or loss
MANY_COPIES, MANY = 0.01, 0.05  # shares of the rows


@dataclass(frozen=True)
class Verdict:
    """The counts of kept and dropped rows.

    Attributes:
        rows, scored, kept, dropped: numbers of rows of the dataset.
        tokens, tokens_kept: numbers of learnt tokens.
        reasons: each reason for dropping with its number of rows, the most frequent first.
        score: the name of what was measured.
        previewed: whether no selection was made, and that of `DataSelector()` is shown.
        epoch: the last epoch of a training run, counted from 1, which trained on the kept rows; None without a run.
    """

    rows: int
    scored: int
    kept: int
    dropped: int
    tokens: int
    tokens_kept: int
    reasons: list[tuple[str, int]]
    score: str
    previewed: bool
    epoch: int | None


def verdict_of(contents: Contents, scores: ScoreTable) -> Verdict:
    """Count the kept and dropped rows."""
    selection = contents.decided()
    tokens = np.nan_to_num(column_or_nan(scores, "num_tokens"))
    kept, cleaned = int(selection.keep.sum()), contents.cleaned if contents.selects_tokens else None
    return Verdict(
        rows=len(scores),
        scored=int(scores.scored.sum()),
        kept=kept,
        dropped=len(scores) - kept,
        tokens=int(tokens.sum()),
        tokens_kept=int((tokens[selection.keep] if cleaned is None else cleaned.keep).sum()),
        reasons=count_reasons((why for why in selection.reason if why != KEPT), LISTED_REASONS),
        score=score_name(contents, scores),
        previewed=contents.selection is None,
        epoch=contents.epochs[-1].number if contents.epochs and contents.selection is not None else None,
    )


def score_name(contents: Contents, scores: ScoreTable) -> str:
    """The name of what was measured."""
    config = scores.provenance.config
    if contents.selects_tokens:
        return "mean loss under the base model"
    if "criterion" in config:
        return str(config["criterion"])
    measured = layers_of(scores) or config.get("n_layers")
    return f"resonance ({config.get('update')}, last {'layer' if measured == 1 else f'{measured} layers'})"


def warnings_of(
    contents: Contents, scores: ScoreTable, length: float | None, loss: float | None, copies: int
) -> list[str]:
    """What makes the verdict doubtful, one sentence each.

    Args:
        contents: what was measured and selected.
        scores: the scores of N rows.
        length, loss: rank correlations of the score with learnt tokens and with loss.
        copies: the number of rows that repeat the text of an earlier row.
    """
    if not scores.scored.any():
        return ["No row has a score: there is nothing to rank."]
    is_loss = contents.selects_tokens or scores.provenance.config.get("criterion") in ("loss", "perplexity")
    return [*_about_scores(scores, length, None if is_loss else loss), *_about_rows(scores, copies)]


def _about_scores(scores: ScoreTable, length: float | None, loss: float | None) -> list[str]:
    found, values = [], scores.column("score")[scores.scored]
    if np.ptp(values) == 0:
        found.append("All scores are equal: which rows are dropped depends on their order alone.")
    if not np.isfinite(values).all():
        found.append(f"{int((~np.isfinite(values)).sum())} scores are not finite; their rows are dropped first.")
    if length is not None and abs(length) >= ALMOST_LENGTH:
        found.append(f"The score is almost the length (rank correlation {length:+.2f}): compare with by='num_tokens'.")
    if loss is not None and abs(loss) >= ALMOST_LOSS:
        found.append(f"The score is almost the loss (rank correlation {loss:+.2f}), which a forward pass alone gives.")
    return [*found, *doubts_of(scores).values()]


def _about_rows(scores: ScoreTable, copies: int) -> list[str]:
    found, rows, unscored = [], len(scores), len(scores) - int(scores.scored.sum())
    if copies > MANY_COPIES * rows:
        found.append(
            f"{copies:,} rows ({copies / rows:.1%}) repeat the text of an earlier row: pass drop_duplicates=True."
        )
    if unscored > MANY * rows:
        found.append(f"{unscored:,} rows ({unscored / rows:.1%}) have no score.")
    limit = scores.provenance.preparation.get("max_length")
    longest = 0 if limit is None else int((column_or_nan(scores, "length") == limit).sum())
    if longest > MANY * rows:
        found.append(f"{longest:,} rows ({longest / rows:.1%}) have max_length={limit} tokens and may be truncated.")
    return found
