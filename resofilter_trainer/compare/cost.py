"""What selecting and training cost in a comparison: parameters, seconds, epochs of a budget. Knows no selector."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from peft.utils import ModulesToSaveWrapper
from torch.nn import Parameter
from transformers import PreTrainedModel

from ..config import InputError
from ..io.files import read_json, replacing

COST, ATTEMPT = "cost.json", "attempt.json"
Result = TypeVar("Result")


def parameters_of(model: PreTrainedModel) -> int:
    """The parameters that a token is multiplied by: all but an input embedding that is not the output layer as well.

    All experts of a mixture of experts count, although a token meets only some of them.
    """
    return sum(_multiplied(model).values())


def trained_flops(model: PreTrainedModel) -> int:
    """The FLOPs of training on a token: of a forward, its gradient, and that of the weights that are trained."""
    return sum((6 if each.requires_grad else 4) * count for each, count in _multiplied(model).items())


def _multiplied(model: PreTrainedModel) -> dict[Parameter, int]:
    """The parameters that a token is multiplied by, each with its number of entries.

    Without those that only the input embedding has, and those of a module of which PEFT trains a copy.
    """
    beside = [each.original_module for each in model.modules() if isinstance(each, ModulesToSaveWrapper)]
    apart = {module for each in (model.get_input_embeddings(), *beside) for module in each.modules()}
    used = [module for module in model.modules() if module not in apart]
    return {each: _entries(each) for module in used for each in module.parameters(recurse=False)}


def _entries(parameter: Parameter) -> int:
    """The entries of a parameter, of which bitsandbytes packs two in a byte in its 4 bits."""
    packed = type(parameter).__name__ == "Params4bit"
    return 2 * parameter.nbytes if packed else parameter.numel()


def longer_by(left: float, cost: float, epochs: float, first: float) -> float:
    """How many times as many epochs a budget pays for.

    Args:
        left: the budget.
        cost: the cost of `epochs` epochs.
        epochs: the number of epochs whose cost is known.
        first: the cost of the first epoch, which may be higher than that of each later one, as in InfoBatch.
    """
    if epochs <= 1 or left <= first or cost <= first:
        return left / cost
    return (1 + (left - first) * (epochs - 1) / (cost - first)) / epochs


def timed(folder: Path, work: Callable[[], Result], resumes: bool) -> tuple[Result, float]:
    """The result of some work in a folder, and the seconds it took, now or when it was first done there.

    Args:
        folder: the folder of the work, in which the seconds are saved.
        work: a function that does the work, or reads its result if it is done.
        resumes: whether interrupted work resumes. The seconds of earlier attempts then count, up to the last file
            that each has written. Otherwise the work starts again in an empty folder.
    """
    if (folder / COST).exists():
        return work(), seconds_of(folder)
    spent = _spent(folder) if resumes else None
    if spent is None:
        shutil.rmtree(folder, ignore_errors=True)
        spent = 0.0
    _save_numbers(folder / ATTEMPT, spent=spent, began=time.time())
    started = time.perf_counter()
    found = work()
    _save_numbers(folder / COST, seconds=spent + time.perf_counter() - started)
    (folder / ATTEMPT).unlink()
    return found, seconds_of(folder)


def seconds_of(folder: Path) -> float:
    """The seconds that the work in a folder took. Raises InputError if the file with them is damaged."""
    return _saved_number(folder / COST, "seconds")


def _spent(folder: Path) -> float | None:
    """The seconds of interrupted attempts; None if there were none, or if it is unknown when they began."""
    if not (folder / ATTEMPT).exists():
        return None
    written = max(path.stat().st_mtime for path in folder.rglob("*") if path.is_file())
    return _saved_number(folder / ATTEMPT, "spent") + max(written - _saved_number(folder / ATTEMPT, "began"), 0.0)


def _save_numbers(path: Path, **numbers: float) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(numbers) + "\n")


def _saved_number(path: Path, name: str) -> float:
    remedy = f"Remove '{path.parent}', and the work is done again."
    saved = read_json(path, remedy)
    try:
        return float(saved[name])
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"'{path}' is damaged, it has no number '{name}'. {remedy}") from error
