"""A comparison: every selector scores, selects, trains and is tested, for every share and seed.

    data of a seed -> Round -> one cell after another, each saved as soon as it is done
    all cells -> comparison.json, a table, a picture

A comparison resumes: a cell that is in the folder is not made again. It runs in one process. Knows folders; does not
know how anything is scored or trained.
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

from ..config import InputError, together
from ..data.models import check_name
from ..data.reference_model import without_revision
from ..evaluation.tasks import check_tasks
from ..io.files import folder_lock, read_json, replacing
from ..io.made_from import as_json, check_made_from
from ..selecting.results import EPOCHS, FLOPS, FULL
from .cells import Cell
from .config import ComparisonConfig, SelectorConfig, slug
from .data import make_data
from .methods import check, method_of
from .recorded import by_dynamics
from .round import Round
from .training import check_adapter, model_path, sft_config

SETTINGS = "settings.json"
BETWEEN, NEW_LINE = "between_prompt_and_completion", "\n"  # in the settings; in those of earlier versions without it
EXTENSIBLE = ("selectors", "keep", "seeds", "model", "output", "equal_flops", "unsafe_code")  # may change later
OF_SOME_CELLS = (  # settings that are saved with the cells that depend on them
    *("proxy_model", "score_model", "reference_model"),
    *("validation_dataset", "validation_split", "validation_rows"),
)
ANOTHER_OUTPUT = "Choose another output."


def run(config: ComparisonConfig) -> list[Cell]:
    """Make the cells that are not in the folder yet, and return all of them.

    Raises:
        InputError: a selector is unknown or lacks something, a model or a dataset cannot be loaded, or the folder has
            another comparison.
    """
    check(config)
    if PartialState().num_processes > 1:
        raise InputError("A comparison runs in one process, one training after another: leave accelerate launch out.")
    if config.tasks:
        check_tasks(config.tasks, config.task_folder)
    together(*(partial(_check_model, config, each) for each in config.models()))
    together(*(partial(check_adapter, config, each) for each in _trained(config)))
    output = Path(config.output)
    cells = []
    with folder_lock(output):
        between = _between(output)
        for seed in config.seeds:
            data = make_data(config, seed, between)
            rounds = [Round(config, model, seed, data) for model in config.model]
            if seed == config.seeds[0]:  # the settings are known to work
                save_settings(output, config, between)
            for one in rounds:
                cells += _cells_of(one, output / "cells" / slug(one.model))
    return cells


def _trained(config: ComparisonConfig) -> list[str]:
    """The models that are trained: those that are compared, and those whose training tells how rows are learnt."""
    tell = [each.score_model or config.score_model for each in config.selectors if method_of(each).score is by_dynamics]
    return list(dict.fromkeys([*config.model, *(each for each in tell if each is not None)]))


def _check_model(config: ComparisonConfig, model: str) -> None:
    """Raise InputError, within seconds, for a model that is not there."""
    args = sft_config(config, model, config.seeds[0])
    if model == config.reference_model:
        args = without_revision(args)
    check_name(model_path(model), args)


def _cells_of(one: Round, folder: Path) -> list[Cell]:
    """All cells of one model and seed: with as many epochs as on all rows, then at equal FLOPs if asked for."""
    config, found = one.config, dict[tuple[str, float], Cell]()
    wanted = [
        (selector, keep)
        for selector in config.selectors
        for keep in ((1.0,) if method_of(selector).whole else config.keep)
    ]
    for selector, keep in wanted:
        make = partial(one.cell, selector, keep)
        found[selector.name, keep] = _once(one, folder, selector, keep, EPOCHS, make)
    cells = list(found.values())
    for selector, keep in wanted if config.equal_flops else ():
        if selector.method != FULL:
            make = partial(one.at_equal_flops, selector, keep, found[selector.name, keep], found[FULL, 1.0])
            cells.append(_once(one, folder, selector, keep, FLOPS, make))
    return cells


def _once(
    one: Round, folder: Path, selector: SelectorConfig, keep: float, budget: str, make: Callable[[], Cell]
) -> Cell:
    """A cell from its file; it is made and saved first if the file does not exist."""
    suffix = "" if budget == EPOCHS else f"-{budget}"
    path = folder / f"{selector.name}-{keep:g}-{one.seed}{suffix}.json"
    origin = {"selector": dataclasses.asdict(selector), "model": one.model, "keep": keep, "seed": one.seed}
    origin |= one.scores.origin(selector)
    if not path.exists():
        one.try_tests()
        cell = make()
        _save_json(path, {"of": origin, **cell.to_json()})
        print(_line(cell), flush=True)
        gc.collect()  # a trained model and its trainer refer to each other
    return read_cell(path, origin)


def _between(output: Path) -> str:
    """The text between prompts and completions under TRL's names: none, but in comparisons of earlier versions."""
    there = read_json(output / SETTINGS, ANOTHER_OUTPUT) if (output / SETTINGS).exists() else {BETWEEN: ""}
    return str(there.get(BETWEEN, NEW_LINE)) if isinstance(there, dict) else ""


