"""Which learnt tokens lie in parts of the completions that the user has marked. Knows texts and tokens, no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import InputError
from ..data.preparation import PreparedRows
from ..data.surveys import learnt_tokens


def marked_tokens(rows: Dataset, prepared: PreparedRows, tokenizer: PreTrainedTokenizerBase, column: str) -> np.ndarray:
    """Whether each learnt token is in a marked part, if only with one of its characters: (N,) bool.

    Args:
        rows: rows with `prompt` and `completion` as texts, and the column.
        prepared: the same rows as tokens.
        tokenizer: the tokenizer of these, which has to tell where tokens are in a text.
        column: the column with the marked parts of each completion: a list of pairs, the first character of a part and
            the one after it.

    Raises:
        InputError: a row has no such list, its prompt or completion is no text, or its tokens are not those of the
            whole text.
    """
    if not tokenizer.is_fast:
        raise InputError("This tokenizer does not tell where its tokens are in a text, so none can be marked.")
    places, _ = learnt_tokens(prepared.dataset)
    ends, found = np.cumsum([0, *prepared.num_tokens]), np.zeros(len(places), dtype=bool)
    for place, row in enumerate(prepared.sample_ids.tolist()):
        own, ids = rows[row], prepared.dataset[place]["input_ids"]
        of_row = _marked_in(own, row, ids, tokenizer, _spans(own[column], len(str(own["completion"])), row, column))
        span = slice(ends[place], ends[place + 1])
        found[span] = of_row[places[span]]
    return found


def _marked_in(
    own: dict[str, Any], row: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, spans: np.ndarray
) -> np.ndarray:
    """(T,) bool: which of a row's tokens are in one of the spans, (n, 2) in its completion."""
    prompt, completion = own["prompt"], own["completion"]
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise InputError(f"Row {row} has messages: parts can be marked where prompt and completion are texts.")
    encoded = tokenizer(prompt + completion, return_offsets_mapping=True)
    of_text, marked = encoded["input_ids"], np.zeros(len(ids), dtype=bool)
    common = min(len(of_text), len(ids))
    if list(ids[:common]) != of_text[:common] or len(ids) > common + 1:  # an end token may follow
        raise InputError(
            f"The tokens of row {row} are not those of its prompt and completion as one text, so it is unknown which "
            "of them are marked."
        )
    start, stop = np.array(encoded["offset_mapping"][:common]).reshape(-1, 2).T
    for first, last in spans + len(prompt):
        marked[:common] |= (start < last) & (stop > first)
    return marked


def _spans(values: Any, length: int, row: int, column: str) -> np.ndarray:
    """(n, 2) the spans of a row. Raises InputError where they are not pairs of places in its completion."""
    try:
        spans = np.array([] if values is None else values, dtype=np.int64).reshape(-1, 2)
    except (TypeError, ValueError):
        spans = None
    if spans is None or (spans < 0).any() or (spans > length).any() or (spans[:, 0] > spans[:, 1]).any():
        raise InputError(
            f"Row {row} has {values!r} in its column '{column}': give a list of pairs, the first character of a marked "
            f"part of the completion and the one after it, of {length} characters."
        )
    return spans
