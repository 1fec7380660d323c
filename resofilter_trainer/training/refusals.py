"""What the callbacks refuse: each setting with its reason and the way round. Knows Trainers, no scores.

The tables of docs/engines.md are these lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer

from ..config import InputError
from ..config.compatibility import has, loss_type, need, sampling_strategy
from ..model.adapters import keeps_a_prefix, refuse_adapters
from ..model.float32 import main_dtype
from ..model.head import mixes_samples
from ..model.losses import unwrapped
from ..model.sharding import is_fsdp2, is_sharded
from ..selecting.results import NAME
from ..selecting.weighted_rows import TOKEN_WEIGHTS, WEIGHT
from .trainer_access import compiles, dispatches, is_packed, is_sft, is_stream, is_unsloth
from .trainer_packing import packs


@dataclass(frozen=True)
class Refusal:
    """One thing that cannot work.

    Attributes:
        what: its name, as the message has it.
        why: the reason, a clause that follows the name.
        remedy: the way round, a sentence without its full stop.
        refused: whether a trainer, with the dataset of its loader, has it; or a stream, as it is read.
    """

    what: str
    why: str
    remedy: str
    refused: Callable[..., bool]


UNPACK = (
    "Pass SFTTrainer the rows themselves (resofilter_trainer.unpack makes rows of packs), with packing=True and "
    "callbacks=[ResonanceCallback(dataset=dataset)]"
)

WRAPPED = Refusal(
    what="packing_strategy='wrapped'",
    why="under which the rows of a pack see each other",
    remedy="Use packing_strategy='bfd' or 'bfd_split'",
    refused=lambda trainer, dataset: packs(trainer) and cast(Any, trainer.args).packing_strategy == "wrapped",
)

# Both callbacks refuse these: the samples of a batch, or their rows, cannot be told apart.
COMMON: tuple[Refusal, ...] = (
    Refusal(
        what="nn.DataParallel",
        why="whose copies of the model, made anew for every batch, the hooks do not know",
        remedy="Use accelerate launch, or show one GPU by CUDA_VISIBLE_DEVICES",
        refused=lambda trainer, dataset: trainer.args.n_gpu > 1,
    ),
    Refusal(
        what="padding_free=True and an adapter that keeps a prefix",
        why="which one sample of a row sees",
        remedy="Set padding_free=False",
        refused=lambda trainer, dataset: (
            bool(getattr(trainer.args, "padding_free", False)) and keeps_a_prefix(cast(Any, trainer.model))
        ),
    ),
)

# ResonanceCallback refuses these, too.
MEASURING: tuple[Refusal, ...] = (
    *COMMON,
    Refusal(
        what="packing=True and an adapter that keeps a prefix",
        why="which one sample of a pack sees",
        remedy="Set packing=False",
        refused=lambda trainer, dataset: packs(trainer) and keeps_a_prefix(cast(Any, trainer.model)),
    ),
    Refusal(
        what="packing=True and dispatch_batches=True",
        why="which divides the rows of a batch",
        remedy="Leave dispatch_batches unset",
        refused=lambda trainer, dataset: packs(trainer) and _dispatches(trainer),
    ),
    Refusal(
        what="rows that are packed already",
        why="of which several are one row of a batch",
        remedy=UNPACK,
        refused=lambda trainer, dataset: is_packed(trainer.args, trainer.train_dataset) and not packs(trainer),
    ),
    Refusal(
        what="packing=True with unsloth",
        why="which packs in its own way",
        remedy="Set packing=False",
        refused=lambda trainer, dataset: packs(trainer) and is_unsloth(trainer),
    ),
    Refusal(
        what="packing=True and skip_prepare_dataset",
        why="which packs nothing",
        remedy="Leave one of them out",
        refused=lambda trainer, dataset: packs(trainer) and cast(Any, trainer)._skip_prepare_dataset,
    ),
    WRAPPED,
    Refusal(
        what="packing=True and train_sampling_strategy='group_by_length'",
        why="as packs are about equally long",
        remedy="Leave the strategy out",
        refused=lambda trainer, dataset: packs(trainer) and sampling_strategy(trainer.args) == "group_by_length",
    ),
    Refusal(
        what="torch_compile=True in several processes",
        why="which compiles the model together with its wrapper, and was never compared",
        remedy="Set torch_compile=False",
        refused=lambda trainer, dataset: compiles(trainer) and trainer.args.world_size > 1,
    ),
    Refusal(
        what="train_sampling_strategy='batch_rebalance'",
        why="whose batches have sizes of their own, and which ignores the sampler that leaves rows out",
        remedy="Use 'random'",
        refused=lambda trainer, dataset: sampling_strategy(trainer.args) == "batch_rebalance",
    ),
    Refusal(
        what="train_sampling_strategy='sequential'",
        why="which transformers ignores before 5.2",
        remedy="Leave it out",
        refused=lambda trainer, dataset: (
            sampling_strategy(trainer.args) == "sequential" and not has("train_sampling_strategy")
        ),
    ),
    Refusal(
        what=f"rows that have weights ('{WEIGHT}')",
        why="which the loss would ignore",
        remedy="Train on them with SampleWeights, or remove the column",
        refused=lambda trainer, dataset: has_column(trainer, WEIGHT),
    ),
    Refusal(
        what=f"rows whose tokens have weights ('{TOKEN_WEIGHTS}')",
        why="which the loss would ignore",
        remedy="Train on them with TokenWeights, or remove the column",
        refused=lambda trainer, dataset: has_column(trainer, TOKEN_WEIGHTS),
    ),
    Refusal(
        what="padding_free=True and dispatch_batches=True",
        why="which divides the rows of a batch",
        remedy="Leave dispatch_batches unset",
        refused=lambda trainer, dataset: bool(getattr(trainer.args, "padding_free", False)) and _dispatches(trainer),
    ),
    Refusal(
        what="a model that is sharded by other means than FSDP2, such as FSDP1",
        why="whose weights are not whole where they are used",
        remedy="Let the Trainer shard it, with fsdp_config={'fsdp_version': 2} or accelerate's own configuration",
        refused=lambda trainer, dataset: _in_shards(trainer) and not _by_fsdp2(trainer),
    ),
    Refusal(
        what="DeepSpeed's fp16",
        why="whose loss scale is the engine's own",
        remedy="Use bf16",
        refused=lambda trainer, dataset: _deepspeed(trainer, "fp16", "enabled"),
    ),
    Refusal(
        what="a scheduler in DeepSpeed's configuration",
        why="which counts the steps of all rows",
        remedy="Leave it out there, and set lr_scheduler_type",
        refused=lambda trainer, dataset: _deepspeed(trainer, "scheduler"),
    ),
    Refusal(
        what="packing=True or padding_free=True under DeepSpeed's ZeRO-3",
        why="which has no whole weights to try whether the model keeps the samples of a row apart",
        remedy="Use ZeRO-2, or leave both out",
        refused=lambda trainer, dataset: (
            trainer.is_deepspeed_enabled
            and is_sharded(cast(Any, trainer.model))
            and (packs(trainer) or bool(getattr(trainer.args, "padding_free", False)))
        ),
    ),
    Refusal(
        what="torch_compile=True and DeepSpeed",
        why="whose engine compiles the model itself",
        remedy="Set torch_compile=False",
        refused=lambda trainer, dataset: trainer.is_deepspeed_enabled and compiles(trainer),
    ),
    Refusal(
        what="parallelism within a sample",
        why="of which each process sees a part only",
        remedy="Leave parallelism_config and DeepSpeed's tensor_parallel unset",
        refused=lambda trainer, dataset: (
            trainer.accelerator.parallelism_config is not None or _deepspeed(trainer, "tensor_parallel")
        ),
    ),
    Refusal(
        what="Apple's GPU",
        why="which has no float64",
        remedy="Pass use_cpu=True",
        refused=lambda trainer, dataset: trainer.args.device.type == "mps",
    ),
    Refusal(
        what="float16 weights",
        why="in whose gradients small numbers vanish",
        remedy="Load the model in float32 or bfloat16",
        refused=lambda trainer, dataset: main_dtype(cast(Any, trainer.model)) == torch.float16,
    ),
    Refusal(
        what="several processes, where each batch's loss is its own mean",
        why="as one may have no row left",
        remedy="Set dataloader_drop_last=True",
        refused=lambda trainer, dataset: (
            trainer.args.world_size > 1
            and not is_stream(trainer)  # of which Accelerate repeats rows
            and not trainer.model_accepts_loss_kwargs
            and not trainer.args.dataloader_drop_last
        ),
    ),
)

PACKED = Refusal(
    what="packed rows",
    why="of which several are one row of a batch",
    remedy="Set packing=False; padding_free=True wastes no padding either",
    refused=lambda trainer, dataset: is_packed(trainer.args, dataset),
)

# SampleWeights refuses these, whose rows it does not know.
UNKNOWN_ROWS: tuple[Refusal, ...] = (
    Refusal(
        what="a streaming dataset",
        why="whose rows have no positions to weight",
        remedy="Load it as a Dataset",
        refused=lambda trainer, dataset: is_stream(trainer),
    ),
    PACKED,
)

# Weights, by SampleWeights or by a policy in a run, cannot act with these.
WEIGHING: tuple[Refusal, ...] = (
    *COMMON,
    Refusal(
        what="torch_compile=True",
        why="which compiles the loss together with the model, before it is weighted",
        remedy="Set torch_compile=False",
        refused=lambda trainer, dataset: compiles(trainer),
    ),
    Refusal(
        what="a loss_type other than 'nll', such as loss_type='dft'",
        why="whose tokens are weighted already",
        remedy="Use 'nll'",
        refused=lambda trainer, dataset: loss_type(cast(Any, trainer.args)) != "nll",
    ),
    Refusal(
        what="compute_loss_func",
        why="which replaces the loss that is weighted",
        remedy="Weight the rows there",
        refused=lambda trainer, dataset: trainer.compute_loss_func is not None,
    ),
    Refusal(
        what="label smoothing",
        why="which is computed from the logits of all tokens together",
        remedy="Leave it out",
        refused=lambda trainer, dataset: bool(trainer.args.label_smoothing_factor),
    ),
)


def check_trainer(trainer: Trainer, train_dataloader: Any) -> None:
    """Raise InputError for a setting under which rows or gradients cannot be told apart; it says what to change."""
    args = cast(Any, trainer.args)
    if loss_type(args) == "dft":
        need("log_probs", "ResonanceCallback with loss_type='dft'")
    refuse_adapters(cast(Any, trainer.model))
    refuse("ResonanceCallback cannot work with", MEASURING, trainer, train_dataloader.dataset)
    if not is_stream(trainer) and len(train_dataloader.dataset) == 0:
        raise InputError("The dataset has no rows to train on.")
    setting = next((name for name in ("packing", "padding_free") if getattr(args, name, False)), None)
    if setting is not None:
        _check_apart(cast(Any, trainer.model), 2e-2 if args.bf16 or args.fp16 else 1e-4, setting)


def check_sample_weights(trainer: Trainer, train_dataloader: Any, what: str = "row") -> None:
    """Raise InputError where weights cannot be taken from the dataset's rows; arguments as for `check_weighable`."""
    refuse(f"{what.capitalize()}s cannot be weighted with", UNKNOWN_ROWS, trainer, train_dataloader.dataset)
    check_weighable(trainer, train_dataloader, what)


