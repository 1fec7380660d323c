"""Which rows share a batch: every row is in one, within the budget, and common first tokens count once."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resofilter_trainer.data.preparation import PreparedRows, prepared_already
from resofilter_trainer.scoring.batches import (
    CLEARLY_LESS,
    LEAST_BEGINNING,
    TOKENS_LOST_PER_BATCH,
    arrange,
    collate,
    default_budget,
    split_by_tokens,
)

CPU = torch.device("cpu")


def rows(*samples: tuple[list[int], list[int]]) -> PreparedRows:
    """Rows with a prompt, which is not learnt, and an answer."""
    made = [{"input_ids": [*p, *a], "labels": [*([-100] * len(p)), *a]} for p, a in samples]
    return prepared_already(Dataset.from_list(made), collate=nn.Identity())


def arranged(prepared: PreparedRows, budget: int = 1024) -> list[np.ndarray]:
    return [batch.rows for batch in arrange(prepared, budget, CPU)]


def groups_of(batches: list[np.ndarray]) -> list[list[int]]:
    return sorted(sorted(batch.tolist()) for batch in batches)


tokens = st.lists(st.integers(1, 3), max_size=40)


@given(st.lists(st.tuples(tokens, tokens.filter(len)), min_size=1, max_size=30), st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_every_row_is_in_one_batch_and_no_batch_is_larger_than_twice_the_budget(samples, budget):
    prepared = rows(*samples)
    batches = arranged(prepared, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(samples)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * prepared.lengths[batch].max() <= 2 * budget


@given(st.lists(st.tuples(tokens, tokens.filter(len)), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_beginnings_are_what_a_plain_loop_finds(samples):
    prompts = rows(*samples).prompts
    found, lengths = prompts.hashes, prompts.lengths
    whole = [[*p, *a] for p, a in samples]
    alike = [len(set(column)) == 1 for column in zip(*whole, strict=False)]
    assert prompts.common == [*alike, False].index(False)
    assert lengths.tolist() == [len(p) for p, _ in samples]
    for i, (p, _) in enumerate(samples):
        assert [bool(each) for each in found == found[i]] == [q == p for q, _ in samples]


def plainly_split(lengths: np.ndarray, budget: int, shared: int, overhead: int) -> list[list[int]]:
    """Rows of similar lengths, the longest first, one after another into the batch that is being filled."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches = []
    while order:
        longest, padding, batch = max(int(lengths[order[0]]), 1), 0, []
        size = max(min(budget // max(longest - shared, 1), 2 * budget // longest if shared else budget), 1)
        while order and len(batch) < size and padding + longest - lengths[order[0]] <= overhead:
            padding += longest - lengths[order[0]]
            batch.append(order.pop(0))
        batches.append(batch)
    return batches


@given(st.lists(st.integers(1, 90), max_size=60), st.integers(1, 400), st.integers(0, 30), st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_rows_are_split_as_a_plain_loop_does(lengths, budget, shared, overhead):
    found = split_by_tokens(np.array(lengths, np.int64), budget, shared, overhead)
    assert [batch.tolist() for batch in found] == plainly_split(np.array(lengths), budget, shared, overhead)


def plainly_arranged(prepared: PreparedRows, budget: int) -> list[tuple[list[int], int, int]]:
    """The batches of `arrange` on a CPU, by the rules of its docstring: rows, shared tokens and cost of each."""
    lengths, known = prepared.lengths, prepared.prompts
    common = known.common if known.common >= LEAST_BEGINNING else 0
    overhead = TOKENS_LOST_PER_BATCH["cpu"]

    def split(rows: list[int], shared: int) -> list[tuple[list[int], int, int]]:
        batches = [[rows[i] for i in batch] for batch in plainly_split(lengths[rows], budget, shared, overhead)]
        return [(batch, shared, overhead + len(batch) * (int(lengths[batch].max()) - shared)) for batch in batches]

    groups: dict[int, list[int]] = {}
    for row, value in enumerate(known.hashes.tolist()):
        groups.setdefault(value, []).append(row)
    repeated = [rows for rows in groups.values() if len(rows) > 1 and known.lengths[rows[0]] >= LEAST_BEGINNING]
    repeated.sort(key=lambda rows: (-lengths[rows].max(), known.hashes[rows[0]]))
    by_length = split(list(range(len(lengths))), common)
    by_prompt = [batch for rows in repeated for batch in split(rows, int(known.lengths[rows[0]]))]
    others = split(sorted({*range(len(lengths))} - {row for rows in repeated for row in rows}), common)
    again = sum(overhead + int(known.lengths[rows[0]]) for rows in repeated)
    work = again + sum(cost for *_, cost in by_prompt + others)
    return by_prompt + others if work < CLEARLY_LESS * sum(cost for *_, cost in by_length) else by_length


prompts = st.tuples(st.integers(1, 4), st.sampled_from([0, 15, 16, 60])).map(lambda pair: [pair[0]] * pair[1])


@given(st.lists(st.tuples(prompts, tokens.filter(len)), min_size=1, max_size=25), st.integers(20, 400))
@settings(max_examples=80, deadline=None)
def test_rows_are_arranged_as_plain_loops_do(samples, budget):
    prepared = rows(*samples)
    with patch.dict(TOKENS_LOST_PER_BATCH, cpu=4):  # so that prompts are shared among few rows
        found = [(batch.rows.tolist(), batch.shared, batch.cost) for batch in arrange(prepared, budget, CPU)]
        assert found == plainly_arranged(prepared, budget)


def test_rows_with_the_same_prompt_share_a_batch_where_that_is_less_work():
    prompts = [list(range(k, k + 100)) for k in range(0, 300, 100)]
    samples = [(prompts[i % 3], list(range(1000, 1010 + i))) for i in range(12)]
    together = groups_of(arranged(rows(*samples)))
    assert together == [[i for i in range(12) if i % 3 == k] for k in range(3)]


def test_rows_with_short_prompts_are_batched_by_length():
    samples = [([i % 3] * 20, [7] * (10 * (i + 1))) for i in range(12)]
    batches = arranged(rows(*samples))
    assert batches[0][0] == 11
    assert groups_of(batches) == groups_of([np.sort(batch) for batch in batches])
    assert any(len({i % 3 for i in batch.tolist()}) > 1 for batch in batches)


def test_common_first_tokens_make_batches_larger():
    shared = [([*range(200), 1000 + i], [5] * 50) for i in range(40)]
    apart = [([*range(i, i + 200), 1000 + i], [5] * 50) for i in range(40)]
    assert max(map(len, arranged(rows(*shared)))) > max(map(len, arranged(rows(*apart))))


def test_a_device_has_a_budget():
    assert default_budget(CPU) < default_budget(torch.device("cuda"))


def test_collated_rows_are_padded_on_the_right():
    batch = collate(rows(([1], [2, 3]), ([], [4])), np.array([1, 0]), CPU)
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[4, -100, -100], [-100, 2, 3]]


@pytest.mark.parametrize("count", [1, 2])
def test_rows_without_a_prompt_have_no_beginning(count):
    prepared = rows(*[([], [1, 2, 3])] * count)
    assert prepared.prompts.lengths.tolist() == [0] * count
    assert len(np.concatenate(arranged(prepared, 10))) == count
