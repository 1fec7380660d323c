"""The numbers and tables of the benchmark of learning dynamics, without a training."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from helpers.ledgers import drawn, write_ledger

from resofilter_trainer import Ledger
from resofilter_trainer.compare.cells import Cell

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def dynamics(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("dynamics")


def test_first_visits_are_those_of_the_first_epoch(dynamics, tmp_path):
    lines = drawn(30, epochs=2)  # 60 rows of a dataset of 70, whose first ten were not trained on
    found = dynamics.first_visits(Ledger.load(write_ledger(tmp_path, lines)), np.arange(10, 70), 70)
    assert np.isnan(found["first loss"][:10]).all()
    for line in lines:
        if line["epoch"] == 0:
            assert found["first loss"][line["sample_id"] + 10] == pytest.approx(line["loss"])
            mean = (line["layer_3"] + line["layer_5"]) / 2
            assert found["first resonance"][line["sample_id"] + 10] == pytest.approx(mean)


def test_the_tables(dynamics):
    def found(mean_loss: float):
        return {
            "first loss": {"plain": [0.9, 0.8, 1.0], "length out": [0.7, 0.6, 0.8]},
            "mean_loss": {"plain": [mean_loss, 0.5, 0.7], "length out": [0.5, 0.4, 0.6]},
        }

    assert dynamics.detection_table([found(0.95)])[2:] == [
        "| mean_loss | largest | 0.950 [0.500, 0.700] | 0.500 [0.400, 0.600] |",
        "| first loss | largest | 0.900 [0.800, 1.000] | 0.700 [0.600, 0.800] |",
    ]
    # with Student's t of three seeds
    of_seeds = dynamics.detection_table([found(0.5), found(0.7), found(0.6)])
    assert of_seeds[3].startswith("| mean_loss | largest | 0.600 [0.352, 0.848] | 0.500 [0.500, 0.500] |")
    costs = {"selection_seconds": 1.0, "training_seconds": 1.0, "wrong_kept": 0.4}
    full = Cell("full", 1.0, 0, 10, 10, 0.5, selection_flops=0.0, training_flops=4.0, **costs)
    half = Cell("mean_loss", 0.5, 0, 10, 5, 0.25, selection_flops=4.0, training_flops=2.0, **costs)
    assert dynamics.training_table([full, half])[2:] == [
        "| full | 1 | 0.400 | 0.500 | - | +0.000 | 1.00 |",
        "| mean_loss | 1 | 0.400 | 0.250 | - | -0.250 | 1.50 |",
    ]
