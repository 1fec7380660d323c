"""The paper's rule against a slow, obvious one, bit for bit; and the counts of kept tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from helpers.tables import Row, make_token_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from resofilter_trainer.config import InputError
from resofilter_trainer.scores.token_scores import TokenScores
from resofilter_trainer.selecting import token_selection
from resofilter_trainer.selecting.token_selection import TokenSelection, TokenSelector, keep_by_sample, keep_globally

CHUNKS = [1, 3, 7, token_selection.CHUNK]
RANKINGS = ["global", "sample"]

few = st.sampled_from([-0.0, 0.0, 0.5, 1.0, 2.0])
huge = st.sampled_from([1e8, 1e8 + 8, 2.0**24, 2.0**24 + 2, 1.0, 1 - 2**-24])  # float32 cannot tell apart
tiny = st.sampled_from([0.0, 1e-30, 1e-9, 2e-9, 2.0**-24, 2.0**-25, 0.5, 1.0, 1.5])  # from these
of_any_size = st.floats(0, 1e9, width=32)
pairs = st.one_of(
    st.tuples(few, few), st.tuples(huge, tiny), st.tuples(tiny, huge), st.tuples(of_any_size, of_any_size)
).map(lambda pair: (float(np.float32(pair[0])), float(np.float32(pair[1]))))
tied_rows = st.lists(st.lists(st.tuples(few, few), max_size=8), max_size=8)
close_rows = st.lists(st.lists(st.tuples(huge, tiny), max_size=8), max_size=8)
mixed_rows = st.lists(st.lists(pairs, max_size=8), max_size=8)
many_rows = tied_rows | close_rows | mixed_rows
shares = st.integers(1, 10).map(lambda tenth: tenth / 10) | st.sampled_from([1, 1e-9, 0.29, 1 / 3]) | st.floats(1e-3, 1)


def papers_rule(pairs: Row, keep: float) -> list[bool]:
    """Sort by score, highest first, of equal ones the earlier; keep the first share."""
    scores = [float(np.float32(base)) - float(np.float32(reference)) for base, reference in pairs]
    order = sorted([(-score, place) for place, score in enumerate(scores)])
    stays = {place for _, place in order[: int(len(pairs) * keep)]}
    return [place in stays for place in range(len(pairs))]


def oracle(rows: Sequence[Row], keep: float, ranking: str) -> list[bool]:
    if ranking == "global":
        return papers_rule([pair for row in rows for pair in row], keep)
    return [stays for row in rows for stays in papers_rule(row, keep)]


def decide(scores: TokenScores, keep: float, ranking: str, chunk: int) -> TokenSelection:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_selection, "CHUNK", chunk)
        return TokenSelector(keep=keep, ranking=ranking).select(scores)


def select_first(counts: Sequence[tuple[int, int]]) -> TokenSelection:
    """Row r has `counts[r][1]` tokens and keeps the first `counts[r][0]`."""
    mask = [place < kept for kept, tokens in counts for place in range(tokens)]
    scores = make_token_scores([[(1.0, 0.0)] * tokens for _, tokens in counts])
    return TokenSelection(scores, np.array(mask, dtype=bool))


# ---- the rule


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("ranking", RANKINGS)
@given(rows=many_rows, keep=shares)
def test_the_mask_is_that_of_the_papers_rule(chunk, ranking, rows, keep):
    mask = decide(make_token_scores(rows), keep, ranking, chunk).keep
    assert mask.dtype == bool
    assert mask.tolist() == oracle(rows, keep, ranking)


@given(many_rows, shares)
def test_the_functions_alone_decide_the_same(rows, keep):
    scores = make_token_scores(rows)
    assert keep_globally(scores.base, scores.reference, keep).tolist() == oracle(rows, keep, "global")
    by_sample = keep_by_sample(scores.base, scores.reference, scores.offsets, keep)
    assert by_sample.tolist() == oracle(rows, keep, "sample")


@given(many_rows, shares)
def test_the_losses_are_left_as_they_are(rows, keep):
    scores = make_token_scores(rows)
    before = [each.tobytes() for each in (scores.base, scores.reference, scores.offsets)]
    for ranking in RANKINGS:
        decide(scores, keep, ranking, 3)
    assert [each.tobytes() for each in (scores.base, scores.reference, scores.offsets)] == before


@given(many_rows, shares)
def test_counts_are_exact_whatever_the_ties(rows, keep):
    scores = make_token_scores(rows)
    assert decide(scores, keep, "global", 7).keep.sum() == int(len(scores) * keep)
    assert decide(scores, keep, "sample", 7).kept_of_row.tolist() == [int(len(row) * keep) for row in rows]


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("chunk", [100, token_selection.CHUNK])
def test_the_rule_holds_for_many_tokens(ranking, chunk):
    draw = np.random.default_rng(0)
    losses = draw.integers(0, 64, (20_000, 2)) / 16  # most scores are tied
    losses[::3] += draw.random((len(losses[::3]), 2)) * 1e-7
    cuts = sorted(draw.integers(0, 20_000, 300).tolist())
    rows = [losses[start:stop].tolist() for start, stop in zip([0, *cuts], [*cuts, 20_000], strict=True)]
    assert decide(make_token_scores(rows), 0.6, ranking, chunk).keep.tolist() == oracle(rows, 0.6, ranking)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_what_float32_cannot_tell_apart_is_told_apart(ranking):
    pairs = [(1e8, 2.0), (1e8, 0.0), (1e8, 1.0), (1e8, 3.0)]
    assert len({np.float32(base) - np.float32(reference) for base, reference in pairs}) == 1
    assert decide(make_token_scores([pairs]), 0.5, ranking, 3).keep.tolist() == [False, True, True, False]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("ranking", RANKINGS)
def test_of_equal_scores_the_earlier_are_kept(ranking, chunk):
    row = [(2.0, 1.0), (1.0, 0.0), (3.0, 1.0), (1.5, 0.5), (0.0, 0.0)]
    assert decide(make_token_scores([row]), 0.6, ranking, chunk).keep.tolist() == [True, True, True, False, False]


def test_rows_share_one_ranking_or_have_their_own():
    scores = make_token_scores([[(9.0, 0.0), (8.0, 0.0)], [], [(1.0, 0.0), (2.0, 0.0)], [(0.5, 0.0)]])
    assert decide(scores, 0.5, "global", 3).keep.tolist() == [True, True, False, False, False]
    assert decide(scores, 0.5, "sample", 3).keep.tolist() == [True, False, False, True, False]


def test_sixty_per_cent_of_all_tokens_is_the_default():
    scores = make_token_scores([[(float(loss), 0.0)] for loss in range(10)])
    assert TokenSelector().select(scores).keep.tolist() == [False] * 4 + [True] * 6


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("rows", [[], [[]], [[], []], [[(1.0, 2.0)]], [[], [(1.0, 1.0), (0.0, 1.0)], []]])
def test_all_are_kept_or_none(rows, ranking):
    scores = make_token_scores(rows)
    assert TokenSelector(keep=1, ranking=ranking).select(scores).keep.tolist() == [True] * len(scores)
    assert TokenSelector(keep=1e-9, ranking=ranking).select(scores).keep.tolist() == [False] * len(scores)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_saved_scores_are_decided_the_same(tmp_path, ranking):
    """They are mapped into memory, read-only."""
    scores = make_token_scores([[(2.0, 1.0), (1.0, 0.5), (3.0, 0.0)], [], [(1.0, 1.0), (4.0, 1.0)]])
    loaded = TokenScores.load(scores.save(tmp_path))
    selector = TokenSelector(ranking=ranking)
    assert selector.select(loaded).keep.tolist() == selector.select(scores).keep.tolist()


# ---- what is counted


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("ranking", RANKINGS)
@given(rows=many_rows, keep=shares)
def test_rows_are_counted(chunk, ranking, rows, keep):
    selection = decide(make_token_scores(rows), keep, ranking, chunk)
    mask = iter(selection.keep.tolist())
    kept = [sum(next(mask) for _ in row) for row in rows]
    assert selection.kept_of_row.tolist() == kept
    assert selection.emptied.tolist() == [len(row) > 0 and count == 0 for row, count in zip(rows, kept, strict=True)]
    assert selection.share() == (sum(kept) / len(selection.keep) if len(selection.keep) else 0)


def test_rows_without_tokens_are_not_emptied():
    selection = select_first([(0, 0), (0, 2), (1, 3), (0, 0), (0, 1), (0, 0)])
    assert selection.kept_of_row.tolist() == [0, 0, 1, 0, 0, 0]
    assert selection.emptied.tolist() == [False, True, False, False, True, False]
    assert selection.share() == 1 / 6


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted), max_size=12),
    st.sampled_from(["abc", [1, 2, 3], [0.5, 1.5, 2.5], [True, False], ["a", "1", 1]]),
    st.data(),
)
def test_share_of_each_group(counts, names, data):
    groups = [data.draw(st.sampled_from(names)) for _ in counts]
    tokens, kept = Counter(), Counter()
    for group, (some, all_of_them) in zip(groups, counts, strict=True):
        tokens[str(group)] += all_of_them
        kept[str(group)] += some
    shares = select_first(counts).share_of_groups(groups)
    assert shares == {group: kept[group] / tokens[group] for group in tokens if tokens[group]}
    assert all(type(group) is str for group in shares)


@pytest.mark.parametrize(
    ("groups", "shares"),
    [
        (["a", None, "a"], {"a": 0.75, "None": 0.5}),
        ([1, None, 1], {"1": 0.75, "None": 0.5}),
        ([None, None, None], {"None": 4 / 6}),
    ],
)
def test_rows_without_group_are_a_group(groups, shares):
    assert select_first([(1, 2), (1, 2), (2, 2)]).share_of_groups(groups) == shares


def test_a_group_without_tokens_has_no_share():
    assert select_first([(0, 0), (1, 4), (0, 2)]).share_of_groups(["none", "some", "all go"]) == {
        "some": 0.25,
        "all go": 0.0,
    }


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12) | st.just(70_000), st.booleans()), max_size=60),
    st.integers(1, 6),
    st.sampled_from(CHUNKS),
)
def test_tokens_by_share_are_counted_and_sorted(occurrences, at_least, chunk):
    count = Counter(token for token, _ in occurrences)
    kept = Counter(token for token, stays in occurrences if stays)
    lines = [(token, count[token], kept[token] / count[token]) for token in count if count[token] >= at_least]
    scores = make_token_scores([[(1.0, 0.0)] * len(occurrences)], tokens=[token for token, _ in occurrences])
    selection = TokenSelection(scores, np.array([stays for _, stays in occurrences], dtype=bool))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_selection, "CHUNK", chunk)
        frame = selection.tokens_by_share(at_least)
    assert list(frame.columns) == ["token", "count", "share"]
    assert list(frame.itertuples(index=False, name=None)) == sorted(
        lines, key=lambda line: (-line[2], -line[1], line[0])
    )
    assert frame.index.tolist() == list(range(len(lines)))


def test_the_highest_share_is_first_then_the_frequent_then_the_smaller_id():
    tokens = [4] * 2 + [3] * 2 + [2] * 4 + [1] * 2
    scores = make_token_scores([[(1.0, 0.0)] * 10], tokens=tokens)
    selection = TokenSelection(scores, np.array([1, 0, 1, 0, 1, 1, 0, 0, 1, 1], dtype=bool))
    assert selection.tokens_by_share(2)["token"].tolist() == [1, 2, 3, 4]
    assert selection.tokens_by_share(3)["token"].tolist() == [2]
    assert selection.tokens_by_share()["token"].tolist() == []


@pytest.mark.parametrize(("size", "seen"), [(6000, [0, 1]), (6001, [0])])
def test_less_than_a_thousandth_is_rare(size, seen):
    scores = make_token_scores([[(1.0, 0.0)] * size], tokens=[1] * 6 + [0] * (size - 6))
    frame = TokenSelection(scores, np.ones(size, dtype=bool)).tokens_by_share()
    assert frame["token"].sort_values().tolist() == seen


# ---- settings that cannot work


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -1, math.nan, math.inf, True, False, "half", None, [0.5]])
def test_keep_outside_0_to_1_is_refused(keep):
    with pytest.raises(InputError, match="above 0 and at most 1") as refused:
        TokenSelector(keep=keep)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith(f"got {keep!r}.")


@pytest.mark.parametrize("keep", [1, 1.0, 0.6, 1e-9, np.float64(0.5), np.float32(0.5)])
def test_keep_up_to_1_is_accepted(keep):
    assert TokenSelector(keep=keep).keep == keep


@pytest.mark.parametrize("ranking", ["other", "", None, "Global"])
def test_unknown_ranking_lists_those_there_are(ranking):
    with pytest.raises(InputError, match="'global', 'sample', got") as refused:
        TokenSelector(ranking=ranking)
    assert "\n" not in str(refused.value)