def check_weighable(trainer: Trainer, train_dataloader: Any, what: str = "row") -> None:
    """Raise InputError where a loss cannot be weighted; it says what to change.

    Args:
        trainer, train_dataloader: the run's.
        what: what has a weight, a row or a token.
    """
    if not is_sft(trainer):
        raise InputError(f"{what.capitalize()}s are weighted in SFTTrainer's loss, this is {type(trainer).__name__}.")
    refuse_adapters(cast(Any, trainer.model))
    refuse(f"{what.capitalize()}s cannot be weighted with", WEIGHING, trainer, train_dataloader.dataset)
    need("log_probs", f"A weight for each {what}")


def check_checkpoint(trainer: Trainer, name: str) -> None:
    """Raise InputError where a run resumes without the ResonanceCallback of its checkpoint.

    Args:
        trainer: the run's trainer.
        name: the callback that it has instead.
    """
    if NAME in trainer.state.stateful_callbacks:
        raise InputError(
            "This checkpoint was made with ResonanceCallback, which is missing here: without it, the run would train "
            f"on all rows. Resume with ResonanceCallback, or start again with {name}."
        )


def refuse_both_weights(trainer: Trainer) -> None:
    """Raise InputError where rows have weights of their own and weights of their tokens: only one kind would act."""
    if has_column(trainer, WEIGHT) and has_column(trainer, TOKEN_WEIGHTS):
        raise InputError(f"The rows have '{WEIGHT}' as well: multiply '{TOKEN_WEIGHTS}' by it, and remove it.")


