"""Which rows each epoch of a run trains on, and why. Knows scores and selections; changes nothing in the trainer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..config import InputError
from ..scores.provenance import Provenance
from ..selecting.results import Results
from ..selecting.selection import KEPT, Selection
from .examples import Examples
from .filtering import FilterConfig, decide, most_common
from .measurements import Measurements
from .token_run import CleaningRun


class Decisions:
    """The selections of a run, one for each epoch that was decided on.

    Args:
        filtering: the settings of the filter: which rows to drop, and when.
        epochs: the number of epochs of the run.
        examples: what the examples of the trainer's loader are.
        results: where scores and selections are kept.
        tokens: the run's token cleaning, which may leave rows without a learnt token; None for none.
    """

    def __init__(
        self, filtering: FilterConfig, epochs: int, examples: Examples, results: Results, tokens: CleaningRun | None
    ) -> None:
        self._filter, self._epochs, self._results, self._tokens = filtering, epochs, results, tokens
        self._examples, self._rows = examples, examples.rows
        self._idle: list[int] = []

    @property
    def kept(self) -> np.ndarray:
        """(N,) bool, the trainer's rows that the latest selection keeps."""
        return self._results.selections[-1].keep[self._rows.sample_ids]

    @property
    def weights(self) -> np.ndarray | None:
        """(S,) the weight of the loss of each of the trainer's samples in this epoch; None where all weigh the same."""
        weight = self._results.selections[-1].weight
        return None if weight is None else self._examples.of_samples(weight[self._rows.sample_ids])

    @property
    def trainable(self) -> np.ndarray:
        """The positions in the user's dataset of the rows that have a token to learn, ascending or as shuffled."""
        ids = self._rows.sample_ids if self._tokens is None else self._rows.sample_ids[~self._tokens.emptied]
        return ids[~np.isin(ids, self._idle)]

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each epoch, as far as shares decide on it; all rows where a policy will."""
        shares = self._filter.shares(self._epochs)
        sizes = self._filter.sizes(self._epochs, len(self.trainable))
        return [size + (share == 1) * len(self._idle) for size, share in zip(sizes, shares, strict=True)]

    def place(self) -> tuple[np.ndarray, Sequence[int]]:
        """Make the examples of the rows that are kept, see `Rows.place`."""
        return self._examples.place(self.kept, self.sizes)

    def begin(self, provenance: Provenance) -> None:
        """Keep every row that has a token to learn."""
        reason = [why or KEPT for why in self._left_out()]
        keep = np.array([why == KEPT for why in reason])
        policy = {**self._filter.to_json(), "epoch": 0}
        self._results.selections = [Selection(keep, reason, policy, provenance.to_json())]

    def score(self, measurements: Measurements, provenance: Provenance) -> None:
        """Make the table of scores from the measurements of samples."""
        measurements = self._examples.by_row(measurements)
        reasons, rows = self._left_out(), self._rows
        if self._tokens is None:  # otherwise a later stage may learn a token of such a row
            self._idle = rows.sample_ids[measurements.idle].tolist()
        for row in self._idle:
            reasons[row] = rows.no_token
        for row in rows.sample_ids[~measurements.ever]:
            reasons[row] = reasons[row] or "not measured yet"
        self._results.scores = measurements.to_scores(self._rows.sample_ids, reasons, provenance)

    def select(self, epoch: int) -> None:
        """Decide on the rows of an epoch, counted from 0, by the scores as they are."""
        last, scores = self._results.selections[-1], self._results.scores
        if self._filter.decides(epoch):
            assert scores is not None, "scores are made before anything is decided"
            share = self._filter.shares(self._epochs)[epoch]
            idle = dict.fromkeys(self._idle, self._rows.no_token)
            last = decide(self._filter, epoch, share, scores, self.trainable, last, idle)
        self._results.selections.append(last)

    def forget_the_first(self) -> None:
        """Leave out the selection of all rows, where scores from before the run decide on the first epoch."""
        self._results.selections = self._results.selections[1:]

    def no_batch(self, epoch: int, folder: object) -> InputError:
        """The error for an epoch whose rows do not fill a batch."""
        why = most_common(self._results.selections[-1].reason)
        return InputError(
            f"Epoch {epoch + 1} would have no batch: {why}. Start again with another threshold or policy. "
            f"The scores are in {folder}."
        )

    def _left_out(self) -> list[str | None]:
        return self._rows.left_out(None if self._tokens is None else self._tokens.emptied)
