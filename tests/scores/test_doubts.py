"""What makes scores doubtful: each doubt where it belongs, with its remedy, in a unit that can be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.tables import make_provenance, make_scores
from hypothesis import given
from hypothesis import strategies as st

from resofilter_trainer.scores.doubts import doubts_of, remarks_of, trust_lines
from resofilter_trainer.scores.full_step import full_step_of, is_saturated, span_of
from resofilter_trainer.scores.provenance import Trust
from resofilter_trainer.scores.score_table import ScoreTable

LR = 1e-5
ADAMW = {"update": "adamw", "norm": "mean_abs", "lr": LR, "eps": 1e-8, "n_layers": 2}
SGD = {**ADAMW, "update": "sgd"}
SPREAD = [LR * share for share in (0.2, 0.5, 0.7, 0.9, 0.95)]
CLOSE = [LR * (0.9999 + 1e-6 * row) for row in range(5)]


def scores_of(values: list[float], config: dict[str, Any] = ADAMW, **made: Any) -> ScoreTable:
    return make_scores(values, provenance=make_provenance(rows=len(values), config=config, **made))


def trust(agreement: float | None = 0.99, **changes: Any) -> Trust:
    return Trust(agreement=agreement, rows=5, saturation=None, **changes)


@pytest.mark.parametrize(
    ("values", "made", "names"),
    [
        (SPREAD, {}, []),
        (SPREAD, {"trust": trust(0.949)}, ["noise"]),
        (SPREAD, {"trust": trust(0.95)}, []),
        (SPREAD, {"trust": trust(None)}, []),
        (SPREAD, {"trust": None}, []),
        (CLOSE, {}, ["saturation"]),
        (CLOSE, {"config": SGD}, []),
        (CLOSE, {"config": {"criterion": "loss"}}, []),
        (CLOSE, {"config": {"criterion": "loss"}, "preparation": {"dtype": "bfloat16"}}, []),
        ([value / 1e3 for value in CLOSE], {}, []),  # small and close together: far from the full step
        (SPREAD, {"preparation": {"dtype": "bfloat16"}}, ["rounding"]),
        (SPREAD, {"preparation": {"dtype": "float16"}}, ["rounding"]),
        (SPREAD, {"preparation": {"dtype": "float32"}}, []),
        (CLOSE, {"trust": trust(0.5), "preparation": {"dtype": "bfloat16"}}, ["noise", "saturation", "rounding"]),
    ],
)
def test_each_doubt_is_raised_where_it_belongs(values, made, names):
    assert list(doubts_of(scores_of(values, **made))) == names


def test_a_doubt_names_its_remedy():
    found = doubts_of(scores_of(CLOSE, trust=trust(0.5), preparation={"dtype": "bfloat16"}))
    assert "eps=1e-4" in found["saturation"]
    assert 'update="sgd" with norm="l2"' in found["saturation"]
    assert "99.99000 % to 99.99040 % of a full step" in found["saturation"]
    assert "dtype=torch.float32" in found["rounding"]
    assert "float32" in found["noise"]
    lines = trust_lines(scores_of(CLOSE))
    assert lines[0].startswith("Trust: rank agreement 0.9900 over 6 rows")
    assert lines[1].startswith("Warning: ")


def test_fewer_layers_than_asked_are_a_remark_and_no_doubt():
    asked = scores_of(SPREAD, {**ADAMW, "n_layers": 3})
    assert list(remarks_of(asked)) == ["layers"]
    assert doubts_of(asked) == {}
    assert "The model has 2 layers: the score is the mean over 2, not 3" in remarks_of(asked)["layers"]
    assert remarks_of(scores_of(SPREAD)) == {}


@given(st.floats(0.6, 1.0), st.floats(1e-6, 0.1))
def test_saturated_is_a_narrow_middle_near_the_full_step(level, width):
    values = LR * np.linspace(level - width, level, 41)
    assert is_saturated(values, ADAMW) == (0.9 * width < 5e-4) or abs(0.9 * width - 5e-4) < 1e-9
    outlier = np.append(values, 0.0)  # one row that differs says nothing of the others
    assert is_saturated(outlier, ADAMW) == is_saturated(values, ADAMW) or abs(0.9 * width - 5e-4) < 1e-4


@given(st.floats(1e-9, 1e-2), st.floats(0.01, 1.0), st.floats(1e-9, 0.5))
def test_the_ends_of_a_span_can_be_told_apart(lr, low, width):
    full = full_step_of({**ADAMW, "lr": lr})
    low_text, rest = span_of(np.array([low * lr, (low + width) * lr]), full).split(" % to ")
    high_text, unit = rest.split(" % ")
    assert unit == "of a full step"
    assert float(low_text) < float(high_text)
    assert float(high_text) - float(low_text) == pytest.approx(100 * width, rel=0.2)


def test_other_updates_and_norms_are_shown_as_numbers():
    assert full_step_of(SGD) is None
    assert full_step_of({**ADAMW, "norm": "l2"}) is None
    assert span_of(np.array([1.0, 1.00001]), None) == "1 to 1.00001"
    assert span_of(np.array([]), None) == "none"
