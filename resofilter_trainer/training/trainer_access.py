"""What a callback needs of the Trainer and is not handed: the trainer itself, which rows it holds, what it can do.

Knows transformers' Trainer and TRL's SFTTrainer, nothing of scores. Everything here is about versions of theirs.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig, SFTTrainer

from ..config import InputError
from ..model.losses import IGNORE
from ..model.sharding import is_sharded
from ..selecting.token_selection import EMPTIED
from .plan import Batching, Progress
from .sampler import IndexedRows, RowCollator, ShrinkingSampler


class Hold:
    """What a run changes in a trainer, and how it is put back.

    Args:
        trainer, train_dataloader: the trainer and what it iterates.
        sampler: takes the place of the trainer's own.
        fetch: takes the place of `trainer.get_batch_samples`, which it is given as `inner`.
    """

    def __init__(self, trainer: Trainer, train_dataloader: Any, sampler: ShrinkingSampler, fetch: Any) -> None:
        self._trainer, self._loader, self._sampler, self._fetch = trainer, train_dataloader, sampler, fetch
        base = getattr(train_dataloader, "base_dataloader", train_dataloader)
        self._base, self._dataset, self._collate = base, base.dataset, base.collate_fn

    def take(self) -> None:
        """Let rows be known, and fetched by the run."""
        self._base.__dict__["dataset"] = IndexedRows(self._dataset)  # a loader refuses it as a plain attribute
        self._base.collate_fn = RowCollator(self._collate)
        self._loader.set_sampler(self._sampler)
        self._let_go()  # of what an earlier run left, that ended by an exception
        self.inner = self._trainer.get_batch_samples
        self._trainer.get_batch_samples = _Fetch(self._fetch, vars(self._trainer).get("get_batch_samples"))

    def release(self) -> None:
        """Leave the trainer as it was found."""
        if self._let_go():
            self._base.__dict__["dataset"], self._base.collate_fn = self._dataset, self._collate
            self._loader.set_sampler(self._sampler.inner)

    def _let_go(self) -> bool:
        """Give the trainer its own `get_batch_samples` back; whether a run had taken its place."""
        there = vars(self._trainer).get("get_batch_samples")
        if not isinstance(there, _Fetch):
            return False
        if there.replaced is None:
            del self._trainer.get_batch_samples
        else:
            self._trainer.get_batch_samples = there.replaced
        return True


class _Fetch:
    """A run's own `get_batch_samples`, to be known again, and what it took the place of on the trainer itself."""

    def __init__(self, fetch: Any, replaced: Any) -> None:
        self._fetch, self.replaced = fetch, replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fetch(*args, **kwargs)


