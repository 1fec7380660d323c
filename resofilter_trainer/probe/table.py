"""What a probe found as text of 120 columns. Knows results, no model."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from .findings import LEAST_PAIRS
from .results import ProbeResult

WIDTH = 120
GAP = "  "
HALVES = "AUROC: 0.5 is chance; below it, the other end of the signal finds the fault."


def table_of(result: ProbeResult) -> str:
    """The AUROC of each signal for each kind, what the kinds stand for, the notes and the recommendation."""
    main = result.evidence
    columns = [_names(result), _interval(result, main), _plain(result, main, "auroc_length_out", "length out")]
    columns.append(_plain(result, main, "auroc_within_prompt", "within prompt"))
    columns.append(_column("seconds", [_seconds(result.record(name, main)["seconds"]) for name in result.ranked]))
    columns += [_plain(result, kind, "auroc", kind) for kind in result.ordered_kinds if kind != main]
    lines = [_cost(result), HALVES, ""]
    for block in _blocks(columns):
        lines += [*block, ""]
    lines += _wrapped(
        f"Interval, length out and within prompt are of {main}; within prompt needs {LEAST_PAIRS} pairs of rows."
    )
    for kind in result.ordered_kinds:
        lines += _wrapped(f"{kind}: {result.kinds.get(kind, '')}")
    for kind, why in result.left_out.items():
        lines += _wrapped(f"{kind} is left out: {why}.")
    lines += [""] if result.alike["groups"] or result.notes else []
    for group in result.alike["groups"]:
        lines += _wrapped(f"Nearly the same ranking (Spearman above {result.alike['above']}): {', '.join(group)}.")
    for note in result.notes:
        lines += _wrapped(f"Note: {note}")
    return "\n".join([*lines, "", *_wrapped(f"Recommendation: {result.recommendation.reason}")])


def cost_text(result: ProbeResult) -> str:
    """What was measured, and how long it took."""
    cost = result.cost
    text = f"{cost['rows']:,} rows and {cost['planted']:,} made of them, {cost['tokens']:,} tokens"
    if cost["seconds"] is None:
        return f"{text}; the pass was resumed, so its seconds are not known."
    return f"{text}: {cost['seconds']:,.0f} s. The signals of one pass share its seconds."


def number_text(value: float | None) -> str:
    """An AUROC in two digits, as in `.71`."""
    return "-" if value is None else f"{value:.2f}".removeprefix("0")


def interval_text(low: float | None, high: float | None) -> str:
    """An interval in brackets; empty if it is not known."""
    return "" if low is None or high is None else f"[{number_text(low)}, {number_text(high)}]"


def _cost(result: ProbeResult) -> str:
    return f"Measured: {cost_text(result)}"


def _names(result: ProbeResult) -> list[str]:
    return _column("signal", result.ranked, left=True)


def _interval(result: ProbeResult, kind: str) -> list[str]:
    records = [result.record(name, kind) for name in result.ranked]
    texts = [f"{number_text(each['auroc'])} {interval_text(each['low'], each['high'])}".strip() for each in records]
    return _column(kind, texts, left=True)


def _plain(result: ProbeResult, kind: str, field: str, title: str) -> list[str]:
    return _column(title, [number_text(result.record(name, kind)[field]) for name in result.ranked])


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _column(title: str, values: Sequence[str], left: bool = False) -> list[str]:
    """A column of lines of one width: three of its title, whose words stand below each other, then the values."""
    words = title.replace("_", " ").split(" ")
    head = words if len(words) <= 3 else [*words[:2], " ".join(words[2:])]
    cells = [""] * (3 - len(head)) + head + list(values)
    width = max(map(len, cells))
    return [f"{each:<{width}}" if left else f"{each:>{width}}" for each in cells]


def _blocks(columns: Sequence[list[str]]) -> list[list[str]]:
    """The columns side by side; where they do not fit, the others follow below, each block with the names."""
    names, *others = columns
    blocks, now = list[list[list[str]]](), [names]
    for each in others:
        if len(now) > 1 and sum(len(column[0]) + len(GAP) for column in [*now, each]) > WIDTH + len(GAP):
            blocks.append(now)
            now = [names]
        now.append(each)
    return [[GAP.join(cells).rstrip() for cells in zip(*block, strict=True)] for block in [*blocks, now]]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