def save_settings(output: Path, config: ComparisonConfig, between: str = "") -> None:
    """Save the settings that every cell depends on, or check them against those of the comparison in the folder.

    Args:
        output, config: the folder and the comparison.
        between: what stands between prompts and completions under TRL's names.

    Raises:
        InputError: the folder has another comparison, or something else.
    """
    settings = {"lora": None, **config.to_json(), BETWEEN: between}
    for name in (*EXTENSIBLE, *OF_SOME_CELLS):
        settings.pop(name)
    path = output / SETTINGS
    if path.exists():
        there = read_json(path, "Choose another output, or remove that one.")
        if not isinstance(there, dict):
            raise InputError(f"'{path}' is damaged, it has no mapping. Choose another output, or remove that one.")
        there = {"lora": None, BETWEEN: NEW_LINE, **there}  # which earlier versions lack
        check_made_from(there, settings, f"'{output}' has a comparison that was", ANOTHER_OUTPUT, settings)
        return
    taken = [name for name in ("cells", "scores", "trainer") if (output / name).exists()]
    if taken:
        raise InputError(f"'{output}' has a folder '{taken[0]}', but no {SETTINGS} of a comparison. {ANOTHER_OUTPUT}")
    _save_json(path, as_json(settings))


def _save_json(path: Path, values: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def read_cell(path: Path, origin: Mapping[str, Any]) -> Cell:
    """A saved cell.

    Args:
        path: the file.
        origin: what the cell should be made from; nothing is compared if it is empty.

    Raises:
        InputError: the file cannot be read, or its cell was made from something else.
    """
    remedy = "Remove it, and the cell is made again."
    values = read_json(path, remedy)
    try:
        there = _by_setting(values.pop("of"))
        cell = Cell(**values)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"'{path}' is damaged or of another version. {remedy}") from error
    here = _by_setting(origin)
    way_out = "Give the selector another name, choose another output, or remove the file."
    check_made_from(there, here, f"'{path}' has a cell that was", way_out, here)
    return cell


def _by_setting(origin: Mapping[str, Any]) -> dict[str, Any]:
    """The origin of a cell with each setting of its selector as an entry of its own, as in `selector.drop`."""
    selector = dict(origin.get("selector", {}))
    settings = {f"selector.{name}": value for name, value in selector.items()}
    return {**{name: value for name, value in origin.items() if name != "selector"}, **settings}


def _line(cell: Cell) -> str:
    what = f"{cell.model}: {cell.selector} keep {cell.keep:g} seed {cell.seed}"
    budget = " at equal FLOPs" if cell.budget == FLOPS else ""
    return f"{what}{budget}: {cell.failure or f'{cell.metric:.3f}'} ({cell.kept} of {cell.rows})"