def calling_trainer() -> tuple[Trainer, str | None]:
    """The trainer that fires the event which is being handled, and the checkpoint that it goes on from.

    A callback is handed neither, and without the trainer nothing can be logged through its trackers. So they are read
    off the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer) and "resume_from_checkpoint" in frame.f_locals:
            checkpoint = frame.f_locals["resume_from_checkpoint"]
            return trainer, None if checkpoint is None else os.fspath(checkpoint)
        frame = frame.f_back
    raise RuntimeError("This version of transformers fires its events in another way: no Trainer was found.")


def check_trainer(trainer: Trainer, train_dataloader: Any) -> None:
    """Raise InputError for a setting under which rows or gradients cannot be told apart; it says what to change."""
    args = cast(SFTConfig, trainer.args)
    dataset = train_dataloader.dataset
    accelerator = trainer.accelerator
    strategy = args.train_sampling_strategy
    sharded = "Score first (resofilter score), then train on the selection"
    by_fsdp = accelerator.distributed_type == DistributedType.FSDP or is_sharded(cast(Any, trainer.model))
    refusals = [
        (isinstance(dataset, torch.utils.data.IterableDataset), "a streaming dataset", "Load it as a Dataset"),
        (is_packed(args, dataset), "packed rows", "Set packing=False; padding_free=True wastes no padding either"),
        (strategy == "batch_rebalance", "train_sampling_strategy='batch_rebalance'", "Use 'random'"),
        (args.accelerator_config.dispatch_batches is True, "dispatch_batches=True", "Leave it unset"),
        (args.torch_compile, "torch_compile=True, which drops hooks", "Set torch_compile=False"),
        (args.fp16, "fp16, in which gradients near eps vanish", "Use bf16=True or float32"),
        (args.n_gpu > 1, "nn.DataParallel", "Use accelerate launch, or show one GPU by CUDA_VISIBLE_DEVICES"),
        (by_fsdp, "FSDP, which shards weights and gradients", sharded),
        (accelerator.distributed_type == DistributedType.DEEPSPEED, "DeepSpeed", sharded),
        (accelerator.parallelism_config is not None, "parallelism within a sample", "Leave parallelism_config unset"),
        (args.device.type == "mps", "Apple's GPU, which has no float64", "Pass use_cpu=True"),
        (cast(Any, trainer.model).dtype == torch.float16, "float16 weights", "Load the model in float32 or bfloat16"),
        (_averages_averages(trainer), "accumulation, where each batch's loss is its own mean", "Accumulate 1 batch"),
        (learns_prompts(trainer.model), "prompt learning, which adds tokens", "Use LoRA, or train all weights"),
    ]
    for refused, what, remedy in refusals:
        if refused:
            raise InputError(f"ResonanceCallback cannot work with {what}. {remedy}.")
    if len(dataset) == 0:
        raise InputError("The dataset has no rows to train on.")


def batching_of(trainer: Trainer, train_dataloader: Any) -> Batching:
    """How this trainer makes updates of rows. Raises InputError for a dataset that fills no batch."""
    args, processes = trainer.args, trainer.args.world_size
    batch_size = trainer._train_batch_size  # that of args, unless auto_find_batch_size has lowered it
    per_process = batch_size // (processes if args.accelerator_config.split_batches else 1)
    rows, drop_last = len(train_dataloader.dataset), args.dataloader_drop_last
    if drop_last and rows < per_process * processes:
        raise InputError(f"{rows} rows fill no batch of {per_process * processes}: leave out dataloader_drop_last.")
    return Batching(rows, per_process, processes, args.gradient_accumulation_steps, drop_last)


def sampler_of(train_dataloader: Any) -> Any:
    """The trainer's own sampler; of several processes each has a shard of its batches."""
    batch_sampler = train_dataloader.batch_sampler
    return getattr(batch_sampler, "batch_sampler", batch_sampler).sampler


@dataclass(frozen=True)
class HeldRows:
    """Which rows of the dataset that the user passed a trainer holds.

    Attributes:
        sample_ids: (N,) the place of each of them in the user's dataset.
        total: rows of the user's dataset.
        dropped: why it does not hold the others.
    """

    sample_ids: np.ndarray
    total: int
    dropped: str

    def left_out(self, emptied: np.ndarray | None) -> list[str | None]:
        """Of the user's rows, why each is not trained on in any epoch; None where it is.

        Args:
            emptied: (N,) bool, the held rows of which no token is learnt.
        """
        reasons: list[str | None] = [self.dropped] * self.total
        for row in self.sample_ids:
            reasons[row] = None
        for row in self.sample_ids[:0] if emptied is None else self.sample_ids[emptied]:
            reasons[row] = EMPTIED
        return reasons


def held_rows(trainer: Trainer) -> HeldRows:
    """The rows that a trainer holds.

    SFTTrainer first maps all rows, which makes a table in the user's order, then drops those with every label masked
    and shuffles, which only list the table's rows in another way. Where it maps nothing it drops nothing, and its
    shuffling is known by the seed. A plain Trainer leaves the dataset as it is.
    """
    dataset, args = cast(Any, trainer.train_dataset), cast(SFTConfig, trainer.args)
    rows, total = np.arange(len(dataset)), len(dataset)
    prepared = isinstance(trainer, SFTTrainer) and isinstance(dataset, Dataset) and not trainer._skip_prepare_dataset
    if prepared and args.max_length is not None:
        listed, total = dataset._indices, dataset.data.num_rows
        rows = rows if listed is None else listed.column(0).to_numpy()
    elif prepared and args.shuffle_dataset:
        rows = np.random.default_rng(args.seed).permutation(total)
    return HeldRows(rows, total, f"no token to learn within max_length {getattr(args, 'max_length', None)}")


