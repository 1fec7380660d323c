"""The embedded demo on its base model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from resofilter_trainer import DataSelector, ScoreTable, Selection, score_dataset
from resofilter_trainer.cli.entry import main
from resofilter_trainer.demo.problems import make_problems
from resofilter_trainer.demo.run import BASE, KEEP, ROWS, WRONG_SHARE
from resofilter_trainer.scores.statistics import rank_correlation


def score(seed: int, rows: int = ROWS, bf16: bool = False) -> tuple[ScoreTable, np.ndarray]:
    problems = make_problems(rows, WRONG_SHARE, seed)
    dataset = Dataset.from_list([{"prompt": p.prompt, "completion": p.completion} for p in problems])
    args = SFTConfig("unused", bf16=bf16, use_cpu=True, report_to="none", per_device_train_batch_size=16)
    return score_dataset(str(BASE), dataset, args=args), np.array([p.kind != "clean" for p in problems])


def test_the_base_model_is_small() -> None:
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 2_000_000


@pytest.mark.parametrize("seed", range(5))
def test_the_kept_half_has_at_most_a_quarter_of_the_wrong_share(seed: int) -> None:
    scores, wrong = score(seed)
    kept = DataSelector(keep=KEEP).select(scores).keep
    assert wrong[kept].mean() <= wrong.mean() / 4


def test_a_bfloat16_forward_ranks_as_float32_does() -> None:
    full, half = (score(0, rows=500, bf16=bf16)[0].column("score") for bf16 in (False, True))
    assert rank_correlation(full, half) >= 0.99


@pytest.fixture
def every_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_whole_demo_writes_its_files_and_is_reproducible(tmp_path, every_core) -> None:
    found = []
    for folder in (tmp_path / "first", tmp_path / "again"):
        main(["demo", "--output", str(folder), "--seed", "3"])
        found.append((folder / "results.json").read_text())
        assert (folder / "picture.png").stat().st_size > 10_000
        assert (folder / "report.html").stat().st_size > 1_000_000
        assert len(Selection.load(folder)) == len(ScoreTable.load(folder)) == ROWS
    assert found[0] == found[1]
    results = json.loads(found[0])
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["all", "random", "kept", "oracle"]
    assert rows["all"]["wrong_share"] == WRONG_SHARE
    assert rows["oracle"]["wrong_share"] == 0
    assert rows["kept"]["accuracy"] > rows["random"]["accuracy"]
    assert set(results["auroc"]) == {"resonance", "loss", "length"}


@pytest.mark.slow
def test_the_demo_in_one_run(tmp_path, every_core) -> None:
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
