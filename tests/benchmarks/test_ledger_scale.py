"""The benchmark's synthetic ledger is one that a run could have written."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from resofilter_trainer import Ledger

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("lines", [3000, 3001])
def test_every_epoch_has_every_row_and_the_planted_one_is_named_first(tmp_path, monkeypatch, lines):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ledger_scale

    planted = ledger_scale.write(tmp_path, lines, epochs=3, rows_per_step=8, part=200)
    sys.modules.pop("ledger_scale")
    ledger = Ledger.load(tmp_path)
    frame = ledger.to_pandas()
    assert len(frame) == lines
    np.testing.assert_allclose(frame.groupby("step")["weight"].sum(), 1, rtol=1e-5)
    for _, epoch in frame.groupby("epoch"):
        assert {*epoch["sample_id"]} == {*range(1000)}
    assert ledger.spikes()[0].rows["sample_id"][0] == planted["row"]
    assert ledger.spikes()[0].step == planted["step"]
    assert (ledger.row(planted["row"])["loss"] == 60).sum() == 1
