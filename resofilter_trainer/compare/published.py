"""The survey's comparison of twelve published methods, recomputed. Arithmetic only: knows no data and no models.

    how much is selected, how well it does    -> efficiency     better the higher above a line through two of them
    what a method needs before it runs        -> feasibility    two penalties: ranked, added, ranked again

Definitions and numbers: "Take the Essence and Discard the Dross" (Liu et al., NAACL 2025, arXiv 2406.14115) and its
tool, TEDD-Ranker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CANVAS = (700, 500)  # the size of the tool's picture, in pixels
PADDING = 60
LINE = ((0.025, 1.400), (0.058, 1.443))  # (SDF, PIR) of Instruction-Mining and InstructionGPT-4
MANY_LLMS, MANY_LLMS_PENALTY = 100, 200.0
SAME_BENCHMARK, OTHER_BENCHMARK = (3.1311, -1.6875), (5.4667, -4.0407)  # slope and intercept
DECIMALS = 9  # of a value in a ranking, so that the two methods on the line are equal


@dataclass(frozen=True)
class Needs:
    """What a method needs, as the survey counts it.

    Attributes:
        llms: the number of language models to train.
        steps: the number of steps from the raw data to the selected data.
        reproducible: whether everything is public.
        model_free: whether it needs no model of its own.
        data_free: whether it needs no data of its own.
        gpt_free: whether it needs no ChatGPT.
        llm_penalty: the penalty for each model to train; 1.5 for a small one (Superfiltering).
    """

    llms: int
    steps: int
    reproducible: bool = True
    model_free: bool = True
    data_free: bool = True
    gpt_free: bool = True
    llm_penalty: float = 2.0

    @property
    def simplicity_penalty(self) -> float:
        """`2 * LLMs + steps + (1 if not reproducible)`; 200 with more than 100 models to train."""
        if self.llms > MANY_LLMS:
            return MANY_LLMS_PENALTY
        return self.llm_penalty * self.llms + self.steps + (not self.reproducible)

    @property
    def flexibility_penalty(self) -> int:
        """`3 * (a model of its own) + 2 * (data of its own) + 1 * (ChatGPT)`."""
        return 3 * (not self.model_free) + 2 * (not self.data_free) + (not self.gpt_free)


@dataclass(frozen=True)
class Entry:
    """A published method in the survey's tables.

    Attributes:
        name: the survey's name for it.
        sdf: the selected data fraction, selected rows over all rows.
        pir: the performance improvement ratio, performance with the selected rows over performance with all rows, on
            the scale of win rates (see `pir`).
        needs: what it needs before it runs.
    """

    name: str
    sdf: float
    pir: float
    needs: Needs


SURVEY = (
    Entry("IFD", 0.05, 1.747, Needs(1, 3, model_free=False, data_free=False)),
    Entry("LESS", 0.05, 1.491, Needs(1, 4, model_free=False, data_free=False)),
    Entry("Superfiltering", 0.05, 1.475, Needs(1, 3, model_free=False, data_free=False, llm_penalty=1.5)),
    Entry("SelectIT", 0.2, 1.653, Needs(0, 4)),
    Entry("InstructionGPT-4", 0.058, 1.443, Needs(30, 4, model_free=False, gpt_free=False)),
    Entry("Instruction-Mining", 0.025, 1.400, Needs(129, 4, reproducible=False, model_free=False, gpt_free=False)),
    Entry("SHED", 0.09, 1.460, Needs(500, 3, model_free=False, data_free=False)),
    Entry("Nuggets", 0.145, 1.519, Needs(0, 4)),
    Entry("InsTag", 0.02, 1.344, Needs(0, 3, reproducible=False, gpt_free=False)),
    Entry("CaR", 0.0196, 1.343, Needs(0, 4)),
    Entry("DEITA", 0.1, 1.426, Needs(2, 5, model_free=False, data_free=False, gpt_free=False)),
    Entry("AlpaGasus", 0.173, 1.284, Needs(0, 2, reproducible=False, gpt_free=False)),
)


def pir(p: float, scale: tuple[float, float] = SAME_BENCHMARK) -> float:
    """The performance improvement ratio, on the scale of win rates.

    Args:
        p: the mean over tasks of (metric after training on the selected rows / metric after training on all rows).
        scale: `SAME_BENCHMARK` or `OTHER_BENCHMARK`, the survey's fits. Win rates by one judge need none.
    """
    slope, intercept = scale
    return slope * p + intercept


def residual(sdf: float, pir: float) -> float:
    """How far a method lies above the survey's line: efficiency without a scale, in units of PIR."""
    (left, low), (right, high) = LINE
    return pir - (low + (high - low) * (sdf - left) / (right - left))


