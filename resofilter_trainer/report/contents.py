"""What a folder holds for a report. Knows the files that the other packages write; knows no model and no chart."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..config import InputError, ScoreWarning, whole_number, with_known_keywords
from ..io.files import file_at, read_json
from ..io.hub import at_hand
from ..io.made_from import check_made_from, refuse_differences
from ..ledger.ledger import Ledger
from ..ledger.schema import LEDGER
from ..scores.provenance import Provenance
from ..scores.score_table import LAYERS_FOLDER, SCORES_FILE, ScoreTable
from ..scores.token_scores import TOKEN_SCORES_FILE, TokenScores
from ..selecting.data_selector import DataSelector
from ..selecting.named_rules import RULES, token_rule
from ..selecting.results import COMPARISON_FILE, LOG_FILE, NAME, SUMMARY_FILE, selection_file
from ..selecting.selection import KEPT, SELECTION_FILE, Selection, check_complete
from ..selecting.token_rules import TokenInputs
from ..selecting.token_selection import EMPTIED, TokenSelection, TokenSelector

SCORES_FOLDER = "scores"
REMEDY = "Remove it, or make it again."
NO_TOKEN = "no token to learn"
TOKEN_POLICY = {"what": "tokens"}  # the policy of a selection that was derived from selected tokens
FILES = (SCORES_FILE, SELECTION_FILE, f"{LAYERS_FOLDER}/{SCORES_FILE}", COMPARISON_FILE)  # of a repository on the hub
LINE_KEYS = {"selector", "model", "keep", "metric", "metric_low", "metric_high"}  # required in a comparison's lines
MEASURED_FROM = ("weights", "tokenizer", "template", "dataset", "rows")  # the same for the layers as for the scores


@dataclass(frozen=True)
class Epoch:
    """One epoch of a training run.

    Attributes:
        number: the epoch, counted from 1, as in the names of the files.
        scores: the scores after the epoch; None where none were saved.
        selection: the rows that the epoch trained on; None where it was not saved.
    """

    number: int
    scores: ScoreTable | None
    selection: Selection | None


@dataclass(frozen=True)
class Contents:
    """Everything that a report can show.

    Attributes:
        scores: one line for every row of the dataset; None where there is only a comparison.
        selection: the rows kept by these scores; None where no selection was made.
        epochs: the epochs of a training run, first epoch first; empty without one.
        log: the Trainer's log, one mapping per entry.
        layers: scores of every layer for some rows (`score_layers`).
        cleaned: the tokens to learn and their losses under both models (`resofilter clean`).
        comparison: the content of `comparison.json` (`resofilter compare`).
        ledger: the ledger of a training run.

    Raises:
        InputError: the scores do not cover every row, or a selection, epoch or layer belongs to other scores.
    """

    scores: ScoreTable | None
    selection: Selection | None = None
    epochs: list[Epoch] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    layers: ScoreTable | None = None
    cleaned: TokenSelection | None = None
    comparison: dict[str, Any] | None = None
    ledger: Ledger | None = None

    def __post_init__(self) -> None:
        if self.scores is None:
            return
        object.__setattr__(self, "scores", ScoreTable.join([self.scores]))  # sorted by row
        check_complete(self.scores)
        rows = self.scores.provenance.rows
        if self.selection is not None:
            check_selection(self.selection, self.scores)
        if self.layers is not None:
            check_layers(self.layers, self.scores)
        for epoch in self.epochs:
            for found in (epoch.scores, epoch.selection):
                if found is not None and len(found) != rows:
                    raise InputError(f"Epoch {epoch.number} has {len(found)} rows and the scores have {rows}.")

    @property
    def selects_tokens(self) -> bool:
        """Whether tokens were selected instead of rows."""
        return self.selection is not None and self.selection.policy == TOKEN_POLICY

    def decided(self) -> Selection:
        """The selection; where none was made, that of `DataSelector()`."""
        return self._default if self.selection is None else self.selection

    @cached_property
    def _default(self) -> Selection:
        assert self.scores is not None, "a selection needs scores"
        return DataSelector().select(self.scores)


@with_known_keywords
def read_contents(
    path: str | os.PathLike[str],
    selection: str | os.PathLike[str] | None = None,
    comparison: str | os.PathLike[str] | None = None,
) -> Contents:
    """Read everything that a report can show from a folder.

    Args:
        path: a file of scores, an output folder of `score`, `clean` or `compare`, or the `output_dir` of a training;
            on the hub, `hf://datasets/owner/name`.
        selection: the file or folder of a selection in another place.
        comparison: the file or folder of a comparison in another place.

    Raises:
        InputError: there is nothing to report on, a file is damaged or from another version, or the selection was made
            from other scores.
    """
    path = at_hand(path, *FILES)
    if not path.exists():
        raise InputError(f"'{path}' does not exist. Pass the folder of a run, or of scores.")
    folder = path.parent if path.suffix == ".parquet" else path
    if not file_at(path, SCORES_FILE).is_file() and (folder / NAME).is_dir():
        path = folder = folder / NAME  # the output_dir of a training
    if not file_at(path, SCORES_FILE).is_file() and (folder / SCORES_FOLDER).is_dir():
        path = folder / SCORES_FOLDER  # the output of a recipe
    scores = ScoreTable.load(path) if file_at(path, SCORES_FILE).is_file() else None
    compared, cleaned = _comparison(folder, comparison), _cleaned(folder)
    epochs = list(_epochs(folder))
    decided = _selection(folder, selection, epochs)
    if scores is None and cleaned is not None:
        scores, decided = scores_of_tokens(cleaned.scores), selection_of_tokens(cleaned)
    if scores is None and compared is None:
        there = f"'{folder}' holds no scores and no comparison"
        if decided is not None:
            raise InputError(f"{there}, only a selection. Pass the folder of its scores, and this one as selection=.")
        raise InputError(f"{there}. Pass the folder of one of them.")
    layers = (path.parent if path.suffix == ".parquet" else path) / LAYERS_FOLDER
    return Contents(
        scores=scores,
        selection=decided,
        epochs=epochs,
        log=_log(folder / LOG_FILE),
        layers=ScoreTable.load(layers) if (layers / SCORES_FILE).is_file() else None,
        cleaned=cleaned,
        comparison=compared,
        ledger=_ledger(folder),
    )


def _selection(folder: Path, elsewhere: str | os.PathLike[str] | None, epochs: Sequence[Epoch]) -> Selection | None:
    """The selection that was asked for, else that in the folder, else that of the last epoch."""
    if elsewhere is not None:
        return Selection.load(elsewhere)
    if (folder / SELECTION_FILE).is_file():
        return Selection.load(folder)
    return next((each.selection for each in reversed(epochs) if each.selection is not None), None)


def selection_of_tokens(cleaned: TokenSelection) -> Selection:
    """The rows that keep at least one token, as a selection of rows."""
    provenance = cleaned.scores.provenance
    keep = np.zeros(provenance.rows, dtype=bool)
    keep[cleaned.scores.sample_id] = cleaned.kept_of_row > 0
    reason = [NO_TOKEN] * provenance.rows
    for row, count, kept in zip(cleaned.scores.sample_id, cleaned.scores.num_tokens, cleaned.kept_of_row, strict=True):
        reason[row] = KEPT if kept else EMPTIED if count else NO_TOKEN
    return Selection(keep, reason, TOKEN_POLICY, provenance.to_json())


def scores_of_tokens(tokens: TokenScores) -> ScoreTable:
    """A table of scores from token scores: the score of a row is its mean loss under the base model."""
    rows = tokens.provenance.rows
    missing = np.ones(rows, dtype=bool)
    missing[tokens.sample_id[tokens.num_tokens > 0]] = False
    sums = np.zeros(rows)
    np.add.at(sums, np.repeat(tokens.sample_id, tokens.num_tokens), tokens.base.astype(np.float64))
    counts = np.zeros(rows, dtype=np.int64)
    counts[tokens.sample_id] = tokens.num_tokens
    loss = pa.array(sums / np.maximum(counts, 1), mask=missing)
    columns = {
        "sample_id": np.arange(rows),
        "score": loss,
        "loss": loss,
        "num_tokens": pa.array(counts, mask=missing),
        "reason": pa.array([NO_TOKEN if each else None for each in missing], pa.string()),
    }
    return ScoreTable(pa.table(columns), tokens.provenance)


def check_selection(selection: Selection, scores: ScoreTable) -> None:
    """Raise InputError unless a selection was made from these scores."""
    if len(selection) != len(scores):
        raise InputError(f"The selection has {len(selection)} rows and the scores have {len(scores)}.")
    try:
        there = Provenance.from_json(selection.provenance)
    except (TypeError, KeyError, ValueError) as error:
        raise InputError("The selection was written by another version. Make it again.") from error
    remedy = "Pass the selection of these scores, or select again."
    refuse_differences(there.differences(scores.provenance), "The selection is of scores that were", remedy)


def check_layers(layers: ScoreTable, scores: ScoreTable) -> None:
    """Raise InputError unless the layers were measured with the same model and on the same rows as the scores."""
    there, here = ({name: getattr(each.provenance, name) for name in MEASURED_FROM} for each in (layers, scores))
    remedy = "Measure the layers again, or move them to another folder."
    check_made_from(there, here, "The scores of every layer were", remedy)


def _epochs(folder: Path) -> Iterator[Epoch]:
    """Read the files of each epoch, in the order of the epochs."""
    found = [re.search(r"-epoch-(\d+)\.parquet$", path.name) for path in folder.glob("*-epoch-*.parquet")]
    for number in sorted({int(each.group(1)) for each in found if each}):
        scores, selection = folder / f"scores-epoch-{number}.parquet", folder / selection_file(number - 1)
        yield Epoch(
            number,
            ScoreTable.load(scores) if scores.is_file() else None,
            Selection.load(selection) if selection.is_file() else None,
        )


def _comparison(folder: Path, elsewhere: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """Read the comparison in a folder, or in another place; None where the folder has none."""
    place = folder if elsewhere is None else Path(elsewhere)
    path = place if place.suffix == ".json" else place / COMPARISON_FILE
    found = _json(path)
    if found is None and elsewhere is not None:
        raise InputError(f"There is no comparison at '{elsewhere}'. Pass the folder of one, or its {COMPARISON_FILE}.")
    if found is None:
        return None
    lines = found.get("lines") if isinstance(found, dict) else None
    if not isinstance(lines, list) or not all(isinstance(line, dict) and line.keys() >= LINE_KEYS for line in lines):
        raise InputError(f"'{path}' is damaged, or not a comparison of this version. {REMEDY}")
    return found


def _log(path: Path) -> list[dict[str, Any]]:
    """Read the Trainer's log; empty where there is none."""
    found = _json(path) or []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise InputError(f"'{path}' is damaged, or not a log of this version. {REMEDY}")
    return found


