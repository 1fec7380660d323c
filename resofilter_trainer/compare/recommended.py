"""A selector from what a probe recommends. Knows a probe's results; knows no models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import InputError, Warmup
from ..probe.results import REMEDY, ProbeResult

SIGNAL = "signal"  # the method that ranks by a column of the pass
PROBE = "probe"  # the default name of such a selector


def recommended_selector(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML entry of a selector with the method `signal`, for one that names a probe.

    Args:
        entry: the entry, whose `probe` is the output folder of `resofilter probe`, or its `probe.json`. What the probe
            itself cost is not counted.

    Raises:
        InputError: there is no such probe, it recommends not to filter, or its warm-up cannot be repeated.
    """
    for name in ("method", "settings", "score_column", "drop"):
        if name in entry:
            raise InputError(f"A selector's probe says what to rank by: leave {name} out.")
    path = entry[PROBE]
    if not isinstance(path, str):
        raise InputError(f"A selector's probe is the folder of one, as text, got {path!r}.")
    found = ProbeResult.load(path)
    best = found.recommendation
    if best.signal is None:
        raise InputError(f"The probe in '{path}' says not to filter, so leave its selector out: {best.reason}")
    settings: dict[str, Any] = {"by": best.signal, "drop": best.drop, "length_out": best.length_out}
    if best.warmup is not None:
        settings["warmup"] = _warmup(found.provenance, path)
    others = {name: value for name, value in entry.items() if name != PROBE}
    return {"name": PROBE, **others, "method": SIGNAL, "settings": settings}


def _warmup(provenance: Mapping[str, Any], path: str) -> dict[str, Any] | int:
    """The settings of the probe's warm-up: the number of rows, if nothing else was set."""
    if "warmup_dataset" in provenance:
        raise InputError(
            f"The probe in '{path}' scores after a warm-up on a warmup_dataset, and that of a comparison is on the "
            "comparison's own rows: probe without warmup_dataset=."
        )
    told = {name.removeprefix("warmup_"): value for name, value in provenance.items() if name.startswith("warmup_")}
    if not {"rows", "method"} <= told.keys():
        raise InputError(f"The probe in '{path}' does not say how its warm-up was done. {REMEDY}")
    usual = Warmup(method=told["method"]).to_json() | {"method": Warmup.method, "rows": None}
    own = {name: value for name, value in told.items() if value != usual.get(name)}
    return int(own["rows"]) if own.keys() == {"rows"} else {"rows": None, **own}
