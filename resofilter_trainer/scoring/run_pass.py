"""A pass from start to end, the same for every score. Knows the order of the steps, not what is measured.

check -> open -> lock -> earlier scores? -> warm-up -> place the model -> measure -> save
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import InputError, Warmup, warmup_settings
from ..data.loading import Opened, check_arguments, check_loss, open_pass, placed
from ..model.float32 import main_dtype
from ..scores.score_table import ScoreTable
from .output import Measured, PassOutput, folder_of
from .warmup import plan_warmup

Measure = Callable[[PreTrainedModel, Opened, PassOutput], Measured]
Place = Callable[[PreTrainedModel, SFTConfig], PreTrainedModel]
Settle = Callable[[PreTrainedModel, Opened], Opened]


def run_pass(
    model: str | PreTrainedModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase | None,
    args: SFTConfig,
    config: Mapping[str, Any],
    output: str | os.PathLike[str] | None,
    measure: Measure,
    *,
    place: Place | None = placed,
    settle: Settle | None = None,
    gradients: bool = False,
    warmup: int | Warmup | None = None,
    warmup_dataset: Dataset | None = None,
    **options: Any,
) -> ScoreTable:
    """Measure every row of a dataset and save the scores; scores that are already there are returned as they are.

    Args:
        model, dataset, processing_class, args, output: as for `score_dataset`.
        config: what is measured and with which settings, for the provenance.
        measure: a function that measures the rows of the opened pass with the placed model; its third argument knows
            where to save results on the way (`PassOutput.parts`).
        place: a function that moves the model to its device; None if the pass does not run the model.
        settle: a function that decides what can be measured of these rows, and says so in their provenance.
        gradients: whether the pass takes gradients, which vanish in float16.
        warmup, warmup_dataset: as for `score_dataset`; the measured model is then a tuned one.
        **options: as for `open_pass`.

    Raises:
        InputError: the arguments, the device or the precision cannot work, nothing can be measured, or `output` holds
            scores of something else or another run writes to it.
    """
    warmup_settings(warmup)  # before anything is loaded
    check_arguments(args, folder_of(output))
    if gradients:
        check_loss(args)
    if place is not None and args.device.type == "mps":
        raise InputError("Apple's GPU has no float64, and scores are float64. Pass use_cpu=True.")
    _check_float16(gradients and args.fp16)
    loaded_here = isinstance(model, str)
    model, opened = open_pass(model, dataset, processing_class, args, config, output=folder_of(output), **options)
    _check_float16(gradients and main_dtype(model) == torch.float16)
    if settle is not None:
        opened = settle(model, opened)
    plan = plan_warmup(warmup, warmup_dataset, model, opened, args, options)
    opened = opened if plan is None else plan.described(opened)
    target = PassOutput(output, opened)
    with target.locked():
        earlier = target.earlier()
        if earlier is not None:
            return earlier
        if plan is not None:
            model, provenance = plan.warmed(model, opened.provenance, folder_of(output), in_place=loaded_here)
            opened = dataclasses.replace(opened, provenance=provenance)
            target = dataclasses.replace(target, opened=opened)
        if place is not None:
            model = place(model, args)
        measured = measure(model, opened, target)
        return target.finish(measured if plan is None else plan.marked(measured, opened.prepared))


def _check_float16(in_float16: bool) -> None:
    if in_float16:
        raise InputError("Gradients near eps vanish in float16, and their ranking with them. Score in bf16 or float32.")