def pixel_distances(points: Sequence[tuple[float, float]]) -> list[float]:
    """Efficiency as the survey's tool measures it: signed distances to the line, in pixels of its picture.

    The axes are scaled to the given points, so the distances depend on them. The order is that of `residual`.

    Args:
        points: (SDF, PIR) of each method; at least two points that differ in both.
    """
    scales = []
    for axis, size in enumerate(CANVAS):
        values = [point[axis] for point in points]
        scales.append((size - 2 * PADDING) / (max(values) - min(values)))
    (left, low), (right, high) = LINE
    slope = (high - low) * scales[1] / ((right - left) * scales[0])
    return [residual(*point) * scales[1] / math.hypot(1, slope) for point in points]


def efficiency_ranks(points: Sequence[tuple[float, float]]) -> list[int]:
    """Dense ranks of (SDF, PIR) points by `residual`, 1 for the most efficient."""
    return dense_ranks([-residual(*point) for point in points])


def feasibility_ranks(needs: Sequence[Needs]) -> list[int]:
    """Dense ranks of the sum of the dense ranks of both penalties, 1 for the method that is simplest to run."""
    simplicity = dense_ranks([each.simplicity_penalty for each in needs])
    flexibility = dense_ranks([each.flexibility_penalty for each in needs])
    return dense_ranks([sum(pair) for pair in zip(simplicity, flexibility, strict=True)])


def dense_ranks(values: Sequence[float]) -> list[int]:
    """Ranks from 1 for the smallest value; equal values share a rank, and the next value gets the next rank."""
    rounded = [round(value, DECIMALS) for value in values]
    order = sorted(set(rounded))
    return [order.index(value) + 1 for value in rounded]


def published_ranks() -> list[dict[str, str | int]]:
    """`method`, `efficiency_rank` and `feasibility_rank` of each method, in the survey's order."""
    efficiency = efficiency_ranks([(each.sdf, each.pir) for each in SURVEY])
    feasibility = feasibility_ranks([each.needs for each in SURVEY])
    return [
        {"method": entry.name, "efficiency_rank": first, "feasibility_rank": second}
        for entry, first, second in zip(SURVEY, efficiency, feasibility, strict=True)
    ]


def published_table() -> str:
    """The survey's tables, as text."""
    distances = pixel_distances([(each.sdf, each.pir) for each in SURVEY])
    lines = [
        f"{'method':20}{'SDF':>8}{'PIR':>8}{'above the line':>16}{'pixels':>8}{'efficiency':>12}"
        f"{'simplicity':>12}{'flexibility':>13}{'feasibility':>13}"
    ]
    for entry, distance, ranks in zip(SURVEY, distances, published_ranks(), strict=True):
        above = residual(entry.sdf, entry.pir)
        needs = entry.needs
        lines.append(
            f"{entry.name:20}{entry.sdf:8.4g}{entry.pir:8.3f}{above:+16.3f}{distance:+8.1f}"
            f"{ranks['efficiency_rank']:12}{needs.simplicity_penalty:12g}{needs.flexibility_penalty:13}"
            f"{ranks['feasibility_rank']:13}"
        )
    return "\n".join([*lines, "", "efficiency and feasibility are ranks, simplicity and flexibility are penalties"])
