"""The pass over a dataset that measures a model's loss, and more, on every learnt token. Knows models and batches.

batches of similar lengths within a token budget -> each measured once, by any process -> losses, row after row
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import TrainingArguments

from ..config import InputError, NotFiniteError
from ..data.preparation import PreparedRows
from ..io.store import UNIT
from ..model.head import PROBE, Way, find_way
from ..model.losses import inputs_of, learnt_positions
from ..model.modes import bfloat16_forward, evaluating
from ..model.prompt_attention import PROMPT_ATTENTION, PromptAttention
from ..model.token_statistics import TokenStatistics
from .batches import collate, padded_tokens, split_by_tokens
from .passes import Parts, measure_batches

LOSS = "loss"


def measure_token_losses(
    model: nn.Module,
    prepared: PreparedRows,
    args: TrainingArguments,
    tokens_per_batch: int,
    label: str,
    parts: Parts | None = None,
) -> np.ndarray:
    """The loss of every learnt token, without dropout and without a gradient.

    The batches depend on the rows and the budget alone, so the losses depend neither on the number of processes nor on
    interruptions.

    Args:
        model: a causal language model, on the device where it runs.
        prepared: the rows as tokens.
        args: whether the forward runs in bfloat16 autocast (`bf16`), and whether to show a progress bar.
        tokens_per_batch: the tokens of a batch, padding included; a longer row is a batch of its own.
        label: the text of the progress bar.
        parts: where to save results, and to resume from.

    Returns:
        (N,) float32 losses in nats, row after row, the same in every process.

    Raises:
        InputError: a loss is not finite; the message names the row.
    """

    def of_batch(rows: np.ndarray, way: Way) -> dict[str, np.ndarray]:
        return {LOSS: _losses_of(model, prepared, rows, way)}

    return _measure(model, prepared, args, tokens_per_batch, label, parts, of_batch)[LOSS]


def measure_token_statistics(
    model: nn.Module,
    prepared: PreparedRows,
    args: TrainingArguments,
    tokens_per_batch: int,
    label: str,
    statistics: Sequence[str],
    parts: Parts | None = None,
) -> dict[str, np.ndarray]:
    """The loss and some statistics of every learnt token, from one forward, the head a tile at a time.

    Args:
        statistics: which, see `TokenStatistics`, and `"prompt_attention"`; one value for each token.
        model, prepared, args, tokens_per_batch, label, parts: as for `measure_token_losses`.

    Returns:
        `"loss"`, the same to the last bit as without statistics, and each statistic by its name: (N,) float32, in every
        process.

    Raises:
        InputError: a loss is not finite, the message names the row; or the attention cannot be had.
    """
    of_head = [name for name in statistics if name != PROMPT_ATTENTION]
    attention = PromptAttention(model) if PROMPT_ATTENTION in statistics else None

    def of_batch(rows: np.ndarray, way: Way) -> dict[str, np.ndarray]:
        collected = TokenStatistics(of_head)
        with attention.watching() if attention is not None else contextlib.nullcontext():
            losses = _losses_of(model, prepared, rows, way, collected)
        found = {name: collected.of(name) for name in of_head}
        if attention is not None:
            found[PROMPT_ATTENTION] = attention.of(collate(prepared, rows, torch.device("cpu"))["labels"])
        return {LOSS: losses, **{name: values.float().cpu().numpy() for name, values in found.items()}}

    return _measure(model, prepared, args, tokens_per_batch, label, parts, of_batch)


def _measure(
    model: nn.Module,
    prepared: PreparedRows,
    args: TrainingArguments,
    tokens_per_batch: int,
    label: str,
    parts: Parts | None,
    of_rows: Callable[[np.ndarray, Way], Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """The columns that `of_rows` measures of a batch's learnt tokens, (n,) each, for all rows: (N,) float32."""
    batches = split_by_tokens(prepared.lengths, tokens_per_batch)
    some = prepared.dataset[int(batches[0][0])]["input_ids"][:PROBE]
    with evaluating(model), torch.no_grad(), bfloat16_forward(model, bool(args.bf16)):
        way = find_way(model, torch.tensor([some], device=next(model.parameters()).device))

        def of_batch(number: int) -> dict[str, Any]:
            ends = np.cumsum(prepared.num_tokens[batches[number]])[:-1]
            found = of_rows(batches[number], way)
            return {name: pa.array(np.split(each, ends), pa.large_list(pa.float32())) for name, each in found.items()}

        costs = padded_tokens(prepared.lengths, batches)
        store = None if parts is None else parts.store(prepared.sample_ids, batches)
        found = measure_batches(batches, costs, of_batch, args, label, store)
    columns = [name for name in found.column_names if name != UNIT]
    return {name: _in_order(batches, found[name].combine_chunks(), prepared.num_tokens) for name in columns}


def _losses_of(
    model: nn.Module, prepared: PreparedRows, rows: np.ndarray, way: Way, statistics: TokenStatistics | None = None
) -> np.ndarray:
    """The losses of a batch's learnt tokens, (n,) float32, in the order of its rows; statistics are collected."""
    batch = collate(prepared, rows, next(model.parameters()).device)
    losses = way(model, inputs_of(model, batch, causal=False)).losses(statistics)
    _check_finite(losses, batch, prepared.sample_ids[rows])
    return losses.float().cpu().numpy()


def _check_finite(losses: torch.Tensor, batch: Mapping[str, torch.Tensor], sample_ids: np.ndarray) -> None:
    """Raise an InputError that names the first row of a batch with a loss that is not finite."""
    if not torch.isfinite(losses).all():
        row_of = learnt_positions(batch["labels"]).nonzero()[:, 0]
        raise NotFiniteError(
            f"Row {sample_ids[int(row_of[~torch.isfinite(losses)][0])]} of the dataset has a token whose loss is not "
            "finite. Are the weights sound? Try float32, or drop the row."
        )


def _in_order(batches: Sequence[np.ndarray], losses: pa.LargeListArray, counts: np.ndarray) -> np.ndarray:
    """The losses of the rows of all batches, in the order of the prepared rows."""
    order = np.argsort(np.concatenate(batches), kind="stable")
    found: np.ndarray = losses.take(pa.array(order)).flatten().to_numpy()
    if len(found) != counts.sum():
        raise InputError(f"There are losses of {len(found)} tokens, and the rows have {counts.sum()}.")
    return found
