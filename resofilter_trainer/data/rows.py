"""The user's rows under TRL's column names, and which of them are empty or repeated.

Knows datasets, not models: a row is a dict here, and its position in the dataset is its `sample_id`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from xxhash import xxh3_128_digest

from ..config import ColumnMapping, InputError, check_kind, with_known_keywords
from .columns import AT_ONCE, kind_of, maybe_blank
from .layout import RENDERED, TOKENS
from .reading import Reader
from .tables import tables_of

if TYPE_CHECKING:
    from trl import SFTConfig


@dataclass(frozen=True)
class ReadRows:
    """A dataset under TRL's column names.

    Attributes:
        dataset: the rows that have a meaning; every other column of the user's stays.
        positions: (N,) their positions in the user's dataset.
        refused: why the others have none, by position.
        notes: what was read as something else, a line for each.
        passed: the columns that TRL's preparation reads.
    """

    dataset: Dataset
    positions: np.ndarray
    refused: dict[int, str]
    notes: list[str]
    passed: list[str]


@with_known_keywords
def map_columns(
    dataset: Dataset, mapping: ColumnMapping, text_field: str | None = None, args: SFTConfig | None = None
) -> Dataset:
    """The dataset under TRL's column names: `prompt` and `completion`, `messages`, or `text`.

    SFTTrainer trains on the result as `score_dataset` scores it. Mapped columns are renamed, chat rows are read as
    `data.chat` says, and every other column stays, unless TRL would take the rows for another kind because of it, such
    as `text` beside a mapped prompt. Whole numbers become their digits. Rows in TRL's own format stay as they are.

    Args:
        dataset: the user's rows.
        mapping: which column is which; an empty mapping needs TRL's own column names.
        text_field: the name of the column in which TRL looks for text; by default that of `args`.
        args: SFTTrainer's arguments, by which messages with flags are read; by default `SFTConfig`'s own values.

    Raises:
        InputError: this is no `Dataset` or it has no rows, a mapped column is missing or holds something else than
            text, no column is usable, or a row has no single meaning.
    """
    check_kind("mapping", mapping, ColumnMapping, "a ColumnMapping")
    if text_field is None:
        text_field = "text" if args is None else args.dataset_text_field
    read = read_rows(dataset, mapping, text_field, args)
    if read.refused:
        raise InputError(f"{told_of(read.refused, len(dataset))} Correct or remove them.")
    return read.dataset


def read_rows(
    dataset: Dataset, mapping: ColumnMapping, text_field: str = "text", args: SFTConfig | None = None
) -> ReadRows:
    """The rows under TRL's column names, without those that have no single meaning; arguments as for `map_columns`.

    Raises:
        InputError: as for `map_columns`, except for single rows.
    """
    reader = Reader.of(dataset, mapping, text_field, args)
    meaning = reader.settled([reader.found()])
    positions = np.arange(len(dataset))
    if meaning.refused:
        positions = np.setdiff1d(positions, list(meaning.refused))
    renamed = reader.under_trls_names(positions, meaning.form)
    passed = [name for name in reader.layout.passed if name in renamed.column_names]
    return ReadRows(renamed, positions, meaning.refused, meaning.notes, passed)


def told_of(refused: Mapping[int, str], rows: int, what: str = "cannot be read") -> str:
    """A line about rows that cannot be used: how many, which, and the first one's reason."""
    first = min(refused)
    listed = "" if len(refused) == 1 else f": rows {listed_rows(refused)}"
    return f"{len(refused)} of {rows} rows {what}{listed}. Row {first}: {refused[first]}."


def listed_rows(rows: Collection[int]) -> str:
    """The first of some rows, for a message."""
    return ", ".join(map(str, sorted(rows)[:5])) + (", ..." if len(rows) > 5 else "")


