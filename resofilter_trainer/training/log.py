"""What a run reports: scalars for the trackers, lines for the console. Knows the Trainer's trackers only."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import Trainer

from ..scores.doubts import remarks_of
from ..scores.full_step import full_step_of, span_of
from ..scores.score_table import SCORES_FILE, ScoreTable, count_reasons
from ..selecting.results import NAME, Results
from ..selecting.selection import KEPT, Selection
from . import trainer_access as access
from .measurements import Measurements

LISTED = 3  # reasons in a line


class RunLog:
    """Reports to the trackers of a trainer and to the console.

    Args:
        trainer: the trainer.
        history: the list to which every entry with scalars is added, as the trackers get it, with its step.
    """

    def __init__(self, trainer: Trainer, history: list[dict[str, float]]) -> None:
        self._trainer, self._history = trainer, history
        self._told: set[str] = set()  # the names of the remarks that were made

    def rows(self, when: str, measurements: Measurements, kept: np.ndarray, results: Results) -> None:
        """Report the scores, how many rows have none, and how many the next epoch keeps with how many of the tokens.

        Args:
            when: the moment of the scores, as text: `"after epoch 1 of 3"`.
            measurements: what was measured of every row.
            kept: (N,) bool, the rows to keep.
            results: the scores of all rows of the user's dataset, and what was decided on them.
        """
        table, selection = results.scores, results.selections[-1]
        assert table is not None, "scores are made before they are reported"
        scores = measurements.score[np.isfinite(measurements.score)]
        tokens = measurements.num_tokens
        dropped_tokens = float(tokens[~kept].sum() / max(tokens.sum(), 1))
        scalars = {"kept_share": float(kept.mean()), "dropped_token_share": dropped_tokens}
        if len(scores):
            quantiles = np.quantile(scores, [0.25, 0.5, 0.75])
            scalars |= dict(zip(("score_q25", "score_q50", "score_q75"), map(float, quantiles), strict=True))
        broken = int((measurements.ever & ~np.isfinite(measurements.score)).sum())
        notes = f", {broken} rows have a score that is not a number" if broken else ""
        span = span_of(scores, full_step_of(table.provenance.config))
        line = (
            f"scores {when}: {span}{notes}; kept: {int(kept.sum()):,} of {len(kept):,} rows "
            f"with {1 - dropped_tokens:.1%} of the tokens"
            f"{_dropped(table, selection)}{_without_score(self._trainer, table)}"
        )
        self._say(scalars, line)
        for name, remark in remarks_of(table).items():
            if name not in self._told:
                self._told.add(name)
                self._say({}, f"warning: {remark}")

    def end(self, results: Results, folder: Path) -> None:
        """Write the log beside the scores, and report where these are."""
        if self._trainer.args.should_save:
            results.save_log(folder, self._trainer.state.log_history)
        if results.scores is not None:
            self._say({}, f"scores, selections and plan: {folder}")

    def plan(self, line: str) -> None:
        """Report the plan of an epoch in the console."""
        self._say({}, line)

    def tokens(self, numbers: Mapping[str, Any]) -> None:
        """Report what a cleaning of tokens kept, in all and of each group: groups may lose out from stage to stage."""
        groups = numbers.get("share_of_groups", {})
        share = numbers["tokens_kept"] / max(numbers["tokens"], 1)
        scalars = {"kept_token_share": share, **{f"kept_token_share/{name}": kept for name, kept in groups.items()}}
        stage = f" of stage {numbers['part'] + 1} of epoch {numbers['epoch']}" if "part" in numbers else ""
        stage = f" of stage {numbers['stage']}" if "stage" in numbers else stage
        listed = "".join(f", {name} {kept:.1%}" for name, kept in groups.items())
        self._say(scalars, f"kept {numbers['tokens_kept']:,} of {numbers['tokens']:,} tokens{stage}{listed}")

    def spike(self, line: str, left_out: int | None) -> None:
        """Report a step that stands out; and how many updates are left out, if its own is."""
        self._say({} if left_out is None else {"updates_left_out": float(left_out)}, line)

    def _say(self, scalars: Mapping[str, float], line: str) -> None:
        if scalars:
            access.log(self._trainer, {f"{NAME}/{name}": value for name, value in scalars.items()}, self._history)
        if self._trainer.args.process_index == 0:
            tqdm.write(f"{NAME}: {line}")


def say_next(trainer: Trainer) -> None:
    """Say in the console which command shows the scores of a run."""
    if trainer.args.process_index == 0:
        output = shlex.quote(str(trainer.args.output_dir))
        tqdm.write(f"{NAME}: Next: resofilter report {output} (report=True writes it with the rows' texts)")


def _dropped(table: ScoreTable, selection: Selection) -> str:
    """How many of the rows with a score are dropped, and why; empty where none is."""
    scored = dict(zip(table.table["sample_id"].to_pylist(), table.scored.tolist(), strict=True))
    reasons = [why for row, why in enumerate(selection.reason) if why != KEPT and scored.get(row)]
    why = ", ".join(f"{count:,} {reason}" for reason, count in count_reasons(reasons, LISTED))
    return f"; dropped: {why}" if reasons else ""


def _without_score(trainer: Trainer, table: ScoreTable) -> str:
    """How many of the user's rows have no score, why, and where each is listed; empty where all have one."""
    reasons = [why for why in table.reasons if why is not None]
    if not reasons:
        return ""
    why = ", ".join(f"{count:,} {reason}" for reason, count in count_reasons(reasons, LISTED))
    place = Path(str(trainer.args.output_dir)) / NAME / SCORES_FILE
    return f"; {len(reasons):,} of {len(table):,} rows have no score ({why}): see reason in {place}"


def warn_that_nothing_is_filtered(trainer: Trainer, first: int, epochs: int) -> None:
    """Warn that filtering would begin after the last epoch."""
    if trainer.args.process_index == 0:
        warnings.warn(
            f"Filtering would begin after {first} of {epochs} epochs: no row is ever dropped, and the run only gives "
            "scores. Train for more epochs, or pass when='before'.",
            stacklevel=2,
        )


def warn_that_no_pass_is_filtered(trainer: Trainer, first: int, passes: int) -> None:
    """Warn that a run on a stream ended in a pass before its filtering would begin."""
    if trainer.args.process_index == 0:
        warnings.warn(
            f"max_steps={trainer.args.max_steps} ended in pass {passes + 1} over the stream, and filtering would begin "
            f"with pass {first + 1}: no row was dropped, and the run only gives scores. Set a larger max_steps.",
            stacklevel=2,
        )
