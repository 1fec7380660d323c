"""One run of a Trainer on a stream: what happens at each of its events. Knows the Trainer's loop.

An epoch is a pass over the stream. Its rows are counted while the first one trains, and from the second on the dropped
rows are left out. The number of steps is `max_steps`, so the Trainer plans them and the learning rate itself.

    the Trainer's epochs     0---------------|1-------|2-------|     an epoch ends where the stream ends
    a pass on fewer rows     all rows        |kept    |kept

Micro-batches at the end of a pass that fill no step add to the gradient of the next pass's first one, as they do
without a callback.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from accelerate.utils import gather_object
from transformers import Trainer, TrainerControl

from ..config import InputError, ResonanceConfig
from ..data.fingerprints import describe_training
from ..data.models import check_causal
from ..io.files import save_parquet
from ..io.made_from import check_made_from
from ..scores.provenance import Provenance
from ..selecting.results import IDS_FILE, Results, remove_stale
from ..selecting.results import NAME as STATE
from . import trainer_access as access
from .checkpoints import checkpoint_folder, warn_of_missing_state, warn_of_other_skipping
from .deciding import Decisions
from .examples import Rows
from .filtering import FilterConfig
from .log import RunLog, warn_that_no_pass_is_filtered
from .measurements import Measurements
from .plan import Batching, Plan
from .plan_log import line, save_plan, why
from .recording import Recording
from .refusals import check_trainer
from .refused_uses import check_use
from .resuming import SKIPPING, TOKEN_RULE, resumed
from .rule_loss import RuleWeights
from .sampler import ROW
from .settings_of import settings_of
from .stream_check import check_stream
from .stream_rows import MetRows, met_in
from .trainer_patches import StreamPatch
from .watching import Watch
from .weighting import BatchWeights


class StreamRun:
    """One call of `trainer.train()` on a stream. It has the methods of `Run`.

    Args:
        trainer: the trainer, about to start or to resume.
        train_dataloader: the loader that it is going to iterate.
        filtering: the settings of the filter: which rows to drop, and when. Shares are of the rows of the first pass.
        config: the step to measure, and how.
        results: the results, which the run fills in.
        recording: the ledger of the run.
        rule: what weighs tokens.
        id_column: the column with an id for each row; None to know rows by their order.

    Raises:
        InputError: the trainer has a setting with which this cannot work.
    """

    def __init__(
        self,
        trainer: Trainer,
        train_dataloader: Any,
        filtering: FilterConfig,
        config: ResonanceConfig,
        results: Results,
        recording: Recording,
        rule: RuleWeights,
        id_column: str | None = None,
    ) -> None:
        check_causal(trainer.model)
        check_stream(trainer, train_dataloader, filtering, id_column)
        check_trainer(trainer, train_dataloader)
        check_use(trainer, config.update)
        self.trainer, self.results, self._recording = trainer, results, recording
        self.folder = Path(str(trainer.args.output_dir)) / STATE
        self._filter, self._config, self._rule = filtering, config, rule
        self._batching = access.batching_of_stream(trainer)
        self._max_steps = trainer.args.max_steps
        filtering.shares(self._max_steps)  # raises where there are more than passes
        self._patch = StreamPatch(trainer, train_dataloader, id_column, self.fetch, rule.acting)
        self._weights = BatchWeights(trainer, train_dataloader)
        own = {"max_steps": self._max_steps, "id_column": id_column}
        self._settings = settings_of(trainer, filtering, config, self._batching, recording, rule, **own)
        self._log = RunLog(trainer, results.log)
        self._known = MetRows()
        self._watch = Watch(trainer, config, self._batching, self.examples, True, False, recording)
        self._decisions: Decisions | None = None  # from the end of the first pass on
        self._entries: list[dict[str, Any]] = []  # of the plan
        self._passes = 0  # that have ended
        self._micro_batches = 0  # of this pass, that the Trainer has got
        self._partial = 0  # of them, those at its end that fill no step
        self._exhausted = False  # whether the stream has ended in this pass
        self._resumed_at: Path | None = None  # the checkpoint, until the first step after resuming
        self._within = self._ends_again = False  # whether it was made within a pass; at its end, which comes again
        self._saved_at = (-1, -1)  # step and ended passes
        self._error: InputError | None = None  # raised once everything is saved

    @property
    def rows(self) -> access.TrainerRows:
        """The rows that were met."""
        there, total = self._known.positions, self._known.total
        total = int(there.max(initial=-1)) + 1 if total is None else total
        return access.TrainerRows(there, total, access.no_token(self.trainer))

    @property
    def examples(self) -> Rows:
        """The rows that were met, as the examples of the loader."""
        return Rows(self.rows, self.trainer.train_dataset)

    # Start or resume

    def begin(self, checkpoint: str | None) -> None:
        """Start, or resume from a checkpoint."""
        step, accumulation = self.trainer.state.global_step, self._batching.accumulation
        if step:
            self._resume(checkpoint_folder(checkpoint, self.trainer))
        else:
            self._provenance = describe_training(self.trainer, 0, self._config, self._settings)
            self.results.scores, self.results.selections = None, []
            if self.trainer.args.should_save:
                remove_stale(self.folder)
        self._provenance_json = self._provenance.to_json()
        size = self._batching.per_micro_batch
        skipped = 0 if self.trainer.args.ignore_data_skip else step * accumulation * size
        self._within = self._micro_batches > 0
        self._begin_pass()
        self._patch.rows.place(skipped, self._micro_batches * size, size)
        self._patch.install()
        self._watch.attach(self._provenance_json, self._known.positions_of)
        self._remember()

    def _resume(self, folder: Path) -> None:
        """Resume from a checkpoint, wherever in a pass it was made."""
        saved = self.trainer.state.stateful_callbacks.get(STATE)
        if saved is None or "passes" not in saved:
            raise InputError(
                "This checkpoint was made without ResonanceCallback on a stream, so the rows it has seen are unknown. "
                "Resume without the callback, or start again with it."
            )
        warn_of_missing_state(self.trainer, folder.parent)
        what, remedy = f"'{folder.parent}' holds a checkpoint", "Resume with the settings it was made with."
        there = saved["settings"]
        check_made_from(there, self._settings, what, remedy, names={*there, TOKEN_RULE} - {*SKIPPING})
        warn_of_other_skipping(self.trainer, folder.parent, saved, self._settings)
        self._provenance = resumed(Provenance.from_json(saved["provenance"]), there, self._settings)
        self.results.log[:] = saved["log"]
        self._passes, self._micro_batches = saved["passes"], saved["micro_batches"]
        self._entries, self._resumed_at, self._ends_again = saved["plan"], folder.parent, saved["ends_again"]
        self._watch.measurements, extra = Measurements.load(folder)
        known, total = self._known, saved["total"]
        known.positions, known.marks, known.total = extra["position"], extra["mark"], total
        known.ids = extra["id"].tolist() if "id" in extra else []
        if self._passes:
            self._decide_from_here()
            self.results.load_selections(folder, self._passes + 1)

    def uninstall(self) -> None:
        """Leave the trainer and the model as they were found."""
        self._watch.detach()
        self._rule.end_update()
        self._weights.detach()
        self._patch.remove()

    # One step

    def begin_epoch(self) -> None:
        """An epoch of the Trainer's begins: the rest of a pass after resuming, otherwise a pass."""
        self._exhausted = False

    def fetch(self, iterator: Any, count: int, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The Trainer's `get_batch_samples`: the micro-batches of a step, and its number of learnt tokens."""
        if not self._patch.is_read:  # by a later training, without the callback
            return self._patch.inner(iterator, count, *args, **kwargs)
        if self.trainer.state.global_step >= self._max_steps:  # a finished run, of which the Trainer would make more
            return [], None
        batches, num_items = self._patch.inner(iterator, count, *args, **kwargs)
        self._exhausted = self._exhausted or len(batches) < count
        if not batches:  # the Trainer asks until its epoch has max_steps
            return batches, num_items
        rows = [batch.pop(ROW).cpu().numpy() for batch in batches]
        for batch in batches:
            self._known.add(met_in(batch))
        if any("labels" not in batch for batch in batches):
            raise InputError("The batches have no labels: ResonanceCallback needs a causal language model's.")
        weights = None if self._decisions is None else self._decisions.weights
        self._watch.expect(batches, rows, num_items, weights)
        if weights is not None:
            self._weights.put(batches, rows, weights)
        self._micro_batches += len(batches)
        self._partial = len(batches) if len(batches) < count else 0
        return batches, num_items

    def begin_step(self) -> None:
        """Undo the random draw of an iterator that an uninterrupted run did not make."""
        if self._resumed_at is not None:
            self._undo_draw()

    def _undo_draw(self) -> None:
        self._resumed_at = None
        if self.trainer.args.ignore_data_skip and self._within:  # otherwise the Trainer restores it after skipping
            self._patch.rows.undo_draw()

    def before_optimizer(self) -> None:
        """Prepare the measurement of the optimizer's step."""
        self._watch.before_step(left_out=self._rule.leaves_out())
        self._rule.leave_out()

    def after_optimizer(self) -> None:
        """Measure what the optimizer's step has changed, where that is what is measured."""
        self._watch.after_step()
        self._rule.end_update()

    def end_step(self, saving: bool) -> None:
        """Keep what was measured before anything is logged or saved."""
        state = self.trainer.state
        self._watch.end_step(self._passes, state.global_step)
        self._rule.end_step()
        state.epoch = self._passes + self._micro_batches / (self._max_steps * self._batching.accumulation)
        self._remember()
        if self._known.has_many_new and self.trainer.args.world_size == 1:
            self._gather()
        if saving:
            self.save_checkpoint()

    # The end of a pass

    def end_epoch(self, control: TrainerControl) -> None:
        """End a pass where the stream has ended, and decide on the next one."""
        if self.trainer.state.global_step >= self._max_steps:
            return
        if not self._exhausted:
            if control.should_training_stop:
                return
            raise InputError(
                f"Another callback ended pass {self._passes + 1} over the stream early (should_epoch_stop): only some "
                "of its rows are measured. Remove that callback, or let it stop the training."
            )
        if self._resumed_at is not None:  # nothing was left of the pass
            access.restore_random_state(self.trainer, self._resumed_at)
            self._undo_draw()
            control.should_training_stop = False  # the Trainer takes the stream to be empty
        if self._ends_again:  # what is due at this end was done before the checkpoint
            control.should_log = control.should_evaluate = control.should_save = self._ends_again = False
        saved = bool(self._partial and control.should_save)
        if saved:  # a checkpoint holds no gradient: a run that resumes from it trains these again
            self._remember(before=self._partial)
            self.save_checkpoint()
        self._close_pass()
        if self._error is not None:
            control.should_training_stop = True
            control.should_save = self.trainer.args.save_strategy != "no"
        elif saved:
            self._saved_at = self.trainer.state.global_step, self._passes
            return
        self._remember()
        if control.should_save:
            self.save_checkpoint()

    def _close_pass(self) -> None:
        """Score, decide on the next pass, and begin it."""
        if self._partial:  # no step will: the rows are measured, and their gradient waits for the next pass
            self._watch.end_rest(self._passes, self.trainer.state.global_step)
        self._gather()
        if not len(self._known):
            raise InputError("The stream has no rows to train on.")
        self._known.total = int(self._patch.rows.seen)
        self._score()
        decisions, ended = cast(Decisions, self._decisions), self._passes + 1
        decisions.select(ended)
        kept = int(decisions.kept.sum())
        self._error = self._weights.refusal(decisions.weights)
        if self._batching.micro_batches(kept) < self._batching.accumulation:
            self._error = _no_step(ended, kept, self._batching) if kept else decisions.no_batch(ended, self.folder)
        self._passes, self._micro_batches, self._partial = ended, 0, 0
        self._begin_pass()
        self._tell_results(ended)

    def _score(self) -> None:
        correct = bool(self._filter.correct_drift)
        self._watch.measurements.end_epoch(self._passes, correct)
        self._decide_from_here()
        cast(Decisions, self._decisions).score(self._watch.measurements, self._provenance)

    def _decide_from_here(self) -> None:
        """Make the decisions of the rows that are known; in the first pass, all are kept."""
        rows = self.rows
        self._provenance = dataclasses.replace(self._provenance, rows=rows.total, dataset=self._known.digest)
        self._provenance_json = self._provenance.to_json()
        if self._decisions is None:
            self._decisions = Decisions(self._filter, self._max_steps, self.examples, self.results, None)
            if not self.results.selections:
                self._decisions.begin(self._provenance)

    def _begin_pass(self) -> None:
        """Let the stream leave out the rows that are dropped."""
        kept = None if self._decisions is None else self._decisions.kept
        self._patch.rows.begin(self._passes, self._known, kept)
        if self._error is None:
            self._tell_plan()

    # What is written where

    def _tell_plan(self) -> None:
        """Log the present pass's rows and steps, and write the plan of all passes so far."""
        passes, done, total = self._max_steps, self.trainer.state.global_step, len(self._known)
        if not self._passes:
            self._log.plan(f"epoch 1: all rows of the stream, at most {passes:,} steps (no scores yet)")
            return
        plan = Plan(self._batching, [0] * passes, passes)
        for number in range(len(self._entries), self._passes + 1):
            kept = int(self.results.selections[number].keep.sum()) if number else total
            steps = min(self._batching.micro_batches(kept) // self._batching.accumulation, passes - done)
            entry = {"epoch": number + 1, "rows": kept, "of_rows": total, "steps": steps if number else done}
            reason = why(plan, self._filter, number, True)
            self._entries.append({**entry, "total_steps": passes, "decided": True, "why": reason})
        self._log.plan(line(self._entries[-1]))
        if self.trainer.args.should_save:
            save_plan(self.folder, self._entries)

    def _gather(self) -> None:
        """Join what all processes have met and measured."""
        new = self._known.take_new()
        self._known.join(gather_object(new) if self.trainer.args.world_size > 1 else new)
        self._watch.measurements.grow(len(self._known))
        self._watch.gather()

    def save_checkpoint(self) -> None:
        """Write tables beside the checkpoint of this step, if possible before the Trainer writes its own files."""
        now = self.trainer.state.global_step, self._passes
        if self._saved_at == now:
            return
        self._gather()
        self._saved_at = now
        if self.trainer.args.should_save:
            folder = checkpoint_folder(None, self.trainer)
            self.results.save_selections(folder)
            known = {"position": self._known.positions, "mark": self._known.marks}
            ids = {"id": np.array(self._known.column_of_ids)} if self._known.ids else {}
            self._watch.measurements.save(folder, {**known, **ids})

    def end(self) -> None:
        """Write the last results, leave the trainer as it was found, and raise the error that stopped the training."""
        try:
            if self._micro_batches:  # within a pass
                self._gather()
                self._score()
                self._save_results(self._passes + 1)
                if self._passes < self._filter.first and self._filter.keep != 1:
                    warn_that_no_pass_is_filtered(self.trainer, self._filter.first, self._passes)
            self._recording.flush()
            self._log.end(self.results, self.folder)
        finally:
            self.uninstall()
        if self._error is not None:
            raise self._error

    def _tell_results(self, ended: int) -> None:
        """Write the scores and selections of all ended passes, and report them."""
        self._save_results(ended)
        kept = cast(Decisions, self._decisions).kept
        self._log.rows(f"after pass {ended} over the stream", self._watch.measurements, kept, self.results)

    def _save_results(self, ended: int) -> None:
        if self.trainer.args.should_save:
            self.results.save(self.folder, ended)
            if self._known.ids:
                table = pa.table({"sample_id": self._known.positions, "id": self._known.column_of_ids})
                save_parquet(table, self.folder / IDS_FILE, {})

    def _remember(self, before: int = 0) -> None:
        """Keep the small part of the state where the Trainer saves its own.

        Args:
            before: the number of micro-batches at the end of the pass that a resumed run trains again.
        """
        own = {"settings": self._settings, "passes": self._passes, "micro_batches": self._micro_batches - before}
        own |= {"total": self._known.total, "provenance": self._provenance_json, "ends_again": before > 0}
        own |= {"plan": [*self._entries], "log": [*self.results.log], **self._recording.to_json()}
        self.trainer.state.stateful_callbacks[STATE] = own


def _no_step(ended: int, kept: int, batching: Batching) -> InputError:
    return InputError(
        f"Epoch {ended + 1} would have {kept} rows, which fill no step of {batching.accumulation} batches "
        f"of {batching.per_micro_batch}, so the Trainer would never end. Keep more rows, or lower "
        "gradient_accumulation_steps."
    )
