"""Batches for a pass that measures and does not train: which rows come together, and which process takes them.

Knows lengths, rows and processes, not what is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .preparation import PreparedRows, beginnings

Result = TypeVar("Result")
TOKENS_PER_BATCH = {"cpu": 1024}  # more only adds padding there
TOKENS_PER_BATCH_ELSEWHERE = 8192
TOKENS_LOST_PER_BATCH = {"cpu": 64}  # what could be computed in the time that a batch costs beside its tokens
TOKENS_LOST_PER_BATCH_ELSEWHERE = 2048
LEAST_BEGINNING = 16  # tokens: less in common is not worth a thought


def default_budget(device: torch.device) -> int:
    """Tokens of a batch, padding included, with which a pass is fast on such a device."""
    return TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH_ELSEWHERE)


def split_by_tokens(lengths: np.ndarray, budget: int, shared: int = 0) -> list[np.ndarray]:
    """Positions of rows, in batches of similar lengths whose size times the longest is at most `budget`.

    The longest come first: if memory does not suffice, the first batch says so. Of the `shared` tokens with which all
    rows begin nothing counts, as long as the whole stays within twice the budget.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        size = max(min(budget // max(longest - shared, 1), 2 * budget // longest if shared else budget), 1)
        batches.append(order[start : start + size])
        start += size
    return batches


def arrange(prepared: PreparedRows, budget: int, device: torch.device) -> list[np.ndarray]:
    """Batches for a pass that takes the tokens with which all rows of a batch begin through the model once.

    Either rows of similar lengths come together, or, where that is less work, rows with the same prompt.
    """
    prompts, prompt_lengths, common = beginnings(prepared.dataset)
    lost = TOKENS_LOST_PER_BATCH.get(device.type, TOKENS_LOST_PER_BATCH_ELSEWHERE)
    common = common if common >= LEAST_BEGINNING else 0
    lengths = prepared.lengths
    by_length = split_by_tokens(lengths, budget, common)
    _, group_of, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    repeated = (sizes[group_of] > 1) & (prompt_lengths >= LEAST_BEGINNING)
    by_prompt = []
    for rows in _groups(group_of, repeated):
        by_prompt += [rows[batch] for batch in split_by_tokens(lengths[rows], budget, int(prompt_lengths[rows[0]]))]
    work = sum(lost + len(batch) * (lengths[batch].max() - common) for batch in by_length)
    work_by_prompt = sum(
        2 * lost + prompt_lengths[batch[0]] + len(batch) * (lengths[batch].max() - prompt_lengths[batch[0]])
        for batch in by_prompt
    )
    rest = np.flatnonzero(~repeated)
    others = [rest[batch] for batch in split_by_tokens(lengths[rest], budget, common)]
    work_by_prompt += sum(lost + len(batch) * (lengths[batch].max() - common) for batch in others)
    if work_by_prompt >= work:
        return by_length
    return sorted([*by_prompt, *others], key=lambda batch: -lengths[batch].max())


def _groups(group_of: np.ndarray, which: np.ndarray) -> list[np.ndarray]:
    """The places of some rows, group by group."""
    places = np.flatnonzero(which)
    places = places[np.argsort(group_of[places], kind="stable")]
    return np.split(places, np.flatnonzero(np.diff(group_of[places])) + 1) if len(places) else []


def collate(prepared: PreparedRows, rows: Sequence[int] | np.ndarray, device: torch.device) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (B, T), padded on the right."""
    examples = [prepared.dataset[int(row)] for row in rows]
    batch: dict[str, Tensor] = DataCollatorForLanguageModeling(pad_token_id=0)(examples)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def own_share(numbers: Sequence[int], label: str, args: TrainingArguments) -> Iterable[int]:
    """This process's share of some batches, with a progress bar over it in the main process."""
    state = PartialState()
    mine = numbers[state.process_index :: state.num_processes]
    bar: Any = tqdm(mine, desc=label, unit="batch", disable=args.disable_tqdm or not state.is_main_process)
    return bar


def of_all_processes(found: list[tuple[int, Result]]) -> dict[int, Result]:
    """What every process found, by the number of the batch."""
    return dict(gather_object(found) if PartialState().num_processes > 1 else found)
