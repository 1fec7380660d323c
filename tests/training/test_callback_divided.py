"""One, two and three processes train alike on a number of rows that they do not divide, also one after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import torchrun
from safetensors.torch import load_file

COUNTS = (1, 2, 3)
# from so many processes to so many, at a step of the first epoch (3 steps), at an epoch's end, and within the second
MOVES = {(1, 2): 1, (2, 1): 2, (2, 3): 3, (3, 1): 4, (1, 3): 1, (3, 2): 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("divided")
    for count in COUNTS:
        torchrun("processes_divided", folder, "dropped", "all", "without", processes=count)
    for count in COUNTS:
        resumed = [f"dropped:{before}:{step}" for (before, now), step in MOVES.items() if now == count]
        torchrun("processes_divided", folder, *resumed, "all:1:1", processes=count)
    return folder


def outcome(place: Path, name: str) -> dict[str, np.ndarray]:
    return dict(np.load(place / name / "outcome.npz"))


def assert_alike(place: Path, mine: str, other: str) -> None:
    """The same rows; weights and scores up to rounding."""
    one, two = outcome(place, mine), outcome(place, other)
    assert str(one["said"]) == str(two["said"]) == ""
    assert np.array_equal(one["keep"], two["keep"])
    apart = 3e-5 * np.ptp(two["score"])  # float32: how far apart depends on the CPU
    np.testing.assert_allclose(one["score"], two["score"], rtol=0, atol=apart)
    there = load_file(place / other / "end.safetensors")
    for name, weight in load_file(place / mine / "end.safetensors").items():
        torch.testing.assert_close(weight, there[name], rtol=0, atol=1e-5)  # AdamW magnifies rounding


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS[1:])
def test_several_processes_train_on_a_ragged_end_as_one_does(count, place):
    assert_alike(place, f"dropped-{count}", "dropped-1")


@pytest.mark.slow
@pytest.mark.parametrize("move", MOVES, ids=str)
def test_a_run_resumes_with_another_number_of_processes(move, place):
    before, now = move
    assert_alike(place, f"dropped-{before}-{MOVES[move]}-{now}", f"dropped-{before}")


@pytest.mark.slow
def test_rows_that_accelerate_repeats_would_be_noticed(place):
    one, two = (load_file(place / f"all-{count}" / "end.safetensors") for count in (1, 2))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_where_nothing_is_dropped_the_weights_are_those_without_the_callback(count, place):
    there = load_file(place / f"without-{count}" / "end.safetensors")
    for name, weight in load_file(place / f"all-{count}" / "end.safetensors").items():
        assert torch.equal(weight, there[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS[1:])
def test_where_accelerate_would_repeat_other_rows_another_number_of_processes_is_refused(count, place):
    said = str(outcome(place, f"all-1-1-{count}")["said"])
    assert said.endswith(
        f"checkpoint-1' holds a checkpoint made with 6 rows per device x 2 accumulated x 1 process, and this run has "
        f"{6 // count} rows per device x 2 accumulated x {count} processes: where nothing is dropped, Accelerate "
        "repeats rows to end an epoch, and would repeat others. Resume with the numbers it was made with."
    )