@with_known_keywords
def unpack(dataset: Dataset) -> Dataset:
    """Make a row of each sample in rows that TRL has packed: `input_ids`, and `labels` if there are any.

    Args:
        dataset: packed rows, with the lengths of each row's samples in `seq_lengths`. A sample that packing has cut in
            two stays two rows.

    Raises:
        InputError: the rows are not packed, or `seq_lengths` does not fit the tokens.
    """
    check_kind("dataset", dataset, Dataset, "a Dataset")
    if not {"seq_lengths", "input_ids"} <= set(dataset.column_names):
        raise InputError(f"The rows are not packed: no seq_lengths among {', '.join(dataset.column_names)}.")
    columns = [name for name in ("input_ids", "labels") if name in dataset.column_names]

    def split(packed: dict[str, list[Any]]) -> dict[str, list[Any]]:
        samples: dict[str, list[Any]] = {name: [] for name in columns}
        for row, lengths in enumerate(packed["seq_lengths"]):
            for name in columns:
                tokens, start = packed[name][row], 0
                if sum(lengths) != len(tokens):
                    raise InputError(f"A packed row has {len(tokens)} {name} and seq_lengths of {sum(lengths)}.")
                for length in lengths:
                    samples[name].append(tokens[start : start + length])
                    start += length
        return samples

    return dataset.map(split, batched=True, remove_columns=dataset.column_names)


def empty_rows(dataset: Dataset, text_field: str = "text") -> list[int]:
    """The rows with nothing to learn, under TRL's column names: an empty completion, answer or text."""
    target = next((name for name in (TOKENS, "completion", "messages") if name in dataset.column_names), text_field)
    doubtful = maybe_blank(dataset, target).tolist()
    rows = dataset.select_columns([target]) if doubtful else dataset
    return [row for row in doubtful if _is_blank(rows[row][target])]


NONE = b"\xff"  # which no text has


def duplicate_rows(dataset: Dataset, text_field: str = "text") -> dict[int, int]:
    """The rows whose prompt equals an earlier row's, each with that row (ResoFilter, released code: the first is kept).

    The prompt of messages is everything before the last answer; plain text is compared as a whole. Rows with other
    `tools` or `chat_template_kwargs` are not the same.
    """
    first: dict[bytes, int] = {}
    repeated = {}
    for row, query in enumerate(query_hashes(dataset, text_field)):
        earlier = first.setdefault(query, row)
        if earlier != row:
            repeated[row] = earlier
    return repeated


def query_hashes(dataset: Dataset, text_field: str = "text") -> list[bytes]:
    """A hash of 16 bytes of what each row asks: equal for rows that ask the same."""
    target = next((name for name in (TOKENS, "prompt", "messages") if name in dataset.column_names), text_field)
    rendered = () if target == TOKENS else [name for name in RENDERED if name in dataset.column_names]
    if rendered or kind_of(dataset.features[target]) != "text":
        rows = dataset.select_columns([target, *rendered])
        return [xxh3_128_digest(repr(_query(row, text_field)).encode(errors="surrogatepass")) for row in rows]
    texts = (text for table in tables_of(dataset, AT_ONCE, [target]) for text in table[target].to_pylist())
    return [xxh3_128_digest(NONE if text is None else text.encode(errors="surrogatepass")) for text in texts]


def _query(example: Mapping[str, Any], text_field: str) -> Any:
    """What the row asks: its prompt, the messages before the last, or the whole text; and its tools and the like."""
    if TOKENS in example:
        return example[TOKENS]
    given = [example[name] for name in RENDERED if example.get(name)]
    if "prompt" in example:
        return example["prompt"], *given
    if "messages" in example:
        return (example["messages"] or [])[:-1], *given
    return example[text_field], *given


def _is_blank(value: Any) -> bool:
    """Whether a value is None, white space, an empty list, or messages whose last has no content and no tool call."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        last = value[-1]
        says = last.get("content", last.get("value", last.get("text")))  # a message, ShareGPT's, or an item of one
        return not last.get("tool_calls") and _is_blank(says)
    return value is None or (isinstance(value, str) and not value.strip()) or value == []
