"""Batches for a pass that measures and does not train: which rows share a batch.

Knows lengths and rows, not what is measured, nor by which process.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
    starts = _starts(lengths[order], np.array([len(order)]), np.array([shared]), budget, overhead)
    return _pieces(order, starts)


def _starts(lengths: np.ndarray, ends: np.ndarray, shared: np.ndarray, budget: int, overhead: int | None) -> np.ndarray:
    """Where batches start among rows that are in groups, in each of which the longest come first.

    Args:
        lengths: (N,) the tokens of each row.
        ends: (G,) where each group ends.
        shared: (G,) how many first tokens the rows of each group have in common.
        budget, overhead: as for `split_by_tokens`.
    """
    before = np.append(0, np.cumsum(lengths))
    starts, start = list[int](), 0
    for end, common in zip(ends.tolist(), shared.tolist(), strict=True):
        while start < end:
            longest = max(int(lengths[start]), 1)
            size = max(min(budget // max(longest - common, 1), 2 * budget // longest if common else budget), 1)
            size = min(size, end - start)
            padding = partial(_padding, before, start, longest)
            if overhead is not None and padding(size) > overhead:
                size = max(bisect.bisect_right(range(1, size), overhead, key=padding), 1)
            starts.append(start)
            start += size
    return np.array(starts, dtype=np.int64)


def _padding(before: np.ndarray, start: int, longest: int, size: int) -> int:
    """The tokens to add so that `size` rows from `start` on are as long as the longest."""
    return int(longest * size - (before[start + size] - before[start]))


def _pieces(rows: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
    return [rows[start:end] for start, end in itertools.pairwise([*starts.tolist(), len(rows)])]


def padded_tokens(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> np.ndarray:
    """The tokens of each batch, padding included, (B,); `lengths` are those of all rows."""
    return np.array([len(batch) * int(lengths[batch].max()) for batch in batches])


def arrange(prepared: PreparedRows, budget: int, device: torch.device, may_share: bool = True) -> list[Batch]:
    """Batches for a pass that can compute the common first tokens of a batch's rows once.

    A batch has rows of similar lengths; or rows with the same prompt, if that is clearly less work.
    """
    lengths, known = prepared.lengths, prepared.prompts
    common = known.common if may_share and known.common >= LEAST_BEGINNING else 0
    overhead = TOKENS_LOST_PER_BATCH.get(device.type, TOKENS_LOST_PER_BATCH_ELSEWHERE)
    divide = partial(_Division.of, lengths, budget, overhead)

    def by_length(rows: np.ndarray) -> _Division:
        ordered = rows[np.argsort(-lengths[rows], kind="stable")]
        return divide(ordered, np.array([len(rows)]), np.array([common]))

    everything = by_length(np.arange(len(lengths)))
    repeated = _are_repeated(known.hashes) & (known.lengths >= LEAST_BEGINNING) & may_share
    if not repeated.any():
        return everything.batches
    ordered, ends = _groups(np.flatnonzero(repeated), known.hashes, lengths)
    prompts = known.lengths[ordered[ends - 1]]
    by_prompt = divide(ordered, ends, prompts)
    others = by_length(np.flatnonzero(~repeated))
    prompts_again = int((overhead + prompts).sum())
    if prompts_again + by_prompt.work + others.work >= CLEARLY_LESS * everything.work:
        return everything.batches
    return by_prompt.batches + others.batches


@dataclass(frozen=True)
class _Division:
    """Rows divided into batches.

    Attributes:
        rows: (N,) the rows, batch after batch.
        starts: (B,) where each batch starts.
        shared, costs: (B,) as of a `Batch`.
    """

    rows: np.ndarray
    starts: np.ndarray
    shared: np.ndarray
    costs: np.ndarray

    @classmethod
    def of(
        cls, lengths: np.ndarray, budget: int, overhead: int, rows: np.ndarray, ends: np.ndarray, shared: np.ndarray
    ) -> _Division:
        """Divide rows that are in groups, in each of which the longest come first.

        Args:
            lengths: the tokens of every row, also of those that are not among `rows`.
            budget, overhead, ends, shared: as for `_starts`.
            rows: (N,) the rows.
        """
        starts = _starts(lengths[rows], ends, shared, budget, overhead)
        of_batch = shared[np.searchsorted(ends, starts, side="right")]
        sizes, longest = np.diff(starts, append=len(rows)), lengths[rows[starts]]
        return cls(rows, starts, of_batch, overhead + sizes * (longest - of_batch))

    @property
    def work(self) -> int:
        """The cost of all batches."""
        return int(self.costs.sum())

    @property
    def batches(self) -> list[Batch]:
        """The batches in order."""
        return list(map(Batch, _pieces(self.rows, self.starts), self.shared.tolist(), self.costs.tolist()))


def _are_repeated(values: np.ndarray) -> np.ndarray:
    """(N,) whether another entry has the same value."""
    ordered = np.sort(values)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.isin(values, twice) if len(twice) else np.zeros(len(values), bool)


def _groups(rows: np.ndarray, hashes: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows, group by group of equal hashes, and where each group ends; the longest row comes first, also of groups."""
    ordered = rows[np.lexsort((-lengths[rows], hashes[rows]))]
    starts = np.flatnonzero(np.append(True, np.diff(hashes[ordered]) != 0))
    sizes = np.diff(starts, append=len(ordered))
    rank = np.empty(len(starts), np.int64)
    rank[np.argsort(-lengths[ordered[starts]], kind="stable")] = np.arange(len(starts))
    again = np.argsort(np.repeat(rank, sizes), kind="stable")
    return ordered[again], np.cumsum(sizes[np.argsort(rank)])


def collate(prepared: PreparedRows, rows: Sequence[int] | np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (B, T), padded on the right."""
    examples = [prepared.dataset[int(row)] for row in rows]
    batch: dict[str, Tensor] = DataCollatorForLanguageModeling(pad_token_id=0)(examples)
    return {name: tensor.to(device) for name, tensor in batch.items()}
