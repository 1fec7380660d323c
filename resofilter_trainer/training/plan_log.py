"""Why an epoch has its number of steps: a line in the console, and `plan.json`. Knows the plan and the filter.

resofilter: epoch 2: 13 of 21 rows, 3 steps, 9 in all (keep 0.6)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..io.files import replacing
from ..selecting.data_selector import DataSelector
from ..selecting.policies import Policy
from .filtering import ByShare, FilterConfig
from .plan import Plan

PLAN_FILE = "plan.json"


def planned_epochs(plan: Plan, filtering: FilterConfig, decided: int, unit: str = "rows") -> list[dict[str, Any]]:
    """The plan in numbers, an entry for each epoch.

    Args:
        plan: the rows and steps of each epoch.
        filtering: the settings of the filter: which rows to drop, and when.
        decided: the number of epochs whose rows are decided on; the numbers of later ones are a forecast.
        unit: what an example of the loader is: `"rows"` or `"packs"`.

    Returns:
        For each epoch `epoch`, counted from 1; `rows` and `of_rows`, or `packs` and `of_packs`; `steps`, `total_steps`
        of the whole run, `decided` and `why` it has these rows.
    """
    found, left = [], plan.total
    for epoch, examples in enumerate(plan.sizes):
        steps = min(plan.steps(epoch), left)
        left -= steps
        found.append(
            {
                "epoch": epoch + 1,
                unit: examples,
                f"of_{unit}": plan.batching.rows,
                "steps": steps,
                "total_steps": plan.total,
                "decided": epoch < decided,
                "why": why(plan, filtering, epoch, epoch < decided),
            }
        )
    return found


def line(entry: dict[str, Any]) -> str:
    """An epoch's entry as a line."""
    unit = "packs" if "packs" in entry else "rows"
    numbers = f"epoch {entry['epoch']}: {entry[unit]:,} of {entry[f'of_{unit}']:,} {unit}, {entry['steps']:,} steps"
    return f"{numbers}, {entry['total_steps']:,} in all ({entry['why']})"


def save_plan(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Write the plan beside the scores."""
    with replacing(folder / PLAN_FILE) as temporary:
        temporary.write_text(json.dumps(entries, indent=2) + "\n")


def why(plan: Plan, filtering: FilterConfig, epoch: int, decided: bool) -> str:
    """Why an epoch, counted from 0, trains on the rows it trains on."""
    return f"{_rows(plan, filtering, epoch, decided)}{_steps(plan, epoch)}"


def _rows(plan: Plan, filtering: FilterConfig, epoch: int, decided: bool) -> str:
    if filtering.ended(epoch):
        return "all rows from here on, end_epoch"
    if epoch < filtering.first:
        return "no scores yet" if epoch == 0 and filtering.when == "training" else "before start_epoch"
    decision = filtering.schedule.decision
    if isinstance(decision, ByShare):
        return f"keep {filtering.shares(len(plan.sizes))[epoch]:g}"
    what = _described(decision.policy)
    if decided:
        return what
    return f"{what} decides later, at most as many rows as now" if not filtering.readmit else f"{what} decides later"


def _described(policy: Policy) -> str:
    """A policy by its threshold, if it has one, or else by the name of its class."""
    threshold = policy.threshold if isinstance(policy, DataSelector) else None
    if threshold is None:
        return type(policy).__name__
    return f"threshold {threshold}" if isinstance(threshold, str) else f"threshold {threshold:g}"


def _steps(plan: Plan, epoch: int) -> str:
    """Why the steps are not those that the rows need."""
    if plan.max_steps is not None and plan.batching.steps(plan.sizes[epoch]) != plan.steps(epoch):
        return "; max_steps fixes the steps, rows come more often"
    return ""
