"""The settings of the method `signal`: the column that it ranks rows by, and what that takes. Knows no models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..config import InputError, Warmup, check_kind, one_of, warmup_settings
from ..scores.score_table import LENGTH
from ..scoring.further_signals import ALL_SIGNALS, FURTHER
from ..selecting.data_selector import DataSelector

# How many forwards each of `scoring.further_signals.FORWARDS` runs.
FORWARDS = {"alone": 1, "verdict": 1, "jitter": 2, "reference": 1, "reference_alone": 1}
ONE_PASS = tuple(name for name in ALL_SIGNALS if name not in FURTHER)
OWN_FOLDER = "cache"  # of a warm-up: the comparison keeps the tuned weights beside the scores


@dataclass(frozen=True)
class SignalSettings:
    """What to rank rows by.

    Attributes:
        by: the name of a signal, one of `scoring.further_signals.ALL_SIGNALS`; or `num_tokens`.
        drop: the end to drop, `"largest"` or `"smallest"`; by default the signal's own.
        length_out: whether to rank by what the signal says beyond the length, as in `DataSelector`.
        warmup: the number of rows of a short training before the pass, of a copy of the model, which then scores; or a
            mapping with the fields of `Warmup`; None for no warm-up. The rows are some of the dataset's: their losses
            are smaller for that, so a selection by a loss keeps more of them.

    Raises:
        InputError: a setting is unknown or cannot be used with another one.
    """

    by: str = ""
    drop: str | None = None
    length_out: bool = False
    warmup: int | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.by:
            raise InputError("The method 'signal' needs a setting 'by', such as {by: loss_sum}.")
        one_of("by", self.by, (*ALL_SIGNALS, LENGTH))
        if self.drop is not None:
            one_of("drop", self.drop, ("largest", "smallest"))
        self.policy(keep=0.5)
        if self.tuning is not None and self.by == LENGTH:
            raise InputError(f"A warm-up does not change {LENGTH}: leave warmup out.")

    def policy(self, keep: float) -> DataSelector:
        """The policy that keeps a share of the rows."""
        return DataSelector(keep=keep, by=self.by, drop=self.drop, length_out=self.length_out)  # type: ignore[arg-type]

    @property
    def tuning(self) -> Warmup | None:
        """The warm-up; None for none."""
        if not isinstance(self.warmup, Mapping):
            check_kind("warmup", self.warmup, (int, type(None)), "a number of rows, or a mapping")
            return warmup_settings(self.warmup)
        for name in self.warmup:
            one_of("A setting of warmup", name, [each.name for each in fields(Warmup) if each.name != OWN_FOLDER])
        return Warmup(**self.warmup)

    @property
    def measured(self) -> tuple[str, ...]:
        """The signals of the pass: all that need no further forward, or the one that does."""
        return (self.by,) if self.by in FURTHER else ONE_PASS

    @property
    def of_resonance(self) -> bool:
        """Whether the signal is a resonance, whose ranking may be noise."""
        return self.by not in FURTHER and (ALL_SIGNALS[self.by].form is not None or ALL_SIGNALS[self.by].of_layers)

    @property
    def by_reference(self) -> bool:
        """Whether the signal needs a reference model."""
        return self.by in FURTHER and FURTHER[self.by].by_reference

    @property
    def further_forwards(self) -> int:
        """The number of forwards besides the pass of the recorder, those of a reference model included."""
        return sum(FORWARDS[each] for each in FURTHER[self.by].forwards) if self.by in FURTHER else 0

    @property
    def folder(self) -> str:
        """The name of the folder of the scores: one for all signals of one pass, and one for each warm-up."""
        if self.by == LENGTH:
            return "length"
        words = [f"signal-{self.by}" if self.by in FURTHER else "signals"]
        if self.tuning is not None:
            usual, own = Warmup(method=self.tuning.method).to_json(), self.tuning.to_json()
            words += ["warmup", "all" if self.tuning.rows is None else str(self.tuning.rows)]
            words += [] if self.tuning.method == Warmup.method else [self.tuning.method]
            others = [name for name in own if name not in ("rows", "method") and own[name] != usual[name]]
            words += [f"{name}-{own[name]:g}" for name in others]
        return "-".join(words)
