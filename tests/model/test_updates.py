"""Updates: what every record promises. That its two forms agree for every model family is in test_recorder.py."""

from __future__ import annotations

import dataclasses
from typing import get_args

import numpy as np
import pytest
import torch
from helpers.families import tiny
from helpers.samples import CLOSED_FORMS, collate, make_samples

from resofilter_trainer import InputError, Recorder, ResonanceConfig, literal, score_dataset, score_layers
from resofilter_trainer.config import OPTIMIZER, UpdateName
from resofilter_trainer.model import recorder
from resofilter_trainer.model.step_recorder import StepRecorder, recorders
from resofilter_trainer.model.training_recorder import TrainingRecorder
from resofilter_trainer.model.updates import (
    UPDATES,
    Update,
    check_updates,
    closed_form,
    fresh_optimizer,
    size_of_change,
    tile_sum,
    unchanged_sum,
)

ONLY_THE_CALLBACK = r"update='optimizer' is what a training run's own optimizer did: only ResonanceCallback sees it\."


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def gradient() -> torch.Tensor:
    return torch.randn(40, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_closed_form_is_the_optimizers_own_step(name, weight, gradient):
    config = ResonanceConfig(update=name, lr=0.1, eps=0.3, weight_decay=0.2)
    parameter = torch.nn.Parameter(weight.clone())
    parameter.grad = gradient.clone()
    fresh_optimizer([parameter], config).step()
    change = closed_form(config)(gradient, weight, config) * config.lr
    torch.testing.assert_close(weight - parameter.detach(), change)


@pytest.mark.parametrize("norm", ["mean_abs", "l2"])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_sum_over_tiles_is_the_size_of_the_change(name, norm, weight, gradient):
    config = ResonanceConfig(update=name, norm=norm, lr=0.1, eps=0.3)
    change = config.lr * closed_form(config)(gradient.clone(), weight, config)
    expected = change.abs().mean() if norm == "mean_abs" else change.norm()
    tiles = zip(gradient.clone().split(7), weight.split(7), strict=True)
    total = sum(float(tile_sum(own, tile, config)) for own, tile in tiles)
    assert size_of_change(np.array([total]), np.array([weight.numel()]), config)[0] == pytest.approx(float(expected))


@pytest.mark.parametrize("norm", ["mean_abs", "l2"])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_weight_without_a_gradient_does_not_change(name, norm):
    config = ResonanceConfig(update=name, norm=norm)
    assert size_of_change(np.array([unchanged_sum(12, config)]), np.array([12]), config)[0] == 0


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_a_record_says_whether_the_change_saturates_or_is_the_gradient(name, weight, gradient):
    config = ResonanceConfig(update=name)
    large = 1e3 * gradient.sign() * (1 + gradient.abs())
    change = closed_form(config)(large.clone(), weight.clamp(-1, 1), config)
    assert bool(((change.abs() - 1).abs() <= 2 * config.weight_decay).all()) == UPDATES[name].saturates
    assert torch.equal(change, large) == UPDATES[name].is_gradient


def test_only_a_runs_own_optimizer_has_no_closed_form():
    assert set(CLOSED_FORMS) == set(get_args(UpdateName)) - {OPTIMIZER}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"nameless": Update("no name in config")}, "update='nameless' is missing in config.UpdateName"),
        ({"sgd": dataclasses.replace(UPDATES["sgd"], optimizer=None)}, "update='sgd' has no optimizer"),
        ({"adamw": dataclasses.replace(UPDATES["adamw"], step=None)}, "update='adamw' has no step"),
        ({"sgd": dataclasses.replace(UPDATES["sgd"], saturates=True)}, "update='sgd' saturates in its record or"),
    ],
)
def test_an_incomplete_record_is_refused(changed, told):
    check_updates(UPDATES)
    with pytest.raises(InputError, match=told):
        check_updates({**UPDATES, **changed})


def test_a_name_without_a_record_is_refused():
    with pytest.raises(InputError, match=r"update='sgd' is missing in model\.updates\.UPDATES"):
        check_updates({name: update for name, update in UPDATES.items() if name != "sgd"})


def test_what_a_runs_own_optimizer_did_is_refused_where_there_is_no_run():
    model, samples, config = tiny("llama"), make_samples(2), ResonanceConfig(update="optimizer")
    for measure in (
        lambda: Recorder(model, config),
        lambda: TrainingRecorder(model, config),
        lambda: literal(model, samples, config),
        lambda: score_dataset("no model", None, config=config),
        lambda: score_layers("no model", None, config=config),
    ):
        with pytest.raises(InputError, match=ONLY_THE_CALLBACK):
            measure()


@pytest.mark.parametrize("name", UPDATES)
def test_a_run_is_measured_as_its_record_says(name):
    training, step = recorders(tiny("llama"), ResonanceConfig(update=name), samples=1)
    assert isinstance(training, TrainingRecorder)
    assert (training.config is not None) == (name in CLOSED_FORMS)
    assert isinstance(step, StepRecorder) == (name not in CLOSED_FORMS)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_provenance_has_every_setting_of_a_closed_form(name):
    config = ResonanceConfig(update=name, lr=0.1)
    assert config.to_json() == dataclasses.asdict(config)
    assert list(config.to_json()) == list(dataclasses.asdict(config))


def test_provenance_has_no_setting_of_a_runs_own_optimizer():
    config = ResonanceConfig(update="optimizer", n_layers=2)
    own = {"update": "optimizer", "lr": None, "eps": None, "weight_decay": None}
    assert config.to_json() == {**dataclasses.asdict(config), **own}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_an_l2_norm_is_the_same_by_tiles_and_without(name, monkeypatch):
    model, batch = tiny("llama").double(), collate(make_samples(3))
    config, found = ResonanceConfig(update=name, norm="l2"), []
    for cheaper in (True, False):
        monkeypatch.setattr(recorder, "gram_is_cheaper", lambda *sizes, cheaper=cheaper: cheaper)
        with Recorder(model, config) as record:
            found.append(record(batch).layers)
    np.testing.assert_allclose(*found, rtol=1e-12)
