"""The numbers of a report, each from the library that decides by it. Knows arrays, no page, no chart, no model.

What is drawn and what is written on the page is one of these: so that page and library cannot differ.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..scores.score_table import LAYER, ScoreTable, count_reasons
from ..scores.statistics import rank_correlation
from ..selecting.results import EPOCHS, FULL
from ..selecting.selection import KEPT, DataSelector, Drop, Selection, drop_order, dropped_of
from .contents import Contents, Epoch

BINS = 60
NEARLY_ALL_LENGTH, NEARLY_ALL_LOSS = 0.9, 0.95  # rank correlations from which on the score says little more
LITTLE_SPREAD = 1e-3  # of the possible range
MANY = 0.05  # of the rows
QUARTER = 0.25
WORDS = re.compile(r"\w+|[^\w\s]")
SHARES = [percent / 100 for percent in range(1, 101)]
LISTED_GROUPS, LISTED_REASONS = 50, 50
STEPS = 1000  # of a line by step


@dataclass(frozen=True)
class Verdict:
    """What happened to the rows, in one line's worth of numbers.

    Attributes:
        rows, scored, kept, dropped: of the dataset.
        tokens, tokens_kept: that are learnt.
        reasons: why rows went, and how many for each, most first.
        score: what was measured, in words.
        previewed: whether nothing was decided yet, and `DataSelector()` stands in.
        epoch: of a run, the last one, whose rows are the kept ones; counted from 1.
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


@dataclass(frozen=True)
class Scale:
    """What is drawn for a score.

    An AdamW score saturates at lr (`updates`): there `1 - score / lr` is what tells rows apart, on a logarithmic axis.

    Attributes:
        title: of the axis.
        lr: to take the distance to; None where the score itself is drawn.
    """

    title: str
    lr: float | None

    def shown(self, scores: np.ndarray) -> np.ndarray:
        """What is drawn, of the same shape."""
        return scores if self.lr is None else 1 - scores / self.lr


@dataclass(frozen=True)
class Bar:
    """Rows of which what is drawn lies in `[start, end)`, the last one's end included; kept or dropped."""

    start: float
    end: float
    decision: str
    rows: int


@dataclass(frozen=True)
class WhatIf:
    """What `DataSelector(keep=..., drop=..., by=...)` would do, for every share in hundredths.

    Attributes:
        by, drop: what is ranked, and which end goes.
        keep: the shares.
        rows, tokens: that stay; no tokens where they were not counted.
        dropped_of_groups: for each group, how many of its rows would go, those without a score among them; the largest
            groups.
        unscored: rows that go in any case.
    """

    by: str
    drop: Drop
    keep: list[float]
    rows: list[int]
    tokens: list[int] | None
    dropped_of_groups: dict[str, list[int]]
    unscored: int


@dataclass(frozen=True)
class Quarter:
    """Means over the rows that are moved least, most, and over all (ResoFilter, figures 4 and 5).

    Attributes:
        rows: "lowest quarter", "highest quarter" or "all".
        tokens: learnt ones of a row, mean; `tokens_low` and `tokens_high` its quartiles.
        frequency: how common a row's words are, mean; None without text.
        counted: rows whose words were counted.
    """

    rows: str
    tokens: float
    tokens_low: float
    tokens_high: float
    frequency: float | None
    counted: int


@dataclass(frozen=True)
class Layer:
    """The change of one layer's W_up (ResoFilter, figure 2): quartiles over rows, and of the entries of a matrix.

    Attributes:
        layer, rows: which, counted from 0; and how many rows were measured.
        low, high: the 25 % and 75 % quantiles of the rows' mean changes.
        entries_low, entries_high: the same of a matrix's entries, mean over the rows; None where not measured.
    """

    layer: int
    rows: int
    low: float
    high: float
    entries_low: float | None
    entries_high: float | None


@dataclass(frozen=True)
class Moved:
    """An epoch of a run: rows it trained on, those that came and went since the one before, and its scores."""

    epoch: int
    rows: int | None
    came: int | None
    went: int | None
    low: float | None
    median: float | None
    high: float | None


@dataclass(frozen=True)
class Numbers:
    """All of them; empty or None where there is nothing to count.

    Attributes:
        cut: the score beyond which all rows go, if one number says it.
        length_correlation, loss_correlation: rank correlations of the score with learnt tokens and with loss.
        log: learning rate and kept share, by step.
        ratios: a comparison's metric by share.
    """

    verdict: Verdict
    warnings: list[str]
    scale: Scale
    histogram: list[Bar]
    cut: float | None
    length_correlation: float | None
    loss_correlation: float | None
    what_if: WhatIf | None
    quarters: list[Quarter]
    layers: list[Layer]
    epochs: list[Moved]
    log: list[dict[str, Any]]
    ratios: list[dict[str, Any]]


