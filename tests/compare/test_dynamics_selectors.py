"""Selectors by learning dynamics: one training with a ledger for all of them, its cost, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from helpers.versions import arguments_here
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from resofilter_trainer import DataSelector, InputError, Ledger, ResonanceCallback, ScoreTable
from resofilter_trainer.compare import recorded
from resofilter_trainer.compare.config import ComparisonConfig, SelectorConfig, slug
from resofilter_trainer.compare.data import make_data
from resofilter_trainer.compare.methods import check, method_of
from resofilter_trainer.compare.run import run
from resofilter_trainer.compare.selector_scores import SelectorScores
from resofilter_trainer.config import NotFiniteError
from resofilter_trainer.ledger.dynamics import DYNAMICS, RANKED
from resofilter_trainer.scores.statistics import auroc

LEARNT = SelectorConfig.of({"dynamics": "loss_slope"})


def learnt(by: str, name: str | None = None, **settings: Any) -> dict[str, Any]:
    return {"dynamics": by, "name": name or by, "settings": settings}


@pytest.fixture
def settings(tiny_settings) -> dict[str, Any]:
    """Two epochs, so that every criterion has a value."""
    training = {**tiny_settings["training"], "num_train_epochs": 2, "logging_strategy": "no"}
    return {**tiny_settings, "training": training}


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """The output folders of all trainings, in their order."""
    found, own = [], SFTTrainer.train

    def train(self, *args, **kwargs):
        found.append(Path(self.args.output_dir).parent.name)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "train", train)
    return found


def compare(settings: dict[str, Any], *selectors: Any, **changes: Any) -> dict[str, Any]:
    """The cells by selector."""
    return {
        cell.selector: cell for cell in run(ComparisonConfig.of({**settings, "selectors": [*selectors], **changes}))
    }


def scored(settings: dict[str, Any], seed: int = 0, **changes: Any) -> ScoreTable:
    """The scores that all selectors by learning dynamics share."""
    config = ComparisonConfig.of({**settings, "selectors": ["full"], **changes})
    return SelectorScores(config, settings["model"], seed, make_data(config, seed)).of(LEARNT).table


def folder_of(settings: dict[str, Any], seed: int = 0) -> Path:
    return Path(settings["output"]) / "scores" / slug(settings["model"]) / f"dynamics-seed-{seed}"


# ---- the settings


@pytest.mark.parametrize("by", RANKED)
def test_every_criterion_is_a_selector_with_its_own_end(by):
    chosen = SelectorConfig.of({"dynamics": by})
    check(ComparisonConfig([chosen]))
    assert (chosen.name, chosen.method) == (by, "dynamics")
    assert chosen == SelectorConfig("dynamics", by, settings={"by": by})
    assert method_of(chosen).policy(0.5, 0, chosen) == DataSelector(keep=0.5, by=by)
    other = SelectorConfig.of(learnt(by, drop="smallest"))
    assert method_of(other).policy(0.5, 0, other) == DataSelector(keep=0.5, by=by, drop="smallest")
    assert method_of(chosen).epochs == (1 if by in ("visits", "mean_loss", "s2l") else 2)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"method": "dynamics", "name": "mine"}, "In the selector 'mine': The method 'dynamics' needs a setting 'by'"),
        ({"dynamics": "los_slope"}, "In the selector 'los_slope': by must be one of .* Did you mean 'loss_slope'?"),
        ({"dynamics": "trajectory"}, "by must be one of "),
        ({"dynamics": ["loss_std", "s2l"]}, "by must be one of "),
        (
            {"dynamics": "loss_std", "settings": {"drop": "both"}},
            "drop must be one of 'largest', 'smallest', got 'both'",
        ),
        (
            {"dynamics": "loss_std", "settings": {"keep": 1}},
            "has no setting 'keep'. Its settings are: by, drop, length_out",
        ),
        ({"dynamics": "loss_std", "settings": 3}, "A selector's settings must be a mapping, got 3"),
        (
            {"dynamics": "loss_std", "method": "signal"},
            "A selector with 'dynamics' has the method 'dynamics': leave me",
        ),
        ({"dynamics": "loss_std", "drop": "largest"}, "'dynamics' has its end to drop in its settings: {by: mean_loss"),
        ({"dynamics": "loss_std", "size": 3}, "Unknown setting 'size' of a selector"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(entry, message, settings, tmp_path):
    with pytest.raises(InputError, match=message):
        compare(settings, "full", entry)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("training", "epochs"), [({"num_train_epochs": 1}, "1"), ({"max_steps": 5}, "1.66667")])
def test_a_training_too_short_for_a_criterion_is_refused_before_it_begins(training, epochs, settings, trainings):
    short = {**settings["training"], **training}
    with pytest.raises(
        InputError, match=rf"'forgetting' needs the losses .* 2 epochs, and the training has {epochs}: "
    ):
        compare(settings, "full", learnt("mean_loss"), learnt("forgetting"), training=short)
    with pytest.raises(InputError, match=r"'s2l' needs .* 1 epoch, and the training has 0.333.* to 1 or more\.$"):
        compare(settings, "full", learnt("s2l"), training={**short, "max_steps": 1})
    assert trainings == []
    assert not (Path(settings["output"]) / "cells").exists()


# ---- the scores


@pytest.mark.slow
def test_all_criteria_are_of_one_training_and_each_ranks_by_its_column(settings, trainings):
    selectors = [learnt("loss_std"), learnt("mean_loss", "out", length_out=True)]
    cells = run(ComparisonConfig.of({**settings, "selectors": ["full", *selectors], "equal_flops": True}))
    found = {cell.selector: cell for cell in cells if cell.budget == "epochs"}
    assert trainings == ["out", "dynamics-seed-0", "out", "out"]
    table, wrong = ScoreTable.load(folder_of(settings)), np.arange(12) % 2 == 1
    policies = {
        "loss_std": DataSelector(0.5, by="loss_std", drop="smallest"),
        "out": DataSelector(0.5, by="mean_loss", drop="largest", length_out=True),
    }
    for name, policy in policies.items():
        assert found[name].wrong_kept == pytest.approx(wrong[policy.select(table).keep].mean())
        assert found[name].selection_flops == pytest.approx(found["full"].training_flops)
        assert found[name].selection_seconds == found["out"].selection_seconds > 0
        assert found[name].scored_by == settings["model"]
    assert found["loss_std"].auroc == pytest.approx(1 - auroc(table.column("loss_std"), wrong))
    assert found["out"].method == "dynamics by=mean_loss length_out=True"
    equal = [cell.failure for cell in cells if cell.budget == "flops"]
    assert equal == ["selecting alone costs as much as training on all rows"] * 2


def test_the_training_is_the_one_on_all_rows(settings, tmp_path, own_rows):
    """Its ledger is that of SFTTrainer with the callback, on the rows as text."""
    scores = scored(settings, seed=3)
    model, tokenizer = (each.from_pretrained(settings["model"]) for each in (AutoModelForCausalLM, AutoTokenizer))
    rows = Dataset.from_json(own_rows).rename_columns({"q": "prompt", "a": "completion"})
    own = {**settings["training"], "bf16": False, "report_to": "none", "save_strategy": "no"}
    args = SFTConfig(**arguments_here({**own, "output_dir": str(tmp_path / "by-hand"), "seed": 3}))
    rows = rows.select_columns(["prompt", "completion"])
    SFTTrainer(model, args, None, rows, processing_class=tokenizer, callbacks=[ResonanceCallback(keep=1.0)]).train()
    mine, truth = Ledger.load(folder_of(settings, seed=3) / "trainer"), Ledger.load(tmp_path / "by-hand")
    assert mine.to_arrow().equals(truth.to_arrow())
    for name in DYNAMICS:
        np.testing.assert_array_equal(scores.column(name), truth.dynamics().column(name))
    assert not [*(folder_of(settings, seed=3) / "trainer").glob("checkpoint-*")]


@pytest.mark.slow
def test_a_killed_training_resumes_after_its_last_epoch(settings, monkeypatch, tmp_path):
    whole = scored(settings)
    own, ended = ResonanceCallback.on_step_end, []

    def on_step_end(self, args, state, control, **kwargs):
        own(self, args, state, control, **kwargs)
        ended.append(state.global_step)
        if len(ended) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResonanceCallback, "on_step_end", on_step_end)
    again = {**settings, "output": str(tmp_path / "again")}
    with pytest.raises(KeyboardInterrupt):
        scored(again)
    resumed = scored(again)
    assert ended == [1, 2, 3, 4, 5, 4, 5, 6]
    assert resumed.table.equals(whole.table)
    ledgers = [Ledger.load(folder_of(each) / "trainer").to_arrow() for each in (settings, again)]
    assert ledgers[0].equals(ledgers[1])


@pytest.mark.slow
def test_a_finished_training_is_not_repeated_and_each_seed_has_its_own(settings, trainings):
    first = compare(settings, learnt("loss_slope"))["loss_slope"]
    del trainings[:]
    found = compare(settings, learnt("loss_slope"), learnt("forgetting"))
    assert trainings == ["out"]
    assert found["loss_slope"] == first
    scored(settings)
    scored(settings, seed=1)
    assert trainings == ["out", "dynamics-seed-1"]


def test_scores_of_another_training_are_refused(settings):
    scored(settings)
    with pytest.raises(InputError, match=r"dynamics-seed-0' holds scores made from .* they differ in training \("):
        scored(settings, training={**settings["training"], "learning_rate": 2e-3})


@pytest.mark.slow
def test_another_model_scores(settings, tiny_llama, tokenizer, tmp_path):
    """As S2L does, by the trajectories of a small model."""
    small = tmp_path / "small"
    tiny_llama(seed=1).save_pretrained(small)
    tokenizer.save_pretrained(small)
    found = scored(settings, score_model=str(small))
    assert (Path(settings["output"]) / "scores" / slug(str(small)) / "dynamics-seed-0").is_dir()
    assert (found.column("mean_loss") != scored(settings).column("mean_loss")).all()


def test_a_row_that_no_step_trained_has_a_reason(settings):
    """Whole batches alone are trained, in one epoch."""
    training = {**settings["training"], "num_train_epochs": 1, "dataloader_drop_last": True}
    found = scored(settings, training={**training, "per_device_train_batch_size": 5})
    assert found.scored.sum() == np.isfinite(found.column("s2l")).sum() == 10
    assert {*found.reasons} == {None, "not trained in the training that tells how rows are learnt"}


def test_a_training_that_diverges_is_told_of(settings, monkeypatch):
    real = recorded.train_with_ledger

    def broken(*args):
        ledger = real(*args)
        whole = ledger.to_arrow()
        loss = whole["loss"].to_numpy().copy()
        loss[-1] = np.nan
        place = whole.column_names.index("loss")
        monkeypatch.setattr(ledger, "batches", lambda columns: iter([whole, whole.set_column(place, "loss", [loss])]))
        return ledger

    monkeypatch.setattr(recorded, "train_with_ledger", broken)
    with pytest.raises(NotFiniteError, match="Training on all rows gave losses that are not finite: try a smaller"):
        scored(settings)
    again = []
    monkeypatch.setattr(SFTTrainer, "training_step", lambda self, *args, **kwargs: again.append(args))
    with pytest.raises(NotFiniteError):
        scored(settings)
    assert again == []
