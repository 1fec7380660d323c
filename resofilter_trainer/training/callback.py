"""Measure and filter inside a Trainer's run: which event does what. The work is done by `run`.

on_train_begin   find the rows, plan the steps, resume from a checkpoint
on_epoch_begin   tell the sampler where the run stands
one step         fetch -> on_step_begin -> [forward, backward] x accumulation -> clip -> on_pre_optimizer_step
                 -> step -> on_optimizer_step -> on_step_end: keep what was measured -> log, evaluate, save
on_epoch_end     scores -> selection -> the next epoch's rows, steps and learning rate -> log, evaluate, save
on_train_end     write the last scores, leave the model as it was found
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, Unpack

from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import (
    OPTIMIZER,
    InputError,
    ResonanceConfig,
    TokenCleaning,
    UpdateName,
    Warmup,
    check_keywords,
    check_kind,
)
from ..config.compatibility import need_extra
from ..config.keywords import StepOptions
from ..scores.score_table import ScoreTable
from ..scoring.passes import locked
from ..selecting.data_selector import DataSelector
from ..selecting.results import Results
from ..selecting.selection import Selection
from ..selecting.token_rules import TokenRule
from . import trainer_access as access
from .empty_rows import tell_of_empty_rows
from .filtering import FilterConfig, Policy, When
from .log import RunLog, say_next
from .recording import Recording, check_recording
from .rule_loss import RuleLike, RuleWeights, rule_of_run
from .run import Run
from .spiking import OnSpike, SpikeWatch
from .stream_run import StreamRun
from .token_weighting import TokenWeights
from .weighting import SampleWeights


class ResonanceCallback(TrainerCallback):
    """Measures every sample's W_up update while an epoch trains, and trains the next epoch on the rows to keep.

    >>> callback = ResonanceCallback(keep=0.5)
    >>> SFTTrainer(model, train_dataset=dataset, callbacks=[callback]).train()
    >>> callback.scores, callback.selections    # and in output_dir/resofilter/

    Args:
        keep, threshold, selector, when, start_epoch, end_epoch, readmit, correct_drift, warmup: what is dropped, when
            and by which scores, see `FilterConfig`. By default, the half with the larger scores after the first epoch.
        token_cleaning: which tokens of the rows are learnt, see `TokenCleaning`. On its own, it drops only the rows
            that keep no token; together with `keep` and the like, rows are scored by the tokens that are learnt.
        token_rule: how much each learnt token of a step counts, by the step's own forward: a name such as `"profit"`, a
            `TokenRule` or a function, as for `TokenWeights`. On its own, it drops no row; together with `keep` and the
            like, the loss and the update of a row are those of its weighted tokens. With `when="before"`, rows are
            scored by all of their tokens.
        keep_tokens: the share of the tokens of each micro-batch to keep, for the name of a rule that has one.
        id_column: of a stream (`IterableDataset`), the column with a number or text of its own for each row, by which
            rows are known in every pass; by default they are known by their order, which must then be the same. The
            ids are in `rows.parquet`: `sample_id` is the position in the first pass, also of a shuffled stream.
        update: the step that is measured: the first step of a fresh optimizer, `"adamw"` or `"sgd"`, in closed form
            and at any batch size; or `"optimizer"`, what this run's own optimizer did, for steps of a single sample.
        report: whether to write `report.html` beside the scores at the end, see `write_report`.
        dataset: the trainer's `train_dataset`, needed with `packing=True`: SFTTrainer packs the rows before training
            begins, and forgets which is which. Not used without packing. The rows to keep are packed anew for every
            epoch. A row that `packing_strategy="bfd_split"` cuts has the mean score of its pieces, weighted by their
            learnt tokens.
        ledger: whether to write a line for every row of every step to `output_dir/resofilter/ledger/`: its loss,
            resonance and weight in the step, see `ledger.schema`; some 20 bytes. By default, where rows are measured
            while training: not with `when="before"`. With `keep=1.0`, the callback only records.
        on_spike: a function that is called, in the main process and before the update, with a `SpikingStep` when the
            step's loss or gradient norm stands out from those of the last 100 steps, see `ledger.live`. It may return
            `"stop"`, to stop the training after the step, or `"skip"`, to leave out the update of the step: weights and
            the optimizer's state stay as they were; the step counts, and the learning rate goes on.
        skip_update: whether the update of every step that stands out is left out, whatever `on_spike` returns.
        **config: the other fields of `ResonanceConfig`: `n_layers`, `norm`, `eps` and so on.

    With `max_steps`, the run has as many steps as asked for: every epoch is as long as one on all rows, and repeats the
    kept rows as often as necessary. Otherwise an epoch is one pass over the kept rows. The rows and steps of each
    epoch, and why, are logged and written to `output_dir/resofilter/plan.json`.

    On a stream, an epoch is a pass over it, shares are of the rows of the first one, and the steps are `max_steps`.

    Raises:
        InputError: here or when training begins, where a setting cannot work; the message says what to change.
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
        warmup: int | Warmup | None = None,
        token_cleaning: TokenCleaning | None = None,
        token_rule: RuleLike | None = None,
        keep_tokens: float | None = None,
        id_column: str | None = None,
        update: UpdateName = "adamw",
        report: bool = False,
        dataset: Dataset | None = None,
        ledger: bool | None = None,
        on_spike: OnSpike | None = None,
        skip_update: bool = False,
        **config: Unpack[StepOptions],
    ) -> None:
        own = [*inspect.signature(ResonanceCallback).parameters][:-1]  # without **config
        check_keywords(config, [*own, *(each.name for each in dataclasses.fields(ResonanceConfig))])
        if dataset is not None:
            check_kind("dataset", dataset, Dataset, "a Dataset, the trainer's train_dataset")
        if token_cleaning is not None and not isinstance(token_cleaning, TokenCleaning):
            raise InputError(f"token_cleaning must be a TokenCleaning, got {token_cleaning!r}.")
        self.token_rule = _rule_of(token_rule, keep_tokens, token_cleaning)
        if (token_cleaning or self.token_rule) and keep is None and threshold is None and selector is None:
            keep = 1.0
        self.token_cleaning, self.id_column = token_cleaning, id_column
        self.filter = FilterConfig(
            keep, threshold, selector, when, start_epoch, readmit, correct_drift, end_epoch, warmup
        )
        if report:
            need_extra("report", "report=True")
        self.report, self.dataset = report, dataset
        self.config = ResonanceConfig(update=update, **config)
        if update == OPTIMIZER and when == "before":
            raise InputError("update='optimizer' is measured while training: leave out when='before'.")
        check_recording(when == "before", ledger, on_spike, skip_update)
        self.ledger = when == "training" if ledger is None else ledger
        self.on_spike, self.skip_update = on_spike, skip_update
        self._results = Results()
        self._mean_weights: list[float] = []
        self._run: Run | StreamRun | None = None
        self._rule: RuleWeights | None = None  # what weighs tokens in the run
        self._lock = contextlib.ExitStack()  # of the run's folder

    @property
    def scores(self) -> ScoreTable | None:
        """The scores after the last epoch that has ended, a line for every row of the user's dataset; None before."""
        return self._results.scores

    @property
    def selections(self) -> list[Selection]:
        """The rows each epoch trained on, first epoch first."""
        return self._results.selections

    @property
    def token_stages(self) -> list[dict[str, Any]]:
        """What each cleaning of tokens kept, in all and of each group, in the order in which they happened."""
        return self._results.token_stages

    @property
    def mean_weights(self) -> list[float]:
        """With a token rule, the mean weight of the learnt tokens of each step, see `TokenWeights`."""
        return self._mean_weights

    @property
    def log_history(self) -> list[dict[str, float]]:
        """The `resofilter/...` scalars as the trackers got them, with epoch and step.

        They are not in the Trainer's `state.log_history`, which stays as it is without this callback.
        """
        return self._results.log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start a run or resume one; also after a restart with another batch size."""
        if self._run is not None:
            self._run.uninstall()
        trainer, checkpoint = access.calling_trainer()
        if sum(isinstance(each, ResonanceCallback) for each in trainer.callback_handler.callbacks) > 1:
            raise InputError("ResonanceCallback was added twice: add it once.")
        if any(isinstance(each, SampleWeights) for each in trainer.callback_handler.callbacks):
            raise InputError(
                "Leave out SampleWeights: pass the policy that weights rows to ResonanceCallback, as selector=."
            )
        if any(isinstance(each, TokenWeights) for each in trainer.callback_handler.callbacks):
            raise InputError(
                "TokenWeights cannot act beside ResonanceCallback, which measures each row's own loss. Pass the rule "
                "to ResonanceCallback, as token_rule=; or mask the tokens first (clean_dataset)."
            )
        self._results, self._mean_weights = Results(), []
        self._run = self._run_of(trainer, kwargs["train_dataloader"])
        self._lock.close()  # of a training that an error ended
        self._lock.enter_context(locked(self._run.folder))
        self._run.begin(checkpoint)
        if isinstance(self._run, Run):  # of a stream, no row is known yet
            tell_of_empty_rows(trainer, self._run.rows.sample_ids, self._run.examples.texts)

    def _run_of(self, trainer: Trainer, loader: Any) -> Run | StreamRun:
        spikes = SpikeWatch(trainer, self.on_spike, self.skip_update, RunLog(trainer, self._results.log))
        recording = Recording(trainer, self.ledger, spikes)
        rule = self._rule = RuleWeights(trainer, loader, self.token_rule, self._mean_weights)
        if not access.is_stream(trainer):
            if self.id_column is not None:
                raise InputError("id_column is for a stream, whose rows have no number of their own: leave it out.")
            return Run(
                trainer,
                loader,
                self.filter,
                self.config,
                self._results,
                recording,
                rule,
                self.token_cleaning,
                self.dataset,
            )
        if self.token_cleaning is not None:
            raise InputError("token_cleaning needs all rows before training: load the stream as a Dataset.")
        return StreamRun(trainer, loader, self.filter, self.config, self._results, recording, rule, self.id_column)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the sampler what to give in this epoch of the Trainer's."""
        self._running.begin_epoch()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the step, whose rows are fetched already."""
        self._running.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the measurement of the optimizer's step."""
        self._running.before_optimizer()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure what the optimizer's step has changed."""
        self._running.after_optimizer()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep what was measured, before anything is logged or saved."""
        self._running.end_step(saving=control.should_save)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Decide on the next epoch."""
        self._running.end_epoch(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add this run's own files to the checkpoint."""
        self._running.save_checkpoint()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the last scores and leave the trainer as it was found."""
        run, self._run = self._running, None
        with self._lock:
            run.end()
            if self._rule is not None:
                self._rule.tell_of_ends()
            if self.report:
                from .report import report_run  # charts take a second to import

                report_run(run.trainer, run.folder, run.rows.sample_ids, run.rows.total, run.examples.texts)
            elif self._results.scores is not None:
                say_next(run.trainer)

    @property
    def _running(self) -> Run | StreamRun:
        if self._run is None:
            raise RuntimeError("The Trainer fired an event of a training that never began.")
        return self._run


def _rule_of(rule: RuleLike | None, keep: float | None, cleaning: TokenCleaning | None) -> TokenRule | None:
    """The rule that weighs tokens. Raises InputError where it cannot."""
    if rule is None:
        if keep is not None:
            raise InputError("keep_tokens= goes with token_rule=.")
        return None
    if cleaning is not None:
        raise InputError("token_rule and token_cleaning decide on the same tokens: pass one of them.")
    return rule_of_run(rule, keep, "keep_tokens")
