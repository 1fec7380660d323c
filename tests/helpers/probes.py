"""Results of a probe without a model, and rows to probe."""

from __future__ import annotations

from typing import Any

from resofilter_trainer.probe.findings import ALL
from resofilter_trainer.probe.recommendation import recommend
from resofilter_trainer.probe.results import ProbeResult

SUMS = [(i, i % 7 + 1) for i in range(40)]
QUESTIONS = [
    {"question": f"what is {a} + {b} ?", "answer": f"we add {a} and {b}. {a} + {b} = {a + b}. done. #### {a + b}"}
    for a, b in SUMS
]


def record(signal: str, kind: str, auroc: float | None, half: float = 0.03, **fields: Any) -> dict[str, Any]:
    """A record of a signal and a kind, with an interval of `half` on either side."""
    bounds = (None, None) if auroc is None else (round(auroc - half, 6), round(auroc + half, 6))
    out = fields.pop("length_out", None)
    return {
        "signal": signal,
        "kind": kind,
        "auroc": auroc,
        "low": bounds[0],
        "high": bounds[1],
        "auroc_length_out": out,
        "low_length_out": None if out is None else round(out - half, 6),
        "high_length_out": None if out is None else round(out + half, 6),
        "auroc_within_prompt": None,
        "pairs_within_prompt": 0,
        "seconds": 1.0,
        "direction": "largest",
        "faulty": 40,
        "compared": 100,
        "beyond": 0.25,
        "against": "writer" if kind == "self_made" else "rows",
        **fields,
    }


def result(records: list[dict[str, Any]] | None = None, **fields: Any) -> ProbeResult:
    """A result with these records."""
    if records is None:
        records = [record("loss", "cut", 0.9), record("loss", ALL, 0.9), record("rank", "cut", None),
                   record("rank", ALL, None)]  # fmt: skip
    names = list(dict.fromkeys(each["signal"] for each in records))
    kinds = list(dict.fromkeys(each["kind"] for each in records))
    usual = {
        "signals": records,
        "recommendation": recommend(records),
        "kinds": {kind: f"what {kind} stands for" for kind in kinds},
        "left_out": {"number": "no row has a number"},
        "notes": ["a <b>note</b>"],
        "alike": {"signals": names, "spearman": [[1.0] * len(names)] * len(names), "groups": [], "above": 0.95},
        "cost": {"rows": 100, "planted": 80, "tokens": 5000, "seconds": 12.3},
        "provenance": {"model": "m", "dataset": "d", "seed": 0, "versions": {"torch": "2"}},
    }
    return ProbeResult(**{**usual, **fields})
