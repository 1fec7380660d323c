"""The survey's published ranks, every one; and its tool's picture, drawn again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resofilter_trainer.compare.published import (
    LINE,
    OTHER_BENCHMARK,
    SAME_BENCHMARK,
    SURVEY,
    Needs,
    dense_ranks,
    efficiency_ranks,
    feasibility_ranks,
    pir,
    pixel_distances,
    published_ranks,
    published_table,
    residual,
)

WIDTH, HEIGHT, PADDING = 700, 500, 60
POINTS = [(entry.sdf, entry.pir) for entry in SURVEY]
PUBLISHED = {  # efficiency, feasibility, simplicity, flexibility
    "IFD": (1, 4, 4, 4),
    "LESS": (2, 5, 5, 4),
    "Superfiltering": (3, 3, 3, 4),
    "SelectIT": (4, 1, 2, 1),
    "InstructionGPT-4": (5, 6, 7, 3),
    "Instruction-Mining": (5, 7, 8, 3),
    "SHED": (6, 8, 8, 4),
    "Nuggets": (7, 1, 2, 1),
    "InsTag": (8, 2, 2, 2),
    "CaR": (9, 1, 2, 1),
    "DEITA": (10, 7, 6, 5),
    "AlpaGasus": (11, 1, 1, 2),
}


def in_the_picture(point: tuple[float, float], shown: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Pixels of a point, y upwards, where the axes reach from the least to the most of what is shown."""
    (left, right), (low, high) = [(min(axis), max(axis)) for axis in zip(*shown, strict=True)]
    x = PADDING + (point[0] - left) / (right - left) * (WIDTH - 2 * PADDING)
    y = PADDING + (point[1] - low) / (high - low) * (HEIGHT - 2 * PADDING)
    return x, y


def distances_in_the_picture(shown: Sequence[tuple[float, float]]) -> list[float]:
    """Signed lengths of the perpendiculars to the line; positive above it."""
    (ax, ay), (bx, by) = (in_the_picture(end, shown) for end in LINE)
    pixels = [in_the_picture(point, shown) for point in shown]
    return [((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / math.dist((ax, ay), (bx, by)) for x, y in pixels]


# ---- what was published


@pytest.mark.parametrize("entry", SURVEY, ids=lambda entry: entry.name)
def test_ranks_are_those_published(entry):
    needs = [each.needs for each in SURVEY]
    at = SURVEY.index(entry)
    simplicity = dense_ranks([each.simplicity_penalty for each in needs])
    flexibility = dense_ranks([each.flexibility_penalty for each in needs])
    got = efficiency_ranks(POINTS)[at], feasibility_ranks(needs)[at], simplicity[at], flexibility[at]
    assert got == PUBLISHED[entry.name]


def test_all_are_listed_in_the_surveys_order():
    assert published_ranks() == [
        {"method": name, "efficiency_rank": ranks[0], "feasibility_rank": ranks[1]} for name, ranks in PUBLISHED.items()
    ]


def test_the_table_has_a_line_for_every_method():
    lines = published_table().splitlines()[1:-2]
    assert [line[:20].strip() for line in lines] == list(PUBLISHED)
    for line, (efficiency, feasibility, _, _) in zip(lines, PUBLISHED.values(), strict=True):
        cells = line[20:].split()
        assert (int(cells[4]), int(cells[-1])) == (efficiency, feasibility)


# ---- efficiency


def test_the_two_methods_on_the_line_lie_on_it():
    for point in LINE:
        assert residual(*point) == pytest.approx(0, abs=1e-12)
    assert residual(0.05, 1.747) > 0 > residual(0.173, 1.284)


@pytest.mark.parametrize("shown", [POINTS, POINTS[:2] + POINTS[3:8], POINTS[::-1], POINTS[-3:]])
def test_pixels_are_perpendiculars_in_the_picture(shown):
    assert pixel_distances(shown) == pytest.approx(distances_in_the_picture(shown), abs=1e-9)


@given(st.lists(st.tuples(st.floats(0.001, 1), st.floats(0.5, 2)), min_size=3, max_size=12))
def test_pixels_rank_as_the_residual_does(points):
    shown = [*points, *LINE]  # which differ in both
    pixels = pixel_distances(shown)
    assert pixels == pytest.approx(distances_in_the_picture(shown), rel=1e-6, abs=1e-6)
    above = [residual(*point) for point in shown]
    for one, first in zip(above, pixels, strict=True):
        for other, second in zip(above, pixels, strict=True):
            if one > other + 1e-9:
                assert first > second


def test_pixels_of_the_published_rank_as_published():
    ranks = [efficiency for efficiency, *_ in PUBLISHED.values()]
    assert dense_ranks([-distance for distance in pixel_distances(POINTS)]) == ranks == efficiency_ranks(POINTS)


def test_pixels_change_with_the_methods_shown_and_the_residual_does_not():
    fewer = [point for point, entry in zip(POINTS, SURVEY, strict=True) if entry.name not in ("IFD", "SelectIT")]
    at = POINTS.index((0.05, 1.491))
    among_fewer = fewer.index((0.05, 1.491))
    assert abs(pixel_distances(POINTS)[at] - pixel_distances(fewer)[among_fewer]) > 1
    above = [residual(*point) for point in POINTS if point in fewer]
    assert above == [residual(*point) for point in fewer]
    assert efficiency_ranks(fewer) == dense_ranks([-each for each in above])


@pytest.mark.parametrize(("scale", "at_one"), [(SAME_BENCHMARK, 1.4436), (OTHER_BENCHMARK, 1.4260)])
def test_performance_as_good_as_that_of_all_rows_is_on_the_scale_of_win_rates(scale, at_one):
    assert pir(1.0, scale) == pytest.approx(at_one)
    assert pir(1.1, scale) - pir(1.0, scale) == pytest.approx(0.1 * scale[0])


# ---- feasibility


@pytest.mark.parametrize(
    ("needs", "simplicity", "flexibility"),
    [
        (Needs(0, 4), 4, 0),
        (Needs(2, 5, model_free=False, data_free=False, gpt_free=False), 9, 6),
        (Needs(1, 3, llm_penalty=1.5), 4.5, 0),
        (Needs(0, 2, reproducible=False, gpt_free=False), 3, 1),
        (Needs(100, 1), 201, 0),
        (Needs(101, 1, reproducible=False, model_free=False), 200, 3),
        (Needs(500, 3, data_free=False), 200, 2),
    ],
)
def test_penalties_are_counted_as_the_survey_does(needs, simplicity, flexibility):
    assert (needs.simplicity_penalty, needs.flexibility_penalty) == (simplicity, flexibility)


# ---- ranks


@given(st.lists(st.integers(-5, 5), max_size=20))
def test_equal_values_share_a_rank_and_none_is_left_out(values):
    assert dense_ranks(values) == [len({other for other in values if other < value}) + 1 for value in values]


def test_rounding_errors_part_nobody():
    assert dense_ranks([0.3, 0.1 + 0.2, -1e-17, 0.0]) == [2, 2, 1, 1]
