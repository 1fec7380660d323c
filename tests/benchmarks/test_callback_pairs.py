"""The benchmark of a step with the callback over one without, on a tiny shape, and its row of the table."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.versions import older_than

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SETTINGS = ("--shape", "tiny", "--pairs", "3", "--warmup", "1", "--threads", "1")


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    """A file like GSM8K's train.jsonl."""
    rows = [{"question": "How many? " * (3 + i % 5), "answer": "They are 4. " * (2 + i % 3)} for i in range(200)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(gsm8k: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "callback.py"), *options, *SETTINGS, "--gsm8k", str(gsm8k)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
@pytest.mark.skipif(
    older_than("transformers", "5.23"), reason="benchmarks are written for the arguments of the newest version"
)
def test_both_trainings_make_the_same_steps_in_turn(gsm8k: Path, tmp_path: Path) -> None:
    done = run(gsm8k, "plain", "packing", "sharded", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[2:]] == ["| plain", "| packing", "| sharded"]
    for both in found.values():
        assert list(both) == ["with", "without"]
        assert both["with"]["loss"] == pytest.approx(both["without"]["loss"], rel=1e-6)
        for each in both.values():
            assert len(each["seconds"]) == 3
            assert min(*each["seconds"], each["end"]) > 0
            assert each["peak_mb"] > 100  # torch alone has more


@pytest.mark.slow
@pytest.mark.skipif(
    older_than("transformers", "5.23"), reason="benchmarks are written for the arguments of the newest version"
)
def test_each_token_rule_is_compared_with_plain_training(gsm8k: Path, tmp_path: Path) -> None:
    options = ("--compare", "token_rule", "--rules", "eaft", "random", "--json", str(tmp_path / "found.json"))
    done = run(gsm8k, *options)
    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[2:]] == ["| plain, eaft", "| plain, random"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["plain, random"]["with"]["loss"] < 0.7 * found["plain, random"]["without"]["loss"]


@pytest.mark.slow
def test_a_training_that_fails_is_shown(gsm8k: Path) -> None:
    gsm8k.write_text('{"question": 7}\n')
    done = run(gsm8k, "plain")
    assert done.returncode == 1
    assert "the training with has ended" in done.stderr
    assert "TypeError" in done.stderr


def test_a_row_has_the_median_and_the_range_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("callback")
    one = {"seconds": [2.0, 3.3, 4.0], "peak_mb": 1050.4, "end": 0.5}
    other = {"seconds": [2.0, 3.0, 5.0], "peak_mb": 1000.0, "end": 0.25}
    row = benchmark.row("plain", {"with": one, "without": other})
    assert row == "| plain | 3 | 1.000, 0.800 to 1.100 | 3.30, 3.00 | 1,050, 1,000 | 1.050 | 0.50, 0.25 |"
    assert row.count("|") == benchmark.HEADER.splitlines()[0].count("|") == benchmark.HEADER.splitlines()[1].count("|")


def test_unknown_configurations_and_a_missing_file_are_refused(gsm8k: Path, tmp_path: Path) -> None:
    assert "unknown: magic; choose from plain" in run(gsm8k, "magic").stderr
    assert "there is no GSM8K" in run(tmp_path / "none.jsonl").stderr
