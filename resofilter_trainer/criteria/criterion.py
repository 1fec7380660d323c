"""The criteria by name, and how each becomes a score. A new criterion is a line here. Knows no dataset and no file."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import xxhash

from ..config import RESONANCE, InputError, with_known_keywords
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
from .source import code_of
from .text import Rarity, length, repetition, response_ratio


@with_known_keywords
@dataclass(frozen=True)
class Criterion:
    """How a sample is measured, and how the numbers become a score.

    Attributes:
        measure: a function `(model, batch)` to (B,) or (B, k); with `counts`, a function that makes it from the
            prepared rows.
        drop: the end of the score to drop first: for criteria of a paper the end that its authors drop.
        columns: names for the k numbers, which are then stored beside the score.
        join: a function from the k numbers of all rows, (N, k), to the score, (N,); None for one number.
        settings: whatever the numbers depend on besides the model, the rows and the code, for the provenance.
        counts: whether the number of a row depends on all rows.
        of_prompt: whether it relates the response to its prompt, and means something else for a row without one.
    """

    measure: Callable[..., Any]
    drop: Literal["largest", "smallest"] = "largest"
    columns: tuple[str, ...] = ()
    join: Callable[[np.ndarray], np.ndarray] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    counts: bool = False
    of_prompt: bool = False

    @property
    def of_all_rows(self) -> bool:
        """Whether the score of a row depends on the other rows; of a `join` that is not known here, it may."""
        return self.counts or self.join not in (None, below_one)


class Criteria(UserDict[str, Criterion]):
    """Criteria by name. A name is given once."""

    def __setitem__(self, name: str, criterion: Criterion) -> None:
        self.check_new(name)
        super().__setitem__(name, criterion)

    def check_new(self, name: str) -> None:
        """Raise InputError for a name that a criterion already has."""
        if name in (RESONANCE, *self):
            raise InputError(f"There is already a criterion '{name}'. Choose a name other than {', '.join(self)}.")


CRITERIA = Criteria(
    {
        "loss": Criterion(loss),
        "perplexity": Criterion(perplexity),
        "entropy": Criterion(entropy),
        "el2n": Criterion(el2n, drop="smallest"),
        "grand": Criterion(grand, drop="smallest"),
        "ifd": Criterion(ifd, drop="smallest", columns=("ifd",), join=below_one, of_prompt=True),
        "length": Criterion(length, drop="smallest"),
        "response_ratio": Criterion(response_ratio, drop="smallest", of_prompt=True),
        "repetition": Criterion(repetition),
        "rarity": Criterion(Rarity.of, counts=True),
        "k_center": Criterion(embedding, join=farthest_first),
        "donod": Criterion(norms, columns=("delta_of_norm", "norm_of_delta"), join=topsis),
    }
)


def source_of(criterion: Criterion) -> str:
    """A hash of the code that measures and joins, the same in every process and run (see `source.code_of`)."""
    code = "\0".join("" if each is None else code_of(each) for each in (criterion.measure, criterion.join))
    return xxhash.xxh3_128_hexdigest(code.encode("utf-8", "backslashreplace"))
