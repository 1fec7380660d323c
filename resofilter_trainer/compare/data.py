"""What a comparison selects from, tests on and validates on. Knows datasets and the demo's problems, no models."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset

from ..config import ColumnMapping, InputError
from ..data.files import load_rows, only_split
from ..data.rows import map_columns
from ..demo.problems import make_problems
from ..demo.run import HELD_OUT_SEED, as_dataset
from ..demo.run import make_data as make_demo_data
from ..evaluation.metrics.final_answer import final_answer
from ..io.digest import FIRST, hash_rows
from .config import DEMO, ComparisonConfig

FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
DEFAULT_SPLITS = ("test", "validation")  # of test_dataset, loss_dataset and validation_dataset
TEXTS = ["prompt", "completion"]


@dataclass(frozen=True, eq=False)
class Data:
    """The data of one seed.

    Attributes:
        rows: the dataset, with `prompt`, `completion` and the user's other columns.
        wrong: (N,) bool, which rows are wrong; None if that is not known.
        prompts, answers: the held-out rows; empty if the models are tested on tasks.
        validation: `prompt` and `completion` of the validation rows; None if there are none.
        task_files: a hash of the user's own task files; "" without any.
        loss_rows: `prompt` and `completion` of the rows for the held-out loss; None if there are none.
    """

    rows: Dataset
    wrong: np.ndarray | None
    prompts: Sequence[Any]
    answers: Sequence[str]
    validation: Dataset | None
    task_files: str = ""
    loss_rows: Dataset | None = None

    @functools.lru_cache  # noqa: B019  # an entry lives as long as the rows do
    def fingerprint(self, column: str | None = None, validated: bool = True) -> str:
        """A hash of the data that a cell depends on: the rows, the held-out rows, the user's own scores.

        Args:
            column: the column of the user's own scores or marks, if the cell's selector has one.
            validated: whether the cell depends on the validation rows.
        """
        rows = self.rows.select_columns(["prompt", "completion", *([column] if column else [])])
        validation = "" if self.validation is None or not validated else hash_rows(self.validation, FIRST)
        wrong = None if self.wrong is None else self.wrong.tolist()
        made_from: list[Any] = [hash_rows(rows, FIRST), validation, wrong, list(self.prompts), list(self.answers)]
        made_from += [self.task_files] if self.task_files else []
        made_from += [] if self.loss_rows is None else [{"loss_rows": hash_rows(self.loss_rows, FIRST)}]
        return xxhash.xxh3_128_hexdigest(json.dumps(made_from, default=str).encode())


def make_data(config: ComparisonConfig, seed: int, between: str = "") -> Data:
    """The user's rows, which are the same for every seed, or the demo's problems, which each seed makes.

    Args:
        config, seed: the comparison and the seed.
        between: the text between prompts and completions under TRL's names.
    """
    if config.dataset == DEMO:
        return _demo_data(config, seed)
    columns = _columns(config, between)
    own = _load(config, config.dataset, config.split)
    rows = map_columns(own, columns)
    for name in {config.wrong_column, *(each.column for each in config.selectors)} - {None, *rows.column_names}:
        if name not in own.column_names:
            raise InputError(f"The dataset has no column '{name}'. It has: {', '.join(own.column_names)}.")
        rows = rows.add_column(name, own[name][:])
    wrong = None if config.wrong_column is None else _flags(rows[config.wrong_column][:], config.wrong_column)
    tests = rows.select([])
    if not config.tasks:
        tests = map_columns(_load(config, config.test_dataset or config.dataset, config.test_split), columns)
        _check_tests(rows, tests)
    validation = None
    if config.validation_dataset is not None:
        validation = map_columns(_load(config, config.validation_dataset, config.validation_split), columns)
        validation = validation.select(range(min(config.validation_rows, len(validation))))
        held_out = {_text(row) for row in tests}
        if any(_text(row) in held_out for row in validation):
            raise InputError(
                "Some validation rows are held-out rows as well: LESS and Nuggets would select for the test."
            )
    loss_rows = None
    if config.loss_dataset is not None:
        loss_rows = map_columns(_load(config, config.loss_dataset, config.loss_split), columns).select_columns(TEXTS)
        _check_apart(rows, loss_rows, "rows of loss_dataset", "loss_dataset", "a memorised row counts as a likely one")
    files = _hash_tasks(config.task_folder)
    return Data(rows, wrong, tests["prompt"][:], tests["completion"][:], validation, files, loss_rows)


def _columns(config: ComparisonConfig, between: str) -> ColumnMapping:
    """The columns of prompts and completions. TRL's own follow each other as SFTTrainer trains on them, with ""."""
    found = ColumnMapping(prompt_column=config.prompt_column, completion_column=config.completion_column)
    return dataclasses.replace(found, separator=between) if found.columns == TEXTS else found


