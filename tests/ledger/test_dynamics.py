"""Criteria of learning dynamics against their plain formulas, and S2L against its procedure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.ledgers import Line, drawn, part, write_ledger, write_part
from helpers.tables import make_provenance, make_scores

from resofilter_trainer import DataSelector, InputError, Ledger, ScoreTable
from resofilter_trainer.ledger import trajectories as trajectories_module
from resofilter_trainer.ledger.dynamics import DYNAMICS, balanced
from resofilter_trainer.ledger.trajectories import Trajectories, clusters_of, filled, trajectories_of
from resofilter_trainer.scores.drift import without_drift
from resofilter_trainer.selecting.results import NAME

NONE = float("nan")


def trajectories(rows: int = 300, epochs: int = 5, seed: int = 0) -> Trajectories:
    """Falling losses; a fifth of the visits is missing, one row has a single visit and one has none."""
    draw = np.random.default_rng(seed)
    loss = 2 * np.exp(-0.4 * np.arange(epochs)) + draw.lognormal(-1, 0.5, (rows, epochs))
    step = np.stack([epoch * rows + draw.permutation(rows) for epoch in range(epochs)], axis=1) + 1.0
    missing = draw.random((rows, epochs)) < 0.2
    missing[0], missing[1] = True, np.arange(epochs) != 2
    return Trajectories(np.where(missing, NONE, loss), np.where(missing, NONE, step))


def drop_of(found: Trajectories) -> dict[int, dict[int, float]]:
    """Each row's losses without drift, by epoch."""
    columns = [without_drift(loss, step) for loss, step in zip(found.loss.T, found.step.T, strict=True)]
    return {row: {e: c[row] for e, c in enumerate(columns) if np.isfinite(c[row])} for row in range(len(found.loss))}


def oracle(name: str, found: Trajectories, row: int) -> float:
    """The formula of the module, for one row."""
    epochs = [epoch for epoch in range(found.loss.shape[1]) if np.isfinite(found.loss[row, epoch])]
    x, s = [found.loss[row, e] for e in epochs], [found.step[row, e] for e in epochs]
    if name == "visits":
        return len(x)
    if name == "mean_loss":
        return sum(x) / len(x) if x else NONE
    if len(x) < 2:
        return NONE
    if name == "loss_slope":
        return float(np.polyfit(epochs, x, 1)[0])
    if name == "loss_std":
        return float(np.std(x))
    if name == "forgetting":
        return max(0.0, *(x[j] - x[i] for j in range(len(x)) for i in range(j)))
    if name == "loss_area":
        return sum((s[i + 1] - s[i]) * (x[i] + x[i + 1]) / 2 for i in range(len(x) - 1)) / (s[-1] - s[0])
    levels = drop_of(found)[row]
    return levels[epochs[0]] - levels[epochs[-1]]


@pytest.mark.parametrize("name", DYNAMICS)
def test_a_criterion_is_its_formula(name):
    found = trajectories(rows=120)
    values = DYNAMICS[name].of(found)
    np.testing.assert_allclose(values, [oracle(name, found, row) for row in range(120)], rtol=1e-9, atol=1e-12)
    assert np.isfinite(values).sum() > 100


def test_what_an_epoch_teaches_is_no_drop_of_a_row():
    """All rows fall alike within an epoch, and between two: no row's drop depends on when it was trained."""
    draw = np.random.default_rng(0)
    level = draw.lognormal(0, 0.3, 2000)
    step = np.stack([epoch * 2000 + draw.permutation(2000) for epoch in range(2)], axis=1) + 1.0
    found = Trajectories(level[:, None] * np.exp(-step / 2000), step)
    late = step[:, 0] - step[:, 1]
    plain = found.loss[:, 0] - found.loss[:, 1]
    assert abs(np.corrcoef(plain / level, late)[0, 1]) > 0.8
    assert abs(np.corrcoef(DYNAMICS["loss_drop"].of(found) / level, late)[0, 1]) < 0.2


def test_visits_are_collected_from_pieces_and_repeats():
    def line(step: int, epoch: int, row: int, loss: float, tokens: int) -> Line:
        return {"step": step, "epoch": epoch, "sample_id": row, "loss": loss, "num_tokens": tokens}

    lines = [
        line(1, 0, 0, 1.0, 10),
        line(2, 0, 0, 4.0, 30),  # a second piece
        line(2, 0, 2, 3.0, 5),
        line(3, 1, 2, NONE, 0),  # no token to learn
        line(3, 1, 0, 2.0, 40),
    ]
    for tables in ([part(lines)], [part(lines[:2]), part(lines[2:])], [part([each]) for each in lines]):
        found = trajectories_of(tables, 3)
        np.testing.assert_array_equal(found.loss, [[3.25, 2.0], [NONE, NONE], [3.0, NONE]])
        np.testing.assert_array_equal(found.step, [[1, 3], [NONE, NONE], [2, NONE]])


