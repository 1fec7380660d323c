"""Batches for a pass that measures and does not train: which rows come together.

Knows lengths and rows, not what is measured, nor by whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..data.preparation import PreparedRows, beginnings

TOKENS_PER_BATCH = {"cpu": 1024}  # more only adds padding there
TOKENS_PER_BATCH_ELSEWHERE = 8192
TOKENS_LOST_PER_BATCH = {"cpu": 64}  # what could be computed in the time that a batch costs beside its tokens
TOKENS_LOST_PER_BATCH_ELSEWHERE = 2048
CLEARLY_LESS = 0.85  # of the work: small batches are slower than their tokens say
LEAST_BEGINNING = 16  # tokens: less in common is not worth a thought


class Batch(NamedTuple):
    """Rows that come together.

    Attributes:
        rows: (B,) their places.
        shared: how many first tokens all of them share with the batches around, and may have in common in the model.
        cost: tokens to compute, what a batch costs beside them included.
    """

    rows: np.ndarray
    shared: int
    cost: int


def default_budget(device: torch.device) -> int:
    """Tokens of a batch, padding included, with which a pass is fast on such a device."""
    return TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH_ELSEWHERE)


def split_by_tokens(lengths: np.ndarray, budget: int, shared: int = 0, lost: int | None = None) -> list[np.ndarray]:
    """Positions of rows, in batches of similar lengths whose size times the longest is at most `budget`.

    The longest come first, which need the most memory.

    Args:
        lengths: (N,) tokens of each row.
        budget: of tokens, padding included; a longer row is a batch of its own.
        shared: with so many tokens all rows begin; they do not count, but the whole stays within twice the budget.
        lost: what a batch costs beside its tokens, in tokens: one with more padding than that is made two.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        size = max(min(budget // max(longest - shared, 1), 2 * budget // longest if shared else budget), 1)
        batch = order[start : start + size]
        if lost is not None:
            batch = batch[np.cumsum(longest - lengths[batch]) <= lost]
        batches.append(batch)
        start += len(batch)
    return batches


def padded_tokens(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> np.ndarray:
    """(B,) tokens of each batch, padding included; `lengths` are those of all rows."""
    return np.array([len(batch) * int(lengths[batch].max()) for batch in batches])


def arrange(prepared: PreparedRows, budget: int, device: torch.device, may_share: bool = True) -> list[Batch]:
    """Batches for a pass that takes what all rows of a batch begin with through the model once, if it can.

    Rows of similar lengths come together, or, where that is clearly less work, rows with the same prompt.
    """
    lengths, (prompts, prompt_lengths, common) = prepared.lengths, beginnings(prepared.dataset)
    common = common if may_share and common >= LEAST_BEGINNING else 0
    lost = TOKENS_LOST_PER_BATCH.get(device.type, TOKENS_LOST_PER_BATCH_ELSEWHERE)

    def split(rows: np.ndarray, shared: int) -> list[Batch]:
        parts = [rows[part] for part in split_by_tokens(lengths[rows], budget, shared, lost)]
        return [Batch(part, shared, lost + len(part) * (int(lengths[part].max()) - shared)) for part in parts]

    by_length = split(np.arange(len(lengths)), common)
    _, group_of, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    repeated = (sizes[group_of] > 1) & (prompt_lengths >= LEAST_BEGINNING) & may_share
    groups = [(rows, int(prompt_lengths[rows[0]])) for rows in _groups(group_of, repeated, lengths)]
    by_prompt = [batch for rows, length in groups for batch in split(rows, length)]
    others = split(np.flatnonzero(~repeated), common)
    beginnings_again = sum(lost + length for _, length in groups)
    work_by_prompt = beginnings_again + sum(batch.cost for batch in by_prompt + others)
    if work_by_prompt >= CLEARLY_LESS * sum(batch.cost for batch in by_length):
        return by_length
    return by_prompt + others


def _groups(group_of: np.ndarray, which: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The places of some rows, group by group, the one with the longest row first."""
    places = np.flatnonzero(which)
    places = places[np.argsort(group_of[places], kind="stable")]
    found = np.split(places, np.flatnonzero(np.diff(group_of[places])) + 1) if len(places) else []
    return sorted(found, key=lambda rows: -lengths[rows].max())


def collate(prepared: PreparedRows, rows: Sequence[int] | np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (B, T), padded on the right."""
    examples = [prepared.dataset[int(row)] for row in rows]
    batch: dict[str, Tensor] = DataCollatorForLanguageModeling(pad_token_id=0)(examples)
    return {name: tensor.to(device) for name, tensor in batch.items()}
