"""What selecting and training cost in a comparison: parameters, seconds, how long a budget lasts. Knows no selector."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel

from ..config import InputError
from ..io.files import read_json, replacing

COST, ATTEMPT = "cost.json", "attempt.json"
Result = TypeVar("Result")


def parameters_of(model: PreTrainedModel) -> int:
    """Parameters that a token is multiplied with: all but an embedding that is no output layer as well.

    Of a mixture of experts all experts count, though a token meets some of them only.
    """
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outer is not None and inner.weight is outer.weight
    return sum(each.numel() for each in model.parameters()) - (0 if tied else inner.weight.numel())


def longer_by(left: float, cost: float, epochs: float, first: float) -> float:
    """How many times as many epochs cost what is left.

    Args:
        left: to be spent.
        cost: of so many `epochs`.
        epochs: of which it is known.
        first: what the first epoch costs, which may be more than each after it, as in InfoBatch.
    """
    if epochs <= 1 or left <= first or cost <= first:
        return left / cost
    return (1 + (left - first) * (epochs - 1) / (cost - first)) / epochs


def timed(folder: Path, work: Callable[[], Result], goes_on: bool) -> tuple[Result, float]:
    """What is done in a folder, and the seconds it took: now, or when it was done there.

    Args:
        folder: in which a note of the time is left.
        work: to be done, or to find that it is done.
        goes_on: whether the work goes on where an interruption has left it, whose seconds count then, up to the last
            file that it has written; else it begins anew, in an empty folder.
    """
    if (folder / COST).exists():
        return work(), seconds_of(folder)
    spent = _spent(folder) if goes_on else None
    if spent is None:
        shutil.rmtree(folder, ignore_errors=True)
        spent = 0.0
    with replacing(folder / ATTEMPT) as part:
        part.write_text(json.dumps({"spent": spent, "began": time.time()}) + "\n")
    started = time.perf_counter()
    found = work()
    with replacing(folder / COST) as part:
        part.write_text(json.dumps({"seconds": spent + time.perf_counter() - started}) + "\n")
    (folder / ATTEMPT).unlink()
    return found, seconds_of(folder)


def seconds_of(folder: Path) -> float:
    """What the work in a folder took. Raises InputError where the note is damaged."""
    return _noted(folder / COST, "seconds")


def _spent(folder: Path) -> float | None:
    """What interrupted attempts took; None where there was none, or nobody knows when it began."""
    if not (folder / ATTEMPT).exists():
        return None
    written = max(path.stat().st_mtime for path in folder.rglob("*") if path.is_file())
    return _noted(folder / ATTEMPT, "spent") + max(written - _noted(folder / ATTEMPT, "began"), 0.0)


def _noted(path: Path, name: str) -> float:
    way_out = f"Remove '{path.parent}', and it is done again."
    noted = read_json(path, way_out)
    try:
        return float(noted[name])
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"'{path}' is damaged, it has no number '{name}'. {way_out}") from error
