"""The rows that the benchmark of preparing writes: as many as asked for, or none."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from resofilter_trainer import load_rows

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def preparation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scale_preparation")


@pytest.mark.parametrize("rows", [3, 100, 128])
def test_files_hold_the_rows_that_were_asked_for(rows, preparation, tmp_path):
    assert len(load_rows(str(preparation.write(tmp_path / "rows", rows)))) == rows


def test_a_killed_start_leaves_no_rows_for_the_next_one(preparation, tmp_path, monkeypatch):
    def killed_at_the_third(path: Path, rows: int, seed: int) -> None:
        if seed == 2:
            raise KeyboardInterrupt
        write_file(path, rows, seed)

    write_file = preparation.write_file
    monkeypatch.setattr(preparation, "write_file", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        preparation.write(tmp_path / "rows", 20)
    monkeypatch.setattr(preparation, "write_file", write_file)
    assert len(load_rows(str(preparation.write(tmp_path / "rows", 20)))) == 20
