"""What makes scores doubtful, in words. Knows a table of scores, no model; whoever makes or shows scores asks here."""

from __future__ import annotations

import re
from typing import Protocol

import numpy as np
import pyarrow as pa

from ..config import RESONANCE
from .full_step import LITTLE_RANGE, full_step_of, is_saturated, span_of
from .provenance import SATURATED, Provenance
from .statistics import LAYER

HALF = ("bfloat16", "float16")


class Scores(Protocol):
    """What is asked of a `ScoreTable`, which prints these doubts itself."""

    @property
    def table(self) -> pa.Table:
        """The columns."""

    @property
    def provenance(self) -> Provenance:
        """What the scores were made from."""

    @property
    def scored(self) -> np.ndarray:
        """(N,) bool, the rows with a score."""

    def column(self, name: str) -> np.ndarray:
        """A column of numbers."""


def doubts_of(scores: Scores) -> dict[str, str]:
    """What makes scores doubtful, a sentence with its remedy for each, by name: noise, saturation, rounding.

    Args:
        scores: any scores; those of another criterion than resonance are doubted for noise alone.
    """
    found, trust = {}, scores.provenance.trust
    if trust is not None and not trust.agrees:
        found["noise"] = f"{trust.measured[0].upper()}{trust.measured[1:]}; {trust.noise}."
    saturated = _saturation(scores)
    if saturated is not None:
        found["saturation"] = saturated
    rounded = _rounding(scores.provenance)
    if rounded is not None:
        found["rounding"] = rounded
    return found


def remarks_of(scores: Scores) -> dict[str, str]:
    """The doubts, and what else is to be said once where scores are made."""
    asked, measured = scores.provenance.config.get("n_layers"), layers_of(scores)
    if not isinstance(asked, int) or not 0 < measured < asked:
        return doubts_of(scores)
    layers = "1 layer" if measured == 1 else f"{measured} layers"
    fewer = f"The model has {layers}: the score is the mean over {measured}, not {asked} (n_layers={measured})."
    return {"layers": fewer} | doubts_of(scores)


def trust_lines(scores: Scores) -> list[str]:
    """How far scores can be trusted, as lines to print: what was measured again, and each remark."""
    trust = scores.provenance.trust
    measured = [] if trust is None else [f"Trust: {trust.measured}"]
    return measured + [f"Warning: {remark}" for remark in remarks_of(scores).values()]


def layers_of(scores: Scores) -> int:
    """The number of measured layers."""
    return sum(re.fullmatch(rf"{LAYER}\d+", name) is not None for name in scores.table.column_names)


def _saturation(scores: Scores) -> str | None:
    config, trust = scores.provenance.config, scores.provenance.trust
    values = scores.column("score")[scores.scored]
    values = values[np.isfinite(values)]
    if "update" in config:
        saturated, span = is_saturated(values, config), span_of(values, full_step_of(config))
    else:  # settings that are not known here, but how much of the range was in use
        saturated = trust is not None and trust.saturation is not None and trust.saturation < LITTLE_RANGE
        span = "" if trust is None or trust.saturation is None else f"within {trust.saturation:.3%} of a full step"
    return f"The scores are saturated ({span}): {SATURATED}." if saturated else None


def _rounding(provenance: Provenance) -> str | None:
    dtype, trust = provenance.preparation.get("dtype"), provenance.trust
    if dtype not in HALF or provenance.config.get("criterion", RESONANCE) != RESONANCE:
        return None
    again = "no row was measured again in float32"
    if trust is not None and trust.in_float32 and trust.agreement is not None:
        again = f"the ranks of some rows agree with those in float32 to {trust.agreement:.4f}"
    return (
        f"The model's weights are {dtype}: {again}, and nothing shows what rounding them to {dtype} has changed. Load "
        "the model in float32 (dtype=torch.float32); the forward may still run in bfloat16 (bf16=True)."
    )
