"""Groups of processes that hold a sharded model share one queue: the same scores, killed and resumed, slow or not."""

from __future__ import annotations

import heapq
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from datasets import Dataset
from helpers.scoring import ROWS, arguments
from hypothesis import given, settings
from hypothesis import strategies as st

from resofilter_trainer import InputError, ScoreTable, score_dataset
from resofilter_trainer.cli.entry import main
from resofilter_trainer.scoring.distribution import batches_alike, guided_chunks, rounds


def handed_out(costs: np.ndarray, sizes: list[int], speeds: list[float]) -> tuple[list[int], float]:
    """The batches that count, and when the last group ends, if a free group takes the next chunk."""
    alike = batches_alike(costs, max(sizes))
    sums = np.array([costs[each].sum() for each in alike])
    free = [(0.0, group) for group in range(len(sizes))]
    done: list[int] = []
    end = 0.0
    for chunk in guided_chunks(sums, len(sizes)):
        now, group = heapq.heappop(free)
        for each in alike[chunk]:
            for places in rounds(costs[each], sizes[group]):
                done += np.unique(each[places]).tolist()
                now += costs[each[places]].max() / speeds[group]
        heapq.heappush(free, (now, group))
        end = max(end, now)
    return done, end


@given(st.lists(st.integers(0, 1000), max_size=100).map(np.array), st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_every_batch_counts_once(costs, sizes):
    done, _ = handed_out(costs, sizes, [1.0] * len(sizes))
    assert sorted(done) == list(range(len(costs)))


@pytest.mark.parametrize("sizes", [[2, 2], [8] * 4, [2, 1], [1] * 64])
@pytest.mark.parametrize("batches_of_a_process", [70, 1000])
def test_a_group_at_a_tenth_of_the_speed_does_not_hold_the_others_for_long(sizes, batches_of_a_process):
    costs = np.sort(np.random.default_rng(0).integers(200, 1000, batches_of_a_process * sum(sizes)))[::-1]
    speeds = [1.0] * (len(sizes) - 1) + [0.1]
    perfect = costs.sum() / sum(size * speed for size, speed in zip(sizes, speeds, strict=True))
    assert handed_out(costs, sizes, speeds)[1] <= 1.1 * perfect


def test_a_group_has_at_least_two_processes_and_not_more_than_there_are(tiny_model_dir):
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    for size, sharded, said in (
        (1, True, "group_size must be a whole number of at least 2"),
        (2, False, "pass sharded=True"),
        (2, True, "group_size is 2, and there are 1 processes"),
    ):
        with pytest.raises(InputError, match=said):
            score_dataset(str(tiny_model_dir), rows, args=arguments(), sharded=sharded, group_size=size)


def test_the_command_takes_a_group_only_of_a_sharded_model(capsys):
    with pytest.raises(SystemExit):
        main(["score", "--model", "m", "--dataset", "rows.jsonl", "--output", "out", "--group_size", "2"])
    assert "--group_size is of processes that hold a sharded model: pass --sharded, too." in capsys.readouterr().err


@pytest.mark.slow
def test_a_group_that_is_killed_ends_the_run_and_three_processes_resume_it(tiny_model_dir, tmp_path):
    """One process alone and two that hold a sharded model together: the scores of a whole one."""
    Dataset.from_list(ROWS * 40).to_json(tmp_path / "rows.jsonl")
    rows = ["--dataset", tmp_path / "rows.jsonl", "--prompt_column", "question", "--completion_column", "answer"]
    command = ["score", "--model", tiny_model_dir, *rows, "--tokens_per_batch", 40, "--precision", "float32"]
    command = [*map(str, command), "--eps", "1e-4"]
    groups = [*command, "--output", str(tmp_path / "groups"), "--num_processes", "3", "--sharded", "--group_size", "2"]
    run = [sys.executable, "-m", "resofilter_trainer.cli", *groups]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as said, subprocess.Popen(run, env=environment, stdout=said, stderr=said) as first:
        until = time.monotonic() + 300
        while not list((tmp_path / "groups" / "parts").rglob("scoring-float32/*.parquet")):
            assert first.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(process_of_rank(first.pid, 1), signal.SIGKILL)
        assert first.wait(300) != 0
    assert "Signal 9 (SIGKILL)" in log.read_text()
    assert not (tmp_path / "groups" / "scores.parquet").exists()
    again = subprocess.run(run, env=environment, text=True, capture_output=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    main([*command, "--output", str(tmp_path / "whole")])
    whole, found = ScoreTable.load(tmp_path / "whole"), ScoreTable.load(tmp_path / "groups")
    assert found.provenance.weights == whole.provenance.weights
    score = whole.column("score")  # up to rounding: a sharded model does not share what rows begin with
    assert np.abs(found.column("score") - score).max() < 1e-5 * np.ptp(score)


def process_of_rank(launcher: int, rank: int) -> int:
    for child in psutil.Process(launcher).children(recursive=True):
        if f"RANK={rank}".encode() in Path(f"/proc/{child.pid}/environ").read_bytes().split(b"\0"):
            return child.pid
    raise AssertionError("not started")