def numbers_of(contents: Contents, groups: Sequence[str] | None, frequency: np.ndarray | None, copies: int) -> Numbers:
    """What a report says about scores, which there must be.

    Args:
        contents: what was measured and decided.
        groups: each row's, or None.
        frequency: (N,) of each row's words, NaN where it is not known; None without text.
        copies: rows whose text is that of an earlier one.
    """
    scores = contents.scores
    assert scores is not None, "there are scores"
    selection = contents.decided()
    there = scores.scored & np.isfinite(scores.column("score"))
    correlations = {name: _correlation(scores, name, there) for name in ("num_tokens", "loss")}
    verdict, scale = _verdict(contents, scores, selection), scale_of(scores, there)
    values, keep = scores.column("score")[there], selection.keep[there]
    is_loss = contents.of_tokens or scores.provenance.config.get("criterion") in ("loss", "perplexity")
    return Numbers(
        verdict=verdict,
        warnings=_warnings(scores, verdict, correlations, copies, is_loss),
        scale=scale,
        histogram=histogram(scale.shown(values), keep, log=scale.lr is not None),
        cut=cut_of(values, keep),
        length_correlation=correlations["num_tokens"],
        loss_correlation=correlations["loss"],
        what_if=what_if(_selector(selection), scores, groups) if there.any() else None,
        quarters=quarters(scores, there, frequency),
        layers=[] if contents.layers is None else layers_of(contents.layers),
        epochs=moved(contents.epochs),
        log=steps_of(contents.log),
        ratios=ratios_of(contents.comparison),
    )


def _verdict(contents: Contents, scores: ScoreTable, selection: Selection) -> Verdict:
    tokens = np.nan_to_num(_optional(scores, "num_tokens"))
    kept, cleaned = int(selection.keep.sum()), contents.cleaned if contents.of_tokens else None
    return Verdict(
        rows=len(scores),
        scored=int(scores.scored.sum()),
        kept=kept,
        dropped=len(scores) - kept,
        tokens=int(tokens.sum()),
        tokens_kept=int((tokens[selection.keep] if cleaned is None else cleaned.keep).sum()),
        reasons=count_reasons((why for why in selection.reason if why != KEPT), LISTED_REASONS),
        score=_score_name(contents),
        previewed=contents.selection is None,
        epoch=contents.epochs[-1].number if contents.epochs and contents.selection is not None else None,
    )


def _score_name(contents: Contents) -> str:
    """What was measured, in words."""
    assert contents.scores is not None
    config = contents.scores.provenance.config
    if contents.of_tokens:
        return "mean loss under the base model"
    return str(config.get("criterion", f"resonance ({config.get('update')}, last {config.get('n_layers')} layers)"))


def _warnings(
    scores: ScoreTable, verdict: Verdict, correlations: dict[str, float | None], copies: int, is_loss: bool
) -> list[str]:
    """What makes the verdict doubtful, a sentence each."""
    found, rows, trust = [], max(verdict.rows, 1), scores.provenance.trust
    values = scores.column("score")[scores.scored]
    length, loss = correlations["num_tokens"], correlations["loss"]
    if not len(values):
        return ["No row has a score: there is nothing to rank."]
    if np.ptp(values) == 0:
        found.append("All scores are equal: which rows go is decided by their order alone.")
    if not np.isfinite(values).all():
        found.append(f"{int((~np.isfinite(values)).sum())} scores are no finite number; those rows go first.")
    if length is not None and abs(length) >= NEARLY_ALL_LENGTH:
        found.append(f"The score is almost only length (rank correlation {length:+.2f}): compare with by=num_tokens.")
    if loss is not None and abs(loss) >= NEARLY_ALL_LOSS and not is_loss:
        found.append(f"The score is almost only loss (rank correlation {loss:+.2f}), which costs a forward alone.")
    if trust is not None and not trust.trusted:
        found.append(f"The ranking is partly noise: {trust}.")
    if trust is not None and trust.saturation is not None and trust.saturation < LITTLE_SPREAD:
        found.append(f"The scores are saturated: {trust.saturation:.3%} of the possible range tells rows apart.")
    if copies > 0.01 * rows:
        found.append(f"{copies:,} rows ({copies / rows:.1%}) repeat the text of an earlier one: --drop_duplicates.")
    if verdict.rows - verdict.scored > MANY * rows:
        found.append(f"{verdict.rows - verdict.scored:,} rows ({1 - verdict.scored / rows:.1%}) have no score.")
    limit = scores.provenance.preparation.get("max_length")
    cut = 0 if limit is None else int((_optional(scores, "length") == limit).sum())
    if cut > MANY * rows:
        found.append(f"{cut:,} rows ({cut / rows:.1%}) fill max_length {limit}: they are cut there, or as long.")
    return found


