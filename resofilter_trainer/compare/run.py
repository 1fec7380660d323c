"""A comparison: every selector scores, selects, trains and is tested, for every share and seed.

    data of a seed -> Round -> one cell after another, each kept as soon as it is done
    all cells -> comparison.json, a table, a picture

What is finished lies in the folder, whole, with what it is of, and is not done again. One process. Knows folders, not
how anything is scored or trained.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..config import InputError
from ..evaluation.tasks import check_tasks
from ..io.files import folder_lock, read_json, replacing
from ..selecting.results import EPOCHS, FLOPS, FULL
from .cells import Cell
from .config import ComparisonConfig, SelectorConfig, slug
from .data import make_data
from .methods import check
from .round import Round

SETTINGS = "settings.json"
LATER = ("selectors", "keep", "seeds", "model", "output", "equal_flops", "unsafe_code")  # more may come
OF_SOME = (  # what only some cells depend on, which have it written down
    *("proxy_model", "score_model", "reference_model"),
    *("validation_dataset", "validation_split", "validation_rows"),
)


def run(config: ComparisonConfig) -> list[Cell]:
    """Do what is not done yet, and give every cell.

    Raises:
        InputError: a selector is not known or lacks something, a model or a dataset cannot be had, or the folder holds
            another comparison.
    """
    check(config)
    if PartialState().num_processes > 1:
        raise InputError("A comparison runs in one process: its trainings take turns. Leave accelerate launch out.")
    if config.tasks:
        check_tasks(config.tasks, config.task_folder)
    output = Path(config.output)
    cells = []
    with folder_lock(output):
        for seed in config.seeds:
            data = make_data(config, seed)
            for model in config.model:
                one = Round(config, model, seed, data)
                if seed == config.seeds[0]:  # nothing is wrong with the settings
                    _claim(output, config)
                cells += _cells_of(one, output / "cells" / slug(model))
    return cells


def _cells_of(own: Round, folder: Path) -> list[Cell]:
    """All of one model and seed; first for as many epochs as all rows, then at equal FLOPs where that is asked for."""
    config, found = own.config, dict[tuple[str, float], Cell]()
    wanted = [
        (selector, keep)
        for selector in config.selectors
        for keep in ((1.0,) if selector.method == FULL else config.keep)
    ]
    for selector, keep in wanted:
        make = partial(own.cell, selector, keep)
        found[selector.name, keep] = _once(own, folder, selector, keep, EPOCHS, make)
    cells = list(found.values())
    for selector, keep in wanted if config.equal_flops else ():
        if selector.method != FULL:
            make = partial(own.at_equal_flops, selector, keep, found[selector.name, keep], found[FULL, 1.0])
            cells.append(_once(own, folder, selector, keep, FLOPS, make))
    return cells


def _once(
    own: Round, folder: Path, selector: SelectorConfig, keep: float, budget: str, make: Callable[[], Cell]
) -> Cell:
    """A cell from its file, made first where it is not there."""
    suffix = "" if budget == EPOCHS else f"-{budget}"
    path = folder / f"{selector.name}-{keep:g}-{own.seed}{suffix}.json"
    origin = {"selector": dataclasses.asdict(selector), "model": own.model, "keep": keep, "seed": own.seed}
    origin |= own.origin(selector)
    if not path.exists():
        if own.config.tasks and not own.tried:
            own.try_tasks()
        cell = make()
        with replacing(path) as part:
            part.write_text(json.dumps({"of": origin, **dataclasses.asdict(cell)}, indent=2) + "\n")
        print(_line(cell), flush=True)
        gc.collect()  # a trained model and its trainer refer to each other
    return read_cell(path, origin)


def _claim(output: Path, config: ComparisonConfig) -> None:
    """Leave in the folder what the cells in it are of. Raises InputError where it holds another comparison's.

    More selectors, shares, seeds and models may come later; what a cell depends on may not change.
    """
    mine = dataclasses.asdict(config)
    for name in (*LATER, *OF_SOME):
        mine.pop(name)
    mine = json.loads(json.dumps(mine, default=str))
    path = output / SETTINGS
    if path.exists():
        theirs = read_json(path, "Choose another output, or remove that one.")
        if not isinstance(theirs, dict):
            raise InputError(f"'{path}' is damaged, it holds no mapping. Choose another output, or remove that one.")
        differing = [f"{name} ({theirs.get(name)} / {mine[name]})" for name in mine if theirs.get(name) != mine[name]]
        if differing:
            raise InputError(
                f"'{output}' holds another comparison (there / here): {'; '.join(differing)}. Choose another output."
            )
        return
    taken = [name for name in ("cells", "scores", "trainer") if (output / name).exists()]
    if taken:
        raise InputError(
            f"'{output}' has a folder '{taken[0]}' and no comparison that it is of. Choose another output."
        )
    with replacing(path) as part:
        part.write_text(json.dumps(mine, indent=2) + "\n")


def read_cell(path: Path, origin: Mapping[str, Any]) -> Cell:
    """A cell that is done. Raises InputError where it cannot be read, or is of another selector or other data."""
    values = read_json(path, "Remove it, and it is done again.")
    try:
        there = dict(values.pop("of"))
        cell = Cell(**values)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"'{path}' is damaged or of another version. Remove it, and it is done again.") from error
    different = [name for name in origin if json.loads(json.dumps(origin[name])) != there.get(name)]
    if different:
        raise InputError(
            f"'{path}' is of another {' and other '.join(different)} than asked for now. Give the selector another "
            "name, choose another output, or remove the file."
        )
    return cell


def _line(cell: Cell) -> str:
    what = f"{cell.model}: {cell.selector} keep {cell.keep:g} seed {cell.seed}"
    budget = " at equal FLOPs" if cell.budget == FLOPS else ""
    return f"{what}{budget}: {cell.failure or f'{cell.metric:.3f}'} ({cell.kept} of {cell.rows})"
