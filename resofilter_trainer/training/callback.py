"""Measure and filter inside a Trainer's run: which event does what. The work is `training_run`'s.

on_train_begin   find the rows, plan the steps, go on from a checkpoint
one update       fetch -> on_step_begin -> [forward, backward] x accumulation -> clip -> on_pre_optimizer_step
                 -> step -> on_optimizer_step -> on_step_end: take in what was measured -> log, evaluate, save
on_epoch_end     scores -> selection -> the next epoch's rows, steps and learning rate -> log, evaluate, save
on_train_end     write the last scores, leave the model as it was found
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, get_args

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import InputError, ResonanceConfig, TokenCleaning, UpdateName, one_of
from ..scores.score_table import ScoreTable
from ..scoring.passes import held
from ..selecting.results import Results
from ..selecting.selection import DataSelector, Selection
from . import trainer_access as access
from .filtering import FilterConfig, Policy, When
from .run import OPTIMIZER, Run
from .weighting import SampleWeights


class ResonanceCallback(TrainerCallback):
    """Measures every sample's W_up update while an epoch trains, and lets the next epoch train on what is kept.

    >>> callback = ResonanceCallback(keep=0.5)
    >>> SFTTrainer(model, train_dataset=dataset, callbacks=[callback]).train()
    >>> callback.scores, callback.selections    # and in output_dir/resofilter/

    Args:
        keep, threshold, selector, when, start_epoch, end_epoch, readmit, correct_drift: what is dropped and when, see
            `FilterConfig`. By default the larger half after the first epoch.
        token_cleaning: which tokens of the rows are learnt, see `TokenCleaning`. On its own, no row is dropped but
            those that keep no token; with `keep` and the like, scores are those of the tokens that are learnt.
        update: the step that is measured: a fresh optimizer's first, `"adamw"` or `"sgd"`, in closed form and at any
            batch size; or `"optimizer"`, what this run's own optimizer did, for updates of a single sample.
        report: write `report.html` beside the scores at the end, see `write_report`.
        **config: the other fields of `ResonanceConfig`: `n_layers`, `norm`, `eps` and so on.

    With `max_steps`, the run has as many steps as asked for: every epoch is as long as one on all rows, and takes the
    kept rows as often as that needs. Otherwise an epoch is one pass over the kept rows.

    Raises:
        InputError: a setting cannot work, here or when training begins; the message says what to change.
    """

    def __init__(
        self,
        keep: float | Sequence[float] | DataSelector | None = None,
        *,
        threshold: float | None = None,
        selector: Policy | None = None,
        when: When = "training",
        start_epoch: int | None = None,
        end_epoch: int | None = None,
        readmit: bool = False,
        correct_drift: bool | None = None,
        token_cleaning: TokenCleaning | None = None,
        update: str = "adamw",
        report: bool = False,
        **config: Any,
    ) -> None:
        if token_cleaning is not None and not isinstance(token_cleaning, TokenCleaning):
            raise InputError(f"token_cleaning is a TokenCleaning, got {token_cleaning!r}.")
        if token_cleaning is not None and keep is None and threshold is None and selector is None:
            keep = 1.0
        self.token_cleaning = token_cleaning
        self.filter = FilterConfig(keep, threshold, selector, when, start_epoch, readmit, correct_drift, end_epoch)
        one_of("update", update, get_args(UpdateName))
        self.report = report
        self.by_optimizer = update == OPTIMIZER
        if self.by_optimizer and when == "before":
            raise InputError("update='optimizer' is seen while training only: leave when='before' out.")
        self.config = ResonanceConfig(update=update, **config)  # type: ignore[arg-type]
        self._results = Results()
        self._run: Run | None = None
        self._holding = contextlib.ExitStack()  # holds it against other runs

    @property
    def scores(self) -> ScoreTable | None:
        """A line for every row of the user's dataset, as of the last epoch that has ended; None before."""
        return self._results.scores

    @property
    def selections(self) -> list[Selection]:
        """Which rows each epoch trained on, first epoch first."""
        return self._results.selections

    @property
    def token_stages(self) -> list[dict[str, Any]]:
        """What each cleaning of tokens kept, in numbers and of each group, in the order in which they happened."""
        return self._results.token_stages

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a run, or go on with one; also after a restart with another batch size."""
        if self._run is not None:
            self._run.uninstall()
        trainer, checkpoint = access.calling_trainer()
        if sum(isinstance(each, ResonanceCallback) for each in trainer.callback_handler.callbacks) > 1:
            raise InputError("ResonanceCallback was added twice: add it once.")
        if any(isinstance(each, SampleWeights) for each in trainer.callback_handler.callbacks):
            raise InputError("Leave SampleWeights out: pass ResonanceCallback the policy that weighs, as selector=.")
        self._results = Results()
        loader = kwargs["train_dataloader"]
        config = (self.filter, self.config, self.by_optimizer, self._results, self.token_cleaning)
        self._run = Run(trainer, loader, *config)
        self._holding.close()  # of a training that an error ended
        self._holding.enter_context(held(self._run.folder))
        self._run.begin(checkpoint)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The rows of the update are fetched."""
        self._running.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The gradient is complete."""
        self._running.before_optimizer()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The weights have moved."""
        self._running.after_optimizer()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take in what was measured, before anything is logged or saved."""
        self._running.end_step(saving=control.should_save)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide on the next epoch."""
        self._running.end_epoch(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint was written: what is ours belongs beside it."""
        self._running.save_checkpoint()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the last scores and let go of the trainer."""
        run, self._run = self._running, None
        run.end()
        if self.report:
            from .report import report_run  # charts take a second to import

            report_run(run.trainer, run.folder, run.sample_ids, run.held.total)
        self._holding.close()

    @property
    def _running(self) -> Run:
        if self._run is None:
            raise RuntimeError("The Trainer fired an event of a training that never began.")
        return self._run