def scale_of(scores: ScoreTable, there: np.ndarray) -> Scale:
    """How scores are drawn: themselves, or where they saturate their distance to it."""
    config, values = scores.provenance.config, scores.column("score")[there]
    if (config.get("update"), config.get("norm", "mean_abs")) == ("adamw", "mean_abs") and len(values):
        distance = 1 - values / config["lr"]
        if distance.min() > 0 and distance.min() < distance.max() / 2:
            return Scale("1 - score / lr: to the right the larger changes", config["lr"])
    return Scale("score", None)


def histogram(values: np.ndarray, keep: np.ndarray, log: bool) -> list[Bar]:
    """Counts in equal steps from the smallest to the largest value; of (N,) finite values, and which rows stay."""
    if not len(values):
        return []
    low, high = float(values.min()), float(values.max())
    if low == high:
        width = abs(low) / 20 or 0.5
        edges = np.array([low - width, low + width])
    else:
        edges = (np.geomspace if log else np.linspace)(low, high, BINS + 1)
        edges[[0, -1]] = low, high  # which rounding may have moved
        edges = np.unique(edges)  # fewer where there are not so many numbers between
    bars = []
    for decision, which in (("kept", keep), ("dropped", ~keep)):
        counts = np.histogram(values[which], edges)[0]
        bars += [
            Bar(float(start), float(end), decision, int(rows))
            for start, end, rows in zip(edges, edges[1:], counts, strict=False)
            if rows
        ]
    return bars


def cut_of(values: np.ndarray, keep: np.ndarray) -> float | None:
    """The last score that stays before all others go; None where kept and dropped rows lie among each other."""
    if keep.all() or not keep.any():
        return None
    kept, dropped = values[keep], values[~keep]
    if kept.max() <= dropped.min():
        return float(kept.max())
    return float(kept.min()) if kept.min() >= dropped.max() else None


def what_if(selector: DataSelector, scores: ScoreTable, groups: Sequence[str] | None) -> WhatIf:
    """For every share, what the selector would keep with it, over all rows together."""
    values = selector.values(scores)
    rows = np.flatnonzero(scores.scored & np.isfinite(values))
    end = selector.end(scores.provenance)
    order = rows[drop_order(values[rows], end)]  # that which goes first at the beginning
    gone = [dropped_of(len(rows), share) for share in SHARES]
    tokens = np.nan_to_num(_optional(scores, "num_tokens")).astype(np.int64)
    gone_tokens = np.concatenate([[0], np.cumsum(tokens[order])])
    of_groups: dict[str, list[int]] = {}
    if groups is not None:
        names = np.array([str(group) for group in groups], dtype=object)
        unscored = Counter(np.delete(names, rows).tolist())
        for name, _ in Counter(names.tolist()).most_common(LISTED_GROUPS):
            counts = unscored[name] + np.concatenate([[0], np.cumsum(names[order] == name)])
            of_groups[name] = counts[gone].tolist()
    return WhatIf(
        by=selector.what,
        drop=end,
        keep=SHARES,
        rows=[len(rows) - count for count in gone],
        tokens=(tokens[rows].sum() - gone_tokens[gone]).tolist() if "num_tokens" in scores.table.column_names else None,
        dropped_of_groups=of_groups,
        unscored=len(scores) - len(rows),
    )


def quarters(scores: ScoreTable, there: np.ndarray, frequency: np.ndarray | None) -> list[Quarter]:
    """Token length and word frequency of the rows with the lowest and the highest scores, and of all."""
    rows = np.flatnonzero(there & np.isfinite(_optional(scores, "num_tokens")))
    if not len(rows):
        return []
    order = rows[np.argsort(scores.column("score")[rows], kind="stable")]
    count = max(1, int(len(rows) * QUARTER))
    found = []
    for name, part in (("lowest quarter", order[:count]), ("highest quarter", order[-count:]), ("all", order)):
        tokens = scores.column("num_tokens")[part]
        low, high = np.quantile(tokens, [0.25, 0.75])
        known = np.empty(0) if frequency is None else frequency[part][np.isfinite(frequency[part])]
        mean = float(known.mean()) if len(known) else None
        found.append(Quarter(name, float(tokens.mean()), float(low), float(high), mean, len(known)))
    return found


