"""What a folder holds that can be reported on. Knows the files that the other rooms leave, no model, no chart."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..config import InputError
from ..io.files import file_at, read_json
from ..scores.provenance import Provenance
from ..scores.score_table import LAYERS_FOLDER, SCORES_FILE, ScoreTable
from ..scores.token_scores import TOKEN_SCORES_FILE, TokenScores
from ..selecting.results import COMPARISON_FILE, LOG_FILE, NAME, SUMMARY_FILE, selection_file
from ..selecting.selection import KEPT, SELECTION_FILE, DataSelector, Selection
from ..selecting.token_selection import EMPTIED, TokenSelection, TokenSelector

SCORES_FOLDER = "scores"
NO_TOKEN = "no token to learn"
OF_TOKENS = {"what": "tokens"}  # the policy where no row was decided on
LINE = {"selector", "model", "keep", "metric", "metric_low", "metric_high"}  # what a comparison's has at least


@dataclass(frozen=True)
class Epoch:
    """One epoch of a run: the scores after it, and which rows it trained on; None where there are none.

    Attributes:
        number: counted from 1, as in the files' names.
    """

    number: int
    scores: ScoreTable | None
    selection: Selection | None


@dataclass(frozen=True)
class Contents:
    """All that a report can be made of.

    Attributes:
        scores: a line for every row of the dataset; None where there is only a comparison.
        selection: what was decided on them; None where nothing was.
        epochs: of a run, first epoch first; none of a two-pass run.
        log: the Trainer's, a mapping for every entry.
        layers: scores of every layer, of some rows (`resofilter score --layers all`).
        cleaned: which tokens are learnt, and two models' losses of them (`resofilter clean`).
        comparison: what `resofilter compare` has left.
    """

    scores: ScoreTable | None
    selection: Selection | None = None
    epochs: list[Epoch] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    layers: ScoreTable | None = None
    cleaned: TokenSelection | None = None
    comparison: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.scores is None:
            return
        object.__setattr__(self, "scores", ScoreTable.join([self.scores]))  # in the dataset's order
        rows = self.scores.provenance.rows
        if len(self.scores) != rows:
            raise InputError(f"The dataset has {rows} rows and the scores cover {len(self.scores)}. Pass all parts.")
        if self.selection is not None:
            check_of(self.selection, self.scores)
        if self.layers is not None:
            check_layers(self.layers, self.scores)
        for epoch in self.epochs:
            for found in (epoch.scores, epoch.selection):
                if found is not None and len(found) != rows:
                    raise InputError(f"Epoch {epoch.number} is of {len(found)} rows and the scores are of {rows}.")

    @property
    def of_tokens(self) -> bool:
        """Whether tokens were selected, and no rows."""
        return self.selection is not None and self.selection.policy == OF_TOKENS

    def decided(self) -> Selection:
        """The selection, or where there is none what `DataSelector()` would decide."""
        return self._default if self.selection is None else self.selection

    @cached_property
    def _default(self) -> Selection:
        assert self.scores is not None, "there are scores"
        return DataSelector().select(self.scores)


def read_contents(
    path: str | os.PathLike[str],
    selection: str | os.PathLike[str] | None = None,
    comparison: str | os.PathLike[str] | None = None,
) -> Contents:
    """What lies at a path.

    Args:
        path: a file of scores, a folder that `score`, `clean` or `compare` wrote to, or a training's `output_dir`.
        selection: a file or folder of `select`, where it lies elsewhere.
        comparison: a file or folder of `compare`, likewise.

    Raises:
        InputError: there is nothing to report on, a file is damaged or of another version, or the selection is of
            other scores.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"There is nothing at '{path}'. Pass the folder of a run, or of scores.")
    folder = path.parent if path.suffix == ".parquet" else path
    if not file_at(path, SCORES_FILE).is_file() and (folder / NAME).is_dir():
        path = folder = folder / NAME  # a training's output_dir
    if not file_at(path, SCORES_FILE).is_file() and (folder / SCORES_FOLDER).is_dir():
        path = folder / SCORES_FOLDER  # a recipe's
    scores = ScoreTable.load(path) if file_at(path, SCORES_FILE).is_file() else None
    compared, cleaned = _comparison(folder, comparison), _cleaned(folder)
    epochs = list(_epochs(folder))
    decided = _selection(folder, selection, epochs)
    if scores is None and cleaned is not None:
        scores, decided = as_scores(cleaned.scores), rows_of(cleaned)
    if scores is None and compared is None:
        there = f"'{folder}' holds no scores and no comparison"
        if decided is not None:
            raise InputError(f"{there}, but a selection: pass the folder of its scores, and this one as --selection.")
        raise InputError(f"{there}. Run `resofilter score` or `compare` first.")
    layers = (path.parent if path.suffix == ".parquet" else path) / LAYERS_FOLDER
    return Contents(
        scores=scores,
        selection=decided,
        epochs=epochs,
        log=_log(folder / LOG_FILE),
        layers=ScoreTable.load(layers) if (layers / SCORES_FILE).is_file() else None,
        cleaned=cleaned,
        comparison=compared,
    )


