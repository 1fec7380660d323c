"""Processes that share a model by FSDP2 measure and keep what one process with the whole model does."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import torchrun
from helpers.sharded import assert_same, load
from helpers.versions import older_than

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        older_than("transformers", "5.0"), reason="transformers before 5 takes FSDP2's settings from the environment"
    ),
]

EXACT = (  # in float32 or float64
    "plain",
    "double",
    "not resharded",
    "checkpointing",
    "the Trainer's checkpointing",
    "offload",
    "accumulation",
    "lora",
    "tied",
    "experts",
    "token rule",
)
BY_THREE = ("plain", "accumulation")
UNTOUCHED = (
    "plain",
    "not resharded",
    "checkpointing",
    "offload",
    "bfloat16",
    "bfloat16, checkpointing",
    "accumulation",
    "lora",
)
RESUMED = ("plain", "sharded checkpoints", "offload", "accumulation", "lora")
OPTIMIZERS = ("plain", "lora")
ROUTER = "experts and their router's loss"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The runs of one process with the whole model."""
    folder = tmp_path_factory.mktemp("whole")
    more = ("resumed", "plain", "optimizer", *OPTIMIZERS)
    torchrun("sharded", folder, "scores", "nothing", *EXACT, "bfloat16", *more, processes=1)
    return folder


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> Path:
    """The runs of two processes that share the model."""
    folder = tmp_path_factory.mktemp("two")
    more = ("untouched", *UNTOUCHED, "resumed", *RESUMED, "refused", ROUTER, "plain")
    torchrun("sharded", folder, "scores", "fsdp", *EXACT, "bfloat16", *more, processes=2)
    return folder


@pytest.fixture(scope="module")
def by_three(tmp_path_factory) -> Path:
    """The runs of three processes that share the model."""
    folder = tmp_path_factory.mktemp("three")
    torchrun("sharded", folder, "scores", "fsdp", *BY_THREE, processes=3)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, by_two) -> Path:
    """The runs of one process whose model FSDP2 holds, one of which resumes a checkpoint of two processes."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(by_two / "plain" / "whole", folder / "plain" / "whole")
    torchrun("sharded", folder, "elsewhere", "fsdp", "plain", "optimizer", *OPTIMIZERS, processes=1)
    return folder


@pytest.mark.parametrize("kind", EXACT)
def test_two_processes_measure_and_keep_what_one_does(kind, whole, by_two):
    assert_same(load(by_two, "scores", kind), load(whole, "scores", kind), 1e-9 if kind == "double" else 1e-5)


@pytest.mark.parametrize("kind", EXACT)
def test_their_ledger_has_the_losses_and_norms_that_are_logged(kind, by_two):
    found = load(by_two, "scores", kind)
    assert len(found["logged"][0]) == found["steps"] >= 6
    assert np.isfinite(found["logged"]).all()
    np.testing.assert_allclose(found["recorded"], found["logged"], rtol=1e-6)


@pytest.mark.parametrize("kind", BY_THREE)
def test_so_do_three(kind, whole, by_three):
    assert_same(load(by_three, "scores", kind), load(whole, "scores", kind), 1e-5)


def test_in_bfloat16_the_scores_agree_as_far_as_its_rounding_lets_them(whole, by_two):
    found, truth = load(by_two, "scores", "bfloat16"), load(whole, "scores", "bfloat16")
    first = np.abs(found["measured"] - truth["measured"])[truth["epoch"] == 0]
    assert first.max() <= 3e-2 * np.ptp(truth["measured"])


@pytest.mark.parametrize("kind", UNTOUCHED)
def test_with_all_rows_kept_the_weights_are_those_without_the_callback(kind, by_two):
    found = load(by_two, "untouched", kind)
    assert np.array_equal(found["with"], found["without"])
    assert np.ptp(found["with"]) > 0


@pytest.mark.parametrize("kind", RESUMED)
def test_the_end_is_the_same_from_every_checkpoint(kind, by_two):
    assert load(by_two, "resumed", kind)["checkpoints"] >= 2


def test_another_number_of_processes_resumes(by_two, alone):
    found, truth = load(alone, "elsewhere", "plain"), load(by_two, "resumed", "plain")
    assert_same(found, truth, 1e-5)
    assert np.abs(found["weights"] - truth["weights"]).max() <= 1e-5 * np.ptp(truth["weights"])


def test_the_trainer_refuses_a_checkpoint_of_another_engine(whole, by_two):
    torchrun("sharded", by_two, "elsewhere", "nothing", "plain", processes=1)
    said = str(load(by_two, "elsewhere", "plain")["said"])
    assert said.endswith("is only supported when using PyTorch FSDP")
    torchrun("sharded", whole, "elsewhere", "fsdp", "plain", processes=1)
    said = str(load(whole, "elsewhere", "plain")["said"])
    assert "No such file or directory" in said
    assert "pytorch_model_fsdp.bin" in said
    assert "\n" not in said


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizers_own_steps_are_measured_on_a_sharded_model(kind, whole, alone):
    """In one process, since a step has one row: a user's way to train a model that is offloaded by FSDP2."""
    found, truth = load(alone, "optimizer", kind), load(whole, "optimizer", kind)
    np.testing.assert_allclose(found["measured"], truth["measured"], rtol=1e-6)
    assert np.array_equal(found["keep"], truth["keep"])


def test_what_a_sharded_model_cannot_measure_is_refused(by_two):
    in_training = str(load(by_two, "refused", ROUTER)["in training"])
    assert in_training.startswith("The router's auxiliary loss is the batch's")
    said = str(load(by_two, "refused", "plain")["before"])
    assert said.startswith("ResonanceCallback cannot work with when='before' of a sharded model")
    assert "score_dataset(..., sharded=True)" in said
