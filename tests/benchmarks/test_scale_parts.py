"""1,024 processes write for a day: at most once a minute each, and few files are left; counted, and with files."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from resofilter_trainer.io import store

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scale_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scale_parts")


@pytest.mark.slow
def test_a_day_of_1024_processes_leaves_few_files(scale_parts):
    found = scale_parts.counted(1024, 24)
    assert found["writes of all processes"] <= 1024 * 24 * 60
    assert found["most files at a time"] < 1024 + 200
    assert found["files at the end"] <= 200
    assert found["MB of results"] == 1024 * 24 * 60 * scale_parts.A_MINUTE // 10**6


@pytest.mark.parametrize("hours", [0.1, 24])
def test_few_processes_write_once_a_second_together_and_lose_at_most_a_minute(hours, scale_parts):
    for processes in (1, 8):
        found = scale_parts.counted(processes, hours)
        assert found["writes of all processes"] <= 3600 * hours
        assert found["most files at a time"] < processes + 10


def test_processes_that_write_files_leave_what_they_measured(scale_parts, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "flush", lambda path: None)
    monkeypatch.setattr(store, "flush_entry", lambda path: None)
    monkeypatch.setattr(store, "MANY", 5)
    monkeypatch.setattr(scale_parts.passes, "LEAST_LOST", 60.0 / 10)  # ten processes write as seldom as sixty
    found = scale_parts.with_files(tmp_path, 10, 23, units=2)
    assert found["most writes of a process"] == 23
    assert found["most files at a time"] <= 11
    assert found["files when all have ended"] == 10
    assert found["and after the main process has merged them"] == 1