def word_frequency(texts: Sequence[str | None]) -> np.ndarray:
    """(N,) the mean, over a text's words and signs, of their share of all; NaN where there is no text.

    ResoFilter's figure 5 counts tokens; words need no tokenizer.
    """
    split = [WORDS.findall(text.lower()) if text else [] for text in texts]
    counts = Counter(word for words in split for word in words)
    total = max(counts.total(), 1)
    return np.array([np.mean([counts[word] for word in words]) / total if words else np.nan for words in split])


def layers_of(scores: ScoreTable) -> list[Layer]:
    """Quartiles of every measured layer's change, lowest layer first."""
    found = []
    names = [name for name in scores.table.column_names if re.fullmatch(rf"{LAYER}\d+", name)]
    for name in sorted(names, key=lambda name: int(name.removeprefix(LAYER))):
        values = scores.column(name)
        there = scores.scored & np.isfinite(values)
        if not there.any():
            continue
        low, high = np.quantile(values[there], [QUARTER, 1 - QUARTER])
        entries = [
            float(scores.column(f"{name}_{part}")[there].mean())
            if f"{name}_{part}" in scores.table.column_names
            else None
            for part in ("q25", "q75")
        ]
        found.append(Layer(int(name.removeprefix(LAYER)), int(there.sum()), float(low), float(high), *entries))
    return found


def moved(epochs: Sequence[Epoch]) -> list[Moved]:
    """Who came and went from epoch to epoch, and where the scores lay."""
    found, last = [], None
    for epoch in epochs:
        rows = came = went = None
        if epoch.selection is not None:
            keep = epoch.selection.keep
            rows = int(keep.sum())
            if last is not None:
                came, went = int((keep & ~last).sum()), int((last & ~keep).sum())
            last = keep
        quantiles: list[float | None] = [None, None, None]
        if epoch.scores is not None:
            values = epoch.scores.column("score")[epoch.scores.scored]
            values = values[np.isfinite(values)]
            quantiles = [float(each) for each in np.quantile(values, [0.25, 0.5, 0.75])] if len(values) else quantiles
        found.append(Moved(epoch.number, rows, came, went, *quantiles))
    return found


def steps_of(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the Trainer's log the learning rate and the kept share, by step; of a long one an even sample."""
    names = {"learning_rate": "learning rate", "resofilter/kept_share": "kept share"}
    found = []
    for name, shown in names.items():
        own = [entry for entry in log if "step" in entry and name in entry and np.isfinite(float(entry[name]))]
        thinned = np.unique(np.linspace(0, len(own) - 1, min(len(own), STEPS)).astype(int)).tolist() if own else []
        found += [{"step": own[i]["step"], "what": shown, "value": float(own[i][name])} for i in thinned]
    return found


def ratios_of(comparison: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Of a comparison the metric by ratio (ResoFilter, figure 3), at as many epochs for all."""
    found = []
    for line in [] if comparison is None else comparison["lines"]:
        values = {name: finite(line[name]) for name in ("metric", "metric_low", "metric_high")}
        if line.get("budget", EPOCHS) == EPOCHS and values["metric"] is not None:
            keep = 1.0 if line["selector"] == FULL else line["keep"]
            found.append({"selector": line["selector"], "model": line["model"], "keep": keep, **values})
    return found


def finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return None if value is None or not np.isfinite(value) else value


def _selector(selection: Selection) -> DataSelector:
    """A selector with a share that ranks as the policy of a selection did, as far as it was one."""
    policies = (selection.policy, selection.policy.get("selector"), selection.policy.get("keep"))
    for policy in policies:  # a run's settings hold that of its policy
        if isinstance(policy, Mapping) and {"by", "drop", "combine"} <= policy.keys():
            by = policy["by"] if isinstance(policy["by"], str) else tuple(policy["by"])
            return DataSelector(drop=policy["drop"], by=by, combine=policy["combine"])
    return DataSelector()


def _correlation(scores: ScoreTable, name: str, there: np.ndarray) -> float | None:
    values = _optional(scores, name)
    both = there & np.isfinite(values)
    return rank_correlation(scores.column("score")[both], values[both]) if both.sum() > 2 else None


def _optional(scores: ScoreTable, name: str) -> np.ndarray:
    """A column as float64, all NaN where the table has none of that name."""
    if name not in scores.table.column_names:
        return np.full(len(scores), np.nan)
    return scores.column(name).astype(np.float64)
