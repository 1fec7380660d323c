"""The weights of signals that vote, from what a probe found. Knows the probe's file, not how it was made."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import InputError
from ..io.files import read_json
from ..scores.score_table import LENGTH

PROBE_FILE = "probe.json"
KINDS = ("labelled", "contradicted", "self_made", "all")  # of the faulty rows: the closer to real errors, the earlier
WARMED = " (warmed up)"  # after the name of a signal: measured after a warm-up
COLUMNS = {"resonance": "score"}  # signals whose column has another name
AGAIN = "Make it again with resofilter probe."


def votes_of(probe: str | os.PathLike[str], kind: str | None = None) -> dict[str, float]:
    """The votes of a probe's signals, as `by=` of a `DataSelector`: `2 |AUROC - 0.5|` for each, the best one first.

    An AUROC is that of a signal's `direction`, by default `"largest"`: above 0.5 the faulty rows are at that end, below
    0.5 at the other. A signal votes against its largest values, `+loss`, or against its smallest, `-el2n`; at 0.5 it
    has no vote.

    Args:
        probe: the folder of a probe, or its `probe.json`.
        kind: the kind of faulty rows whose AUROC counts; by default the first of `labelled`, `contradicted`,
            `self_made` and `all` that the probe has.

    Raises:
        InputError: the file is missing, damaged or no probe's; or it has no such kind, or no signal with a vote.
    """
    path = Path(probe) if Path(probe).suffix == ".json" else Path(probe) / PROBE_FILE
    found = _aurocs(path)
    kinds = {each for each, _ in found}
    chosen = kind if kind is not None else next((each for each in KINDS if each in kinds), None)
    if chosen not in kinds:
        raise InputError(f"'{path}' has no AUROC of kind {chosen!r}. It has: {', '.join(sorted(kinds))}.")
    votes = {name: 2 * value - 1 for (each, name), value in found.items() if each == chosen and value != 0.5}
    if not votes:
        raise InputError(f"In '{path}' no signal finds the faulty rows (kind {chosen!r}): none can vote.")
    ordered = sorted(votes.items(), key=lambda vote: -abs(vote[1]))
    return {f"{'+' if vote > 0 else '-'}{COLUMNS.get(name, name)}": round(abs(vote), 6) for name, vote in ordered}


def _of_largest(record: Mapping[str, Any]) -> float | None:
    """The AUROC of a signal's largest values, from that of its direction."""
    if record["auroc"] is None or record.get("direction", "largest") == "largest":
        return record["auroc"]
    return 1 - record["auroc"]


def _counts(record: Mapping[str, Any], warmed: bool) -> bool:
    """Whether a record has a vote: it is of the model that the probe recommends, and of no writer's style.

    The length has none: the votes would rank by it.
    """
    signal = str(record["signal"])
    of_style = record["kind"] == "self_made" and record.get("against", "writer") != "writer"
    return signal.endswith(WARMED) == warmed and signal != LENGTH and not of_style


def _aurocs(path: Path) -> dict[tuple[str, str], float]:
    """The AUROC of the largest values, for each kind and signal. Raises InputError for a file that is no probe's."""
    try:
        probe = read_json(path, AGAIN)
    except FileNotFoundError as error:
        raise InputError(f"There is no '{path}': pass the folder that resofilter probe wrote.") from error
    try:
        entries: Any = probe["signals"] if isinstance(probe, Mapping) else None
        if not isinstance(entries, Sequence) or not entries:
            raise TypeError
        warmed = (probe.get("recommendation") or {}).get("warmup") is not None
        counted = [each for each in entries if _counts(each, warmed)]
        found = {(str(each["kind"]), each["signal"].removesuffix(WARMED)): _of_largest(each) for each in counted}
        known = {key: float(value) for key, value in found.items() if value is not None and not math.isnan(value)}
        if not known or not all(0 <= value <= 1 for value in known.values()):
            raise ValueError
        return known
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"'{path}' holds no AUROC of signals. {AGAIN}") from error
