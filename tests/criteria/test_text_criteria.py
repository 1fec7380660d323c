"""What is counted in texts, against counting by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.samples import collate
from helpers.scoring import COLUMNS, ROWS, arguments
from hypothesis import given
from hypothesis import strategies as st

from resofilter_trainer import score_by
from resofilter_trainer.criteria.text import length, repetition, response_ratio
from resofilter_trainer.model.losses import IGNORE

MODEL = torch.nn.Identity()  # which nothing here asks


def sample(prompt: list[int], response: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.tensor(prompt + response)
    return {"input_ids": ids, "labels": torch.tensor([IGNORE] * len(prompt) + response)}


def test_length_and_ratio_count_tokens_and_no_padding():
    batch = collate([sample([1, 2, 3], [4]), sample([1], [2, 3, 4, 5, 6, 7, 8])])
    assert length(MODEL, batch).tolist() == [1, 7]
    assert response_ratio(MODEL, batch).tolist() == pytest.approx([1 / 4, 7 / 8])


@pytest.mark.parametrize(
    ("response", "share"),
    [
        ([5, 6, 7, 8], 0),
        ([5, 6, 7, 5, 6, 7], 1 / 4),  # 567 675 756 567
        ([9, 9, 9, 9, 9], 2 / 3),
        ([5, 6], 0),
    ],
)
def test_repetition_is_the_share_of_trigrams_that_were_there_before(response, share):
    batch = collate([sample([9, 9, 9, 9], response), sample([1], [2, 3])])  # what the prompt repeats does not count
    assert repetition(MODEL, batch).tolist() == pytest.approx([share, 0])


@given(st.lists(st.integers(1, 3), min_size=3, max_size=20))
def test_repetition_lies_between_none_and_all_but_one(response):
    (found,) = repetition(MODEL, collate([sample([1], response)])).tolist()
    assert 0 <= found <= 1 - 1 / (len(response) - 2) + 1e-12


def test_rarity_is_the_cross_entropy_with_the_datasets_frequencies(tiny_llama, tokenizer):
    scores = score_by("rarity", tiny_llama(), Dataset.from_list(ROWS), tokenizer, arguments(), **COLUMNS)
    texts = [row["answer"] + tokenizer.eos_token for row in ROWS]
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    counts = Counter(token for each in tokens for token in each)
    total = sum(counts.values())
    expected = [np.mean([-math.log(counts[token] / total) for token in each]) for each in tokens]
    np.testing.assert_allclose(scores.column("score"), expected, rtol=1e-12)
    assert scores.column("num_tokens").tolist() == [len(each) for each in tokens]
