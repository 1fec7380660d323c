"""What a callback needs of the Trainer and is not given: the trainer itself, its rows, its schedule.

Knows transformers' Trainer and TRL's SFTTrainer; as `trainer_packing` and `trainer_patches`, it knows their internals.
Knows no scores.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher, SeedableRandomSampler
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import DynamoBackend, broadcast_object_list
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase, Trainer, get_scheduler
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig

from ..config import InputError, Warmup, warmup_settings
from ..config.compatibility import loss_is_scaled_for_ga, loss_type
from ..data.preparation import PreparedRows
from ..model.loss_check import TokenLoss
from ..model.losses import IGNORE
from ..scoring.warmup import WarmupPlan
from ..selecting.token_selection import EMPTIED
from .plan import Batching, Progress


def calling_trainer() -> tuple[Trainer, str | None]:
    """The trainer that fires the present event, and the checkpoint that it resumes from.

    A callback is given neither, and without the trainer nothing can be logged through its trackers. So they are read
    from the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer) and "resume_from_checkpoint" in frame.f_locals:
            checkpoint = frame.f_locals["resume_from_checkpoint"]
            return trainer, None if checkpoint is None else os.fspath(checkpoint)
        frame = frame.f_back
    raise RuntimeError("This version of transformers fires its events in another way: no Trainer was found.")


def is_stream(trainer: Trainer) -> bool:
    """Whether a trainer's rows come one after another, and are as many as there are."""
    return isinstance(trainer.train_dataset, torch.utils.data.IterableDataset)


def is_sft(trainer: Trainer) -> bool:
    """Whether a trainer prepares its rows as SFTTrainer does: TRL's own, or unsloth's copy of its source."""
    return is_unsloth(trainer) or any(each.__name__ == "SFTTrainer" for each in type(trainer).__mro__)


def is_unsloth(trainer: Trainer) -> bool:
    """Whether a trainer is unsloth's copy of SFTTrainer."""
    return any(each.__name__ == "_UnslothSFTTrainer" for each in type(trainer).__mro__)


def dispatches(train_dataloader: Any) -> bool:
    """Whether one process loads the rows of all and sends each its own (Accelerate's `dispatch_batches`)."""
    return isinstance(train_dataloader, DataLoaderDispatcher)


def warmup_of(trainer: Trainer, prepared: PreparedRows, warmup: int | Warmup | None) -> WarmupPlan | None:
    """The warm-up of a copy of a trainer's model; None for none.

    Args:
        trainer: the trainer.
        prepared: its rows, from which those of the warm-up are drawn.
        warmup: the settings.

    Raises:
        InputError: the trainer is no SFTTrainer with a tokenizer, its model cannot be tuned, or it has too few rows.
    """
    settings = warmup_settings(warmup)
    if settings is None:
        return None
    tokenizer, model = trainer.processing_class, cast(Any, trainer.model)
    if not is_sft(trainer) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError("A warm-up needs SFTTrainer, with a tokenizer as its processing_class.")
    args = cast(SFTConfig, trainer.args)
    return WarmupPlan.of(settings, model, tokenizer, args, prepared, "the rows to train on")


def batching_of(trainer: Trainer, train_dataloader: Any, repeats: bool) -> Batching:
    """How this trainer makes steps of rows. Raises InputError for a dataset that does not fill a batch.

    Args:
        trainer, train_dataloader: the trainer and the loader that it iterates.
        repeats: whether several processes repeat rows to end an epoch, as Accelerate does.
    """
    args, processes = trainer.args, trainer.args.world_size
    batch_size = trainer._train_batch_size  # that of args, unless auto_find_batch_size has lowered it
    split = args.accelerator_config.split_batches
    if split and batch_size % processes:
        raise InputError(
            f"split_batches=True divides batches of {batch_size} rows among {processes} processes: set "
            f"per_device_train_batch_size to a multiple of {processes}."
        )
    per_process = batch_size // (processes if split else 1)
    rows, drop_last = len(train_dataloader.dataset), args.dataloader_drop_last
    if drop_last and rows < per_process * processes:
        raise InputError(
            f"{rows} rows do not fill a batch of {per_process * processes}: leave out dataloader_drop_last."
        )
    dispatched = batch_size if dispatches(train_dataloader) else 0
    return Batching(rows, per_process, processes, args.gradient_accumulation_steps, drop_last, repeats, dispatched)


