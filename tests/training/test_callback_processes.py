"""Two processes decide as one does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.processes import torchrun

SIZES = {"plain": [44, 22, 11], "before": [27, 22, 11], "ragged": [45, 23, 12], "sequential": [44, 22, 11]}
SIZES |= {"packed": [44, 22, 11]}
SIZES |= {"dispatched": [44, 22, 11], "dispatched ragged": [45, 23, 12], "split": [44, 22, 11]}
SIZES |= {"dispatched split": [44, 22, 11]}
SIZES |= {"stream": [48, 24, 12], "stream ragged": [50, 25, 13], "split stream": [48, 24, 12]}
RESUMED = {"plain": "resumed"}
RESUMED |= {kind: f"resumed {kind}" for kind in ("dispatched", "dispatched ragged", "split", "stream", "stream ragged")}
TOKENS = ("tokens", "ragged tokens", "dispatched tokens")


def outcome(place: Path, processes: int, kind: str) -> dict[str, np.ndarray]:
    found = dict(np.load(place / f"{kind}-{processes}" / "outcome.npz"))
    assert found.pop("processes") == processes
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with every kind of run, of one process and of two."""
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        torchrun("two_processes", folder, processes, *SIZES, *TOKENS, processes=processes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIZES)
def test_two_processes_keep_what_one_keeps(kind, place):
    sizes, (one, two) = SIZES[kind], (outcome(place, processes, kind) for processes in (1, 2))
    same = 2 if kind == "stream ragged" else 3  # two processes repeat rows to end each pass, so weights differ
    assert np.array_equal(one["keep"][:same], two["keep"][:same])
    assert one["keep"].sum(axis=1).tolist() == sizes
    assert one["steps"] == two["steps"]
    same_weights = one["epoch"] <= (0 if kind == "stream ragged" else 2)
    assert same_weights.any()
    np.testing.assert_allclose(two["measured"][same_weights], one["measured"][same_weights], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENS)
def test_two_processes_keep_the_tokens_that_one_keeps(kind, place):
    one, two = (outcome(place, processes, kind) for processes in (1, 2))
    assert len(one["masks"]) == len(two["masks"]) > 5
    assert np.array_equal(one["masks"], two["masks"])
    assert len(np.unique(one["masks"], axis=0)) >= 5  # of six parts, the first whole


@pytest.fixture(scope="module")
def resumed(place) -> Path:
    """The same folder, with the runs that two new processes resume."""
    torchrun("two_processes", place, 2, *RESUMED.values(), processes=2)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("kind", RESUMED)
def test_two_processes_go_on_where_they_were(kind, resumed):
    whole, rest = outcome(resumed, 2, kind), outcome(resumed, 2, RESUMED[kind])
    for name, value in whole.items():
        assert np.array_equal(rest[name], value, equal_nan=True), name
