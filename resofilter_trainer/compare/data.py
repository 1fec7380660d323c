"""What a comparison selects from, tests on and validates on. Knows datasets and the demo's problems, no models."""

from __future__ import annotations

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
from ..data.rows import hash_rows, load_rows, map_columns
from ..demo.problems import make_problems
from ..demo.run import HELD_OUT_SEED, as_dataset
from ..demo.run import make_data as make_demo_data
from ..evaluation.metrics.final_answer import final_answer
from .config import DEMO, ComparisonConfig


@dataclass(frozen=True, eq=False)
class Data:
    """What one seed trains and tests on.

    Attributes:
        rows: `prompt`, `completion` and the user's other columns.
        wrong: (N,) bool, which rows are known to be wrong; None where that is not known.
        prompts, references: of the held-out rows; empty where tasks are what is tested.
        validation: `prompt` and `completion` of the rows that some selectors select for; None where there are none.
        task_files: a hash of the user's own task files.
    """

    rows: Dataset
    wrong: np.ndarray | None
    prompts: Sequence[Any]
    references: Sequence[str]
    validation: Dataset | None
    task_files: str = ""

    @functools.lru_cache  # noqa: B019  # as long-lived as the rows are
    def fingerprint(self, score_column: str | None = None, validated: bool = True) -> str:
        """Of what a cell depends on: the rows, a column of scores if it is selected by one, what is held out.

        Args:
            score_column: the column.
            validated: whether it depends on the validation rows.
        """
        rows = self.rows.select_columns(["prompt", "completion", *([score_column] if score_column else [])])
        validation = "" if self.validation is None or not validated else hash_rows(self.validation)
        wrong = None if self.wrong is None else self.wrong.tolist()
        parts = [hash_rows(rows), validation, wrong, list(self.prompts), list(self.references)]
        parts += [self.task_files] if self.task_files else []
        return xxhash.xxh3_128_hexdigest(json.dumps(parts, default=str).encode())


def make_data(config: ComparisonConfig, seed: int) -> Data:
    """The user's rows, the same for every seed; or the demo's, which each seed makes anew."""
    if config.dataset == DEMO:
        return _demo_data(config, seed)
    columns = ColumnMapping(prompt_column=config.prompt_column, completion_column=config.completion_column)
    own = _load(config, config.dataset, config.split)
    rows = map_columns(own, columns)
    for name in {config.wrong_column, *(each.score_column for each in config.selectors)} - {None, *rows.column_names}:
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
                "Some validation rows are held out to test on: LESS and Nuggets would select for the test."
            )
    return Data(rows, wrong, tests["prompt"][:], tests["completion"][:], validation, _hash_tasks(config.task_folder))


def hash_files(folder: Path, files: Iterable[Path]) -> str:
    """Of some files in a folder, with their names."""
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
    """Rows of a dataset; the configuration on the hub is that of the one that is selected from."""
    return load_rows(name, split, config.dataset_config if name == config.dataset else None)


def _flags(values: list[Any], name: str) -> np.ndarray:
    """(N,) bool. Raises InputError for anything but true and false, or 1 and 0."""
    odd = next((row for row, value in enumerate(values) if value not in (True, False)), None)
    if odd is not None:
        raise InputError(
            f"wrong_column '{name}' says of each row true or false, or 1 or 0; row {odd} has {values[odd]!r}."
        )
    return np.array(values, dtype=bool)


def _check_tests(rows: Dataset, tests: Dataset) -> None:
    """Raise InputError for held-out rows that are none, or whose answers cannot be marked."""
    trained = {_text(row) for row in rows}
    known = sum(_text(row) in trained for row in tests)
    if 2 * known > len(tests):
        raise InputError(
            f"{known} of the {len(tests)} held-out rows are among those that are selected from. A single file has no "
            "splits: name another as test_dataset."
        )
    if known:
        warnings.warn(
            f"{known} of the {len(tests)} held-out rows are among those that are selected from: what is learnt by "
            "heart counts as solved. Leave them out of the one or the other.",
            stacklevel=2,
        )
    for row, reference in enumerate(tests["completion"]):
        if not isinstance(reference, str) or final_answer(reference) is None:
            raise InputError(
                f"Held-out row {row} ends in no number after '####' or 'The answer is', by which answers are marked."
            )


def _text(row: dict[str, Any]) -> str:
    return json.dumps([row["prompt"], row["completion"]], default=str)


def _demo_data(config: ComparisonConfig, seed: int) -> Data:
    """Problems of one seed to train on, and others, all of them right, to test and to validate on."""
    demo = config.demo
    rows, wrong, tests = make_demo_data(seed, demo.rows, demo.wrong_share, demo.held_out)
    asked = {*rows["prompt"], *(problem.prompt for problem in tests)}
    validation = as_dataset(make_problems(config.validation_rows, seed=2 * HELD_OUT_SEED + seed, exclude=asked))
    prompts, references = [each.prompt for each in tests], [each.completion for each in tests]
    return Data(rows, wrong, prompts, references, validation, _hash_tasks(config.task_folder))
