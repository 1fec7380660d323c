"""Which signal to drop rows by, from what the probe found; or none. Knows records of numbers, no model and no rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..selecting.votes import WARMED
from .findings import ALL, CONTRADICTED, LABELLED, SELF_MADE, WRITER

USUAL = "loss_sum"  # near the best on most real errors, as measured (benchmarks/RESULTS.md)
NUMBERS, EXCHANGED = ("number", "number_carried", "final_number"), "exchanged"  # planted faults in what is said
ABOUT_AS_GOOD = 0.02  # of AUROC
LEAST_FOUND = 0.55  # AUROC
LEAST_NOTICED = 0.6  # of the copies with a wrong answer
WIDEST = 0.15  # half of the interval of an AUROC: of evidence that tells less, nothing is said
MEASURED = (  # benchmarks/RESULTS.md
    f"{USUAL} was the best signal, or within .03 of it, in 7 of the 8 sets of real errors (of arithmetic) that were "
    "measured"
)
INSTEAD = "Do not filter by score: look for repeats and cut answers first."
NO_EVIDENCE = "Planted faults are not real ones: what finds them need not find errors that a model made."
OTHER = {"largest": "smallest", "smallest": "largest"}


@dataclass(frozen=True)
class Recommendation:
    """What to drop rows by.

    Attributes:
        signal: the column of the scores; None for "do not filter".
        drop: the end to drop; None without a signal.
        reason: why, in one or two sentences with the numbers.
        length_out: whether to take the length out: the residual of the signal's ranks on those of `num_tokens`.
        warmup: whether to score with a copy of the model that was tuned first, on so many rows; 0 for all, None for no.
        evidence: the kind of fault that it rests on.
        auroc, low, high: how well the recommended end finds it, and the 95 % interval; None if nothing was measured.
    """

    signal: str | None
    drop: Literal["largest", "smallest"] | None
    reason: str
    length_out: bool = False
    warmup: int | None = None
    evidence: str = ALL
    auroc: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def name(self) -> str | None:
        """The name of its records: that of the signal, with what says that the model was tuned."""
        return self.signal if self.signal is None or self.warmup is None else self.signal + WARMED


@dataclass(frozen=True)
class Candidate:
    """A signal, the end of it that finds the evidence, and how well, with length in it or not."""

    record: Mapping[str, Any]
    length_out: bool

    @property
    def known(self) -> bool:
        """Whether it was measured, with an interval."""
        return self._get("auroc") is not None and self._get("low") is not None

    @property
    def reverse(self) -> bool:
        """Whether the end that the signal does not drop by itself finds more."""
        return bool(self._get("auroc") < 0.5)

    @property
    def drop(self) -> Any:
        """The end to drop."""
        own = self.record["direction"]
        return OTHER[own] if self.reverse else own

    @property
    def bounds(self) -> tuple[float, float, float]:
        """The AUROC of that end, and its interval."""
        auroc, low, high = (float(self._get(name)) for name in ("auroc", "low", "high"))
        return (1 - auroc, 1 - high, 1 - low) if self.reverse else (auroc, low, high)

    def over_all(self, records: Sequence[Mapping[str, Any]]) -> float:
        """The mean AUROC of this end over all kinds; plain ones before those with length taken out, if equal."""
        own = [each for each in records if each["signal"] == self.record["signal"] and each["kind"] != ALL]
        found = [value for each in own if (value := each[self._name("auroc")]) is not None]
        mean = float(np.mean(found)) if found else 0.5
        return (1 - mean if self.reverse else mean) - 1e-6 * self.length_out

    def _name(self, name: str) -> str:
        return f"{name}_length_out" if self.length_out else name

    def _get(self, name: str) -> Any:
        return self.record[self._name(name)]


def recommend(records: Sequence[Mapping[str, Any]], warmup: int | None = None) -> Recommendation:
    """The signal to drop rows by.

    The evidence is the user's own labels; else rows that other answers contradict; else answers that a model wrote
    itself, wrong ones against right ones; else planted faults. Of the second and third, too few rows are no evidence:
    at least one AUROC must be known to within .15. The signal with the largest lower bound wins; or, among
    those whose AUROC is within .02 of its own, the one with the largest mean over all kinds. None, if the bound is not
    above .5 or the AUROC is below .55.

    `loss_sum` was the best, or nearly, wherever real errors were measured, so without labels it takes the place of a
    winner whose lower bound is not above its own AUROC. What finds planted faults need not find real ones, so with no
    other evidence the signal is `loss_sum`, too; if the model notices wrong numbers in copies of a row, or, where no
    answer has numbers, exchanged answers.

    Args:
        records: what `records_of` returns.
        warmup: the rows of the warm-up, if there was one.
    """
    found = _recommended(records)
    if found.signal is None or not found.signal.endswith(WARMED):
        return found
    return replace(found, signal=found.signal.removesuffix(WARMED), warmup=warmup or 0)


def _recommended(records: Sequence[Mapping[str, Any]]) -> Recommendation:
    evidence = _evidence(records)
    own = [each for each in records if each["kind"] == evidence]
    if evidence == ALL:
        return _as_usual(records)
    candidates = [each for record in own for out in (False, True) if (each := Candidate(record, out)).known]
    if not candidates:
        return Recommendation(None, None, f"Nothing could be measured. {INSTEAD}", evidence=evidence)
    best = max(candidates, key=lambda each: each.bounds[1])
    auroc = best.bounds[0]
    if _finds(best):
        usual = None if evidence == LABELLED else _not_beaten(candidates, best)
        as_good = [each for each in candidates if each.bounds[1] > 0.5 and abs(each.bounds[0] - auroc) <= ABOUT_AS_GOOD]
        chosen = usual or max(as_good, key=lambda each: each.over_all(records))
        reason = _reason(chosen, evidence)
        if usual is not None and usual is not best:
            reason += f" {_called(best)}, with {_numbers(best)}, is not better beyond doubt; {MEASURED}."
        name = chosen.record["signal"]
        return Recommendation(name, chosen.drop, reason, chosen.length_out, None, evidence, *chosen.bounds)
    best = max(candidates, key=lambda each: each.bounds[0])
    reason = f"None of these finds {_what(evidence)}: the best, {_called(best)}, has {_numbers(best)}. {INSTEAD}"
    return Recommendation(None, None, reason, False, None, evidence, *best.bounds)


def _finds(candidate: Candidate) -> bool:
    auroc, low, _ = candidate.bounds
    return low > 0.5 and auroc >= LEAST_FOUND


def _not_beaten(candidates: Sequence[Candidate], best: Candidate) -> Candidate | None:
    """The usual signal, if it finds the evidence and the best signal's lower bound is not above its AUROC."""
    usual = [
        each
        for each in candidates
        if each.record["signal"] in (USUAL, USUAL + WARMED) and not each.length_out and not each.reverse
    ]
    found = max(usual, key=lambda each: each.bounds[1], default=None)
    return found if found is not None and _finds(found) and best.bounds[1] <= found.bounds[0] else None


