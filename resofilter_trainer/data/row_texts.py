"""Rows as people read them: prompt and completion. Knows datasets and tokenizers, not models."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import ColumnMapping, InputError
from ..model.losses import IGNORE
from .chat import Learning, Unreadable
from .chat import said as said
from .layout import Layout, read_row
from .models import OF_TOKENIZER, check_on_hub

TOKENS = "input_ids"


class RowTexts(Sequence[tuple[str, str]]):
    """A dataset's rows as pairs of text.

    Args:
        dataset: the user's rows, as they were scored.
        mapping: which columns are prompt and completion.
        text_field: the name of the column with plain text.
    """

    def __init__(self, dataset: Dataset, mapping: ColumnMapping, text_field: str = "text") -> None:
        self.dataset, self.mapping, self.text_field = dataset.with_format(None), mapping, text_field
        self._layout: Layout | None = None
        with contextlib.suppress(InputError):  # of rows that are tokens and something else
            self._layout = Layout.of(dataset.column_names, mapping, text_field)

    @property
    def known(self) -> bool:
        """Whether the rows have a column of text; they may have tokens only."""
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
        example = self._as_scored(example)
        if "prompt" in example and "completion" in example:
            return said(example["prompt"]), said(example["completion"])
        messages = next((example[name] for name in ("messages", "conversations") if name in example), None)
        if messages is not None:
            return said(messages[:-1]), said(messages[-1:])
        text = example.get(self.text_field)
        return "", "" if text is None else str(text)

    def _as_scored(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row under TRL's names; as it is in the dataset where it has no meaning, and was not scored."""
        if self._layout is None or self._layout.kind == "tokens":
            return example
        try:
            return read_row(example, self._layout, Learning()).row
        except (Unreadable, InputError):
            *before, last = (_plain(example[name]) for name in self._layout.sources)
            return {"prompt": "\n\n".join(before), "completion": last}


class TokenTexts(Sequence[tuple[str, str]]):
    """A trainer's rows, which are tokens, as pairs of text; the completion begins with the first learnt token.

    Args:
        dataset: R rows with `input_ids`; and with `labels`, unless all their tokens are learnt.
        sample_ids: (R,) the position of each in the user's dataset.
        rows: the number of rows in the user's dataset; a row that is not in `dataset` has no text.
        tokenizer: the tokenizer of the rows.
    """

    def __init__(self, dataset: Dataset, sample_ids: np.ndarray, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
        self.dataset, self.tokenizer = dataset.with_format(None), tokenizer
        self._index = np.full(rows, -1)
        self._index[sample_ids] = np.arange(len(sample_ids))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, row: Any) -> Any:
        if self._index[row] < 0:
            return "", ""
        example = self.dataset[int(self._index[row])]
        tokens, labels = example[TOKENS], example.get("labels", example[TOKENS])
        start = next((position for position, label in enumerate(labels) if label != IGNORE), len(tokens))
        return self.tokenizer.decode(tokens[:start]), self.tokenizer.decode(tokens[start:])


def decoder(model: str) -> Callable[[Sequence[int]], list[str]] | None:
    """A function from token ids to the text of each; None, and a printed line, where the tokenizer cannot be loaded."""
    try:
        check_on_hub(model, "tokenizer", OF_TOKENIZER)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        print(f"The report colours no tokens: the tokenizer of '{model}' cannot be loaded ({type(error).__name__}).")
        return None
    return partial(pieces, tokenizer)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the tokens before it; a character of several tokens belongs to the last."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        if text.endswith("\ufffd") and end < len(ids):
            found.append("")
            continue
        found.append(text[len(before) :] if text.startswith(before) else tokenizer.decode([ids[end - 1]]))
        before = text
    return found


def _plain(value: Any) -> str:
    """A value that is no text or messages, as text."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