def test_missing_visits_have_the_loss_of_the_one_before():
    values = np.array([[NONE, 1, NONE, 2], [NONE, NONE, NONE, NONE], [1, 2, 3, NONE]])
    np.testing.assert_array_equal(filled(values), [[1, 1, 1, 2], [NONE] * 4, [1, 2, 3, 3]])


# ---- clusters


def blobs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    of = np.repeat(np.arange(4), [10, 40, 90, 60])
    centres = np.array([[0, 0, 0], [9, 9, 9], [9, 0, 9], [0, 9, 0]])
    return centres[of] + 0.1 * draw.standard_normal((200, 3)), of


def test_groups_that_lie_apart_are_the_clusters():
    points, of = blobs()
    found = clusters_of(points, 4, seed=0)
    assert len({*zip(found.tolist(), of.tolist(), strict=True)}) == len({*found.tolist()}) == 4
    np.testing.assert_array_equal(found, clusters_of(points, 4, seed=0))


def test_every_point_is_in_the_cluster_whose_mean_is_nearest():
    points = trajectories(400).loss[:, :3]
    points = points[np.isfinite(points).all(axis=1)]
    found = clusters_of(points, 7, seed=3)
    means = np.stack([points[found == cluster].mean(axis=0) for cluster in range(7)])
    distance = ((points[:, None] - means[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(found, distance.argmin(axis=1))


def test_fewer_different_trajectories_than_clusters():
    points = np.repeat([[1.0, 2.0], [3.0, 4.0]], 5, axis=0)
    assert len({*clusters_of(points, 100, seed=0).tolist()}) == 2


def test_centres_of_many_rows_are_found_from_a_part_of_them(monkeypatch):
    draw = np.random.default_rng(0)
    of = draw.integers(3, size=120_000)
    points = np.array([[0.0, 0.0], [9.0, 9.0], [9.0, 0.0]])[of] + 0.1 * draw.standard_normal((120_000, 2))
    sizes, nearest = [], trajectories_module._nearest
    monkeypatch.setattr(
        trajectories_module, "_nearest", lambda some, centres: sizes.append(len(some)) or nearest(some, centres)
    )
    found = clusters_of(points, 3, seed=0)
    assert len({*zip(found.tolist(), of.tolist(), strict=True)}) == len({*found.tolist()}) == 3
    assert {*sizes[:-1]} == {100_000}
    assert sizes[-1] == 120_000
    np.testing.assert_array_equal(found, clusters_of(points, 3, seed=0))


def s2l(cluster: np.ndarray, budget: int) -> list[int]:
    """How many rows S2L takes from each cluster: from the smallest on, an equal part of what is left of the budget."""
    sizes, taken = np.bincount(cluster), np.zeros(cluster.max() + 1, int)
    for done, at in enumerate(np.argsort(sizes, kind="stable")):
        taken[at] = min(sizes[at], (budget - taken.sum()) // (len(sizes) - done))
    return taken.tolist()


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.9])
def test_keeping_the_smallest_s2l_is_s2l(keep):
    points, of = blobs()
    cluster, place = balanced(points, 4, seed=1)
    kept = np.argsort(place)[: int(200 * keep)]
    taken = np.bincount(of[kept], minlength=4)
    np.testing.assert_allclose(taken, s2l(of, int(200 * keep)), atol=1)
    assert len({*zip(cluster.tolist(), of.tolist(), strict=True)}) == 4


# ---- as scores


def saved(tmp_path: Path, rows: int = 60, **changes: Any) -> tuple[Ledger, ScoreTable]:
    """A run of three epochs, of which the row 7 was never trained."""
    lines = [line for line in drawn(45, epochs=3) if line["sample_id"] != 7]
    write_ledger(tmp_path, lines)
    scores = make_scores([None if row == 7 else float(row) for row in range(rows)], **changes)
    scores.save(tmp_path / NAME)
    return Ledger.load(tmp_path), scores


def test_the_run_s_scores_get_the_columns(tmp_path):
    ledger, scores = saved(tmp_path)
    found = ledger.dynamics(clusters=4)
    assert found.table.column_names == [*scores.table.column_names, *DYNAMICS, "trajectory", "s2l"]
    assert found.table.select(scores.table.column_names).equals(scores.table)
    assert found.provenance == scores.provenance
    assert np.isnan(found.column("mean_loss")[7])
    life = ledger.row(11)
    assert found.column("mean_loss")[11] == pytest.approx(life["loss"].mean())
    assert found.column("forgetting")[11] == pytest.approx(
        oracle("forgetting", trajectories_of(ledger.batches(), 60), 11)
    )
    assert [found.direction(name) for name in ("mean_loss", "loss_std", "s2l")] == ["largest", "smallest", "largest"]
    again = ledger.dynamics(clusters=4)
    assert found.table.equals(again.table)


@pytest.mark.parametrize("name", [*DYNAMICS, "s2l"])
def test_a_selector_takes_every_column(tmp_path, name):
    found = saved(tmp_path)[0].dynamics()
    found.save(tmp_path / "dynamics")
    selection = DataSelector(keep=0.5, by=name).select(ScoreTable.load(tmp_path / "dynamics"))
    values = found.column(name)
    kept, dropped = values[selection.keep], values[~selection.keep & np.isfinite(values)]
    assert kept.max() <= dropped.min() if found.direction(name) == "largest" else kept.min() >= dropped.max()
    assert not selection.keep[7]


@pytest.mark.parametrize("by", ["trajectory", "-trajectory", ["score", "trajectory"], {"trajectory": 1, "score": 1}])
def test_the_number_of_a_cluster_is_nothing_to_rank_by(tmp_path, by):
    saved(tmp_path)[0].dynamics().save(tmp_path / "dynamics")
    found = ScoreTable.load(tmp_path / "dynamics")
    assert found.direction("trajectory") is None
    with pytest.raises(InputError, match=r"'trajectory' has numbers of clusters, whose order means nothing"):
        DataSelector(keep=0.5, by=by).select(found)


def test_an_epoch_that_has_not_ended_counts_for_the_rows_it_has_trained(tmp_path):
    lines = [line for line in drawn(30, epochs=2) if line["step"] <= 20]
    write_part(tmp_path, part(lines), 1, 20)
    make_scores([float(row) for row in range(60)]).save(tmp_path / NAME)
    twice = {line["sample_id"] for line in lines if line["epoch"] == 1}
    visits = Ledger.load(tmp_path).dynamics().column("visits")
    assert visits.tolist() == [2 if row in twice else 1 for row in range(60)]


def test_columns_of_the_scores_of_a_part_of_the_rows(tmp_path):
    provenance = make_provenance(rows=60)
    write_ledger(tmp_path, drawn(45, epochs=3))
    make_scores([1.0, 2.0], ids=[50, 3], provenance=provenance).save(tmp_path / NAME)
    ledger = Ledger.load(tmp_path)
    losses = [ledger.row(row)["loss"].mean() for row in (50, 3)]
    np.testing.assert_allclose(ledger.dynamics().column("mean_loss"), losses, rtol=1e-6)


def test_a_run_whose_first_epoch_has_not_ended(tmp_path):
    ledger = Ledger.load(write_ledger(tmp_path, drawn(5)))
    assert ledger.scores() is None
    with pytest.raises(InputError, match=r"has no scores\.parquet, which a run writes at the end of each epoch"):
        ledger.dynamics()


def test_scores_of_another_run(tmp_path):
    with pytest.raises(InputError, match=r"The ledger has row \d+, and the scores are of 20 rows: they are of diff"):
        saved(tmp_path, rows=20)[0].dynamics()


def test_no_row_has_a_loss(tmp_path):
    write_part(tmp_path, part([{"step": 1, "num_tokens": 0, "loss": NONE, "weight": 0.0}]), 1, 1)
    make_scores([1.0]).save(tmp_path / NAME)
    with pytest.raises(InputError, match="no row with a finite loss"):
        Ledger.load(tmp_path).dynamics()


def test_a_row_trained_once_has_a_mean_and_no_slope(tmp_path):
    ledger = Ledger.load(write_ledger(tmp_path, drawn(5)))
    make_scores([float(row) for row in range(20)]).save(tmp_path / NAME)
    found = ledger.dynamics()
    assert np.isfinite(found.column("mean_loss")).all()
    assert np.isnan(found.column("loss_slope")).all()
    selection = DataSelector(keep=0.5, by="loss_slope").select(found)
    assert {*selection.reason} == {"loss_slope is nan"}