def batching_of_stream(trainer: Trainer) -> Batching:
    """How this trainer makes steps of the rows of a stream, of which none is known yet."""
    args, processes = trainer.args, trainer.args.world_size
    split = processes if args.accelerator_config.split_batches else 1
    return Batching(0, trainer._train_batch_size // split, processes, args.gradient_accumulation_steps, repeats=True)


def from_main(value: Any) -> Any:
    """What the main process has, in every process."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def sampler_of(train_dataloader: Any) -> Any:
    """The trainer's own sampler; with several processes, each has a shard of its batches."""
    batch_sampler = train_dataloader.batch_sampler
    return getattr(batch_sampler, "batch_sampler", batch_sampler).sampler


@dataclass(frozen=True)
class TrainerRows:
    """Which rows of the user's dataset a trainer trains on.

    Attributes:
        sample_ids: (N,) the position of each of them in the user's dataset.
        total: the number of rows of the user's dataset.
        no_token: why a row without a token to learn has none. The trainer leaves out such rows, or trains on them.
    """

    sample_ids: np.ndarray
    total: int
    no_token: str

    def left_out(self, emptied: np.ndarray | None) -> list[str | None]:
        """Why each of the user's rows is not trained on in any epoch; None where it is.

        Args:
            emptied: (N,) bool, the trainer's rows of which no token is learnt; None for none.
        """
        reasons: list[str | None] = [self.no_token] * self.total
        for row in self.sample_ids:
            reasons[row] = None
        for row in self.sample_ids[:0] if emptied is None else self.sample_ids[emptied]:
            reasons[row] = EMPTIED
        return reasons


def rows_of(trainer: Trainer) -> TrainerRows:
    """The rows that a trainer trains on.

    SFTTrainer first maps all rows, which makes a table in the user's order, then drops those whose labels are all
    masked and shuffles, which only list the table's rows in another way. Where it maps nothing it drops nothing, and
    its shuffling follows from the seed. A plain Trainer leaves the dataset as it is.
    """
    dataset, args = cast(Any, trainer.train_dataset), cast(SFTConfig, trainer.args)
    rows, total = np.arange(len(dataset)), len(dataset)
    prepared = is_sft(trainer) and isinstance(dataset, Dataset) and not trainer._skip_prepare_dataset
    if prepared and args.max_length is not None:
        listed, total = dataset._indices, dataset.data.num_rows
        rows = rows if listed is None else listed.column(0).to_numpy()
    elif prepared and args.shuffle_dataset:
        rows = np.random.default_rng(args.seed).permutation(total)
    return TrainerRows(rows, total, no_token(trainer))


def end_token(trainer: Trainer) -> int | None:
    """The end token of a trainer's tokenizer; None where it has none."""
    processor: Any = trainer.processing_class
    found: int | None = getattr(getattr(processor, "tokenizer", processor), "eos_token_id", None)
    return found


def no_token(trainer: Trainer) -> str:
    """Why a row without a token to learn has none."""
    length = getattr(trainer.args, "max_length", None)
    return "no token to learn" + ("" if length is None else f" within max_length {length}")


def token_weight(trainer: Trainer, num_items: Any, batch: Any, micro_batches: int) -> Any:
    """The factor by which the loss of a micro-batch multiplies each token's own loss.

    Args:
        trainer: the trainer that computes the loss.
        num_items: the number of learnt tokens of the whole step, as the Trainer counts them; None where it does not.
        batch: the micro-batch.
        micro_batches: the number of micro-batches of the step.
    """
    if averages(trainer, num_items):
        return 1 / ((batch["labels"][:, 1:] != IGNORE).sum().clamp(min=1) * micro_batches)
    return (trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1) / num_items


def scaled(accelerator: Any, loss: torch.Tensor) -> torch.Tensor:
    """A loss as fp16 scales it before its backward, so that small gradients do not vanish; otherwise unchanged."""
    return loss if accelerator.scaler is None else accelerator.scaler.scale(loss)


def compiles(trainer: Trainer) -> bool:
    """Whether torch.compile makes graphs of the model, by the Trainer's setting or by Accelerate's own."""
    plugin = getattr(trainer.accelerator.state, "dynamo_plugin", None)
    return bool(trainer.args.torch_compile) or (plugin is not None and plugin.backend != DynamoBackend.NO)


def token_loss(trainer: Trainer) -> TokenLoss:
    """The loss of one token, as the trainer's arguments say."""
    args = cast(Any, trainer.args)
    by_probability = is_sft(trainer) and loss_type(args) == "dft"
    return TokenLoss(0.0 if by_probability else args.label_smoothing_factor, by_probability)


def division_facts(trainer: Trainer, sampler: Any) -> dict[str, bool]:
    """What depends on how the rows of a step are divided among micro-batches and processes.

    Args:
        trainer: the trainer.
        sampler: its own sampler.
    """
    counted = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    by_process = trainer.args.world_size > 1 and not trainer.args.average_tokens_across_devices
    return {
        "order_by_process": not isinstance(sampler, SequentialSampler | SeedableRandomSampler),
        "loss_by_batch": averages(trainer, 1 if counted else None),
        "loss_by_process": by_process,
    }


def follow_progress(trainer: Trainer, progress: Progress, now: bool) -> None:
    """Make the learning rate follow its schedule at another pace. A schedule of the user's own is left alone.

    Args:
        trainer: the trainer whose scheduler is changed.
        progress: the step of the schedule at each step of the run.
        now: whether the learning rate of the next step is set, too.
    """
    args, scheduler = trainer.args, trainer.lr_scheduler
    created = trainer._created_lr_scheduler
    if isinstance(scheduler, AcceleratedScheduler):  # in DeepSpeed's engine, beside an optimizer of its configuration
        scheduler, created = scheduler.scheduler, True
    if not created or not isinstance(scheduler, LambdaLR):
        return
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        stand_in,
        num_warmup_steps=args.get_warmup_steps(progress.scheduled),
        num_training_steps=progress.scheduled,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    ).lr_lambdas[0]
    # a partial, as the original is: a function would be saved in another way
    scheduler.lr_lambdas = [functools.partial(_at_pace, schedule, progress)] * len(scheduler.lr_lambdas)
    if now:
        rates = [base * _at_pace(schedule, progress, scheduler.last_epoch) for base in scheduler.base_lrs]
        for group, rate in zip(cast(Any, trainer.optimizer).param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


def set_total(trainer: Trainer, total: int, intervals: bool) -> None:
    """Tell the Trainer and its progress bar the number of steps of the run.

    Args:
        trainer: the trainer.
        total: the number of steps.
        intervals: whether to change the intervals of logging, evaluation and saving that are a share of the run.
    """
    trainer.state.max_steps = total
    if intervals:
        trainer.state.compute_steps(trainer.args, total)
    for callback in trainer.callback_handler.callbacks:
        bar = getattr(callback, "training_bar", None) if isinstance(callback, ProgressCallback) else None
        if bar is not None:
            bar.total = total
            bar.refresh()


def restore_random_state(trainer: Trainer, checkpoint: Path | None) -> None:
    """Restore the random state of a checkpoint, after an epoch of the Trainer's that only skips.

    Before transformers 5.3, the Trainer does so only with the first batch that it trains on in that epoch.
    """
    if checkpoint is not None:
        trainer._load_rng_state(str(checkpoint))


def learnt_anywhere(trainer: Trainer, batches: Sequence[Any]) -> bool:
    """Whether any process has a token to learn in these micro-batches of a step."""
    counts = [(batch["labels"][..., 1:] != IGNORE).sum() for batch in batches]
    return bool(trainer.accelerator.gather(torch.stack(counts).sum()).sum() > 0)


def at_least_one(num_items: Any) -> Any:
    """A number of learnt tokens to divide by."""
    if isinstance(num_items, torch.Tensor):
        return num_items.clamp(min=1)
    return None if num_items is None else max(num_items, 1)


def log(trainer: Trainer, scalars: Mapping[str, float], history: list[dict[str, float]]) -> None:
    """Log scalars to the trackers, and add them to a history; what is due to be logged stays due.

    The trainer's own `log` is not called: it adds to `state.log_history`, whose entries users count, and TRL's clears
    its running averages.
    """
    due, state = trainer.control.should_log, trainer.state
    entry = {**scalars, "epoch": float(state.epoch or 0)}
    history.append({**entry, "step": state.global_step})
    trainer.callback_handler.on_log(trainer.args, state, trainer.control, entry)
    trainer.control.should_log = due


def _at_pace(schedule: Any, progress: Progress, step: int) -> float:
    return float(schedule(progress.at(step)))


def is_packed(args: Any, dataset: Any) -> bool:
    """Whether several samples are one row."""
    packing = getattr(args, "packing", False) or getattr(args, "sample_packing", False)  # the second is axolotl's
    return bool(packing) or "seq_lengths" in (getattr(dataset, "column_names", None) or ())


def averages(trainer: Trainer, num_items: Any) -> bool:
    """Whether the loss of a step is the mean over its micro-batches of their own means.

    Args:
        trainer: the trainer that computes the loss.
        num_items: the number of learnt tokens of the whole step, as the Trainer counts them; None where it does not.
    """
    return num_items is None or loss_is_scaled_for_ga(trainer) is False
