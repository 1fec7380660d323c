"""What a probe found, as a record and as `probe.json`. Knows numbers and text, no model and no rows."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import InputError
from ..io.files import file_at, read_json, replacing
from ..scores.row_record import as_html
from .findings import ALL, LABELLED, Record
from .recommendation import Recommendation

RESULT_FILE = "probe.json"
REMEDY = "Remove it, or probe again."
OF_ALL = "all kinds of faults together, each with the same weight"
OF_SELF_MADE = "answers by a model to the same prompts that end differently: the most like real errors"
OF_CONTRADICTED = "the dataset's own rows that end otherwise than half or more of the answers to their prompt"
OF_LABELS = "the rows that your own labels call wrong"


@dataclass(frozen=True)
class ProbeResult:
    """Which signal finds which kind of fault in a dataset's rows.

    Attributes:
        signals: a record for each signal and kind, `"all"` included, see `findings.records_of`.
        recommendation: which end of which signal to drop rows by; its `signal` is None for "do not filter".
        kinds: what each kind of fault stands for.
        left_out: why the other kinds were not planted.
        notes: what is to be said of the numbers.
        alike: Spearman's rank correlation of the signals over the unplanted rows (`signals`, `spearman`), and the
            `groups` of signals whose correlation is above .95.
        cost: what was measured: `rows`, `planted`, `tokens`, and the `seconds` of the pass; None where it was
            resumed.
        provenance: what was probed: model, dataset, settings, versions.
    """

    signals: list[Record]
    recommendation: Recommendation
    kinds: dict[str, str]
    left_out: dict[str, str]
    notes: list[str]
    alike: dict[str, Any]
    cost: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def evidence(self) -> str:
        """The kind that the recommendation rests on."""
        return self.recommendation.evidence

    @property
    def ranked(self) -> list[str]:
        """The signals, the one that finds the evidence best first; either end of a signal counts."""
        own = {each["signal"]: each["auroc"] for each in self.signals if each["kind"] == self.evidence}
        return sorted(own, key=lambda name: 1.0 if own[name] is None else -abs(own[name] - 0.5))

    @property
    def ordered_kinds(self) -> list[str]:
        """The kinds of the records: the evidence, then all, then the others as they were planted."""
        found = dict.fromkeys(each["kind"] for each in self.signals)
        return list(dict.fromkeys(kind for kind in (self.evidence, LABELLED, ALL, *found) if kind in found))

    def record(self, signal: str, kind: str = ALL) -> Record:
        """The record of a signal and a kind. Raises InputError where there is none."""
        for each in self.signals:
            if (each["signal"], each["kind"]) == (signal, kind):
                return each
        raise InputError(f"The probe has no record of signal {signal!r} and kind {kind!r}.")

    def __str__(self) -> str:
        return self.recommendation.reason

    def __repr__(self) -> str:
        best = self.recommendation
        what = "do not filter" if best.signal is None else f"drop the {best.drop} {best.name}"
        return f"ProbeResult({len(self.ranked)} signals, {len(self.ordered_kinds)} kinds of faults; {what})"

    def _repr_html_(self) -> str:
        """How well each signal finds the evidence, and the recommendation, for a notebook."""
        records = [self.record(name, self.evidence) for name in self.ranked]
        columns = {name: [each[name] for each in records] for name in ("signal", "auroc", "low", "high")}
        return as_html(repr(self), pd.DataFrame(columns).round(3), f"AUROC for {self.evidence}. {self}")

    def to_json(self) -> dict[str, Any]:
        """The content of `probe.json`."""
        return dataclasses.asdict(self)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `probe.json` to a folder, complete or not at all. Returns the file."""
        path = Path(folder) / RESULT_FILE
        with replacing(path) as temporary:
            text = json.dumps(self.to_json(), indent=1, allow_nan=False)
            temporary.write_text(f"{text}\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ProbeResult:
        """Read what `save` wrote. Raises InputError if the file is missing, damaged, or something else."""
        path = file_at(path, RESULT_FILE) if Path(path).suffix != ".json" else Path(path)
        try:
            found = read_json(path, REMEDY)
        except FileNotFoundError as error:
            raise InputError(f"There is no probe at '{path}'. Pass the output folder of a probe.") from error
        try:
            made = cls(**{**found, "recommendation": Recommendation(**found["recommendation"])})
            made._check()
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"'{path}' is damaged, or not a probe of this version. {REMEDY}") from error
        return made

    def _check(self) -> None:
        """Raise TypeError or KeyError if a part is not of its kind."""
        kinds = {"signals": list, "kinds": Mapping, "left_out": Mapping, "notes": list, "alike": Mapping}
        for name, kind in {**kinds, "cost": Mapping, "provenance": Mapping}.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} has another type")
        for each in self.signals:
            _ = each["signal"], each["kind"], each["auroc"], each["low"], each["high"], each["beyond"]
