"""The embedded demo on its base model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.commands import refused
from trl import SFTConfig

from resofilter_trainer import DataSelector, ScoreTable, Selection, score_dataset
from resofilter_trainer.cli.entry import main
from resofilter_trainer.demo.problems import make_problems
from resofilter_trainer.demo.run import BASE, KEEP, ROWS, WRONG_SHARE, make_data
from resofilter_trainer.scores.statistics import rank_correlation


def score(seed: int, rows: int = ROWS, bf16: bool = False) -> tuple[ScoreTable, np.ndarray]:
    problems = make_problems(ROWS, WRONG_SHARE, seed)[:rows]
    dataset = Dataset.from_list([{"prompt": p.prompt, "completion": p.completion} for p in problems])
    args = SFTConfig("unused", bf16=bf16, use_cpu=True, report_to="none", per_device_train_batch_size=16)
    return score_dataset(str(BASE), dataset, args=args), np.array([p.kind != "clean" for p in problems])


def test_the_base_model_is_small() -> None:
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 2_000_000


@pytest.fixture(scope="module")
def scored() -> tuple[ScoreTable, np.ndarray]:
    """The scores of seed 0, and which rows are wrong."""
    return score(0)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) for seed in range(5)])
def test_the_kept_half_has_at_most_a_quarter_of_the_wrong_share(seed: int) -> None:
    scores, wrong = score(seed, rows=ROWS if seed else 300)
    kept = DataSelector(keep=KEEP).select(scores).keep
    assert wrong[kept].mean() <= wrong.mean() / 4


@pytest.mark.slow
def test_a_bfloat16_forward_ranks_as_float32_does(scored) -> None:
    full, half = scored[0].column("score")[:500], score(0, rows=500, bf16=True)[0].column("score")
    assert rank_correlation(full, half) >= 0.99


@pytest.mark.slow
def test_scores_and_selection_are_reproducible(scored) -> None:
    first, again = scored[0], score(0)[0]
    assert again.table.equals(first.table)
    one, two = (DataSelector(keep=KEEP).select(scores) for scores in (first, again))
    assert np.array_equal(one.keep, two.keep)
    assert list(one.reason) == list(two.reason)


@pytest.fixture(scope="module")
def free_cores() -> Iterator[None]:
    """As many threads as there are cores for each process of the tests: more would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def demo(tmp_path, request) -> Path:
    """The folder of a whole demo: of one that has just been run as RESOFILTER_DEMO says, or of one that is run here."""
    folder = os.environ.get("RESOFILTER_DEMO")
    if folder is None:
        request.getfixturevalue("free_cores")
        main(["demo", "--output", str(tmp_path), "--seed", "0"])
    return Path(folder or tmp_path)


def test_stages_are_named_and_the_table_is_alone_at_the_end(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("resofilter_trainer.demo.run.train_with", lambda *_: 0.5)
    main(["demo", "--rows", "64", "--output", str(tmp_path)])
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    stages = [line for line in lines if re.match(r"\d of 6: ", line)]
    wrong = make_data(0, rows=64)[1]
    assert stages == [
        "1 of 6: scoring 64 rows",
        "2 of 6: training on all, 64 rows, and answering 400 problems",
        "3 of 6: training on random, 32 rows, and answering 400 problems",
        "4 of 6: training on kept, 32 rows, and answering 400 problems",
        f"5 of 6: training on oracle, {int((~wrong).sum())} rows, and answering 400 problems",
        "6 of 6: writing the report",
    ]
    table = next(place for place, line in enumerate(lines) if line.startswith("trained on"))
    assert [line.split()[:2] for line in lines[table + 1 : table + 5]] == [
        ["all", "64"], ["random", "32"], ["kept", "32"], ["oracle", str(int((~wrong).sum()))]
    ]  # fmt: skip
    assert lines[table + 5 :] == ["", lines[-1]]
    assert lines[-1].startswith("AUROC as detectors of the wrong rows: resonance")
    assert len(ScoreTable.load(tmp_path)) == 64


def test_a_demo_of_too_few_rows_is_refused(tmp_path, capsys) -> None:
    assert refused(capsys, "demo", "--rows", "3", "--output", tmp_path).startswith("--rows must be a whole number of")


@pytest.mark.slow
def test_the_whole_demo_writes_its_files_and_results(demo, scored) -> None:
    assert (demo / "picture.png").stat().st_size > 10_000
    assert (demo / "report.html").stat().st_size > 1_000_000
    scores, selection = ScoreTable.load(demo), Selection.load(demo)
    assert len(selection) == len(scores) == ROWS
    assert rank_correlation(scores.column("score"), scored[0].column("score")) > 0.999  # threads may differ
    assert selection.keep.sum() == KEEP * ROWS
    results = json.loads((demo / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["all", "random", "kept", "oracle"]
    assert rows["all"]["wrong_share"] == WRONG_SHARE
    assert rows["oracle"]["wrong_share"] == 0
    assert rows["kept"]["wrong_share"] == scored[1][selection.keep].mean() <= WRONG_SHARE / 4
    assert rows["kept"]["accuracy"] > rows["random"]["accuracy"]
    assert set(results["auroc"]) == {"resonance", "loss", "length"}


@pytest.mark.slow
def test_the_demo_in_one_run(tmp_path, free_cores) -> None:
    main(["demo", "--mode", "callback", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert [row["rows"] for row in rows.values()] == [[2000, 2000], [2000, 1000], [2000, 1000], [1000, 1000]]
    assert rows["training"]["wrong_share"] < 0.2 < 0.35 < rows["random"]["wrong_share"]
    assert rows["before"]["wrong_share"] <= 0.1
    scores = {row["name"]: row for row in results["scores"]}
    assert np.ptp(scores["measured"]["drop_rate_by_moment"]) > 0.3  # dropping depends on when a row was measured
    assert np.ptp(scores["corrected"]["drop_rate_by_moment"]) < 0.15
    same = {name: row["same_decision_as_before"] for name, row in scores.items()}
    assert same["before"] == 1 > same["corrected"] > same["measured"] > 0.65
    assert scores["corrected"]["rank_correlation_with_before"] > 0.6
