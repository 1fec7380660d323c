"""One run of a Trainer with the callback: what happens at each of its events. Knows the Trainer's loop.

Measuring is in `watching`, deciding in `deciding`, and applying the plan in `timeline`; this joins them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from torch.utils.data import RandomSampler
from transformers import Trainer, TrainerControl

from ..config import InputError, ResonanceConfig, TokenCleaning
from ..data.fingerprints import describe_training, fingerprint
from ..data.models import check_causal
from ..scores.provenance import Provenance
from ..selecting.results import NAME as STATE
from ..selecting.results import Results, remove_stale
from . import trainer_access as access
from .before import measured_before
from .checkpoints import checkpoint_folder, warn_of_missing_state, warn_of_other_skipping
from .deciding import Decisions
from .examples import examples_of
from .filtering import FilterConfig
from .log import RunLog, warn_that_nothing_is_filtered
from .measurements import Measurements
from .plan_log import line, planned_epochs, save_plan
from .recording import Recording
from .refusals import check_trainer
from .refused_uses import check_use
from .resuming import check_settings, has_other_length, resumed
from .rule_loss import RuleWeights
from .sampler import ROW
from .settings_of import settings_of
from .timeline import Timeline
from .token_run import CleaningRun
from .trainer_patches import TrainerPatch
from .watching import Watch
from .weighting import BatchWeights


class Run:
    """One call of `trainer.train()`.

    Args:
        trainer: the trainer, about to start or to resume.
        train_dataloader: the loader that it is going to iterate.
        filtering: the settings of the filter: which rows to drop, and when.
        config: the step to measure, and how.
        results: the results, which the run fills in.
        recording: the ledger of the run.
        rule: what weighs tokens.
        cleaning: the settings of token cleaning; None to learn all tokens.
        dataset: the rows as the trainer got them, which packed rows need.

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
        cleaning: TokenCleaning | None = None,
        dataset: Dataset | None = None,
    ) -> None:
        check_causal(trainer.model)
        check_trainer(trainer, train_dataloader)
        check_use(trainer, config.update, before=filtering.when == "before", cleans=cleaning is not None)
        self.trainer, self.results, self._recording = trainer, results, recording
        self.folder = Path(str(trainer.args.output_dir)) / STATE
        self.examples = examples_of(trainer, dataset)
        self.rows = self.examples.rows
        self._filter, self._config = filtering, config
        keeps_all = filtering.keeps_all and cleaning is None
        self._batching = access.batching_of(trainer, train_dataloader, repeats=keeps_all)
        own_sampler = access.sampler_of(train_dataloader)
        self._random_order = isinstance(own_sampler, RandomSampler)
        self._timeline = Timeline(trainer, own_sampler, self._batching, filtering)
        in_training = filtering.when == "training"
        self._watch = Watch(trainer, config, self._batching, self.examples, in_training, not keeps_all, recording)
        self._rule, sampler = rule, self._timeline.sampler
        self._patch = TrainerPatch(trainer, train_dataloader, sampler, self.fetch, self.examples, rule.acting)
        self._weights = BatchWeights(trainer, train_dataloader)
        self._tokens = None if cleaning is None else CleaningRun(trainer, cleaning)
        if self._tokens is not None:
            results.token_stages = self._tokens.stages
        self._decisions = Decisions(filtering, self._timeline.epochs, self.examples, results, self._tokens)
        plan, cleans = self._timeline.plan, None if cleaning is None else dataclasses.asdict(cleaning)
        own: dict[str, Any] = {"epochs": plan.epochs, "max_steps": plan.max_steps, "token_cleaning": cleans}
        own |= access.division_facts(trainer, own_sampler)
        self._settings = settings_of(trainer, filtering, config, self._batching, recording, rule, **own)
        self._log = RunLog(trainer, results.log)
        self.nothing_learnt = False  # in this step, in any process
        self._saved_at = (-1, -1)  # step and ended epochs
        self._checkpoint: Path | None = None  # that the run resumes from
        self._error: InputError | None = None  # raised once everything is saved

    # Start or resume

    def begin(self, checkpoint: str | None) -> None:
        """Start, or resume from a checkpoint; then let the Trainer use the run's rows, steps and learning rate."""
        starts = not self.trainer.state.global_step
        if starts:
            self._start()
        else:
            folder = checkpoint_folder(checkpoint, self.trainer)
            self._checkpoint = folder.parent
            self._resume(folder)
        self._provenance_json = self._provenance.to_json()  # which every step keeps in the Trainer's state
        self._tell_plan()  # before anything is changed in the trainer: the disk may refuse the file
        self._patch.install()
        self._watch.attach(self._provenance_json, self.examples.of_samples(self.rows.sample_ids).__getitem__)
        self._timeline.install(starts)
        self._remember()

    def _start(self) -> None:
        self._provenance = describe_training(self.trainer, self.rows.total, self._config, self._settings)
        self.results.scores = None
        self._decisions.begin(self._provenance)
        if self.trainer.args.should_save:
            remove_stale(self.folder)
        if self._tokens is not None:
            self._clean_tokens(self._tokens)
        if self._filter.when == "before":
            self._measure_before()
            self._decisions.select(0)
            self._decisions.forget_the_first()
            there, sizes = self._decisions.place()
            self._check_rows(0, there)
            self._timeline.plan_start(there, sizes)
            warm = self._filter.warmup is not None
            self._tell_results(0, "after the warm-up" if warm else "at the starting weights")
        elif self._filter.first >= self._timeline.epochs and self._filter.keep != 1:
            warn_that_nothing_is_filtered(self.trainer, self._filter.first, self._timeline.epochs)

    def _clean_tokens(self, tokens: CleaningRun) -> None:
        """Measure the base model; with a fixed reference model, leave out the rows that keep no token."""
        plan, epochs = self._timeline.plan, self._timeline.epochs
        tokens.begin(self._provenance, self.folder, min(plan.steps(epoch) for epoch in range(epochs)))
        for numbers in tokens.stages:
            self._log.tokens(numbers)
        if tokens.emptied.any():
            self._decisions.begin(self._provenance)
            there, sizes = self._decisions.place()
            self._check_rows(0, there)
            self._timeline.plan_start(there, sizes)

    def _measure_before(self) -> None:
        """Score all rows before the first step."""
        found, self._provenance = measured_before(
            self.trainer, self.examples.tokens, self._tokens, self._filter.warmup, self._config, self._provenance
        )
        self._watch.measurements.add(found)
        self._watch.measurements.end_epoch(0, correct_drift=False)
        self._decisions.score(self._watch.measurements, self._provenance)

    def _resume(self, folder: Path) -> None:
        """Resume from a checkpoint, wherever in an epoch it was made."""
        saved = self.trainer.state.stateful_callbacks.get(STATE)
        if saved is None:
            raise InputError(
                "This checkpoint was made without ResonanceCallback, so the rows it has seen are unknown. "
                "Resume without the callback, or start again with it."
            )
        warn_of_missing_state(self.trainer, folder.parent)
        there = saved["settings"]
        here = {**self._settings, "dataset": fingerprint(self.trainer.train_dataset, there.get("dataset"))}
        check_settings(there, here, f"'{folder.parent}' holds a checkpoint")
        warn_of_other_skipping(self.trainer, folder.parent, saved, here)
        self._provenance = resumed(Provenance.from_json(saved["provenance"]), there, here)
        self.results.log[:] = saved.get("log", [])  # version 0.1.0 kept it in the Trainer's
        self._timeline.resume(saved, folder.parent)
        self._load_checkpoint(folder, len(saved["sizes"]))
        if self._timeline.epoch_is_complete:
            self._close_epoch()  # the checkpoint was made after the last step of an epoch, before its end
        self._check_rows(self._timeline.ended_epochs, self._timeline.sampler.kept)
        if has_other_length(there, here):
            self._timeline.extend(*self._decisions.place())

    def uninstall(self) -> None:
        """Leave the trainer and the model as they were found."""
        self._watch.detach()
        self._rule.end_update()
        self._weights.detach()
        self._patch.remove()

    # One step

    def begin_epoch(self) -> None:
        """Tell the sampler which slots to give in the Trainer's epoch that begins."""
        self._timeline.begin_epoch()

    def fetch(self, iterator: Any, count: int, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """The Trainer's `get_batch_samples`: the micro-batches of a step, and its number of learnt tokens.

        The Trainer steps its optimizer after as many micro-batches as it asks for. The last step of an epoch on fewer
        rows may have fewer, and is completed with micro-batches that have nothing to learn.
        """
        if not self._patch.is_read:  # by a later training, without the callback
            return self._patch.inner(iterator, count, *args, **kwargs)
        if self._batching.dispatched and not self._timeline.trains:
            return [], None  # all is skipped, and Accelerate's dispatcher raises where nothing is left
        count = self._timeline.asked(count)
        iterator = iterator if self._tokens is None else self._tokens.masked_batches(iterator, self._enter_step)
        batches, num_items = self._patch.inner(iterator, count, *args, **kwargs)
        rows = [batch.pop(ROW).cpu().numpy() for batch in batches]
        if any("labels" not in batch for batch in batches):
            raise InputError("The batches have no labels: ResonanceCallback needs a causal language model's.")
        if self._tokens is not None and batches:
            self.nothing_learnt = not access.learnt_anywhere(self.trainer, batches)
            num_items = access.at_least_one(num_items)
        weights = self._decisions.weights
        self._watch.expect(batches, rows, num_items, weights)
        if weights is not None:
            self._weights.put(batches, rows, weights)
        return self._patch.completed(batches, count, access.averages(self.trainer, num_items)), num_items

    def _enter_step(self, tokens: CleaningRun) -> None:
        """Clean the tokens of the stage that begins with this step, if one does."""
        plan, epoch, done = self._timeline.plan, self._timeline.ended_epochs, self._timeline.steps_done
        stage, order = tokens.stage_at(done, plan.steps(epoch)), self._timeline.sampler.order
        if stage is not None and self._batching.dispatched:  # only the main process draws an order
            order = access.from_main(order)
        if stage is not None and order is not None:
            size = self._batching.per_micro_batch
            rows, per_step = order[: plan.micro_batches(epoch) * size], size * self._batching.accumulation
            rows = rows[done * per_step : stage.stop * per_step]
            self._log.tokens(tokens.clean_stage(epoch, stage.number, rows))

    def begin_step(self) -> None:
        """Undo a random draw that an uninterrupted run did not make; the rows of the step are fetched already."""
        self._timeline.begin_step()
        self._patch.begin_step()

    def before_optimizer(self) -> None:
        """Prepare the optimizer's step; without a learnt token, clear the gradient, so that no weight changes."""
        if self.nothing_learnt:
            cast(Any, self.trainer.model).zero_grad(set_to_none=True)
        self._watch.before_step(left_out=self._rule.leaves_out())
        self._rule.leave_out()

    def after_optimizer(self) -> None:
        """Measure what the optimizer's step has changed, where that is what is measured."""
        self._watch.after_step()
        self._rule.end_update()

    def end_step(self, saving: bool) -> None:
        """Keep what was measured before anything is logged or saved."""
        self._watch.end_step(self._timeline.ended_epochs, self.trainer.state.global_step)
        self._rule.end_step()
        self._timeline.end_step()
        self._remember()
        if saving:
            self.save_checkpoint()

    # The end of an epoch

    def end_epoch(self, control: TrainerControl) -> None:
        """End the true epoch with the Trainer's, unless nothing was trained in it, and decide on the next one."""
        if not self._timeline.trains:
            control.should_log = control.should_evaluate = control.should_save = False
            access.restore_random_state(self.trainer, self._checkpoint)
            return
        if not self._timeline.epoch_is_complete:
            if control.should_training_stop:
                return
            raise InputError(
                f"Another callback ended epoch {self._timeline.ended_epochs + 1} early (should_epoch_stop): only some "
                "of its rows are measured, and the plan of steps is wrong. Remove that callback, or let it stop "
                "the training."
            )
        self._close_epoch()
        if self._error is None:
            self._tell_plan()
        else:
            control.should_training_stop = True
            control.should_save = self.trainer.args.save_strategy != "no"
        self._remember()
        if control.should_save:
            self.save_checkpoint()

    def _close_epoch(self) -> None:
        """Score, decide on the next epoch, and plan it."""
        self._score()
        ended, epochs = self._timeline.ended_epochs + 1, self._timeline.epochs
        if ended < epochs:
            self._decisions.select(ended)
        there, sizes = self._decisions.place()
        self._error = self._refusal(ended, there) if ended < epochs else None
        replan = ended < epochs and self._error is None
        self._timeline.next_epoch(there, sizes if replan else None)
        self._tell_results(ended, f"after epoch {ended} of {epochs}")

    def _score(self) -> None:
        self._watch.gather()
        if self._filter.when == "training":
            correct = self._filter.correct_drift
            epoch = self._timeline.ended_epochs
            self._watch.measurements.end_epoch(epoch, self._random_order if correct is None else correct)
        self._decisions.score(self._watch.measurements, self._provenance)

    def _refusal(self, epoch: int, there: np.ndarray) -> InputError | None:
        """Why an epoch cannot be trained on the examples that are `there` now, (E,) bool; None where it can."""
        kept, error = int(there.sum()), self._weights.refusal(self._decisions.weights)
        if error is not None:
            return error
        if not self._batching.micro_batches(kept):
            return self._decisions.no_batch(epoch, self.folder)
        if self._tokens is None:
            return None
        fixed_steps = self._timeline.plan.max_steps is not None
        return self._tokens.refusal(self._batching.steps(self._batching.rows if fixed_steps else kept))

    def _check_rows(self, epoch: int, there: np.ndarray) -> None:
        error = self._error or self._refusal(epoch, there)
        if error is not None:
            raise error

    # What is written where

    def _tell_plan(self) -> None:
        """Log the present epoch's rows and steps, and write the plan of all epochs."""
        timeline = self._timeline
        entries = planned_epochs(timeline.plan, self._filter, timeline.ended_epochs + 1, self.examples.unit)
        if not timeline.over:
            self._log.plan(line(entries[timeline.ended_epochs]))
        if self.trainer.args.should_save:
            save_plan(self.folder, entries)

    def save_checkpoint(self) -> None:
        """Write tables beside the checkpoint of this step, if possible before the Trainer writes its own files."""
        now = self.trainer.state.global_step, self._timeline.ended_epochs
        if self._saved_at == now:
            return
        self._watch.gather()
        self._saved_at = now
        if self.trainer.args.should_save:
            folder = checkpoint_folder(None, self.trainer)
            drawn, order = self._timeline.sampler.order, np.full(self.examples.samples, -1)
            if drawn is not None and self._timeline.steps_done:
                order[: len(drawn)] = drawn
            self.results.save_selections(folder)
            self._watch.measurements.save(folder, {"order": order})
            if self._tokens is not None:
                self._tokens.save(folder)

    def _load_checkpoint(self, folder: Path, epochs: int) -> None:
        """Undo `save_checkpoint` of a run of so many epochs."""
        if self._tokens is not None:
            self._tokens.load(folder, self._provenance, self.folder)
        ended = self._timeline.ended_epochs
        self._watch.measurements, extra = Measurements.load(folder)
        self.results.load_selections(folder, min(ended, epochs - 1) + 1)
        self.results.scores = None
        if np.isfinite(self._watch.measurements.score).any():
            self._decisions.score(self._watch.measurements, self._provenance)
        order = extra["order"][extra["order"] >= 0]
        there, _ = self._decisions.place()
        self.examples.check_same(self.trainer.state.stateful_callbacks[STATE])
        if ended == epochs and not self._timeline.over:  # that run is finished, and this one has more epochs
            self._decisions.select(ended)
            there, _ = self._decisions.place()
        self._timeline.sampler.begin(ended, there, order if len(order) else None)

    def end(self) -> None:
        """Write the last results, leave the trainer as it was found, and raise the error that stopped the training."""
        try:
            if not self._timeline.over and self._timeline.steps_done:  # within an epoch
                self._score()
                if self.trainer.args.should_save:
                    self.results.save(self.folder, self._timeline.ended_epochs + 1)
            self._recording.flush()
            self._log.end(self.results, self.folder)
        finally:
            self.uninstall()
        if self._error is not None:
            raise self._error

    def _tell_results(self, ended: int, when: str) -> None:
        """Write the scores and selections of all ended epochs, and report them."""
        if self.trainer.args.should_save:
            self.results.save(self.folder, ended)
        self._log.rows(when, self.examples.by_row(self._watch.measurements), self._decisions.kept, self.results)

    def _remember(self) -> None:
        """Keep the small part of the state where the Trainer saves its own."""
        own = {"settings": self._settings, **self._timeline.to_json(), **self.examples.to_json()}
        own["provenance"] = self._provenance_json
        own |= {"log": self.results.log, **self._recording.to_json()}
        self.trainer.state.stateful_callbacks[STATE] = own
