"""Criteria of the text alone: length, ratios, repetition, rarity of tokens. Know tokens and batches, and use no model.

Each is a function `(model, batch) -> one number per sample`, like those of `model.py`; tokens are taken as words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..data.preparation import PreparedRows
from ..data.surveys import learnt_tokens
from ..model.losses import TokenBatch, learnt_positions

NGRAM = 3


def length(model: nn.Module, batch: TokenBatch) -> Tensor:
    """The number of learnt tokens, (B,)."""
    return learnt_positions(batch["labels"]).sum(1)


def response_ratio(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Learnt tokens divided by all tokens, (B,): near 0 for a long prompt with a short answer, near 1 without one."""
    return learnt_positions(batch["labels"]).sum(1) / batch["attention_mask"].sum(1)


def repetition(model: nn.Module, batch: TokenBatch) -> Tensor:
    """The share of trigrams of learnt tokens that occur earlier among them, (B,); 0 without a trigram."""
    found = []
    for tokens in _learnt(batch):
        grams = list(zip(*(tokens[start:] for start in range(NGRAM)), strict=False))
        found.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True)
class Rarity:
    """Mean of `-log p(t)` over a row's learnt tokens t, (B,) in nats; p is their frequency in the dataset.

    ResoFilter's figure 5 shows mean frequencies; this is the unigram cross-entropy.

    Attributes:
        surprise: (V,) `-log p`, infinite for tokens that are never learnt.
    """

    surprise: Tensor

    @classmethod
    def of(cls, rows: PreparedRows) -> Rarity:
        """The criterion with frequencies counted over all rows."""
        _, tokens = learnt_tokens(rows.dataset)
        counts = torch.bincount(torch.as_tensor(tokens, dtype=torch.long)).double()
        return cls(-(counts / counts.sum()).log())

    def __call__(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """(B,); the model is not used."""
        return torch.stack([self.surprise[torch.tensor(tokens)].mean() for tokens in _learnt(batch)])


def without_prompt(rows: PreparedRows, start: int | None) -> np.ndarray:
    """Which rows have no prompt, (N,) bool: nothing but a start token comes before the first learnt token.

    Args:
        rows: the rows; of text and of messages, every token is learnt, unless `assistant_only_loss` is set.
        start: the beginning-of-sequence token, if there is one.
    """
    return rows.prompts.column(start).is_null().to_numpy(zero_copy_only=False)


def _learnt(batch: TokenBatch) -> list[list[int]]:
    """Each row's learnt tokens."""
    learnt = learnt_positions(batch["labels"])
    return [ids[1:][mask].tolist() for ids, mask in zip(batch["input_ids"], learnt, strict=True)]
