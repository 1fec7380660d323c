"""A pass over a dataset with a selector's criterion: every row, once, as a ScoreTable. Knows batches and processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import InputError, NotFiniteError
from ..criteria.criterion import CRITERIA, Criterion
from ..data.loading import check_arguments, default_arguments, open_pass, placed
from ..data.preparation import PreparedRows
from ..model.modes import bfloat16_forward, evaluating
from ..scores.score_table import ScoreTable
from .batches import collate, padded_tokens, split_by_tokens
from .output import PassOutput, folder_of
from .passes import Parts, measure_batches

Measure = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
TOKENS_PER_BATCH = 1024  # whole logits of a batch are held
VALUE = "value"


def score_by(
    criterion: str | Criterion | Measure,
    model: str | PreTrainedModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    **row_options: Any,
) -> ScoreTable:
    """Score every row by a criterion of another selector.

    Args:
        criterion: one of `CRITERIA`, a function `(model, batch)` to (B,) of one's own, or a `Criterion`. In a folder,
            scores by a function are known by its name.
        model, dataset, processing_class, args, output, **row_options: as for `score_dataset`.
        tokens_per_batch: padding included.

    Returns:
        A line for every row: its score, and where the criterion has several numbers these, too; or the reason why it
        has none. `DataSelector()` drops the end that those who proposed the criterion drop.

    Raises:
        InputError: the criterion is not known, a row's number is not finite, or as for `score_dataset`.
    """
    name, chosen = _named(criterion)
    if output is not None and ("<" in name or not name):
        raise InputError(
            "Scores in a folder are known by the function's name: give it one, it is a lambda or the like."
        )
    args = args or default_arguments()
    if args.device.type == "mps":
        raise InputError("Apple's GPU has no float64, in which scores are kept. Pass use_cpu=True.")
    check_arguments(args, folder_of(output))
    config = {"criterion": name, "drop": chosen.drop, "columns": list(chosen.columns), **chosen.settings}
    model, opened = open_pass(model, dataset, processing_class, args, config, **row_options)
    target = PassOutput(output, opened)
    with target.held():
        earlier = target.earlier()
        if earlier is not None:
            return earlier
        model = placed(model, args)
        measure = chosen.measure(opened.prepared) if chosen.counts else chosen.measure
        parts = target.parts(tokens_per_batch)
        values = measure_rows(measure, model, opened.prepared, args, tokens_per_batch, f"Measuring {name}", parts)
        return target.finish(_columns_of(values, name, chosen))


def _columns_of(values: np.ndarray, name: str, chosen: Criterion) -> dict[str, np.ndarray]:
    """The score of every row, and what it is made of by name."""
    each = values.reshape(len(values), -1)
    if (values.ndim > 1 and chosen.join is None) or (chosen.columns and len(chosen.columns) != each.shape[1]):
        raise InputError(
            f"{name} gives {each.shape[1]} numbers a row: a Criterion of several names each (columns) and says "
            "what the score is made of them by (join)."
        )
    score = values if chosen.join is None else chosen.join(each)
    beside = dict(zip(chosen.columns, each.T, strict=True)) if chosen.columns else {}
    return {"score": score, **beside}


def measure_rows(
    measure: Measure,
    model: nn.Module,
    prepared: PreparedRows,
    args: SFTConfig,
    tokens_per_batch: int,
    label: str,
    parts: Parts | None = None,
) -> np.ndarray:
    """What a function finds of every row, (N,) or (N, k) float64, in the order in which they were prepared.

    Each process takes its share; each gets everything. Raises InputError where a number is not finite; names the row.
    """
    device = next(model.parameters()).device
    batches = split_by_tokens(prepared.lengths, tokens_per_batch)

    def of_batch(number: int) -> dict[str, Any]:
        values = measure(model, collate(prepared, batches[number], device)).detach().double().cpu().numpy()
        finite = np.isfinite(values.reshape(len(values), -1)).all(1)
        if not finite.all():
            row = prepared.sample_ids[batches[number][int(np.argmin(finite))]]
            raise NotFiniteError(
                f"Row {row} of the dataset has a number that is not finite ({label.lower()}): nothing was written. "
                "Are the weights sound? Try float32, or drop the row."
            )
        return {VALUE: list(values)}

    with evaluating(model), bfloat16_forward(model, bool(args.bf16)):
        costs = padded_tokens(prepared.lengths, batches)
        store = None if parts is None else parts.store(prepared.sample_ids, batches)
        lines = measure_batches(batches, costs, of_batch, args, label, store)[VALUE].combine_chunks()
    flat = lines.flatten() if pa.types.is_list(lines.type) else lines
    values = flat.to_numpy().reshape(len(lines), *([-1] if pa.types.is_list(lines.type) else []))
    return values[np.argsort(np.concatenate(batches), kind="stable")]


def _named(criterion: str | Criterion | Measure) -> tuple[str, Criterion]:
    if callable(criterion):
        criterion = Criterion(criterion)
    if isinstance(criterion, Criterion):
        measure = criterion.measure
        named = measure if hasattr(measure, "__qualname__") else type(measure)
        if measure not in [each.measure for each in CRITERIA.values()]:
            CRITERIA.check_new(named.__name__)
        return f"{named.__module__}.{named.__qualname__.split('<locals>.')[-1]}", criterion
    if criterion not in CRITERIA:
        raise InputError(f"There is no criterion '{criterion}'. There are {', '.join(CRITERIA)}.")
    return criterion, CRITERIA[criterion]
