"""The metrics of a model on tasks of lm-evaluation-harness (the extra `eval`). Knows no training."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import InputError
from ..data.files import first_line
from ..model.modes import evaluating

INSTALL = "Tasks need lm-evaluation-harness, which is not installed: pip install 'lm_eval>=0.4.13'"


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    batch_size: int,
    folder: str | None = None,
    limit: int | None = None,
    unsafe_code: bool = False,
) -> dict[str, float]:
    """Evaluate a model on tasks.

    Args:
        model, tokenizer: the model and its tokenizer.
        tasks: the names of tasks or groups, as for `lm_eval --tasks`.
        batch_size: the number of requests in a batch.
        folder: a folder with further task files, which may read local data.
        limit: the number of documents of each task; None for all.
        unsafe_code: whether tasks may run code that the model generates on this machine.

    Returns:
        The main metric of each task, by name: the first in its file for which larger is better.

    Raises:
        InputError: the harness is not installed, or a task is not known, fails, or has no such metric.
    """
    index = check_tasks(tasks, folder)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with evaluating(model):
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                task_manager=index,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                confirm_run_unsafe_code=unsafe_code,
            )
    except Exception as error:  # tasks, datasets and metrics raise errors of any type
        raise InputError(f"The tasks {', '.join(tasks)} failed: {first_line(error)}") from error
    return {name: main_metric(name, found) for name in tasks}


def check_tasks(tasks: Sequence[str], folder: str | None = None) -> Any:
    """The harness's index of tasks. Raises InputError where the harness is not installed, or a task is not known."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(INSTALL) from error
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"The folder of task files '{folder}' does not exist.")
    index = _index(TaskManager, folder)
    for name in tasks:
        if name in index.all_tags:
            raise InputError(f"'{name}' is a tag of lm-evaluation-harness. Pass its tasks, or a group.")
        if name not in index.all_tasks:
            raise InputError(f"lm-evaluation-harness knows no task '{name}'. `lm_eval ls tasks` lists them.")
    return index


@functools.cache
def _index(manager: Any, folder: str | None) -> Any:
    """The index, cached: the harness reads thousands of task files for it."""
    return manager(include_path=folder)


def main_metric(name: str, found: Mapping[str, Any]) -> float:
    """The main metric of a task or a group; of a group without its own metrics, the mean over its tasks.

    Args:
        name: the name of the task or group.
        found: the results of `lm_eval.simple_evaluate`.

    Raises:
        InputError: the task has no metric for which larger is better.
    """
    results, better = found["results"].get(name, {}), _directions(name, found)
    for key, value in results.items():
        if better.get(key.split(",")[0]) and isinstance(value, int | float):
            return float(value)
    members = found["group_subtasks"].get(name)
    if members:
        return fmean(main_metric(each, found) for each in members)
    raise InputError(f"The task '{name}' has no metric for which larger is better: {', '.join(map(str, results))}.")


def _directions(name: str, found: Mapping[str, Any]) -> dict[str, bool]:
    """Whether larger is better, by metric; for a group from its tasks, as the harness omits those of nested groups."""
    better: dict[str, bool] = {}
    for member in found["group_subtasks"].get(name, []):
        better |= _directions(member, found)
    return better | found["higher_is_better"].get(name, {})
