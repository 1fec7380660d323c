"""Which example each sample of a batch is, by its tokens. Knows examples and batches, not where they come from.

A collator may sort its examples, truncate them or add to them. One that leaves some out, or makes one sample of
several, is refused: what is measured could belong to any row.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import InputError
from ..model.gradients import Segment, segments_of
from ..model.losses import IGNORE

FIRST, EVERY = 32, 16  # of the batches whose examples have no tokens, those that are compared
REMEDY = (
    "It must return one sample for each row, with the row's tokens in one piece: filter the dataset instead. Or score "
    "the rows first (score_dataset), and train on the selection without a callback of this package."
)


class Matcher:
    """Finds the samples of a collator's batches among its examples.

    Examples with `input_ids` are compared in every batch. Others are collated one by one for comparison, in the first
    batches and then now and then, or always once samples were found in another order. No random number is drawn.

    Args:
        collate: the collator.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate
        self._alone: Callable[[list[Any]], Any] | None = None  # a copy, for examples one by one
        self._batches, self._moves, self._told = 0, False, False

    def collate(self, examples: list[Any]) -> tuple[Any, list[Segment], list[int]]:
        """Collate some examples.

        Returns:
            The batch; the place of each of its samples, as many as there are examples; and which example each is.

        Raises:
            InputError: the samples cannot be found among the examples.
        """
        tokens = [_tokens_of(example) for example in examples]
        compares = all(own is not None for own in tokens)
        if not compares and len(examples) > 1:
            self._batches += 1
            compares = self._moves or self._batches <= FIRST or self._batches % EVERY == 0
        if not compares:
            batch = self._collate(examples)
            return batch, self._samples(batch, len(examples)), list(range(len(examples)))
        kept = [dict(example) for example in examples]
        if any(own is None for own in tokens):
            kept = copy.deepcopy(kept)  # a collator may change what examples contain
        batch = self._collate(examples)
        segments = self._samples(batch, len(kept))
        order = self._order(batch, segments, kept, [own for own in tokens if own is not None])
        self._moves = self._moves or order != sorted(order)
        return batch, segments, order

    def _samples(self, batch: Any, count: int) -> list[Segment]:
        """The places of the samples of a batch of `count` examples. Raises InputError where there are more or fewer."""
        if "input_ids" not in batch:
            raise InputError(f"The batches of {self._name} have no input_ids, by which rows are found. {REMEDY}")
        segments = segments_of(batch)
        samples, further = segments[:count], segments[count:]
        labels = batch.get("labels")
        if labels is not None and any((labels[each.row, each.tokens] != IGNORE).any() for each in further):
            raise InputError(f"{self._name} returns {len(segments)} samples for {count} rows. {REMEDY}")
        if len(samples) < count:
            raise InputError(
                f"{self._name} returns {len(samples)} samples for {count} rows. {REMEDY} A padding-free batch needs "
                "position_ids that restart with every sample (return_position_ids=True), and no attention_mask."
            )
        starts = [labels[each.row, each.tokens][:1] for each in samples if each.tokens.start and labels is not None]
        if "attention_mask" not in batch and starts and bool((torch.cat(starts) != IGNORE).any()):
            raise InputError(
                f"{self._name} lets the end of a sample predict the beginning of the next. Give the first token of "
                "every sample the label -100."
            )
        return samples

    def _order(
        self, batch: Any, segments: Sequence[Segment], examples: Sequence[Any], tokens: Sequence[np.ndarray]
    ) -> list[int]:
        found = [_numbers(batch["input_ids"][each.row, each.tokens]) for each in segments]
        labels = [_numbers(batch["labels"][each.row, each.tokens]) if "labels" in batch else None for each in segments]
        if len(tokens) == len(found):
            given = [None if example.get("labels") is None else _numbers(example["labels"]) for example in examples]
            order = match(found, tokens, labels, given)
            if order is not None:
                return order
        with _same_random_numbers():
            order, at_random = self._by_themselves(found, labels, examples)
        if order is not None:
            return order
        if not at_random:
            raise InputError(f"{self._name} returns samples that are none of its rows, or several alike. {REMEDY}")
        if not self._told:
            self._told = True
            warnings.warn(
                f"{self._name} changes tokens at random, or cannot be copied, so it cannot be seen whether it moves "
                "rows: they are taken to be in the order of the batch.",
                stacklevel=2,
            )
        return list(range(len(examples)))

    def _by_themselves(
        self, found: Sequence[np.ndarray], labels: Sequence[np.ndarray | None], examples: Sequence[Any]
    ) -> tuple[list[int] | None, bool]:
        """Which example each sample is, by collating one after the other; and whether that gives random tokens."""
        if self._alone is None:
            try:
                self._alone = copy.deepcopy(self._collate)
            except Exception:  # whatever it holds says why it cannot be copied; its own state must not move
                return None, True
        try:
            tokens, own_labels = zip(*map(self._by_itself, examples), strict=True)
            order = match(found, tokens, labels, own_labels)
            again = tokens if order is not None else [self._by_itself(example)[0] for example in examples]
        except Exception:  # it needs several examples, or makes several samples of one
            return None, False
        return order, not all(map(np.array_equal, tokens, again))

    def _by_itself(self, example: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """The tokens and labels of an example that is collated alone."""
        assert self._alone is not None
        batch = self._alone([copy.deepcopy(example)])
        where = self._samples(batch, 1)[0]
        own = {name: batch[name][where.row, where.tokens] for name in ("input_ids", "labels") if name in batch}
        return _numbers(own["input_ids"]), _numbers(own["labels"]) if "labels" in own else None

    @property
    def _name(self) -> str:
        return f"The collator {getattr(self._collate, '__qualname__', type(self._collate).__qualname__)}"


def match(
    found: Sequence[np.ndarray],
    given: Sequence[np.ndarray],
    found_labels: Sequence[np.ndarray | None],
    given_labels: Sequence[np.ndarray | None],
) -> list[int] | None:
    """Which of the given rows each sample is.

    Args:
        found: the tokens of N samples.
        given: the tokens of N rows.
        found_labels, given_labels: their labels, which tell rows of the same tokens apart; None where there are none.

    Returns:
        For each sample its row; None where a sample is none of the rows, or could be several different ones.
    """
    order = [-1] * len(found)
    by_tokens: dict[bytes, list[int]] = {}
    for row, own in enumerate(given):
        by_tokens.setdefault(own.tobytes(), []).append(row)
    for sample, own in enumerate(found):
        alike = by_tokens.get(own.tobytes(), [])
        if alike:
            order[sample] = _like(alike, found_labels[sample], given_labels)
            alike.remove(order[sample])
    changed = [sample for sample, row in enumerate(order) if row < 0]
    in_place = all(row in (sample, -1) for sample, row in enumerate(order))
    if in_place and all(_contains(found[sample], given[sample]) for sample in changed):
        return list(range(len(order)))
    twins: dict[tuple[bytes, bytes], list[int]] = {}
    for sample in changed:
        labels = found_labels[sample]
        twins.setdefault((found[sample].tobytes(), b"" if labels is None else labels.tobytes()), []).append(sample)
    left = sorted(set(range(len(given))) - set(order))
    for samples in twins.values():
        rows = [row for row in left if _contains(found[samples[0]], given[row])]
        if len(rows) != len(samples):
            return None
        for sample, row in zip(samples, rows, strict=True):
            order[sample] = row
    return order if len(set(order)) == len(order) else None


def _like(rows: Sequence[int], labels: np.ndarray | None, given: Sequence[np.ndarray | None]) -> int:
    """The first of some rows of the same tokens that has these labels; the first of all where none has."""
    return next((row for row in rows if labels is not None and _same(labels, given[row])), rows[0])


def _same(one: np.ndarray, other: np.ndarray | None) -> bool:
    """Whether two rows have the same labels. The first is never learnt, so it does not matter."""
    return other is not None and np.array_equal(one[1:], other[1:])


def _contains(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether one of two sequences is a part of the other: truncated, or with something before and after."""
    short, long = sorted((one, other), key=len)
    if not len(short):
        return not len(long)
    starts = np.flatnonzero(long[: len(long) - len(short) + 1] == short[0])
    return any(np.array_equal(long[start : start + len(short)], short) for start in starts)


def _tokens_of(example: Mapping[str, Any]) -> np.ndarray | None:
    """An example's tokens, without padding; None where it has none."""
    if example.get("input_ids") is None:
        return None
    tokens = _numbers(example["input_ids"])
    mask = example.get("attention_mask")
    if mask is None or len(shown := _numbers(mask).nonzero()[0]) in (0, len(tokens)):
        return tokens
    return tokens[shown[0] : shown[-1] + 1].copy()


def _numbers(values: Any) -> np.ndarray:
    """A sequence or tensor as int64, flattened, in memory of its own."""
    values = values.cpu().numpy() if isinstance(values, Tensor) else values
    return np.array(values, dtype=np.int64).reshape(-1)


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """What comes after draws the random numbers that it would have drawn anyway."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
