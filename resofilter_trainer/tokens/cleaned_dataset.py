"""The dataset with all but the kept tokens masked, and its summary. Knows rows as tokens, no model."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import InputError
from ..data.surveys import ROW_POSITION
from ..io.files import check_folder, writing
from ..model.losses import IGNORE
from ..scores.row_record import as_html
from ..selecting.results import SUMMARY_FILE
from ..selecting.token_rules import ends_of_rows
from ..selecting.token_selection import TokenSelection
from ..selecting.weighted_rows import TOKEN_WEIGHTS

SAMPLE_ID = "sample_id"
SHOWN = 5  # of the most and of the least kept tokens


@dataclass(frozen=True)
class CleanedDataset:
    """A dataset that SFTTrainer trains on as it is, and what led to it.

    Attributes:
        dataset: `input_ids`, `labels` and `sample_id`, the position in the user's dataset; with weights, also
            `token_weights`. Rows without a learnt token are left out.
        selection: the decision on every token that could be learnt, and the token scores.
        reasons: why each of the user's other rows is left out, by position.
        summary: the numbers of tokens and rows, as in `summary.json`.
    """

    dataset: Dataset
    selection: TokenSelection
    reasons: Mapping[int, str]
    summary: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        left = f"{len(self.reasons):,} other rows left out"
        kept = f"{int(self.selection.keep.sum()):,} of {len(self.selection):,} tokens kept"
        return f"CleanedDataset({len(self):,} rows to train on; {kept}; {left})"

    def _repr_html_(self) -> str:
        """The numbers as a table, for a notebook."""
        numbers = {name: value for name, value in self.summary.items() if isinstance(value, int | float | str)}
        return as_html(repr(self), pd.DataFrame({"": list(numbers), "value": [str(each) for each in numbers.values()]}))


def masked(dataset: Dataset, offsets: np.ndarray, position: np.ndarray, keep: np.ndarray) -> Dataset:
    """Prepared rows with the labels of all but the kept tokens masked.

    Args:
        dataset: R rows with `input_ids` and `labels`.
        offsets, position: (R + 1,) and (N,), the positions of their learnt tokens, as in `TokenScores`.
        keep: (N,) bool, the tokens to keep.
    """
    return _mapped(dataset, _mask_batch, offsets, position, keep)


def weighted(dataset: Dataset, offsets: np.ndarray, position: np.ndarray, weight: np.ndarray) -> Dataset:
    """Prepared rows with the column `token_weights`.

    Args:
        dataset, offsets, position: as for `masked`.
        weight: (N,) the weight of each learnt token.
    """
    return _mapped(dataset, _weigh_batch, offsets, position, weight)


def _mapped(
    dataset: Dataset, of_batch: Callable[..., pa.Table], offsets: np.ndarray, position: np.ndarray, values: np.ndarray
) -> Dataset:
    """The rows, changed by a function of consecutive rows and the values of all tokens."""
    digest = xxhash.xxh3_128(f"{dataset._fingerprint} {of_batch.__name__}".encode())
    for array in (values, offsets, position):
        digest.update(np.ascontiguousarray(array).data)
    arrow = dataset.with_format("arrow").map(
        partial(of_batch, offsets=offsets, position=position, values=values),
        with_indices=True,
        batched=True,
        new_fingerprint=digest.hexdigest()[:16],  # otherwise `map` pickles the arrays to compute one
    )
    return arrow.with_format(None)


def mask_labels(dataset: Dataset, selection: TokenSelection) -> Dataset:
    """The rows to train on: all but the kept labels are masked, and rows that keep none are left out.

    With weights, the labels of these rows stay as they are, also those of the weight 0, so that a trainer divides the
    loss by the same number of tokens.

    Args:
        dataset: R prepared rows, in the order of the selection.
        selection: the decision on their learnt tokens.

    Returns:
        `input_ids`, `labels` and `sample_id`; with weights, also `token_weights`, a list of T numbers for each row, 0
        where no token is learnt.
    """
    scores, weight = selection.scores, selection.weight
    if weight is None:
        cleaned = masked(dataset, scores.offsets, scores.position, selection.keep)
    else:
        cleaned = weighted(dataset, scores.offsets, scores.position, weight)
    cleaned = cleaned.rename_column(ROW_POSITION, SAMPLE_ID)
    some = np.flatnonzero(selection.kept_of_row > 0)
    return cleaned if len(some) == len(cleaned) else cleaned.select(some)


def summarise(
    selection: TokenSelection, tokenizer: PreTrainedTokenizerBase, groups: list[Any] | None
) -> dict[str, Any]:
    """What was kept, in numbers and by token.

    Args:
        selection: the decision on the tokens of R rows.
        tokenizer: the tokenizer, to show tokens as text.
        groups: the group of each row, R values, or None.
    """
    frame = selection.tokens_by_share()
    ends = {"most_kept": frame.head(SHOWN), "least_kept": frame.tail(SHOWN)[::-1]}
    listed = {
        name: [
            {"token": tokenizer.decode([int(token)]), "count": int(count), "share": float(share)}
            for token, count, share in tokens.itertuples(index=False)
        ]
        for name, tokens in ends.items()
    }
    return {
        "tokens": len(selection.keep),
        "tokens_kept": int(selection.keep.sum()),
        "rows": len(selection.scores.sample_id),
        "rows_emptied": selection.scores.sample_id[selection.emptied].tolist(),
        **_row_ends(selection, tokenizer.eos_token_id),
        **({} if selection.weight is None else {"mean_weight": selection.share()}),
        **({} if groups is None else {"share_of_groups": selection.share_of_groups(groups)}),
        **listed,
    }


def _row_ends(selection: TokenSelection, end: int | None) -> dict[str, int]:
    """How many rows have an end token to learn, and of how many it is masked: these do not teach a model to stop."""
    last = ends_of_rows(selection.scores.token, selection.scores.offsets, end)
    return {"row_ends": len(last), "row_ends_masked": int((~selection.keep[last]).sum())}


def described(summary: Mapping[str, Any], reasons: Mapping[int, str]) -> str:
    """A summary, of one cleaning or of several stages, in a few lines for the console."""
    lines = []
    for stage in summary.get("stages", [summary]):
        name = f"stage {stage['stage']}: " if "stage" in stage else ""
        share = stage["tokens_kept"] / max(stage["tokens"], 1)
        lines.append(f"{name}{stage['tokens_kept']:,} of {stage['tokens']:,} tokens kept ({share:.1%})")
        if "mean_weight" in stage:
            lines.append(f"  mean weight of a token: {stage['mean_weight']:.3f}")
        for group, kept in stage.get("share_of_groups", {}).items():
            lines.append(f"  {group}: {kept:.1%}")
        for ends in ("most_kept", "least_kept"):
            listed = ", ".join(f"{each['token']!r} {each['share']:.0%}" for each in stage.get(ends, []))
            lines += [f"  {ends.replace('_', ' ')}: {listed}"] if listed else []
        if stage.get("row_ends_masked"):
            of_rows = f"{stage['row_ends_masked']:,} of {stage['row_ends']:,} rows"
            lines.append(f"  the end token is masked in {of_rows}, which do not teach the model to stop")
    for reason, count in Counter(reasons.values()).most_common(5):
        lines.append(f"  {count} rows left out: {reason}")
    return "\n".join(lines)


def groups_of(dataset: Any, column: str | None) -> list[Any] | None:
    """The values of a column; None without a name. Raises InputError where the dataset has no such column."""
    if column is None:
        return None
    names = getattr(dataset, "column_names", None) or []
    if column not in names:
        raise InputError(f"group_by: the dataset has no column '{column}'. It has: {', '.join(names)}.")
    return list(dataset[column])


def check_output(folder: Path | None, own: str) -> None:
    """Raise InputError where a folder holds a dataset, but not the file `own` that a cleaning writes before it."""
    if folder is None:
        return
    check_folder(folder)
    if (folder / own).exists():
        return
    if any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        raise InputError(f"'{folder}' holds a dataset that was made in another way. Choose another output.")


def save_dataset(dataset: Dataset, summary: Mapping[str, Any], folder: Path) -> None:
    """Write dataset and summary into a folder that may hold those of an earlier cleaning.

    The dataset is written to a temporary folder first. `datasets` opens no folder without `state.json`: it is removed
    first and put in place last, so that no mixture of two datasets is ever read.
    """
    temporary = folder / f".dataset.{os.getpid()}.part"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process with the same number
    try:
        with writing(folder):
            dataset.save_to_disk(temporary)
            text = json.dumps(summary, indent=2, ensure_ascii=False)
            (temporary / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")
        (folder / "state.json").unlink(missing_ok=True)
        for stale in folder.glob("data-*-of-*.arrow"):
            stale.unlink()
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "state.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _mask_batch(
    table: pa.Table, rows: list[int], offsets: np.ndarray, position: np.ndarray, values: np.ndarray
) -> pa.Table:
    """Consecutive rows with the labels of all but the kept tokens masked; `values` says which are kept."""
    flat, ends, places, span = _places(table, rows, offsets, position)
    flat[places[~values[span]]] = IGNORE
    return table.set_column(table.column_names.index("labels"), "labels", _lists(flat, ends))


def _weigh_batch(
    table: pa.Table, rows: list[int], offsets: np.ndarray, position: np.ndarray, values: np.ndarray
) -> pa.Table:
    """Consecutive rows with the weights of their tokens as a column."""
    flat, ends, places, span = _places(table, rows, offsets, position)
    weights = np.zeros(len(flat), dtype=np.float32)
    weights[places] = values[span]
    return table.append_column(TOKEN_WEIGHTS, _lists(weights, ends))


def _places(
    table: pa.Table, rows: list[int], offsets: np.ndarray, position: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, slice]:
    """The labels of consecutive rows as one array, the rows' ends, and the places and numbers of the learnt ones."""
    labels = table["labels"].combine_chunks()
    flat = labels.flatten().to_numpy().copy()
    lengths = pc.list_value_length(labels).to_numpy()
    ends = np.cumsum(lengths)
    first, last = rows[0], rows[-1] + 1
    span = slice(offsets[first], offsets[last])
    starts = np.repeat(ends - lengths, np.diff(offsets[first : last + 1]))
    return flat, ends, starts + position[span], span


def _lists(flat: np.ndarray, ends: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]).astype(np.int32)), pa.array(flat))