def _cleaned(folder: Path) -> TokenSelection | None:
    """The tokens that a cleaning kept, selected again from its scores and settings; None where there is none."""
    summary = _json(folder / SUMMARY_FILE)
    if not isinstance(summary, dict) or not (folder / TOKEN_SCORES_FILE).is_file():
        return None
    by_share = {"keep_tokens", "ranking"} <= summary.keys()
    rule = str(summary.get("rule")) if isinstance(summary.get("settings"), dict) else ""
    if not by_share and rule not in RULES:  # nothing, or a user's own rule, which cannot be applied again
        return None
    scores = TokenScores.load(folder)
    ids = scores.sample_id
    if len(ids) and not 0 <= ids.min() <= ids.max() < scores.provenance.rows:
        raise InputError(f"The token scores in '{folder}' have rows that are not in the dataset. Make them again.")
    if by_share:
        return TokenSelector(summary["keep_tokens"], summary["ranking"]).select(scores)
    inputs = TokenInputs.of(scores, whole_number("vocabulary", summary.get("vocabulary"), least=1))
    return TokenSelection.of_weights(scores, token_rule(rule, **summary["settings"]).weights(inputs))


def _ledger(folder: Path) -> Ledger | None:
    """Open a run's ledger; None, and a warning, where it cannot be read as a whole."""
    if not any((folder / LEDGER).glob("*/*.parquet")):
        return None
    try:
        ledger = Ledger.load(folder)
        ledger.steps()
        return ledger
    except InputError as error:
        warnings.warn(f"The report has no time line: {error}", ScoreWarning, stacklevel=3)
        return None


def _json(path: Path) -> Any:
    """Read a JSON file; None where it does not exist."""
    return read_json(path, REMEDY) if path.is_file() else None
