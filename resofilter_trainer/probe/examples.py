"""Rows as prompt and answer that can be written back with another answer. Knows datasets, not what is planted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from trl import SFTConfig

from ..config import ColumnMapping, InputError, NothingError, check_kind
from ..data.loading import usable_rows
from ..data.row_texts import said
from ..data.rows import told_of
from ..data.surveys import ROW_POSITION

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A row whose answer is a text.

    Attributes:
        row: its position in the user's dataset.
        values: the row under TRL's names, the columns that TRL reads.
        prompt: what is asked, as people read it; empty for plain text.
        answer: what is learnt: the completion, the last message, or the whole text.
        column: the column with the answer.
    """

    row: int
    values: dict[str, Any]
    prompt: str
    answer: str
    column: str

    @property
    def messages(self) -> list[Message]:
        """All messages of a chat, the answer last; empty for text."""
        if not isinstance(self.values[self.column], list):
            return []
        before = self.values["prompt"] if self.column == "completion" else []
        return [*before, *self.values[self.column]]

    @property
    def question(self) -> str:
        """The user's last message of a chat; otherwise the prompt."""
        asked = [each["content"] for each in self.messages[:-1] if each["role"] == "user" and each["content"]]
        return asked[-1] if asked else self.prompt

    def with_answer(self, answer: str) -> dict[str, Any]:
        """The row with another answer; everything else as it is."""
        value = self.values[self.column]
        changed = answer if isinstance(value, str) else [*value[:-1], {**value[-1], "content": answer}]
        return {**self.values, self.column: changed}

    def without_messages(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The row without some of its `messages`, by their places; the answer stays."""
        before = len(self.messages) - len(self.values[self.column])
        values = dict(self.values)
        for column, start in ((self.column, before), *((("prompt", 0),) if before else ())):
            kept = enumerate(self.values[column], start)
            values[column] = [each for number, each in kept if number not in numbers]
        return values


def examples_of(
    dataset: Dataset,
    mapping: ColumnMapping,
    args: SFTConfig,
    rows: Sequence[int] | np.ndarray | None = None,
    skipped: dict[int, str] | None = None,
) -> tuple[Dataset, list[Example]]:
    """The rows whose answer is a text, under TRL's names, and an example of each, in the same order.

    Args:
        dataset: the user's rows, in any format that `score_dataset` reads.
        mapping: which column is which.
        args: what is learnt of a row, and where TRL looks for text.
        rows: the positions of the rows to read; by default all.
        skipped: a dict to extend with the reasons why other rows have no such answer, by position.

    Raises:
        InputError: the rows are tokens, hold images, or have no single meaning, or none has an answer.
    """
    check_kind("dataset", dataset, Dataset, "a Dataset")
    positions = np.arange(len(dataset)) if rows is None else np.asarray(rows)
    if "input_ids" in dataset.column_names and not mapping.columns:
        raise InputError(
            "The rows are tokens (input_ids), and faults are planted in texts. Pass the rows as they were before they "
            "were tokenised."
        )
    chosen = dataset if rows is None else dataset.select(positions)
    try:
        usable, refused = usable_rows(chosen, mapping, args, drop_duplicates=False, drop_empty=True)
    except NothingError as error:
        reasons = {int(positions[row]): reason for row, reason in error.reasons.items()}
        raise NothingError(told_of(reasons, len(chosen), "have no answer to plant faults in"), reasons) from error
    reasons = {int(positions[row]): reason for row, reason in refused.items()}
    sound, examples = [], []
    for number, values in enumerate(usable):
        row = int(positions[values.pop(ROW_POSITION)])
        why = _why_not(values)
        if why:
            reasons[row] = why
            continue
        sound.append(number)
        examples.append(_example(row, values, args.dataset_text_field))
    if skipped is not None:
        skipped |= reasons
    if not examples:
        raise NothingError(told_of(reasons, len(chosen), "have no answer to plant faults in"), reasons)
    return usable.remove_columns(ROW_POSITION).select(sound), examples


def _why_not(values: dict[str, Any]) -> str:
    """Why the answer of a row is no text; empty if it is."""
    messages = next((values[name] for name in ("completion", "messages") if isinstance(values.get(name), list)), None)
    if messages is None:
        return ""
    last = messages[-1]
    if last["role"] != "assistant":
        return f"its last message is from '{last['role']}', not an answer"
    if last.get("tool_calls"):
        return "its answer is a call of a tool"
    return ""


def _example(row: int, values: dict[str, Any], text_field: str) -> Example:
    column = next((name for name in ("completion", "messages") if name in values), text_field)
    value = values[column]
    if isinstance(value, str):
        return Example(row, values, values["prompt"] if column == "completion" else "", value, column)
    before = [*(values["prompt"] if column == "completion" else ()), *value[:-1]]
    return Example(row, values, said(before), value[-1]["content"], column)
