"""The benchmark of planted rows trains, and the planted row is the one that it looks for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_a_planted_row_is_named_first_in_a_real_training(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import spikes

    results = tmp_path / "spikes.json"
    command = ["spikes.py", "--rows", "160", "--seeds", "0", "--output", str(tmp_path / "runs"), "--json", str(results)]
    monkeypatch.setattr(sys, "argv", command)
    try:
        spikes.main()
        dataset, planted = spikes.with_garbage(160, 0.0, 0)
    finally:
        sys.modules.pop("spikes")
    (found,) = json.loads(results.read_text())
    assert found["planted"] == planted
    assert "####" not in dataset["completion"][planted]
    assert sum("####" not in each for each in dataset["completion"]) == 1
    assert found["named_first"]
    assert found["rank"] == 1
    assert "named first at 1 of 1 seeds" in capsys.readouterr().out
    assert not list((tmp_path / "runs").iterdir())
