"""The user's rows: which column is which, and which rows are empty or repeated.

Knows datasets, not models: a row is a dict here, and its position in the dataset is its `sample_id`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from ..config import ColumnMapping, InputError

KNOWN_PAIRS = [
    (("instruction", "input"), "output"),
    (("instruction",), "output"),
    (("question",), "answer"),
    (("query",), "response"),
    (("problem",), "solution"),
]


def map_columns(dataset: Dataset, mapping: ColumnMapping, text_field: str = "text") -> Dataset:
    """The dataset under TRL's column names: `prompt` and `completion`, `messages`, or `text`.

    Args:
        dataset: the user's rows.
        mapping: which column is which; an empty mapping needs TRL's own column names.
        text_field: the name of the column in which TRL looks for text.

    Raises:
        InputError: this is no `Dataset` or it has no rows, a mapped column is missing, or no column is usable.
    """
    if not isinstance(dataset, Dataset):
        raise InputError(
            f"A dataset is needed, got {type(dataset).__name__}. Pass one split of a DatasetDict, make a Dataset of a "
            "list with Dataset.from_list, and pass a stream to score_stream."
        )
    if len(dataset) == 0:
        raise InputError("The dataset has no rows.")
    columns = dataset.column_names
    missing = [column for column in mapping.columns if column not in columns]
    if missing:
        raise InputError(f"The dataset has no column '{missing[0]}'. It has: {', '.join(columns)}.")
    if mapping.prompt_columns:
        return dataset.map(prompt_and_completion, fn_kwargs={"mapping": mapping}, remove_columns=columns)
    if mapping.messages_column:
        mapped = dataset.select_columns([mapping.messages_column]).rename_columns(
            _to(mapping.messages_column, "messages")
        )
    elif mapping.text_column:
        mapped = dataset.select_columns([mapping.text_column]).rename_columns(_to(mapping.text_column, text_field))
    elif _usable(columns, text_field):
        mapped = dataset
    else:
        raise InputError(f"No column of the dataset can be trained on. It has: {', '.join(columns)}. {_hint(columns)}")
    _check_types(mapped, text_field)
    return mapped


def unpack(dataset: Dataset) -> Dataset:
    """Make a row of each sample in rows that TRL has packed: `input_ids`, and `labels` if there are any.

    Args:
        dataset: packed rows, with the lengths of each row's samples in `seq_lengths`. A sample that packing has cut in
            two stays two rows.

    Raises:
        InputError: the rows are not packed, or `seq_lengths` does not fit the tokens.
    """
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
    return [row for row, example in enumerate(dataset) if _is_blank(_target(example, text_field))]


def duplicate_rows(dataset: Dataset, text_field: str = "text") -> dict[int, int]:
    """The rows whose prompt equals an earlier row's, each with that row (ResoFilter, released code: the first is kept).

    The prompt of messages is everything before the last answer; plain text is compared as a whole.
    """
    first: dict[str, int] = {}
    repeated = {}
    for row, example in enumerate(dataset):
        earlier = first.setdefault(repr(_query(example, text_field)), row)
        if earlier != row:
            repeated[row] = earlier
    return repeated


def prompt_and_completion(example: Mapping[str, Any], mapping: ColumnMapping) -> dict[str, Any]:
    """A row's mapped prompt columns joined, and its completion, as text or as messages."""
    for column in mapping.columns:
        if isinstance(example[column], list | Mapping):
            raise InputError(
                f"Column '{column}' holds {type(example[column]).__name__}, not text: convert it to text first."
            )
    texts = [str(example[column]) for column in mapping.prompt_columns if not _is_blank(example[column])]
    prompt, completion = "\n\n".join(texts), example[str(mapping.completion_column)]
    completion = "" if completion is None else str(completion)
    if mapping.conversational:
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": completion}],
        }
    return {"prompt": prompt if prompt[-1:].isspace() else prompt + mapping.separator, "completion": completion}


def _to(old: str, new: str) -> dict[str, str]:
    return {} if old == new else {old: new}


def _check_types(dataset: Dataset, text_field: str) -> None:
    """Raise InputError where, in the first row, a column that TRL reads holds neither text nor messages."""
    example = dataset[0]
    for name in ("prompt", "completion", "messages", "conversations", text_field):
        value = example.get(name)
        is_text = isinstance(value, str) and name not in ("messages", "conversations")
        are_messages = isinstance(value, list) and all(isinstance(each, Mapping) for each in value)
        if not (value is None or is_text or are_messages):
            raise InputError(f"Column '{name}' holds {type(value).__name__}, not text or a list of messages.")


def _usable(columns: list[str], text_field: str) -> bool:
    pairs = "prompt" in columns and "completion" in columns
    return pairs or any(name in columns for name in ("input_ids", "messages", "conversations", text_field))


def _hint(columns: list[str]) -> str:
    for prompts, completion in KNOWN_PAIRS:
        if {*prompts, completion} <= set(columns):
            prompt = json.dumps(prompts[0] if len(prompts) == 1 else prompts)
            return f'Say which is which: prompt_column={prompt}, completion_column="{completion}".'
    return 'Say which is which: prompt_column="X", completion_column="Y", or messages_column="X", or text_column="X".'


def _target(example: Mapping[str, Any], text_field: str) -> Any:
    """What the row teaches: its completion, last message, or text."""
    for name in ("input_ids", "completion", "messages", "conversations"):
        if name in example:
            return example[name]
    return example[text_field]


def _query(example: Mapping[str, Any], text_field: str) -> Any:
    """What the row asks: its prompt, the messages before the last, or the whole text."""
    if "input_ids" in example:
        return example["input_ids"]
    if "prompt" in example:
        return example["prompt"]
    for name in ("messages", "conversations"):
        if name in example:
            return example[name][:-1]
    return example[text_field]


def _is_blank(value: Any) -> bool:
    """Whether a value is None, white space, an empty list, or messages whose last has no content and no tool call."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        last = value[-1]
        says = last.get("content", last.get("value", last.get("text")))  # a message, ShareGPT's, or an item of one
        return not last.get("tool_calls") and _is_blank(says)
    return value is None or (isinstance(value, str) and not value.strip()) or value == []
