"""A pass over a dataset with another selector's criterion: every row once, as a ScoreTable.

Knows criteria and batches, not how a criterion measures.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import numpy as np
import pyarrow as pa
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import InputError, NotFiniteError, Warmup, whole_number
from ..config.keywords import RowOptions
from ..criteria.criterion import CRITERIA, Criterion, source_of
from ..criteria.text import without_prompt
from ..data.arguments import check_call
from ..data.loading import Opened, default_arguments
from ..data.preparation import PreparedRows
from ..io.made_from import BUILT_IN_SOURCE, OF_ALL_ROWS
from ..model.modes import bfloat16_forward, evaluating
from ..scores.score_table import ScoreTable
from .batches import collate, padded_tokens, split_by_tokens
from .output import Measured, PassOutput
from .passes import Parts, measure_batches
from .run_pass import run_pass

Measure = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
TOKENS_PER_BATCH = 1024  # all logits of a batch are in memory at once
VALUE = "value"
SOURCE = "criterion_source"  # in the provenance's config, for a function of the user's own
RECORDED_MODULES = {  # by which scores name the functions of this package, wherever these are now
    "resofilter_trainer.criteria.model": "resofilter_trainer.criteria",
    "resofilter_trainer.criteria.prompted": "resofilter_trainer.prompted_criteria",
    "resofilter_trainer.criteria.text": "resofilter_trainer.text_criteria",
}


def score_by(
    criterion: str | Criterion | Measure,
    model: str | PreTrainedModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    warmup: int | Warmup | None = None,
    warmup_dataset: Dataset | None = None,
    **row_options: Unpack[RowOptions],
) -> ScoreTable:
    """Score every row by a criterion of another selector.

    Args:
        criterion: one of `CRITERIA`; a function of your own, `(model, batch)` to (B,); or a `Criterion`. Scores in a
            folder belong to the function's name and its source: after a change of either, they are not returned.
        model, dataset, processing_class, args, output, warmup, warmup_dataset, **row_options: as for `score_dataset`.
        tokens_per_batch: the tokens of a batch, padding included.

    Returns:
        A table with every row of the dataset: its score, or the reason why it has none. If the criterion measures
        several numbers, they have columns of their own. By default, `DataSelector` drops the end that the criterion's
        authors drop.

    Raises:
        InputError: the criterion is unknown, it relates responses to prompts and no row has a prompt, a function of
            your own has the name of one of `CRITERIA`, a row's number is not finite, or as for `score_dataset`.
    """
    check_call(score_by, row_options, model, processing_class, args)
    name, chosen = _named(criterion)
    if output is not None and ("<" in name or not name):
        raise InputError("Scores in a folder are found by the function's name, and a lambda has none: give it one.")
    tokens = whole_number("tokens_per_batch", tokens_per_batch, least=1)
    args = args or default_arguments()
    config = {"criterion": name, "drop": chosen.drop, "columns": list(chosen.columns), **chosen.settings}
    config[BUILT_IN_SOURCE if _is_ours(chosen) else SOURCE] = source_of(chosen)
    if chosen.of_all_rows:
        config[OF_ALL_ROWS] = True

    def measure(model: PreTrainedModel, opened: Opened, target: PassOutput) -> Measured:
        if _is_of_prompt(chosen):
            _check_prompts(name, opened, stacklevel=5)
        function = chosen.measure(opened.prepared) if chosen.counts else chosen.measure
        label, parts = f"Measuring {name}", target.parts(tokens)
        values = measure_rows(function, model, opened.prepared, args, tokens, label, parts)
        return Measured(_columns_of(values, name, chosen))

    return run_pass(
        model, dataset, processing_class, args, config, output, measure,
        warmup=warmup, warmup_dataset=warmup_dataset, **row_options,
    )  # fmt: skip


def depends_on_all_rows(name: str) -> bool:
    """Whether the score of a row, by one of `CRITERIA`, depends on the other rows, so that no shard has it."""
    return CRITERIA[name].of_all_rows


def _is_of_prompt(criterion: Criterion) -> bool:
    """Whether a criterion, or the one with the same function, relates responses to prompts."""
    return criterion.of_prompt or any(each.of_prompt for each in CRITERIA.values() if each.measure is criterion.measure)


def _check_prompts(name: str, opened: Opened, stacklevel: int) -> None:
    """Warn about rows without a prompt, for which the criterion means something else.

    Raises InputError where no row has one.
    """
    none = without_prompt(opened.prepared, opened.tokenizer.bos_token_id)
    hint = "Pass prompt and completion, or assistant_only_loss=True for messages."
    if none.all():
        raise InputError(f"{name} relates a response to its prompt, and every token of all rows is learnt. {hint}")
    if none.any():
        warnings.warn(
            f"{none.sum()} of {len(none)} rows have no prompt, as all their tokens are learnt: their {name} cannot be "
            f"compared with that of the others. {hint}",
            stacklevel=stacklevel,
        )


def _columns_of(values: np.ndarray, name: str, chosen: Criterion) -> dict[str, np.ndarray]:
    """The score of every row, and by name the numbers that it is made of."""
    each = values.reshape(len(values), -1)
    if (values.ndim > 1 and chosen.join is None) or (chosen.columns and len(chosen.columns) != each.shape[1]):
        raise InputError(
            f"{name} gives {each.shape[1]} numbers a row: pass a Criterion with a name for each (columns) and a "
            "function that makes the score of them (join)."
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
    """A function's numbers of every row, (N,) or (N, k) float64, in the order of the prepared rows.

    Every process takes a share of the rows and gets all numbers. Raises InputError, which names the row, where a number
    is not finite.
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
        found = measure_batches(batches, costs, of_batch, args, label, store)[VALUE].combine_chunks()
    several = pa.types.is_list(found.type)
    flat = found.flatten() if several else found
    values = flat.to_numpy().reshape(len(found), *([-1] if several else []))
    return values[np.argsort(np.concatenate(batches), kind="stable")]


def _named(criterion: str | Criterion | Measure) -> tuple[str, Criterion]:
    """The name for the provenance, and the criterion. Raises InputError for an unknown name, or one that is taken."""
    if callable(criterion):
        criterion = Criterion(criterion)
    if not isinstance(criterion, Criterion):
        if criterion not in CRITERIA:
            raise InputError(f"There is no criterion '{criterion}'. There are {', '.join(CRITERIA)}.")
        return criterion, CRITERIA[criterion]
    definition = _definition(criterion.measure)
    if criterion.measure not in [each.measure for each in CRITERIA.values()]:
        CRITERIA.check_new(definition.__name__)
    module = RECORDED_MODULES.get(definition.__module__, definition.__module__)
    return f"{module}.{definition.__qualname__.split('<locals>.')[-1]}", criterion


def _is_ours(criterion: Criterion) -> bool:
    """Whether this package defines all of a criterion's functions."""
    functions = [each for each in (criterion.measure, criterion.join) if each is not None]
    package = __name__.partition(".")[0]
    return all(str(_definition(each).__module__).partition(".")[0] == package for each in functions)


def _definition(function: Callable[..., Any]) -> Any:
    """The function itself, or the class of a callable object."""
    return function if hasattr(function, "__qualname__") else type(function)
