"""The pass before a run: the scores of all its rows at the starting weights, or at those of a tuned copy."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from datasets import Dataset
from transformers import Trainer

from ..config import InputError, ResonanceConfig, Warmup
from ..data.loading import check_loss
from ..data.preparation import prepared_already
from ..scores.provenance import Provenance
from ..scoring.dataset import score_prepared
from . import trainer_access as access
from .measurements import Measured
from .token_run import CleaningRun


def measured_before(
    trainer: Trainer,
    dataset: Any,
    tokens: CleaningRun | None,
    warmup: int | Warmup | None,
    config: ResonanceConfig,
    provenance: Provenance,
) -> tuple[Measured, Provenance]:
    """Score the samples of a run in one pass (ResoFilter, 3.1).

    Args:
        trainer: the trainer, before its first step.
        dataset: the samples.
        tokens: the run's token cleaning, which says which tokens are learnt; None to learn all tokens.
        warmup: the tuning of the copy; None to score with the model itself.
        config: the step to measure, and how.
        provenance: the provenance of the run.

    Returns:
        What was measured, as of epoch 0; and the provenance with the warm-up and the trust.

    Raises:
        InputError: the dataset is no `datasets.Dataset`, or its rows cannot be scored.
    """
    if not isinstance(dataset, Dataset):
        raise InputError(f"when='before' needs a datasets.Dataset, got {type(dataset).__name__}.")
    check_loss(trainer.args)
    prepared = prepared_already(dataset, trainer.data_collator) if tokens is None else tokens.cleaned()
    model, plan = cast(Any, trainer.model), access.warmup_of(trainer, prepared, warmup)
    if plan is not None:
        model, provenance = plan.warmed(model, plan.told(provenance), None)
    found, _, trust = score_prepared(model, prepared, trainer.args, config)
    numbers = (found.loss, found.num_tokens, prepared.lengths, found.layers)
    return Measured(0, 0, prepared.sample_ids, *numbers), dataclasses.replace(provenance, trust=trust)
