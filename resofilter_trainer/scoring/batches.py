"""Batches for a pass that measures and does not train: which rows share a batch.

Knows lengths and rows, not what is measured, nor by which process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..data.preparation import PreparedRows

TOKENS_PER_BATCH = {"cpu": 1024}  # more would only add padding there
TOKENS_PER_BATCH_ELSEWHERE = 8192
TOKENS_LOST_PER_BATCH = {"cpu": 64}  # tokens that fit in the time of a batch's overhead
TOKENS_LOST_PER_BATCH_ELSEWHERE = 2048
CLEARLY_LESS = 0.85  # of the work: small batches take longer than their number of tokens suggests
LEAST_BEGINNING = 16  # common first tokens: sharing fewer saves next to nothing


class Batch(NamedTuple):
    """Rows of one batch.

    Attributes:
        rows: (B,) their indices.
        shared: how many first tokens the rows have in common, also with neighbouring batches; the model may compute
            them once.
        cost: the tokens to compute, with the batch's overhead in tokens.
    """

    rows: np.ndarray
    shared: int
    cost: int


def default_budget(device: torch.device) -> int:
    """The tokens of a batch, padding included, with which a pass is fast on a device."""
    return TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH_ELSEWHERE)


def split_by_tokens(lengths: np.ndarray, budget: int, shared: int = 0, overhead: int | None = None) -> list[np.ndarray]:
    """Batches of rows of similar lengths. The size of a batch times its longest row is at most `budget`.

    The longest rows, which need the most memory, come first.

    Args:
        lengths: (N,) the tokens of each row.
        budget: the tokens of a batch, padding included; a longer row is a batch of its own.
        shared: how many first tokens all rows have in common. They do not count, but with them a batch has at most
            twice the budget.
        overhead: the overhead of a batch, in tokens. A batch with more padding than that is split.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        size = max(min(budget // max(longest - shared, 1), 2 * budget // longest if shared else budget), 1)
        batch = order[start : start + size]
        if overhead is not None:
            batch = batch[np.cumsum(longest - lengths[batch]) <= overhead]
        batches.append(batch)
        start += len(batch)
    return batches


def padded_tokens(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> np.ndarray:
    """The tokens of each batch, padding included, (B,); `lengths` are those of all rows."""
    return np.array([len(batch) * int(lengths[batch].max()) for batch in batches])


def arrange(prepared: PreparedRows, budget: int, device: torch.device, may_share: bool = True) -> list[Batch]:
    """Batches for a pass that can compute the common first tokens of a batch's rows once.

    A batch has rows of similar lengths; or rows with the same prompt, if that is clearly less work.
    """
    lengths, known = prepared.lengths, prepared.prompts
    prompts, prompt_lengths, common = known.hashes, known.lengths, known.common
    common = common if may_share and common >= LEAST_BEGINNING else 0
    overhead = TOKENS_LOST_PER_BATCH.get(device.type, TOKENS_LOST_PER_BATCH_ELSEWHERE)

    def split(rows: np.ndarray, shared: int) -> list[Batch]:
        batches = [rows[some] for some in split_by_tokens(lengths[rows], budget, shared, overhead)]
        return [Batch(each, shared, overhead + len(each) * (int(lengths[each].max()) - shared)) for each in batches]

    by_length = split(np.arange(len(lengths)), common)
    _, group_of, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    repeated = (sizes[group_of] > 1) & (prompt_lengths >= LEAST_BEGINNING) & may_share
    if not repeated.any():
        return by_length
    groups = [(rows, int(prompt_lengths[rows[0]])) for rows in _groups(group_of, repeated, lengths)]
    by_prompt = [batch for rows, length in groups for batch in split(rows, length)]
    others = split(np.flatnonzero(~repeated), common)
    prompts_again = sum(overhead + length for _, length in groups)
    work_by_prompt = prompts_again + sum(batch.cost for batch in by_prompt + others)
    if work_by_prompt >= CLEARLY_LESS * sum(batch.cost for batch in by_length):
        return by_length
    return by_prompt + others


def _groups(group_of: np.ndarray, which: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """The indices of some rows, group by group; the group with the longest row comes first."""
    rows = np.flatnonzero(which)
    rows = rows[np.argsort(group_of[rows], kind="stable")]
    found = np.split(rows, np.flatnonzero(np.diff(group_of[rows])) + 1) if len(rows) else []
    return sorted(found, key=lambda each: -lengths[each].max())


def collate(prepared: PreparedRows, rows: Sequence[int] | np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (B, T), padded on the right."""
    examples = [prepared.dataset[int(row)] for row in rows]
    batch: dict[str, Tensor] = DataCollatorForLanguageModeling(pad_token_id=0)(examples)
    return {name: tensor.to(device) for name, tensor in batch.items()}
