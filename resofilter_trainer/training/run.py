"""One run of a Trainer with the callback: its true epochs, positions and rows. Knows the Trainer's loop.

The Trainer counts epochs and steps for the whole dataset. The true epoch, its position and its order are kept here. An
epoch on fewer rows ends when its sampler has no more. On going on from a checkpoint the Trainer skips as many steps as
it believes to have been made in one of its epochs: it is given those to skip, and then what is left of the true epoch;
or, where its epoch might end before the true one, nothing, and the true epoch goes on in the next of the Trainer's.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import RandomSampler
from transformers import Trainer, TrainerControl

from ..config import InputError, ResonanceConfig, TokenCleaning
from ..data.fingerprints import describe_training, run_settings
from ..data.preparation import prepared_already
from ..model.gradients import segments_of
from ..model.training_recorder import MicroBatch, StepRecorder, TrainingRecorder, recorders
from ..model.up_projection import find_up_projections
from ..scores.provenance import Provenance
from ..scores.score_table import ScoreTable
from ..scoring.dataset import score_prepared
from ..selecting.results import NAME as STATE
from ..selecting.results import Results, remove_stale
from ..selecting.selection import KEPT, Selection
from . import trainer_access as access
from .filtering import FilterConfig, decide, most_common
from .log import report_rows, report_tokens
from .measurements import Measured, Measurements
from .plan import Plan, Progress
from .sampler import ROW, ShrinkingSampler
from .token_run import CleaningRun
from .weighting import BatchWeights, weights_of

OPTIMIZER = "optimizer"


class Run:
    """One call of `trainer.train()`.

    Args:
        trainer: about to begin, or to go on.
        train_dataloader: that it is going to iterate.
        filtering: what is dropped and when.
        config: which step is measured and how.
        by_optimizer: whether the step is the run's own optimizer's.
        results: filled in as the run goes on.
        cleaning: which tokens are learnt; None for all.

    Raises:
        InputError: the trainer has a setting with which this cannot work.
    """

    def __init__(
        self,
        trainer: Trainer,
        train_dataloader: Any,
        filtering: FilterConfig,
        config: ResonanceConfig,
        by_optimizer: bool,
        results: Results,
        cleaning: TokenCleaning | None = None,
    ) -> None:
        access.check_trainer(trainer, train_dataloader)
        self.filter, self.config, self.by_optimizer, self.results = filtering, config, by_optimizer, results
        self.trainer, self.args, self.loader = trainer, trainer.args, train_dataloader
        self.folder = Path(str(self.args.output_dir)) / STATE
        self.batching = access.batching_of(trainer, train_dataloader)
        self.epochs = int(trainer.state.num_train_epochs)
        self.its_total = trainer.state.max_steps
        max_steps = self.args.max_steps if self.args.max_steps > 0 else None
        length = min(self.args.num_train_epochs, self.epochs) if max_steps is None else self.epochs
        sizes = self.filter.sizes(self.epochs, self.batching.rows)
        self.plan = Plan(self.batching, sizes, length, max_steps)
        self.held = access.held_rows(trainer)
        self.sample_ids = self.held.sample_ids
        self.weights = BatchWeights(trainer, train_dataloader)
        self.recorder: TrainingRecorder | None = None
        self.step_recorder: StepRecorder | None = None
        if filtering.when == "training":
            size = self.batching.per_micro_batch * self.batching.accumulation
            self.recorder, self.step_recorder = recorders(cast(Any, trainer.model), config, size)
        sampler = access.sampler_of(train_dataloader)
        self.random_order = isinstance(sampler, RandomSampler)
        self.sampler = ShrinkingSampler(sampler, self.batching, max_steps is not None)
        self.hold = access.Hold(trainer, train_dataloader, self.sampler, self.fetch)
        self.epoch, self.steps_done = 0, 0  # the true ones: steps of this epoch
        self.pending: list[Measured] = []  # of this process, since the last exchange
        self.rows: Sequence[np.ndarray] = []  # of each micro-batch of the update
        self.moved: np.ndarray | None = None
        self.skipping = self.restore_random_state = False
        self.saved_at = (-1, -1)  # step and epoch
        self.error: InputError | None = None
        self.tokens = None if cleaning is None else CleaningRun(trainer, cleaning)
        if self.tokens is not None:
            self.results.token_stages = self.tokens.stages
        self.nothing_learnt = False  # in this update, in any process
        found = find_up_projections(trainer.model, config.n_layers, config.up_projection)
        self.measurements = Measurements(self.batching.rows, sorted({each.layer for each in found}))
        self.settings = run_settings(
            trainer,
            **self.filter.to_json(),
            **self.config.to_json(),
            **dataclasses.asdict(self.batching),
            epochs=self.plan.epochs,
            max_steps=self.plan.max_steps,
            token_cleaning=None if cleaning is None else dataclasses.asdict(cleaning),
        )

    # Beginning

    def begin(self, checkpoint: str | None) -> None:
        """Measure first if that is asked for, or go on where the checkpoint was; then take hold of the trainer."""
        state = self.trainer.state
        if state.global_step:
            self._resume(access.checkpoint_folder(checkpoint, self.trainer))
        else:
            self._start()
        self.provenance_json = self.provenance.to_json()
        self.hold.take()
        if self.recorder is not None:
            self.recorder.attach()
        access.set_total(self.trainer, self.plan.total, intervals=state.global_step == 0)
        self._follow_progress(begin=state.global_step == 0)
        self._remember()

    def _start(self) -> None:
        self.provenance = describe_training(self.trainer, self.held.total, self.config, self.settings)
        self.progress = Progress.of(self.plan.total)
        self.results.scores, self.results.selections = None, [self._all_rows()]
        if self.args.should_save:
            remove_stale(self.folder)
        if self.tokens is not None:
            self._clean_tokens(self.tokens)
        if self.filter.when == "before":
            self._measure_before()
            self._select(0)
            if self.error is not None:
                raise self.error
            self.results.selections = self.results.selections[1:]
            self.sampler.begin(0, self._kept)
            self._replan()
            self.progress = Progress.of(self.plan.total)
            self._write_results(0)
            report_rows(self.trainer, "scores at the starting weights", self.measurements, self._kept)
        elif self.filter.first >= self.epochs and self.filter.keep != 1 and self.args.process_index == 0:
            warnings.warn(
                f"Filtering would begin after {self.filter.first} of {self.epochs} epochs: nothing is ever filtered, "
                "scores are all you get. Train for more epochs, or pass when='before'.",
                stacklevel=2,
            )

    def _clean_tokens(self, tokens: CleaningRun) -> None:
        """Measure the base model; with a fixed reference, leave out the rows that keep no token."""
        tokens.begin(self.provenance, self.folder, min(self.plan.steps(epoch) for epoch in range(self.epochs)))
        for numbers in tokens.stages:
            report_tokens(self.trainer, numbers)
        if tokens.emptied.any():
            self.results.selections = [self._all_rows()]
            self._check_rows(0)
            if self.error is not None:
                raise self.error
            self.plan = dataclasses.replace(self.plan, sizes=self.filter.sizes(self.epochs, len(self._trainable)))
            self.sampler.begin(0, self._kept)
            self._replan()
            self.progress = Progress.of(self.plan.total)

    def _measure_before(self) -> None:
        """The paper's definition: one pass at the starting weights (ResoFilter, 3.1)."""
        dataset = self.trainer.train_dataset
        if not isinstance(dataset, Dataset):
            raise InputError(f"when='before' needs a datasets.Dataset, got {type(dataset).__name__}.")
        if self.tokens is None:
            prepared = prepared_already(dataset, self.trainer.data_collator)
        else:
            prepared = self.tokens.cleaned()
        found, _, trust = score_prepared(self.trainer.model, prepared, self.args, self.config)
        self.provenance = dataclasses.replace(self.provenance, trust=trust)
        numbers = (found.loss, found.num_tokens, prepared.lengths, found.layers)
        self.measurements.add(Measured(0, 0, prepared.sample_ids, *numbers))
        self.measurements.end_epoch(0, correct_drift=False)
        self.results.scores = self._scores()

    def _resume(self, folder: Path) -> None:
        """Go on from a checkpoint, wherever in an epoch it was made."""
        saved = self.trainer.state.stateful_callbacks.get(STATE)
        if saved is None:
            raise InputError(
                "This checkpoint was made without ResonanceCallback: which rows it has seen is not known. "
                "Go on without the callback, or start anew with it."
            )
        mine = self.settings
        differences = [f"{name} ({old} / {mine.get(name)})" for name, old in saved["settings"].items()
                       if old != mine.get(name)]  # fmt: skip
        if differences:
            raise InputError(f"This checkpoint was made with other settings (there / here): {'; '.join(differences)}.")
        self.provenance = Provenance.from_json(saved["provenance"])
        self.progress = Progress(saved["scheduled"], tuple((step, at) for step, at in saved["knots"]))
        self.plan = dataclasses.replace(self.plan, sizes=saved["sizes"])
        self.epoch, self.steps_done = saved["epoch"], saved["steps_done"]
        if self.tokens is not None:
            self.tokens.load(folder, self.provenance, self.folder)
        self.measurements, extra = Measurements.load(folder)
        count = min(self.epoch, self.epochs - 1) + 1
        self.results.load_selections(folder, count)
        self.results.scores = self._scores() if np.isfinite(self.measurements.score).any() else None
        self.sampler.begin(self.epoch, self._kept)
        order = extra["order"][extra["order"] >= 0]
        self.sampler.order = order if len(order) else None
        if self.epoch < self.epochs and self.steps_done >= self.plan.steps(self.epoch):
            self._close_epoch()  # the checkpoint was made after the last step of an epoch, before its end
        self._check_rows(self.epoch)
        if self.error is not None:
            raise self.error
        self._place()

    def _place(self) -> None:
        """Bring the Trainer's idea of where its epoch stands together with the truth.

        Where the two agree, it skips what is to be skipped. Else it is given other slots to skip, and then what is left
        of the true epoch, if its own epoch has room for that: in the same epoch of both it has, an earlier one may not.
        """
        step, full = self.trainer.state.global_step, self.batching.steps(self.batching.rows)
        its_epoch, its_steps = divmod(step, full)
        to_skip = 0 if self.args.ignore_data_skip else its_steps
        slots = self.batching.accumulation * self.batching.per_micro_batch
        self.sampler.ended = self.epoch == self.epochs or step >= self.plan.total
        if to_skip and (its_epoch, its_steps) == (self.epoch, self.steps_done):
            return
        self.sampler.skip, self.sampler.prefix = self.steps_done * slots, to_skip * slots
        if to_skip and its_epoch < self.epoch:  # its epoch might end before the true one: go on in its next
            self.skipping = self.sampler.ended = True
        self.restore_random_state = self.steps_done > 0 and (self.skipping or not to_skip)

    def uninstall(self) -> None:
        """Leave the trainer and the model as they were found."""
        if self.recorder is not None:
            self.recorder.detach()
        self.weights.detach()
        self.hold.release()

    # One update

    def fetch(self, iterator: Any, count: int, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The Trainer's `get_batch_samples`: the micro-batches of an update, and its number of learnt tokens.

        The Trainer steps its optimizer after as many micro-batches as it asks for. The last update of an epoch on
        fewer rows may have fewer, and is filled up with micro-batches that have nothing to learn.
        """
        iterator = iterator if self.tokens is None else self.tokens.cleaned_batches(iterator, self._enter_update)
        batches, num_items = self.hold.inner(iterator, count, *args, **kwargs)
        if any(ROW not in batch for batch in batches):  # a later training, without the callback
            return batches, num_items
        rows = [batch.pop(ROW).cpu().numpy() for batch in batches]
        if any("labels" not in batch for batch in batches):
            raise InputError("The batches have no labels: ResonanceCallback needs a causal language model's.")
        if self.tokens is not None and batches:
            self.nothing_learnt = not access.learnt_anywhere(self.trainer, batches)
            num_items = access.at_least_one(num_items)
        if self.recorder is not None:
            self._expect(batches, rows, num_items)
        if self._weights is not None:
            self.weights.put(batches, rows, self._weights)
        filled = [access.masked_copy(batches[-1]) for _ in range(count - len(batches))] if batches else []
        return [*batches, *filled], num_items

    def _enter_update(self, tokens: CleaningRun) -> None:
        """Clean the part of the epoch that begins with this update, if one does."""
        assert self.sampler.order is not None
        part = tokens.part_at(self.steps_done, self.plan.steps(self.epoch))
        if part is not None:
            size = self.batching.per_micro_batch
            rows = self.sampler.order[: self.plan.micro_batches(self.epoch) * size]
            size *= self.batching.accumulation
            rows = rows[self.steps_done * size : part.stop * size]
            report_tokens(self.trainer, tokens.clean_part(self.epoch, part.number, rows))

    def _expect(self, batches: Sequence[Any], rows: Sequence[np.ndarray], num_items: Any) -> None:
        assert self.recorder is not None
        self.rows, expected = rows, []
        for batch, own_rows in zip(batches, rows, strict=True):
            weight = access.token_weight(self.trainer, num_items, batch, len(batches))
            if self._weights is not None:
                weight = weight * torch.tensor(weights_of(own_rows, self._weights), device=batch["labels"].device)
            segments = segments_of(batch)[: len(own_rows)]
            expected.append(MicroBatch(batch["input_ids"], batch["labels"], segments, weight))
        self.lengths = [np.array([each.tokens.stop - each.tokens.start for each in one.segments]) for one in expected]
        self.recorder.expect(expected)

    def begin_step(self) -> None:
        """On going on within an epoch, an iterator was made that the undisturbed run did not make: undo its draw."""
        if self.restore_random_state and self.sampler.random_state is not None:
            torch.set_rng_state(self.sampler.random_state)
        self.restore_random_state = False

    def before_optimizer(self) -> None:
        """Remember the weights. An update without a token to learn is none: without gradients, nothing moves."""
        if self.nothing_learnt:
            cast(Any, self.trainer.model).zero_grad(set_to_none=True)
        if self.step_recorder is not None:
            self.step_recorder.before()

    def after_optimizer(self) -> None:
        """Compare them."""
        if self.step_recorder is not None:
            self.moved = self.step_recorder.after()

    def end_step(self, saving: bool) -> None:
        """Take in what was measured and count the step."""
        state = self.trainer.state
        if self.recorder is not None:
            parts = zip(self.rows, self.recorder.take(), self.lengths, strict=True)
            for rows, found, length in parts:
                layers = found.layers if self.moved is None else self.moved[None]
                self.pending.append(
                    Measured(self.epoch, state.global_step, rows, found.loss, found.num_tokens, length, layers)
                )
        self.steps_done += 1
        done, planned = self.steps_done * self.batching.accumulation, self.plan.micro_batches(self.epoch)
        state.epoch = self.epoch + min(done, planned) / planned
        self._remember()
        if saving:
            self.save_checkpoint()

    # The end of an epoch

    def end_epoch(self, control: TrainerControl) -> None:
        """The Trainer's epoch has ended; the true one, mostly, too."""
        finished = self.trainer.state.global_step >= self.plan.total and self.sampler.ended
        if self.skipping or finished:  # it only skipped, or there was nothing left to do
            self.skipping, self.sampler.prefix, self.sampler.ended = False, 0, finished
            control.should_log = control.should_evaluate = control.should_save = False
            return
        if self.steps_done < self.plan.steps(self.epoch):
            if control.should_training_stop:
                return
            raise InputError(
                f"Another callback ended epoch {self.epoch + 1} early (should_epoch_stop): its rows are measured in "
                "part, and the planned steps do not hold. Leave that callback out, or let it stop the training."
            )
        self._close_epoch()
        if self.error is not None:
            control.should_training_stop = True
            control.should_save = self.args.save_strategy != "no"
        self._remember()
        if control.should_save:
            self.save_checkpoint()

    def _close_epoch(self) -> None:
        self._score()
        if self.epoch + 1 < self.epochs:
            self._select(self.epoch + 1)
        self.epoch, self.steps_done = self.epoch + 1, 0
        self.sampler.begin(self.epoch, self._kept)
        self.sampler.ended = self.epoch == self.epochs
        if not self.sampler.ended and self.error is None:
            self._replan()
        self._write_results(self.epoch)
        report_rows(self.trainer, f"epoch {self.epoch} of {self.epochs}", self.measurements, self._kept)

    def _score(self) -> None:
        self._exchange()
        if self.filter.when == "training":
            correct = self.filter.correct_drift
            self.measurements.end_epoch(self.epoch, self.random_order if correct is None else correct)
        self.results.scores = self._scores()

    def _select(self, epoch: int) -> None:
        """Decide on the rows of an epoch."""
        assert self.results.scores is not None
        last = self.results.selections[-1]
        if self.filter.decides(epoch):
            share = self.filter.shares(self.epochs)[epoch]
            last = decide(self.filter, epoch, share, self.results.scores, self._trainable, last)
        self.results.selections.append(last)
        self._check_rows(epoch)

    def _check_rows(self, epoch: int) -> None:
        """Note an epoch that has no batch; what is there already is saved before the error is raised."""
        kept = int(self._kept.sum())
        if self.tokens is not None:
            updates = self.batching.steps(kept if self.plan.max_steps is None else self.batching.rows)
            self.error = self.error or self.tokens.refusal(updates)
        if not self.batching.micro_batches(kept):
            why = most_common(self.results.selections[-1].reason)
            self.error = InputError(
                f"Epoch {epoch + 1} would have no batch: {why}. Start anew with another threshold or policy. "
                f"The scores are in {self.folder}."
            )

    def _replan(self) -> None:
        """Steps and learning rate for as many rows as there are now."""
        kept, sizes, share_known = int(self._kept.sum()), list(self.plan.sizes), self.filter.has_shares
        most = self.batching.rows if self.filter.readmit else kept
        for epoch in range(self.epoch, self.epochs):
            known = share_known and epoch > self.epoch
            sizes[epoch] = min(sizes[epoch], most) if known or self.filter.ended(epoch) else kept
        before, self.plan = self.plan.total, dataclasses.replace(self.plan, sizes=sizes)
        if self.plan.total != before:
            self.progress = self.progress.replanned(self.trainer.state.global_step, self.plan.total)
            access.set_total(self.trainer, self.plan.total, intervals=True)
            self._follow_progress(begin=False)

    def _follow_progress(self, begin: bool) -> None:
        if self.progress != Progress.of(self.its_total):  # else its own schedule is right
            access.follow_progress(self.trainer, self.progress, begin)

    # What is kept where

    def save_checkpoint(self) -> None:
        """Tables beside the checkpoint of this step, before the Trainer writes its own files if that is possible."""
        now = self.trainer.state.global_step, self.epoch
        if self.saved_at == now:
            return
        self._exchange()
        self.saved_at = now
        if self.args.should_save:
            folder = access.checkpoint_folder(None, self.trainer)
            order = np.full(self.batching.rows, -1)
            if self.sampler.order is not None and self.steps_done:
                order[: len(self.sampler.order)] = self.sampler.order
            self.results.save_selections(folder)
            self.measurements.save(folder, {"order": order})
            if self.tokens is not None:
                self.tokens.save(folder)

    def end(self) -> None:
        """The Trainer is done."""
        if self.epoch < self.epochs and self.steps_done:  # it stopped within an epoch
            self._score()
            self._write_results(self.epoch + 1)
        if self.args.should_save:
            self.results.save_log(self.folder, self.trainer.state.log_history)
        self.uninstall()
        if self.error is not None:
            raise self.error

    def _write_results(self, ended: int) -> None:
        if self.args.should_save:
            self.results.save(self.folder, ended)

    def _exchange(self) -> None:
        """Every process takes in what all have measured."""
        pending, self.pending = self.pending, []
        if self.args.world_size > 1:
            pending = sorted(gather_object(pending), key=lambda each: each.step)
        for each in pending:
            self.measurements.add(each)

    def _remember(self) -> None:
        """The small part of the state, which the Trainer saves with its own."""
        self.trainer.state.stateful_callbacks[STATE] = {
            "settings": self.settings,
            "epoch": self.epoch,
            "steps_done": self.steps_done,
            "sizes": list(self.plan.sizes),
            "scheduled": self.progress.scheduled,
            "knots": [list(knot) for knot in self.progress.knots],
            "provenance": self.provenance_json,
        }

    @property
    def _kept(self) -> np.ndarray:
        """(N,) bool, of the rows that can be trained on."""
        return self.results.selections[-1].keep[self.sample_ids]

    @property
    def _weights(self) -> np.ndarray | None:
        """(N,) what each row that can be trained on counts in this epoch; None where all count alike."""
        weight = self.results.selections[-1].weight
        return None if weight is None else weight[self.sample_ids]

    def _all_rows(self) -> Selection:
        reason = [why or KEPT for why in self._left_out()]
        keep = np.array([why == KEPT for why in reason])
        return Selection(keep, reason, {**self.filter.to_json(), "epoch": 0}, self.provenance.to_json())

    @property
    def _trainable(self) -> np.ndarray:
        """The user's rows that can be trained on."""
        return self.sample_ids if self.tokens is None else self.sample_ids[~self.tokens.emptied]

    def _left_out(self) -> list[str | None]:
        return self.held.left_out(None if self.tokens is None else self.tokens.emptied)

    def _scores(self) -> ScoreTable:
        reasons = self._left_out()
        for row in self.sample_ids[~self.measurements.ever]:
            reasons[row] = reasons[row] or "not measured yet"
        return self.measurements.to_scores(self.sample_ids, reasons, self.provenance)