def _evidence(records: Sequence[Mapping[str, Any]]) -> str:
    """The kind that is most like real errors; answers by a writer only if compared with its own right ones."""
    own = [each for each in records if each["kind"] != SELF_MADE or each["against"] == WRITER]
    halves: dict[str, list[float]] = {}
    for each in own:
        half = WIDEST if each["low"] is None else (each["high"] - each["low"]) / 2
        halves.setdefault(each["kind"], []).append(half)
    told = [kind for kind in halves if kind == LABELLED or min(halves[kind]) <= WIDEST]
    return next((kind for kind in (LABELLED, CONTRADICTED, SELF_MADE) if kind in told), ALL)


def _as_usual(records: Sequence[Mapping[str, Any]]) -> Recommendation:
    """The usual signal, or none, by whether the model notices a wrong number; without numbers, an exchanged answer.

    It does if the signal is larger for a copy with the fault than for the row itself: a comparison with other rows
    would be one of lengths and prompts.
    """
    found = {name: noticed for name in (USUAL, USUAL + WARMED) if (noticed := _noticed(records, name)) is not None}
    if not found:
        reason = f"No real errors are known here, nor whether {USUAL} finds a wrong answer. {NO_EVIDENCE} {INSTEAD}"
        return Recommendation(None, None, reason)
    name, share = max(found.items(), key=lambda each: each[1])
    seen = f"{name} is larger for a copy with a wrong answer than for the row itself in {share:.0%} of the rows"
    if share < LEAST_NOTICED:
        return Recommendation(None, None, f"No real errors are known here, and {seen} only. {INSTEAD}")
    reason = (
        f"No real errors are known here. {MEASURED}, and {seen}. {NO_EVIDENCE} Label some rows (wrong_column) to know "
        "more."
    )
    return Recommendation(name, "largest", reason)


def _noticed(records: Sequence[Mapping[str, Any]], signal: str) -> float | None:
    """The share of copies with a wrong answer that have a larger value than their row; None if it is not known."""
    for kinds in (NUMBERS, (EXCHANGED,)):
        own = [each for each in records if each["signal"] == signal and each["kind"] in kinds]
        known = [each for each in own if each["auroc_within_prompt"] is not None]
        shares = [
            each["auroc_within_prompt"] if each["direction"] == "largest" else 1 - each["auroc_within_prompt"]
            for each in known
        ]
        if shares:
            return float(np.mean(shares))
    return None


def _reason(best: Candidate, evidence: str) -> str:
    record = best.record
    said = f"The {best.drop} values of {_called(best)} find {_what(evidence)} with {_numbers(best)}"
    beyond = record["beyond"]
    share = "" if beyond is None or best.length_out else f"; {beyond:.0%} of the rows as they are lie beyond the median"
    share += " of the faulty ones" if share else ""
    return f"{said}{share}." + (f" {NO_EVIDENCE}" if evidence == ALL else "")


def _called(candidate: Candidate) -> str:
    name = candidate.record["signal"]
    return f"{name} with the length taken out" if candidate.length_out else str(name)


def _what(evidence: str) -> str:
    return {
        LABELLED: "the rows that you labelled as wrong",
        CONTRADICTED: "the rows that other answers to the same prompt contradict",
        SELF_MADE: "wrong answers that a model wrote itself",
    }.get(evidence, "planted faults")


def _numbers(candidate: Candidate) -> str:
    auroc, low, high = candidate.bounds
    return f"an AUROC of {auroc:.2f} (95 % interval {low:.2f} to {high:.2f})"
