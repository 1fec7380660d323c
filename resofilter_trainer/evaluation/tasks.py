"""What a trained model reaches in tasks of lm-evaluation-harness (the extra `eval`). Knows no training."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import InputError
from ..data.rows import first_line
from ..model.modes import evaluating

INSTALL = "tasks are lm-evaluation-harness's, which is not installed: pip install 'lm_eval>=0.4.13'"


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    batch_size: int,
    folder: str | None = None,
    limit: int | None = None,
    unsafe_code: bool = False,
) -> dict[str, float]:
    """The main metric of each task: the first in its file that is better when larger.

    Args:
        model, tokenizer: what is asked.
        tasks: names of tasks or groups, as `lm_eval --tasks` takes them.
        batch_size: requests at once.
        folder: of task files of one's own, which may read local data.
        limit: how many documents of each task.
        unsafe_code: whether tasks may run on this machine what the model writes.

    Raises:
        InputError: the harness is not installed, a task is not known or cannot be run, or has no such metric.
    """
    known = check_tasks(tasks, folder)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with evaluating(model):
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks),
                task_manager=known,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                confirm_run_unsafe_code=unsafe_code,
            )
    except Exception as error:  # datasets, metrics and tasks each raise their own
        raise InputError(f"The tasks {', '.join(tasks)} cannot be run: {first_line(error)}") from error
    return {name: main_metric(name, found) for name in tasks}


def check_tasks(tasks: Sequence[str], folder: str | None = None) -> Any:
    """The harness's index of tasks. Raises InputError where it is not installed, or a task is not known."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(INSTALL) from error
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"There is no folder '{folder}' with task files.")
    index = _index(TaskManager, folder)
    for name in tasks:
        if name in index.all_tags:
            raise InputError(f"'{name}' is a tag of lm-evaluation-harness: name its tasks, or a group.")
        if name not in index.all_tasks:
            raise InputError(f"lm-evaluation-harness knows no task '{name}'. `lm_eval ls tasks` lists them.")
    return index


@functools.cache
def _index(manager: Any, folder: str | None) -> Any:
    """Made once: the harness reads thousands of task files for it."""
    return manager(include_path=folder)


def main_metric(name: str, found: Mapping[str, Any]) -> float:
    """Of a task, from the harness's results; of a group its own, or the mean of its tasks'.

    Raises:
        InputError: there is none of which more is better.
    """
    results, better = found["results"].get(name, {}), _directions(name, found)
    for key, value in results.items():
        if better.get(key.split(",")[0]) and isinstance(value, int | float):
            return float(value)
    members = found["group_subtasks"].get(name)
    if members:
        return fmean(main_metric(each, found) for each in members)
    raise InputError(f"The task '{name}' has no metric that is better when larger: {', '.join(map(str, results))}.")


def _directions(name: str, found: Mapping[str, Any]) -> dict[str, bool]:
    """Whether more is better, by metric; a group's from its tasks', as the harness leaves out those of outer groups."""
    better: dict[str, bool] = {}
    for member in found["group_subtasks"].get(name, []):
        better |= _directions(member, found)
    return better | found["higher_is_better"].get(name, {})
