"""Several processes write a ledger together, each its own part of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import torchrun
from helpers.run_ledgers import lines, losses
from helpers.two_processes_ledger import GARBAGE, KINDS


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with every kind of run, and a copy of each that was resumed in the middle."""
    folder = tmp_path_factory.mktemp("ledgers")
    torchrun("two_processes_ledger", folder, *KINDS, "spikes")
    for kind in KINDS:
        shutil.copytree(folder / kind, folder / f"{kind} resumed")
    torchrun("two_processes_ledger", folder, *(f"{kind} resumed" for kind in KINDS))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_of_all_processes_add_up_to_the_loss_that_is_logged(kind, place):
    found, truth = lines(place / kind, processes=2), np.load(place / kind / "logged.npz")
    np.testing.assert_allclose(losses(found), truth["loss"], rtol=1e-6)
    assert found["process"].nunique() == 2
    of_step = found.groupby("step")[["grad_norm", "learning_rate"]]
    assert (of_step.nunique() == 1).all(axis=None)
    for name in ("grad_norm", "learning_rate"):
        np.testing.assert_allclose(of_step.first()[name], truth[name], rtol=1e-6)
    visits = found[found["epoch"] == 0]["sample_id"].value_counts()
    assert sorted(visits.index) == list(range(23))
    assert kind == "stream" or (visits == 1).all()  # of a stream, Accelerate repeats rows to end a pass


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_same_ledger(kind, place):
    assert lines(place / f"{kind} resumed", processes=2).equals(lines(place / kind, processes=2))


@pytest.mark.slow
def test_all_processes_leave_out_the_update_that_the_main_one_decides_on(place):
    found = np.load(place / "spikes" / "spike.npz")
    assert found["rows"].tolist() == [GARBAGE, GARBAGE + 1]  # of one process each
    assert found["step"] == found["left_out"] == 26
    own = lines(place / "spikes", processes=2)
    np.testing.assert_allclose(losses(own)[25], found["loss"], rtol=1e-6)
    assert own["left_out"].equals((own["step"] == 26).rename("left_out"))
