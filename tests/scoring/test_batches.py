"""Which rows share a batch: every row is in one, within the budget, and common first tokens count once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resofilter_trainer.data.preparation import PreparedRows, prepared_already
from resofilter_trainer.scoring.batches import arrange, collate, default_budget

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