def has_column(trainer: Trainer, name: str) -> bool:
    """Whether the rows that a trainer trains on have a column."""
    return name in (getattr(trainer.train_dataset, "column_names", None) or [])


def refuse(cannot: str, refusals: Sequence[Refusal], *given: Any) -> None:
    """Raise InputError for the first refusal that applies to what is given.

    Args:
        cannot: the beginning of the message.
        refusals: the refusals, each with the same arguments.
        given: these arguments.
    """
    for each in refusals:
        if each.refused(*given):
            raise InputError(f"{cannot} {each.what}, {each.why}. {each.remedy}.")


def _check_apart(model: Any, tolerance: float, setting: str) -> None:
    """Raise InputError for a model whose samples in a padding-free row see each other."""
    if mixes_samples(model, tolerance):
        raise InputError(
            f"With {setting}=True, the samples of a row see each other in {type(unwrapped(model)).__name__} "
            f"(attn_implementation='{model.config._attn_implementation}'), in training and so in their scores. Set "
            f"{setting}=False, or load the model with an attn_implementation that keeps them apart, such as "
            "'flash_attention_2'."
        )


def _in_shards(trainer: Trainer) -> bool:
    """Whether a trainer's model is sharded, by whatever means."""
    if trainer.is_deepspeed_enabled:
        return False  # whose ZeRO-3 has each layer whole while it runs
    by_class = isinstance(trainer.model, FullyShardedDataParallel)
    by_engine = trainer.accelerator.distributed_type == DistributedType.FSDP
    return by_class or by_engine or is_sharded(cast(Any, trainer.model))


def _by_fsdp2(trainer: Trainer) -> bool:
    """Whether the Trainer itself has sharded its model by FSDP2."""
    return trainer.is_fsdp_enabled and is_fsdp2(cast(Any, trainer.model))


def _deepspeed(trainer: Trainer, *path: str) -> bool:
    """Whether an entry of DeepSpeed's configuration is there and true; never without DeepSpeed."""
    found = trainer.accelerator.deepspeed_config if trainer.is_deepspeed_enabled else {}
    for name in path:
        found = found.get(name) or {}
    return bool(found)


def _dispatches(trainer: Trainer) -> bool:
    """Whether one process loads the rows of all."""
    return dispatches(trainer.callback_handler.train_dataloader)
