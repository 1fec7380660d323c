"""Rows as people read them: prompt and completion. Knows datasets and tokenizers, no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import ColumnMapping
from ..model.losses import IGNORE
from .rows import prompt_and_completion

TOKENS = "input_ids"


class RowTexts(Sequence[tuple[str, str]]):
    """A dataset's rows as pairs of text.

    Args:
        dataset: the user's rows, as they were scored.
        mapping: which columns are which.
        text_field: the name of plain text.
    """

    def __init__(self, dataset: Dataset, mapping: ColumnMapping, text_field: str = "text") -> None:
        self.dataset, self.mapping, self.text_field = dataset.with_format(None), mapping, text_field

    @property
    def known(self) -> bool:
        """Whether there is a column of text at all: rows may be tokens only."""
        names = {*self.mapping.columns, "completion", "messages", "conversations", self.text_field}
        return bool(names & set(self.dataset.column_names))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: Any) -> Any:
        return self._text(self.dataset[int(row)])

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for batch in self.dataset.iter(1000):
            for values in zip(*batch.values(), strict=True):
                yield self._text(dict(zip(batch, values, strict=True)))

    def _text(self, example: Mapping[str, Any]) -> tuple[str, str]:
        mapping = self.mapping
        if mapping.prompt_columns:
            example = prompt_and_completion(example, mapping)
        if "prompt" in example and "completion" in example:
            return said(example["prompt"]), said(example["completion"])
        names = [name for name in (mapping.messages_column, "messages", "conversations") if name is not None]
        messages = next((example[name] for name in names if name in example), None)
        if messages is not None:
            return said(messages[:-1]), said(messages[-1:])
        text = example.get(mapping.text_column or self.text_field)
        return "", "" if text is None else str(text)


class TokenTexts(Sequence[tuple[str, str]]):
    """The same of rows that are tokens, as a trainer holds them: the completion begins with the first learnt token.

    Args:
        dataset: R rows with `input_ids` and `labels`, or all of whose tokens are learnt.
        places: (R,) the place of each in the user's dataset.
        rows: of the user's dataset; those that are not held have no text.
        tokenizer: theirs.
    """

    def __init__(self, dataset: Dataset, places: np.ndarray, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.dataset, self.tokenizer = dataset.with_format(None), tokenizer
        self.held = np.full(rows, -1)
        self.held[places] = np.arange(len(places))

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, row: Any) -> Any:
        if self.held[row] < 0:
            return "", ""
        example = self.dataset[int(self.held[row])]
        tokens, labels = example[TOKENS], example.get("labels", example[TOKENS])
        start = next((place for place, label in enumerate(labels) if label != IGNORE), len(tokens))
        return self.tokenizer.decode(tokens[:start]), self.tokenizer.decode(tokens[start:])


def decoder(model: str) -> Callable[[Sequence[int]], list[str]] | None:
    """Token ids as the text of each, by a model's tokenizer; None, with a line that says so, where it cannot be had."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        print(f"The report colours no tokens: the tokenizer of '{model}' cannot be loaded ({type(error).__name__}).")
        return None
    return partial(pieces, tokenizer)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it; of a character in several tokens, the last has it."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(before) :] if text.startswith(before) else tokenizer.decode([ids[end - 1]]))
        before = text
    return found


def said(value: Any) -> str:
    """Text, or messages one after another with who says them; a single one without."""
    if not isinstance(value, list):
        return "" if value is None else str(value)
    parts = [(str(each.get("role", each.get("from", ""))), _content(each)) for each in value]
    return parts[0][1] if len(parts) == 1 else "\n\n".join(f"{role}: {content}" for role, content in parts)


def _content(message: Mapping[str, Any]) -> str:
    """What a message says: text, or the parts of it that are text."""
    value = message.get("content", message.get("value"))
    if isinstance(value, list):
        return "\n".join(str(part["text"]) for part in value if isinstance(part, Mapping) and "text" in part)
    return "" if value is None else str(value)


def scored_columns(preparation: Mapping[str, Any]) -> ColumnMapping:
    """The mapping that a table of scores was made with, from its provenance."""
    names = [each.name for each in dataclasses.fields(ColumnMapping)]
    return ColumnMapping(**{name: preparation[name] for name in names if preparation.get(name)})