def token_weight(trainer: Trainer, num_items: Any, batch: Any, micro_batches: int) -> Any:
    """What the loss of a micro-batch multiplies each token's own loss by.

    Args:
        num_items: learnt tokens of the whole update, as the Trainer counts them; None where it does not.
        batch: the micro-batch.
        micro_batches: how many the update has.
    """
    if num_items is None or trainer.loss_is_scaled_for_ga is False:  # a mean of means
        return 1 / ((batch["labels"][:, 1:] != IGNORE).sum().clamp(min=1) * micro_batches)
    return (trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1) / num_items


def follow_progress(trainer: Trainer, progress: Progress, begin: bool) -> None:
    """Make the learning rate follow its schedule at another pace. A schedule of the user's own is left alone.

    Args:
        begin: whether no step was made yet, so that the first learning rate is set too.
    """
    args, scheduler = trainer.args, trainer.lr_scheduler
    if not trainer._created_lr_scheduler or not isinstance(scheduler, LambdaLR):
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
    if begin:
        for group, base in zip(cast(Any, trainer.optimizer).param_groups, scheduler.base_lrs, strict=True):
            group["lr"] = base * schedule(progress.at(0))


def set_total(trainer: Trainer, total: int, intervals: bool) -> None:
    """Tell the Trainer and its progress bar how many steps the run has.

    Args:
        intervals: whether logging, evaluation and saving, where they are a share of the run, follow.
    """
    trainer.state.max_steps = total
    if intervals:
        trainer.state.compute_steps(trainer.args, total)
    for callback in trainer.callback_handler.callbacks:
        bar = getattr(callback, "training_bar", None) if isinstance(callback, ProgressCallback) else None
        if bar is not None:
            bar.total = total
            bar.refresh()


def learnt_anywhere(trainer: Trainer, batches: Sequence[Any]) -> bool:
    """Whether any process has a token to learn in these micro-batches of an update."""
    counts = [(batch["labels"][..., 1:] != IGNORE).sum() for batch in batches]
    return bool(trainer.accelerator.gather(torch.stack(counts).sum()).sum() > 0)


def at_least_one(num_items: Any) -> Any:
    """A number of learnt tokens to divide by."""
    if isinstance(num_items, torch.Tensor):
        return num_items.clamp(min=1)
    return None if num_items is None else max(num_items, 1)


def masked_copy(batch: Any) -> Any:
    """A micro-batch like another that has nothing to learn."""
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORE)}


def log(trainer: Trainer, scalars: dict[str, float]) -> None:
    """Through the trainer's history and trackers; what else is due to be logged stays due."""
    due = trainer.control.should_log
    Trainer.log(trainer, dict(scalars))  # not the trainer's own: TRL's would add, and clear, its running averages
    trainer.control.should_log = due


def checkpoint_folder(checkpoint: str | None, trainer: Trainer) -> Path:
    """Where a checkpoint keeps what belongs to this package; by default of the one at the current step."""
    default = os.path.join(cast(str, trainer.args.output_dir), f"checkpoint-{trainer.state.global_step}")
    return Path(checkpoint or default) / "resofilter"


def _at_pace(schedule: Any, progress: Progress, step: int) -> float:
    return float(schedule(progress.at(step)))


def is_packed(args: Any, dataset: Any) -> bool:
    """Whether several samples are one row."""
    return bool(getattr(args, "packing", False)) or "seq_lengths" in (getattr(dataset, "column_names", None) or ())


def _averages_averages(trainer: Trainer) -> bool:
    """Whether the model takes no number of items: an update that is filled up would weigh its rows less."""
    return trainer.args.gradient_accumulation_steps > 1 and not trainer.model_accepts_loss_kwargs


def learns_prompts(model: Any) -> bool:
    """Whether tokens are added that stand in no batch."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
