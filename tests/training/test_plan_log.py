"""What a run says about its plan, and writes: each epoch's rows, steps, total steps and why."""

from __future__ import annotations

import json

import pytest
from helpers.training import rows, train

from resofilter_trainer import DataSelector, RandomSelector, ResonanceCallback
from resofilter_trainer.training.filtering import FilterConfig
from resofilter_trainer.training.plan import Batching, Plan
from resofilter_trainer.training.plan_log import PLAN_FILE, line, planned_epochs

BATCHING = Batching(rows=21, per_process=2, accumulation=2)


def plan_of(filtering: FilterConfig, epochs: float = 3, max_steps: int | None = None) -> Plan:
    return Plan(BATCHING, filtering.sizes(round(epochs), BATCHING.rows), epochs, max_steps)


def lines(filtering: FilterConfig, decided: int, epochs: float = 3, max_steps: int | None = None) -> list[str]:
    return [line(entry) for entry in planned_epochs(plan_of(filtering, epochs, max_steps), filtering, decided)]


def test_every_epoch_says_its_rows_steps_and_why():
    assert lines(FilterConfig(keep=[1.0, 0.6, 0.3]), decided=1) == [
        "epoch 1: 21 of 21 rows, 6 steps, 12 in all (no scores yet)",
        "epoch 2: 13 of 21 rows, 4 steps, 12 in all (keep 0.6)",
        "epoch 3: 7 of 21 rows, 2 steps, 12 in all (keep 0.3)",
    ]


@pytest.mark.parametrize(
    ("filtering", "decided", "expected"),
    [
        (FilterConfig(keep=0.5, when="before"), 1, ["keep 0.5"] * 3),
        (FilterConfig(keep=0.5, start_epoch=2), 1, ["no scores yet", "before start_epoch", "keep 0.5"]),
        (
            FilterConfig(keep=0.5, readmit=True, end_epoch=2),
            1,
            ["no scores yet", "keep 0.5", "all rows from here on, end_epoch"],
        ),
        (
            FilterConfig(threshold=1e-5),
            2,
            ["no scores yet", "threshold 1e-05", "threshold 1e-05 decides later, at most as many rows as now"],
        ),
        (
            FilterConfig(selector=RandomSelector(), readmit=True),
            1,
            ["no scores yet", "RandomSelector decides later", "RandomSelector decides later"],
        ),
        (
            FilterConfig(keep=DataSelector(threshold="otsu"), readmit=True),
            2,
            ["no scores yet", "threshold otsu", "threshold otsu decides later"],
        ),
        (FilterConfig(selector=DataSelector(threshold=2.5, by="loss")), 3, ["no scores yet", *["threshold 2.5"] * 2]),
        (FilterConfig(selector=DataSelector(stratify_by="num_tokens")), 3, ["no scores yet", *["DataSelector"] * 2]),
        (FilterConfig(keep=DataSelector(keep=0.25)), 1, ["no scores yet", "keep 0.25", "keep 0.25"]),
    ],
)
def test_why(filtering, decided, expected):
    assert [entry["why"] for entry in planned_epochs(plan_of(filtering), filtering, decided)] == expected


def test_a_last_epoch_in_part_has_the_steps_that_are_left():
    entries = planned_epochs(plan_of(FilterConfig(keep=1.0), epochs=2.5), FilterConfig(keep=1.0), decided=1)
    assert [entry["steps"] for entry in entries] == [6, 6]


def test_fixed_steps_say_so_where_rows_come_more_often():
    assert lines(FilterConfig(keep=0.5), decided=1, max_steps=15)[1:] == [
        "epoch 2: 11 of 21 rows, 6 steps, 15 in all (keep 0.5; max_steps fixes the steps, rows come more often)",
        "epoch 3: 11 of 21 rows, 3 steps, 15 in all (keep 0.5; max_steps fixes the steps, rows come more often)",
    ]


def test_a_run_says_its_plan_and_writes_it(tmp_path, tokenizer, capsys):
    outcome = train(tmp_path, tokenizer, ResonanceCallback(keep=0.6), dataset=rows(21), save_strategy="epoch")
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith("resofilter: epoch")]
    entries = json.loads((tmp_path / "resofilter" / PLAN_FILE).read_text())
    assert said == [f"resofilter: {line(entry)}" for entry in entries]
    assert [entry["steps"] for entry in entries] == [11, 7, 7]
    assert {entry["total_steps"] for entry in entries} == {25} == {outcome.trainer.state.global_step}
    assert all(entry["decided"] for entry in entries)
    checkpoint = str(tmp_path / "checkpoint-11")
    train(tmp_path, tokenizer, ResonanceCallback(keep=0.6), dataset=rows(21), resume=checkpoint)
    resumed = [text for text in capsys.readouterr().out.splitlines() if text.startswith("resofilter: epoch")]
    assert resumed == said[1:]


def test_the_plan_is_written_anew_when_a_threshold_has_decided(tmp_path, tokenizer, capsys):
    selector = DataSelector(threshold="otsu")
    train(tmp_path, tokenizer, ResonanceCallback(selector=selector), dataset=rows(21))
    entries = json.loads((tmp_path / "resofilter" / PLAN_FILE).read_text())
    kept = [entry["rows"] for entry in entries]
    assert kept[0] == 21 > kept[1]
    assert [entry["why"] for entry in entries] == ["no scores yet", "threshold otsu", "threshold otsu"]
