"""What people count in a text: its length, ratios, repetition, how common its tokens are. No model is asked.

`(model, batch) -> one number per sample`, as in `criteria`; tokens stand for words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.preparation import PreparedRows, learnt_tokens
from ..model.losses import Batch, learnt_positions

NGRAM = 3


def length(model: nn.Module, batch: Batch) -> Tensor:
    """Learnt tokens, (B,)."""
    return learnt_positions(batch["labels"]).sum(1)


def response_ratio(model: nn.Module, batch: Batch) -> Tensor:
    """Learnt tokens over all tokens, (B,): near 0 a long prompt with a short answer."""
    return learnt_positions(batch["labels"]).sum(1) / batch["attention_mask"].sum(1)


def repetition(model: nn.Module, batch: Batch) -> Tensor:
    """Of the learnt tokens' trigrams the share that has occurred in the row before, (B,); 0 where there are none."""
    found = []
    for tokens in _learnt(batch):
        grams = list(zip(*(tokens[start:] for start in range(NGRAM)), strict=False))
        found.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True)
class Rarity:
    """Mean of `-log p(t)` over a row's learnt tokens t, (B,) in nats; p is their frequency in the dataset.

    ResoFilter's figure 5 looks at mean frequencies; this is the unigram cross-entropy.

    Attributes:
        surprise: (V,) `-log p`, infinite for tokens that are never learnt.
    """

    surprise: Tensor

    @classmethod
    def of(cls, rows: PreparedRows) -> Rarity:
        """Counted over all rows."""
        _, tokens = learnt_tokens(rows.dataset)
        counts = torch.bincount(torch.as_tensor(tokens, dtype=torch.long)).double()
        return cls(-(counts / counts.sum()).log())

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,), whatever the model."""
        return torch.stack([self.surprise[torch.tensor(tokens)].mean() for tokens in _learnt(batch)])


def _learnt(batch: Batch) -> list[list[int]]:
    """Each row's learnt tokens."""
    learnt = learnt_positions(batch["labels"])
    return [ids[1:][mask].tolist() for ids, mask in zip(batch["input_ids"], learnt, strict=True)]
