"""The rows that a page shows: both ends of the ranking, truncated texts, copies and neighbours, and their JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resofilter_trainer.report import samples


def test_all_rows_are_shown_or_both_ends_and_an_even_sample_of_the_others():
    assert samples.chosen_rows(np.array([np.nan, 1, 0]), np.array([False, True, True]), 3).tolist() == [0, 1, 2]
    values, scored = np.random.default_rng(0).permutation(1000.0 * np.arange(10_000)), np.ones(10_000, dtype=bool)
    scored[::7] = False
    rows = samples.chosen_rows(values, scored, 400)
    shown, ranked = np.sort(values[rows[scored[rows]]]), np.sort(values[scored])
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert (len(shown), (~scored[rows]).sum()) == (400, samples.UNSCORED)
    assert shown[:100].tolist() == ranked[:100].tolist()
    assert shown[-100:].tolist() == ranked[-100:].tolist()
    gaps = np.diff(np.searchsorted(ranked, shown[100:-100]))
    assert gaps.max() - gaps.min() <= 1


def test_a_copy_names_the_first_row_with_its_text():
    texts = [("a", "b"), ("ab", ""), ("a", "b"), ("", "ab"), ("\ud800", "x"), ("\ud800", "x")]
    assert samples.first_of_copies(texts).tolist() == [0, 1, 0, 3, 4, 4]


def test_the_same_text_is_nearest_and_other_texts_have_no_neighbour():
    texts = ["one two three four", "one two three five", "six seven", "ONE two three four", "", ""]
    found = samples.neighbours(texts, np.arange(6) * 10)
    assert found[0][0] == (30, 1.0)
    assert [row for row, _ in found[0]] == [30, 10]
    assert found[2] == found[4] == []
    assert samples.neighbours(["alone"], np.array([7])) == [[]]


def test_texts_are_truncated_so_that_all_fit():
    texts = ["é" * 300, "<" * 1000, "abc"]
    assert samples.text_limit(texts) == samples.MAX_TEXT
    limit = samples.text_limit(texts, 1000)
    assert sum(samples.page_bytes(text[:limit]) for text in texts) <= 1000
    assert sum(samples.page_bytes(text[: 2 * limit]) for text in texts) > 1000


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("<>&\u2028\u2029\\\"'/")))
def test_json_is_read_back_and_ends_no_script(text):
    found = samples.as_json({"text": [text]})
    assert json.loads(found) == {"text": [text]}
    assert not set(found) & set("<>&\u2028\u2029")


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\\\ud800"])
def test_a_lone_surrogate_is_read_back(text):
    assert json.loads(samples.as_json(text).encode()) == text
