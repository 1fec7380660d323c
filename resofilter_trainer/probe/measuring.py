"""The pass over the drawn and planted rows, and its numbers as arrays. Knows scoring, not what the numbers say."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import ColumnMapping, InputError, Precision, ScoreWarning, Warmup
from ..data.loading import usable_rows
from ..data.surveys import ROW_POSITION
from ..scores.score_table import WARMED_UP, ScoreTable
from ..scoring.dataset import score_dataset
from ..scoring.passes import from_main
from ..selecting.votes import WARMED
from .contradictions import UNTOLD
from .drawing import Drawn
from .findings import LENGTH, UNPLANTED, Rows, number_of

DROPS = ("drop_duplicates", "drop_empty")
SCORES, SCORES_WARMED = "scores", "scores_warmed"  # folders in that of the probe


@dataclass(frozen=True)
class Measured:
    """What a pass has measured.

    Attributes:
        scores: the drawn rows and then the planted ones.
        seconds: how long it took; None where an interrupted pass was resumed.
        suffix: what follows the names of its signals.
    """

    scores: ScoreTable
    seconds: float | None
    suffix: str = ""

    def seconds_of(self, name: str) -> float | None:
        """How long a signal took; those of one pass share its seconds."""
        return None if self.seconds is None else self.scores.seconds.get(name, self.seconds)

    @property
    def names(self) -> list[str]:
        """The signals that it measured."""
        scores = self.scores
        apart = (LENGTH, WARMED_UP)
        return [each for each in scores.table.column_names if scores.direction(each) is not None and each not in apart]


@dataclass(frozen=True)
class Measuring:
    """How rows are measured; the attributes are as for `score_dataset`."""

    args: SFTConfig
    signals: str | Sequence[str]
    reference: str | None
    precision: Precision | None
    tokens_per_batch: int | None

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drawn: Drawn,
        folder: Path | None,
        warmup: Warmup | None = None,
        tune_on: Dataset | None = None,
    ) -> Measured:
        """Measure all rows; after a warm-up on some others, if there is one."""
        output = None if folder is None else folder / (SCORES if warmup is None else SCORES_WARMED)
        fresh = from_main(lambda: output is None or not output.exists())
        begun = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ScoreWarning)  # they become notes
            scores = score_dataset(
                model, drawn.together(), tokenizer, self.args, output=output, precision=self.precision,
                tokens_per_batch=self.tokens_per_batch, signals=self.signals, reference=self.reference,
                warmup=warmup, warmup_dataset=tune_on, drop_empty=True,
            )  # fmt: skip
        seconds = time.perf_counter() - begun if fresh else None
        return Measured(scores, seconds, "" if warmup is None else WARMED)


def rows_to_tune_on(
    warmup: Warmup, warmup_dataset: Dataset | None, drawn: Drawn, args: SFTConfig, **row_options: Any
) -> Dataset:
    """The rows of a warm-up, under TRL's names as the drawn ones.

    Args:
        warmup: the warm-up.
        warmup_dataset: the user's own rows for it; by default those of the dataset that were not drawn.
        drawn: the rows.
        args, **row_options: as for `score_dataset`.

    Raises:
        InputError: there are fewer than the warm-up needs, or they cannot be read.
    """
    if warmup_dataset is None:
        found, remedy = drawn.others, "Draw fewer rows (rows=), tune on fewer (warmup=), or pass a warmup_dataset."
    else:
        columns = {name: row_options[name] for name in row_options if name not in ("source", *DROPS)}
        repeated, empty = (bool(row_options.get(name)) for name in DROPS)
        found, _ = usable_rows(warmup_dataset, ColumnMapping(**columns), args, repeated, empty)
        found, remedy = found.remove_columns(ROW_POSITION), "Pass more rows, or tune on fewer (warmup=)."
    if len(found) < (warmup.rows or 1):
        raise InputError(f"The warm-up needs {warmup.rows or 1} rows, and there are {len(found)} for it. {remedy}")
    return found


def total_seconds(passes: Sequence[Measured]) -> float | None:
    """How long all passes took, with the warm-up; None where one was resumed."""
    found = [each.seconds for each in passes]
    return None if None in found else sum(each for each in found if each is not None)


def rows_of(drawn: Drawn, passes: Sequence[Measured]) -> tuple[Rows, list[str]]:
    """The measured rows as arrays, and notes on those that do not count.

    Args:
        drawn: the rows.
        passes: what was measured of them; the first pass says which rows count.
    """
    count, scores = len(drawn.examples), passes[0].scores
    total = len(scores)
    number = {example.row: place for place, example in enumerate(drawn.examples)}
    source = np.array([*range(count), *(number[each.row] for each in drawn.planted)])
    prompts = number_of(example.prompt.strip() or example.row for example in drawn.examples)
    wrong = np.zeros(count, bool) if drawn.wrong is None else drawn.wrong
    lengths, notes = scores.column(LENGTH).astype(float), list[str]()
    unscored = int((~scores.scored).sum())
    if unscored:
        notes.append(f"{unscored} of {total} rows could not be scored, and do not count.")
    limit = scores.provenance.preparation["max_length"]
    truncated = np.arange(total) >= count if limit is not None else np.zeros(total, bool)
    truncated &= scores.column("length") >= (limit or 0)
    if truncated.any():
        lengths[truncated] = np.nan
        notes.append(
            f"{int(truncated.sum())} rows with a fault reach max_length={limit} tokens, where the fault may be cut "
            "off. They do not count."
        )
    for each in passes:
        learnt = int(np.nansum(each.scores.column(WARMED_UP))) if WARMED_UP in each.scores.table.column_names else 0
        if learnt:
            notes.append(f"The warm-up has learnt {learnt} of the measured rows, whose losses are smaller for that.")
    named = [(name + each.suffix, name, each) for each in passes for name in each.names]
    rows = Rows(
        signals={**{key: each.scores.column(name).astype(float) for key, name, each in named}, LENGTH: lengths},
        directions={**{key: str(each.scores.direction(name)) for key, name, each in named}, LENGTH: "largest"},
        lengths=lengths,
        kind=np.array([UNPLANTED] * count + [each.kind for each in drawn.planted]),
        faulty=np.concatenate([wrong, [each.faulty for each in drawn.planted]]).astype(bool),
        stratum=np.array([""] * count + [each.stratum for each in drawn.planted]),
        source=source,
        prompt=prompts[source],
        labelled=drawn.wrong is not None,
        contradicted=np.concatenate([drawn.contradicted, np.full(len(drawn.planted), UNTOLD)]),
        seconds={**{key: each.seconds_of(name) for key, name, each in named}, LENGTH: 0.0},
    )
    return rows, notes
