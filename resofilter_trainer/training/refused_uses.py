"""What uses of ResonanceCallback it refuses with some trainers: see `refusals`. Knows Trainers, no scores.

A table of docs/engines.md has these, too.
"""

from __future__ import annotations

from typing import Any, cast

from transformers import Trainer

from ..config import InputError
from ..model.sharding import is_sharded
from ..selecting.weighted_rows import TOKEN_WEIGHTS, WEIGHT
from .refusals import WRAPPED, Refusal, check_weighable, has_column, refuse
from .trainer_packing import packs


def steps_in_backward(trainer: Trainer) -> bool:
    """Whether the optimizer steps in the backward, so that no update is left to leave out."""
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim)).lower()
    return trainer.is_deepspeed_enabled or any(word in name for word in ("lomo", "layerwise"))


BEFORE_SHARDED = Refusal(
    what="when='before' of a sharded model",
    why="in which processes with fewer rows than others leave the others waiting",
    remedy=(
        "Score first, with score_dataset(..., sharded=True), and train on the selection; or measure while training"
    ),
    refused=lambda trainer, dataset: is_sharded(cast(Any, trainer.model)),
)
CLEANING_SHARDED = Refusal(
    what="token_cleaning of a sharded model",
    why="which measures tokens in passes of its own",
    remedy="Clean the tokens first (resofilter clean)",
    refused=lambda trainer, dataset: is_sharded(cast(Any, trainer.model)),
)

CLEANING_PACKED = Refusal(
    what="token_cleaning and packing=True",
    why="as it masks the tokens of single rows",
    remedy="Set packing=False",
    refused=lambda trainer, dataset: packs(trainer),
)

BEFORE_DEEPSPEED = Refusal(
    what="when='before' under DeepSpeed",
    why="whose engine takes every gradient as its own",
    remedy="Score first, with score_dataset, and train on the selection; or measure while training",
    refused=lambda trainer, dataset: trainer.is_deepspeed_enabled,
)
CLEANING_DEEPSPEED = Refusal(
    what="token_cleaning under DeepSpeed",
    why="which makes its step in the backward, even where no token is learnt",
    remedy="Clean the tokens first (resofilter clean)",
    refused=lambda trainer, dataset: trainer.is_deepspeed_enabled,
)
OPTIMIZER_DEEPSPEED = Refusal(
    what="update='optimizer' under DeepSpeed",
    why="which makes its step in the backward",
    remedy="Use update='adamw'",
    refused=lambda trainer, dataset: trainer.is_deepspeed_enabled,
)

SKIPPING = Refusal(
    what="skip_update=True, or 'skip' from on_spike, and an optimizer that steps in the backward",
    why="such as LOMO, a layer-wise one or DeepSpeed's, which has no update left to leave out",
    remedy="Return 'stop' from on_spike, or use another optim",
    refused=lambda trainer, dataset: steps_in_backward(trainer),
)
RULE_IN_BACKWARD = Refusal(
    what="a token rule and an optimizer that steps in the backward",
    why="such as LOMO, a layer-wise one or DeepSpeed's, which steps even where no token has a weight",
    remedy="Clean the tokens first (resofilter clean), or use another optim",
    refused=lambda trainer, dataset: steps_in_backward(trainer),
)

USES = (
    BEFORE_SHARDED,
    BEFORE_DEEPSPEED,
    CLEANING_SHARDED,
    CLEANING_DEEPSPEED,
    CLEANING_PACKED,
    OPTIMIZER_DEEPSPEED,
    SKIPPING,
    RULE_IN_BACKWARD,
)


def check_use(trainer: Trainer, update: str, before: bool = False, cleans: bool = False) -> None:
    """Raise InputError for a use of the callback that this trainer does not allow.

    Args:
        trainer: the trainer.
        update: the update that is measured.
        before: whether rows are measured in a pass of their own, before the training.
        cleans: whether tokens are cleaned.
    """
    asked = [
        *([BEFORE_SHARDED, BEFORE_DEEPSPEED] if before else []),
        *([CLEANING_SHARDED, CLEANING_DEEPSPEED, CLEANING_PACKED] if cleans else []),
        *([OPTIMIZER_DEEPSPEED] if update == "optimizer" else []),
    ]
    refuse("ResonanceCallback cannot work with", asked, trainer, trainer.train_dataset)


def check_skipping(trainer: Trainer) -> None:
    """Raise InputError where the update of a step cannot be left out."""
    refuse("ResonanceCallback cannot work with", [SKIPPING], trainer, trainer.train_dataset)


def check_rule(trainer: Trainer, train_dataloader: Any) -> None:
    """Raise InputError where a token rule cannot act in a run, or rows have weights already."""
    check_weighable(trainer, train_dataloader, "token")
    refuse("Tokens cannot be weighted with", [WRAPPED, RULE_IN_BACKWARD], trainer, trainer.train_dataset)
    for column in (WEIGHT, TOKEN_WEIGHTS):
        if has_column(trainer, column):
            raise InputError(f"The rows have weights ('{column}'): leave the token rule out, or remove the column.")
