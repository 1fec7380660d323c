"""The criteria by name, and what is made of what each measures. Add one here. Knows no dataset and no file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..selecting.combining import topsis
from .model import (
    below_one,
    el2n,
    embedding,
    entropy,
    farthest_first,
    grand,
    ifd,
    loss,
    norms,
    perplexity,
)
from .text import Rarity, length, repetition, response_ratio


@dataclass(frozen=True)
class Criterion:
    """How a sample is measured, and what is made of it.

    Attributes:
        measure: `(model, batch)` to (B,), or (B, k); or what makes that function from the prepared rows, if `counts`.
        drop: which end of the score goes first, as those who proposed it have it; of texts, our choice.
        columns: names for the k numbers, which then stand beside the score.
        join: what the score is made of the k numbers of all rows by, (N, k) to (N,); None where there is one.
        settings: what the numbers depend on besides model and rows, for the provenance.
        counts: whether what is measured of a row depends on all rows.
    """

    measure: Callable[..., Any]
    drop: Literal["largest", "smallest"] = "largest"
    columns: tuple[str, ...] = ()
    join: Callable[[np.ndarray], np.ndarray] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    counts: bool = False


CRITERIA = {
    "loss": Criterion(loss),
    "perplexity": Criterion(perplexity),
    "entropy": Criterion(entropy),
    "el2n": Criterion(el2n, drop="smallest"),
    "grand": Criterion(grand, drop="smallest"),
    "ifd": Criterion(ifd, drop="smallest", columns=("ifd",), join=below_one),
    "length": Criterion(length, drop="smallest"),
    "response_ratio": Criterion(response_ratio, drop="smallest"),
    "repetition": Criterion(repetition),
    "rarity": Criterion(Rarity.of, counts=True),
    "k_center": Criterion(embedding, join=farthest_first),
    "donod": Criterion(norms, columns=("delta_of_norm", "norm_of_delta"), join=topsis),
}