def _selection(folder: Path, elsewhere: str | os.PathLike[str] | None, epochs: Sequence[Epoch]) -> Selection | None:
    """The one that was asked for, or that lies there, or the last epoch's."""
    if elsewhere is not None:
        return Selection.load(elsewhere)
    if (folder / SELECTION_FILE).is_file():
        return Selection.load(folder)
    return next((each.selection for each in reversed(epochs) if each.selection is not None), None)


def rows_of(cleaned: TokenSelection) -> Selection:
    """The rows that keep a token, where it was tokens that were selected."""
    provenance = cleaned.scores.provenance
    keep = np.zeros(provenance.rows, dtype=bool)
    keep[cleaned.scores.sample_id] = cleaned.kept_of_row > 0
    reason = [NO_TOKEN] * provenance.rows
    for row, count, kept in zip(cleaned.scores.sample_id, cleaned.scores.num_tokens, cleaned.kept_of_row, strict=True):
        reason[row] = KEPT if kept else EMPTIED if count else NO_TOKEN
    return Selection(keep, reason, OF_TOKENS, provenance.to_json())


def as_scores(tokens: TokenScores) -> ScoreTable:
    """Each row's mean loss under the base model as its score, where tokens were cleaned and no row was scored."""
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


def check_of(selection: Selection, scores: ScoreTable) -> None:
    """Raise InputError where a selection was made on other scores."""
    if len(selection) != len(scores):
        raise InputError(f"The selection is of {len(selection)} rows and the scores are of {len(scores)}.")
    try:
        theirs = Provenance.from_json(selection.provenance)
    except (TypeError, KeyError, ValueError) as error:
        raise InputError("The selection was written by another version. Make it again.") from error
    differences = theirs.differences(scores.provenance)
    if differences:
        raise InputError(f"The selection is of other scores, they differ in {'; '.join(differences)}.")


def check_layers(layers: ScoreTable, scores: ScoreTable) -> None:
    """Raise InputError where the layers were measured with another model, or on other rows."""
    for name in ("weights", "tokenizer", "template", "dataset", "rows"):
        mine, theirs = getattr(scores.provenance, name), getattr(layers.provenance, name)
        if mine != theirs:
            raise InputError(
                f"The layers were measured on another {name} than the scores ({str(theirs)[:8]} / {str(mine)[:8]}): "
                "measure them again, or move them away."
            )


def _epochs(folder: Path) -> Iterator[Epoch]:
    """In the order of their numbers."""
    found = [re.search(r"-epoch-(\d+)\.parquet$", path.name) for path in folder.glob("*-epoch-*.parquet")]
    for number in sorted({int(each.group(1)) for each in found if each}):
        scores, selection = folder / f"scores-epoch-{number}.parquet", folder / selection_file(number - 1)
        yield Epoch(
            number,
            ScoreTable.load(scores) if scores.is_file() else None,
            Selection.load(selection) if selection.is_file() else None,
        )


def _comparison(folder: Path, elsewhere: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """What `compare` has left, there or elsewhere."""
    place = folder if elsewhere is None else Path(elsewhere)
    path = place if place.suffix == ".json" else place / COMPARISON_FILE
    found = _json(path)
    if found is None and elsewhere is not None:
        raise InputError(f"There is no comparison at '{elsewhere}'. Pass the folder of one, or its {COMPARISON_FILE}.")
    if found is None:
        return None
    lines = found.get("lines") if isinstance(found, dict) else None
    if not isinstance(lines, list) or not all(isinstance(line, dict) and line.keys() >= LINE for line in lines):
        raise InputError(f"'{path}' is damaged, or no comparison of this version. Remove it, or make it again.")
    return found


def _log(path: Path) -> list[dict[str, Any]]:
    """The Trainer's, if there is one."""
    found = _json(path) or []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise InputError(f"'{path}' is damaged, or no log of this version. Remove it, or make it again.")
    return found


def _cleaned(folder: Path) -> TokenSelection | None:
    """Which tokens a cleaning has kept: decided again, as it was."""
    settings = _json(folder / SUMMARY_FILE)
    sound = isinstance(settings, dict) and {"keep_tokens", "ranking"} <= settings.keys()
    if not sound or not (folder / TOKEN_SCORES_FILE).is_file():
        return None
    scores = TokenScores.load(folder)
    ids = scores.sample_id
    if len(ids) and not 0 <= ids.min() <= ids.max() < scores.provenance.rows:
        raise InputError(f"The token scores in '{folder}' are of rows that the dataset has not. Make them again.")
    return TokenSelector(settings["keep_tokens"], settings["ranking"]).select(scores)


def _json(path: Path) -> Any:
    """What a file holds; None where there is none."""
    return read_json(path, "Remove it, or make it again.") if path.is_file() else None
