"""One, two and three processes give the same scores, bit for bit; and none waits for a lost one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.scoring import ROWS

from resofilter_trainer import DataSelector, ScoreTable
from resofilter_trainer.cli.entry import main
from resofilter_trainer.io import digest


def resofilter(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "resofilter_trainer.cli", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


@pytest.fixture
def command(tmp_path, tiny_model_dir) -> list[object]:
    Dataset.from_list(ROWS).to_json(tmp_path / "rows.jsonl")
    rows = ["--dataset", tmp_path / "rows.jsonl", "--prompt_column", "question", "--completion_column", "answer"]
    named = ["--tokens_per_batch", 40, "--precision", "float32"]  # auto would time both
    return ["score", "--model", tiny_model_dir, *rows, *named]


def scores_of(command: list[object], output: Path, *options: object) -> ScoreTable:
    """The scores of one process, this one."""
    assert torch.get_num_threads() == 1  # as in the processes that are started
    main([*map(str, [*command, *options]), "--output", str(output)])
    return ScoreTable.load(output)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_number_of_processes_gives_the_same_scores(processes, command, tmp_path):
    command += ["--signals", "all"]
    done = resofilter(*command, "--output", tmp_path / "several", "--num_processes", processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Scores: ") == 1
    one, several = scores_of(command, tmp_path / "one"), ScoreTable.load(tmp_path / "several")
    assert several.table.equals(one.table)
    assert np.array_equal(DataSelector().select(several).keep, DataSelector().select(one).keep)


@pytest.mark.slow
def test_what_two_processes_read_together_has_the_same_scores(tiny_model_dir, tmp_path, monkeypatch):
    """Here the prepared rows are kept beside a copy of the dataset, as the first start would else spare the second."""
    rows = [{**row, "answer": "" if i == 3 else row["answer"]} for i, row in enumerate([*ROWS, ROWS[1]])]
    for name in ("one", "two"):
        Dataset.from_list(rows).save_to_disk(tmp_path / name)
    for shard in range(3):
        Dataset.from_list(rows).shard(3, shard).to_parquet(tmp_path / "files" / f"{shard}.parquet")
    options = ["--model", tiny_model_dir, "--prompt_column", "question", "--completion_column", "answer"]
    options += ["--tokens_per_batch", 40, "--precision", "float32", "--drop_duplicates", "--drop_empty"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command += ["-m", "helpers.prepared_together", "score", "--dataset", tmp_path / "two"]
    command = [*command, "--output", tmp_path / "several", *options]
    stream = ["score", "--streaming", "--dataset", tmp_path / "files", *options]
    command += ["then", *stream, "--output", tmp_path / "streamed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len([*(tmp_path / "two").glob("resofilter-*/*/tokens-*.arrow")]) > 2
    monkeypatch.setattr(digest, "BLOCK", 3)
    one = scores_of(["score", "--dataset", tmp_path / "one", *options], tmp_path / "alone")
    several = ScoreTable.load(tmp_path / "several")
    assert several.table.equals(one.table)
    assert several.provenance.differences(one.provenance) == []
    assert several.provenance.source["content"] == one.provenance.source["content"]
    read = sorted(int(rows) for rows in re.findall("([0-9]+) rows read", done.stderr))
    assert read == [10, 10, 11, 11, 11]  # both processes read the first piece, and one of them each shard
    scores_of(stream, tmp_path / "stream")
    paths = [tmp_path / name / "scores.parquet" for name in ("streamed", "stream")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.slow
def test_a_sharded_model_gives_the_scores_of_a_whole_one(command, tmp_path):
    command += ["--signals", "all"]
    options = ["--output", tmp_path / "sharded", "--num_processes", 2, "--eps", 1e-4, "--sharded"]
    done = resofilter(*command, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, sharded = scores_of(command, tmp_path / "whole", "--eps", 1e-4), ScoreTable.load(tmp_path / "sharded")
    score = whole.column("score")  # up to rounding: a sharded model does not share what rows begin with
    assert np.abs(sharded.column("score") - score).max() < 1e-5 * np.ptp(score)
    assert np.array_equal(DataSelector().select(sharded).keep, DataSelector().select(whole).keep)
    for name in ("resonance_l2", "entropy", "conflict", "rank", "el2n", "ifd", "loss_alone", "jitter"):
        np.testing.assert_allclose(sharded.column(name), whole.column(name), rtol=1e-4)


def test_one_process_has_nothing_to_share_a_model_with(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*map(str, command), "--output", str(tmp_path / "out"), "--sharded"])
    assert "--sharded is for several processes: pass --num_processes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["el2n", "donod"])
def test_criteria_of_other_selectors_give_the_same_scores_in_two_processes(criterion, command, tmp_path):
    options = ["--criterion", criterion]
    assert resofilter(*command, *options, "--output", tmp_path / "two", "--num_processes", 2).returncode == 0
    assert ScoreTable.load(tmp_path / "two").table.equals(scores_of(command, tmp_path / "one", *options).table)


@pytest.mark.slow
def test_an_error_of_the_input_is_one_line_and_not_0(command, tmp_path):
    done = resofilter(*command, "--output", tmp_path / "out", "--num_processes", 2, "--up_projection", "nothing")
    assert done.returncode != 0
    said = re.findall(r"^resofilter score( \(process 1\))?: error: (.*)$", done.stderr, flags=re.MULTILINE)
    assert said  # the launcher may stop the second process before it prints the same
    assert len({process for process, _ in said}) == len(said)
    assert all("matches nothing" in message for _, message in said)


@pytest.mark.parametrize("processes", ["0", "-1"])
def test_there_must_be_a_process(processes, command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, command), "--output", "out", "--num_processes", processes])
    assert ended.value.code == 2
    assert "--num_processes must be a whole number of at least 1" in capsys.readouterr().err