def hash_files(folder: Path, files: Iterable[Path]) -> str:
    """A hash of files in a folder and of their names."""
    digest = xxhash.xxh3_128()
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder)}\n".encode())
        with path.open("rb") as opened:
            while block := opened.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _hash_tasks(folder: str | None) -> str:
    if folder is None:
        return ""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return hash_files(Path(folder), files)


def _load(config: ComparisonConfig, name: str, split: str) -> Dataset:
    """The rows of a dataset; `dataset_config` applies to the dataset that is selected from.

    Of a single file, the default splits `test` and `validation` are all rows.
    """
    if split in DEFAULT_SPLITS:
        split = only_split(name) or split
    return load_rows(name, split, config.dataset_config if name == config.dataset else None)


def _flags(values: list[Any], name: str) -> np.ndarray:
    """(N,) bool from a column, of CSV as text. Raises InputError for values other than true and false, or 1 and 0."""
    flags = [FLAGS.get(value.strip().lower()) if isinstance(value, str) else value for value in values]
    odd = next((row for row, value in enumerate(flags) if value not in (True, False)), None)
    if odd is not None:
        raise InputError(
            f"wrong_column '{name}' must be true or false, or 1 or 0, in each row; row {odd} has {values[odd]!r}."
        )
    return np.array(flags, dtype=bool)


def _check_apart(rows: Dataset, others: Dataset, what: str, setting: str, effect: str) -> None:
    """Warn where some other rows are in the dataset. Raise InputError where most are.

    Args:
        rows: the dataset.
        others: the other rows.
        what, setting: what they are, and the setting that names them.
        effect: what follows.
    """
    trained = {_text(row) for row in rows}
    known = sum(_text(row) in trained for row in others)
    if 2 * known > len(others):
        raise InputError(
            f"{known} of the {len(others)} {what} are also in the dataset. A single file has no splits: name another "
            f"one as {setting}."
        )
    if known:
        warnings.warn(
            f"{known} of the {len(others)} {what} are also in the dataset, so that {effect}. Remove them from one of "
            "the two.",
            stacklevel=3,
        )


def _check_tests(rows: Dataset, tests: Dataset) -> None:
    """Raise InputError where most held-out rows are in the dataset, or where an answer cannot be marked."""
    _check_apart(rows, tests, "held-out rows", "test_dataset", "a memorised answer counts as right")
    for row, answer in enumerate(tests["completion"]):
        if not isinstance(answer, str) or final_answer(answer) is None:
            raise InputError(
                f"Held-out row {row} does not end in a number after '####' or 'The answer is': it cannot be marked."
            )


def _text(row: dict[str, Any]) -> str:
    return json.dumps([row["prompt"], row["completion"]], default=str)


def _demo_data(config: ComparisonConfig, seed: int) -> Data:
    """One seed's problems to train on, and others, all with right answers, to test and to validate on."""
    demo = config.demo
    rows, wrong, tests = make_demo_data(seed, demo.rows, demo.wrong_share, demo.held_out)
    asked = {*rows["prompt"], *(problem.prompt for problem in tests)}
    validation = as_dataset(make_problems(config.validation_rows, seed=2 * HELD_OUT_SEED + seed, exclude=asked))
    prompts, answers = [each.prompt for each in tests], [each.completion for each in tests]
    return Data(rows, wrong, prompts, answers, validation, _hash_tasks(config.task_folder))
