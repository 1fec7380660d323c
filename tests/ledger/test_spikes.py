"""Spikes: planted ones are found and explained, and a falling loss has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.ledgers import drawn, part, write_part

from resofilter_trainer import InputError, Ledger
from resofilter_trainer.ledger.spikes import FLOOR, NORMAL, added_loss, stands_out

ROWS, BATCH = 5000, 8


def oracle(values: list[float], window: int, least: float | None) -> tuple[list[float], list[float]]:
    """The rule of the module, one step at a time."""
    half, count = window // 2, len(values)

    def median(found: list[float]) -> float:
        finite = [each for each in found if np.isfinite(each)]
        return float(np.median(finite)) if finite else float("nan")

    level = [median(values[: 2 * i + 1] if i < half else values[i - half : i + half + 1]) for i in range(count)]
    apart = [abs(value - at) for value, at in zip(values, level, strict=True)]
    scores = []
    for i in range(count):
        noise = NORMAL * median(apart[max(i - half, 0) : i + half + 1])
        scores.append((values[i] - level[i]) / max(noise, FLOOR * abs(level[i]) if least is None else least))
    return level, scores


@pytest.mark.parametrize("count", [3, 30, 400])
@pytest.mark.parametrize("window", [11, 101])
def test_the_rule_is_the_stated_one(count, window):
    values = np.random.default_rng(count).lognormal(0, 0.4, count)
    values[count // 2] = np.nan
    for by_factor in (False, True):
        level, score = stands_out(values, window, by_factor)
        plain = np.log(values) if by_factor else values
        expected_level, expected_score = oracle(plain.tolist(), window, FLOOR if by_factor else None)
        np.testing.assert_allclose(np.log(level) if by_factor else level, expected_level)
        np.testing.assert_allclose(score, expected_score)


def test_a_falling_loss_has_no_spike_and_a_constant_one_neither():
    falling = 1 + 9 * np.exp(-np.arange(500) / 15)
    assert np.nanmax(stands_out(falling, 101)[1]) < 1
    np.testing.assert_array_equal(stands_out(np.full(50, 2.0), 101)[1], 0)


def test_what_is_not_finite_stands_out_and_what_is_not_known_does_not():
    values = np.array([1.0, 1.1, np.inf, 1.0, np.nan, 1.1] * 4)
    score = stands_out(values, 11)[1]
    np.testing.assert_array_equal(np.isinf(score), np.isinf(values))
    np.testing.assert_array_equal(np.isnan(score), np.isnan(values))


def with_planted(seed: int) -> tuple[pd.DataFrame, int]:
    """An epoch of 5,000 rows whose losses fall and have long tails, and the row of garbage in it.

    The gradient of a row is long where its loss is high, and a fifth of it points where the others' do.
    """
    draw = np.random.default_rng(seed)
    step = np.arange(ROWS) // BATCH + 1
    loss = (0.8 + 1.5 * np.exp(-step / 40)) * draw.lognormal(0, 0.35, ROWS)
    tokens = draw.integers(20, 300, ROWS)
    row = int(draw.integers(ROWS))
    loss[row], tokens[row] = 11.0, 150
    lines = pd.DataFrame({"step": step, "sample_id": np.arange(ROWS), "loss": loss, "num_tokens": tokens})
    lines["weight"] = tokens / np.bincount(step, tokens)[step]
    gradient = lines["weight"] * loss * draw.lognormal(0, 0.3, ROWS)
    norm = np.sqrt(0.2 * np.bincount(step, gradient) ** 2 + 0.8 * np.bincount(step, gradient**2))
    return lines.assign(grad_norm=norm[step]), row


def test_a_planted_row_is_named_first_in_19_of_20_seeds(tmp_path):
    named = []
    for seed in range(20):
        lines, row = with_planted(seed)
        output = tmp_path / str(seed)
        write_part(output, part(lines.to_dict("records")), 1, int(lines["step"].max()))
        spikes = Ledger.load(output).spikes()
        named.append(bool(spikes) and int(spikes[0].rows["sample_id"][0]) == row)
    assert sum(named) >= 19, named


def spiked(tmp_path: Path, **changes: Any) -> Ledger:
    """120 steps of gradients of one norm, of which the 70th has a line that is changed."""
    lines = [{**line, "grad_norm": 1.0} for line in drawn(120)]
    step = [line for line in lines if line["step"] == 70]
    for name, value in changes.items():
        for line in step if name == "grad_norm" else step[2:3]:
            line[name] = value
    write_part(tmp_path, part(lines), 1, 120)
    return Ledger.load(tmp_path)


def test_the_rows_of_a_spike_are_ranked_by_what_they_add_to_the_loss(tmp_path):
    (spike,) = spiked(tmp_path, loss=30.0).spikes()
    assert (spike.step, spike.epoch, spike.by) == (70, 0, "loss")
    rows = spike.rows
    added = rows["weight"] * (rows["loss"] - spike.loss_level)
    np.testing.assert_allclose(rows["explains"], added / (spike.loss - spike.loss_level), rtol=1e-4)
    assert rows["explains"].sum() == pytest.approx(1, rel=1e-4)
    assert rows["loss"][0] == 30
    assert rows["explains"].is_monotonic_decreasing
    assert spike.score == spike.loss_score > 6


def test_a_long_row_of_usual_loss_does_not_come_before_a_short_one_of_high_loss():
    rows = pd.DataFrame({"weight": [0.8, 0.1, 0.1], "loss": [1.1, 6.0, 0.9]})
    added = added_loss(rows, level=1.0)
    np.testing.assert_allclose(added, np.array([0.08, 0.5, -0.01]) / 0.57)
    assert (rows["weight"] * rows["loss"]).idxmax() == 0


def test_the_rows_of_a_spike_of_the_gradient_alone_are_ranked_by_the_update(tmp_path):
    (spike,) = spiked(tmp_path, grad_norm=50.0, layer_3=0.05).spikes()
    assert (spike.step, spike.by) == (70, "grad_norm")
    rows = spike.rows
    update = rows["weight"] * rows["resonance"]
    mean = update.sum() / rows["weight"].sum()
    expected = rows["weight"] * (rows["resonance"] - mean) / update.sum()
    np.testing.assert_allclose(rows["explains"], expected, rtol=1e-4, atol=1e-7)
    assert rows["resonance"].idxmax() == 0
    assert spike.score == spike.grad_norm_score


def test_a_loss_that_is_not_a_number_is_a_spike_of_the_row_that_has_it(tmp_path):
    (spike,) = spiked(tmp_path, loss=float("nan")).spikes()
    assert (spike.step, spike.by, spike.score) == (70, "loss", np.inf)
    assert np.isnan(spike.rows["loss"][0])
    assert spike.rows["explains"].tolist() == [1, 0, 0, 0]


def overflowing(steps: int = 3000, every: int = 100) -> list[dict[str, Any]]:
    """Lines of an fp16 run whose gradient scaler leaves out a step in a hundred: its norm is infinite."""
    return [{**line, "grad_norm": 1.0 if line["step"] % every else np.inf} for line in drawn(steps, rows=2)]


def test_steps_that_fp16_leaves_out_do_not_hide_a_spike_of_the_loss(tmp_path):
    lines = overflowing()
    planted = [line for line in lines if line["step"] in (1234, 1500)][1:3]  # step 1500 is one of those
    for line in planted:
        line["loss"] = 12.0
    lines = [line for line in lines if line["step"] != 701]  # no row was trained after an infinite norm
    write_part(tmp_path, part(lines), 1, 3000)
    spikes = Ledger.load(tmp_path).spikes()
    assert {spike.step for spike in spikes[:2]} == {1234, 1500}
    assert {spike.rows["sample_id"][0] for spike in spikes[:2]} == {line["sample_id"] for line in planted}
    assert [spike.by for spike in spikes if spike.step == 1500] == ["loss"]
    assert not [spike.step for spike in spikes if spike.step % 100 == 0 and spike.step != 1500]


def test_a_norm_that_is_not_finite_stands_out_where_the_loss_breaks(tmp_path):
    """Its own, or the next: the update of the first was taken, and the model is lost."""
    lines = [
        {
            **line,
            "loss": np.nan if line["step"] > 70 else line["loss"],
            "grad_norm": np.inf if line["step"] == 70 else 1.0,
        }
        for line in drawn(120)
    ]
    write_part(tmp_path, part(lines), 1, 120)
    first, second = Ledger.load(tmp_path).spikes(most=2)
    assert (first.step, first.by, first.score) == (70, "grad_norm", np.inf)
    assert (second.step, second.by) == (71, "loss")


def test_losses_and_norms_of_which_none_is_known_are_no_spikes(tmp_path):
    """As those of update="optimizer" with label smoothing."""
    lines = [{**line, "loss": np.nan, "grad_norm": 60.0 if line["step"] == 90 else 1.0} for line in drawn(120)]
    write_part(tmp_path, part(lines), 1, 120)
    assert [(spike.step, spike.by) for spike in Ledger.load(tmp_path).spikes()] == [(90, "grad_norm")]
    overflow = [{**line, "loss": np.nan} for line in overflowing(steps=300)]
    write_part(tmp_path / "fp16", part(overflow), 1, 300)
    assert Ledger.load(tmp_path / "fp16").spikes() == []
    level, score = stands_out(np.full(30, np.inf), 11, by_factor=True)
    assert np.isnan(level).all()
    assert np.isnan(score).all()


def test_both_stand_out(tmp_path):
    (spike,) = spiked(tmp_path, loss=30.0, grad_norm=50.0).spikes()
    assert spike.by == "loss and grad_norm"
    assert spike.rows["loss"][0] == 30


def test_at_most_so_many_from_the_largest_on(tmp_path):
    lines = [{**line, "grad_norm": float("nan")} for line in drawn(200)]
    for step, loss in ((50, 20.0), (90, 40.0), (150, 30.0)):
        next(line for line in lines if line["step"] == step)["loss"] = loss
    write_part(tmp_path, part(lines), 1, 200)
    ledger = Ledger.load(tmp_path)
    found = ledger.spikes()
    assert {spike.step for spike in found[:3]} == {50, 90, 150}
    assert [spike.score for spike in found] == sorted((spike.score for spike in found), reverse=True)
    assert [spike.step for spike in ledger.spikes(most=2)] == [spike.step for spike in found[:2]]
    assert ledger.spikes(threshold=1e9) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 5}, "window must be a whole number of at least 11, got 5"),
        ({"threshold": 0}, "threshold must be a finite number above 0, got 0"),
        ({"most": 0}, "most must be a whole number of at least 1, got 0"),
    ],
)
def test_settings_that_cannot_work(tmp_path, settings, says):
    with pytest.raises(InputError, match=says):
        spiked(tmp_path).spikes(**settings)
