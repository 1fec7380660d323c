"""What is known of rows as tokens, against plain loops over Python lists."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resofilter_trainer.data.surveys import ROW_POSITION, BlockSurvey, Prompts, survey

IGNORED = -100
samples = st.lists(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=6), min_size=1, max_size=8)


def columns(rows: list[list[tuple[int, bool]]], kind: pa.DataType) -> dict[str, pa.Array]:
    """Token ids and labels of rows of tokens, of which each has a label or has none."""
    ids = [[token for token, _ in row] for row in rows]
    labels = [[token if has else IGNORED for token, has in row] for row in rows]
    return {name: pa.array(each, pa.list_(kind)) for name, each in (("input_ids", ids), ("labels", labels))}


def prompt_of(row: list[tuple[int, bool]]) -> list[int]:
    """The tokens before the first with a label; none where there is no label."""
    first = next((place for place, (_, has) in enumerate(row) if has), 0)
    return [token for token, _ in row[:first]]


@given(samples, st.sampled_from([pa.int32(), pa.int64()]))
@example([[]], pa.int32())
@example([[(1, True)], [(1, True)], [], [(1, False)]], pa.int32())
@settings(max_examples=80, deadline=None)
def test_lengths_learnt_tokens_and_prompts_are_those_of_a_plain_loop(rows, kind):
    table = pa.table({ROW_POSITION: pa.array(range(len(rows)), pa.int64()), **columns(rows, kind)})
    found = BlockSurvey.of(table)
    assert found.lengths.tolist() == [len(row) for row in rows]
    assert found.learnt.tolist() == [sum(has for _, has in row[1:]) for row in rows]
    assert found.largest == max((token for row in rows for token, _ in row), default=0)
    assert found.prompts.lengths.tolist() == [len(prompt_of(row)) for row in rows]
    hashes = [xxhash.xxh3_64_intdigest(np.array(prompt_of(row), np.int64).tobytes()) for row in rows]
    assert found.prompts.hashes.view(np.uint64).tolist() == hashes
    whole = Dataset(table.drop_columns(ROW_POSITION))
    assert [each.tolist() for each in survey(whole)[:2]] == [found.lengths.tolist(), found.learnt.tolist()]
    assert Prompts.of(whole).hashes.tolist() == found.prompts.hashes.tolist()
