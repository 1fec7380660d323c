"""What the columns of a dataset hold: text, messages, images; empty or not. Knows datasets, not how a row is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Json, LargeList, List, Value

from ..config import InputError
from .chat import KEYS
from .layout import MASKS, MEDIA, TOKENS, Layout
from .tables import tables_of

AT_ONCE, BLOCK = 1000, 10_000  # rows in memory, as Python's values and as Arrow's
PRINTED = "[!-~]"


def check_types(dataset: Dataset, layout: Layout) -> None:
    """Raise InputError where a column that becomes text or messages holds something else."""
    kinds = {name: kind_of(dataset.features[name]) for name in layout.sources}
    for name, kind in kinds.items():
        if layout.kind == "messages" and kind not in ("messages", "any"):
            raise InputError(
                f"Column '{name}' holds {kind}, not a list of messages. Make a list of dicts with role and content of "
                "each row first; text of JSON is read with json.loads."
            )
        if layout.mapped and layout.kind != "messages" and kind not in ("text", "whole numbers", "any"):
            text = f"str(row['{name}'])"
            if isinstance(dataset.features[name], ClassLabel):
                text = f"dataset.features['{name}'].int2str(row['{name}'])"
            raise InputError(
                f"Column '{name}' holds {kind}, not text. Write it as the text that is meant first, for example with "
                f"dataset.map(lambda row: {{'{name}_text': {text}}}), and name column '{name}_text'."
            )
        if not layout.mapped and layout.kind in ("pair", "text") and kind not in ("text", "messages", "any"):
            raise InputError(f"Column '{name}' holds {kind}, not text or a list of messages. {_as_text(layout)}")
    if layout.kind == "text" and "messages" in kinds.values():
        raise InputError(f"Column '{layout.sources[0]}' holds messages, not text: pass messages_column instead.")
    if layout.kind == "pair" and {"text", "messages"} <= set(kinds.values()):
        raise InputError("One of 'prompt' and 'completion' holds messages and the other text. Write both alike.")


def refused_tokens(dataset: Dataset) -> dict[int, str]:
    """Why rows of tokens cannot be trained on, by position. Raises InputError for a column of anything else."""
    names = [name for name in (TOKENS, *MASKS) if name in dataset.column_names]
    for name in names:
        feature = dataset.features[name]
        item = feature.feature if isinstance(feature, List | LargeList) else feature
        kinds = ("whole numbers", "bool") if name.endswith(("mask", "masks")) else ("whole numbers",)
        if item != Value("null") and (item is feature or kind_of(item) not in kinds):
            raise InputError(f"Column '{name}' is {feature}, not a list of whole numbers in every row.")
    found: dict[int, str] = {}
    start = 0
    for table in tables_of(dataset, AT_ONCE, names):
        tokens = _lengths(table[TOKENS])
        for name in names:
            own = _lengths(table[name])
            for row in np.flatnonzero(own != tokens).tolist():
                found[start + row] = f"{own[row]} entries in column '{name}', {tokens[row]} in '{TOKENS}'"
            what = "null or negative" if name == TOKENS else "null"
            for row in _rows_with_null(table[name], negative=name == TOKENS):
                found[start + row] = f"column '{name}' has an entry that is {what}"
        start += len(table)
    return found


def check_names(dataset: Dataset, layout: Layout) -> None:
    """Raise InputError where a mapped column would take the name of another column that holds something else."""
    if not layout.mapped:
        return
    for name in set(layout.targets) & set(dataset.column_names) - set(layout.sources):
        source = layout.mapping.completion_column if name == "completion" else layout.sources[0]
        if dataset.select_columns([name])[:][name] != dataset.select_columns([str(source)])[:][source]:
            raise InputError(
                f"Column '{source}' is to become '{name}', and there is another column '{name}'. Remove that one with "
                f"dataset.remove_columns('{name}'), or rename it."
            )


def kind_of(feature: Any) -> str:
    """What a column holds: "text", "whole numbers", "messages", "any" where only the rows can tell; or its type."""
    if isinstance(feature, Json):
        return "any"
    if isinstance(feature, Value):
        name = str(feature.dtype)
        if name == "null":
            return "any"
        is_text = name in ("string", "large_string", "string_view")
        return "text" if is_text else "whole numbers" if "int" in name else name
    item = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if isinstance(feature, list | List | LargeList):
        are_messages = isinstance(item, dict | Json) or kind_of(item) == "any"
        return "messages" if are_messages else "list"
    return type(feature).__name__


def messages_feature(feature: Any) -> Any:
    """The feature of messages, with `role` and `content`, that were stored as a feature."""
    item = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if isinstance(item, Json) or isinstance(feature, Json):
        return List(Json())
    own = item if isinstance(item, dict) else {}
    others = {name: each for name, each in own.items() if name not in (*KEYS["role"], *KEYS["content"])}
    return List({"role": Value("string"), "content": Value("string"), **others})


def media_columns(dataset: Dataset) -> dict[str, int]:
    """The columns with images, videos or sound that are not empty, each with its first row that is not."""
    return {name: row for name in dataset.column_names if name in MEDIA and (row := _first_full(dataset, name)) >= 0}


def has_null(dataset: Dataset, name: str) -> bool:
    """Whether any row of a column is null."""
    if not dataset.data.table[name].null_count:  # of all that is stored, which is known without reading it
        return False
    return any(table[name].null_count for table in tables_of(dataset, AT_ONCE, [name]))


def maybe_blank(dataset: Dataset, name: str) -> np.ndarray:
    """The rows in which a column may be blank, ascending: all but those that surely have a printed character or token.

    Text counts by its printed ASCII characters, messages by those of the last one's content; what holds anything else
    has to be looked at.
    """
    found, start = [np.empty(0, int)], 0
    for table in tables_of(dataset, BLOCK, [name]):
        for chunk in table[name].chunks:
            found.append(start + np.flatnonzero(~_surely_full(chunk)))
            start += len(chunk)
    return np.concatenate(found)


def _surely_full(values: pa.Array) -> np.ndarray:
    """(N,) whether each value surely holds something."""
    kind, unknown = values.type, np.zeros(len(values), bool)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        full = pc.fill_null(pc.match_substring_regex(values, PRINTED), False)
        return np.asarray(full.to_numpy(zero_copy_only=False), bool)
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return unknown
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
    if pa.types.is_integer(kind.value_type):
        return np.asarray(lengths > 0)
    if pa.types.is_struct(kind.value_type) and "content" in [field.name for field in kind.value_type]:
        last = values.flatten().take(pa.array((np.cumsum(lengths) - 1)[lengths > 0]))
        unknown[lengths > 0] = _surely_full(pc.struct_field(last, "content"))
    return unknown


def _as_text(layout: Layout) -> str:
    if layout.kind == "text":
        return f'Whole numbers are read as text with text_column="{layout.text_field}"; write anything else as text.'
    return (
        'Whole numbers are read as text with prompt_column="prompt", completion_column="completion"; write anything '
        "else as text."
    )


def _first_full(dataset: Dataset, name: str) -> int:
    """The first row in which a column holds anything; -1 if it is empty."""
    start = 0
    for table in tables_of(dataset, AT_ONCE, [name]):
        for row, value in enumerate(table[name].to_pylist() if table[name].null_count < len(table) else ()):
            if _is_full(value):
                return start + row
        start += len(table)
    return -1


def _is_full(value: Any) -> bool:
    if isinstance(value, list | dict):
        return any(map(_is_full, value.values() if isinstance(value, dict) else value))
    return value is not None and value != ""


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    """The number of entries in each list, (N,); 0 for null."""
    if pa.types.is_null(column.type):
        return np.zeros(len(column), int)
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy()


def _rows_with_null(column: pa.ChunkedArray, negative: bool) -> list[int]:
    """The rows with an entry that is null; or below 0, if asked for."""
    if pa.types.is_null(column.type):
        return []
    entries = pc.list_flatten(column)
    least = pc.min(entries).as_py() if negative and len(entries) and not pa.types.is_null(entries.type) else 0
    if not entries.null_count and least >= 0:
        return []
    rows = pc.list_parent_indices(column)
    if pa.types.is_null(entries.type):
        return pc.unique(rows).to_pylist()
    wrong = pc.is_null(entries)
    if negative:
        wrong = pc.or_(wrong, pc.fill_null(pc.less(entries, 0), False))
    return pc.unique(rows.filter(wrong)).to_pylist()
