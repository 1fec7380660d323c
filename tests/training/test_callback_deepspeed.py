"""Processes that train by DeepSpeed's engine measure and keep what one process without it does."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import torchrun
from helpers.sharded import assert_same, load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]

EXACT = (
    "ZeRO-0, plain",
    "ZeRO-1, plain",
    "ZeRO-1, accumulation",
    "ZeRO-2, plain",
    "ZeRO-2, double",
    "ZeRO-2, accumulation",
    "ZeRO-2, the Trainer's checkpointing",
    "ZeRO-2, lora",
    "ZeRO-2, tied",
    "ZeRO-2, experts",
    "ZeRO-2, offload",
    "ZeRO-2, the engine's optimizer",
    "ZeRO-2, packing",
    "ZeRO-2, stream",
    "ZeRO-3, plain",
    "ZeRO-3, double",
    "ZeRO-3, accumulation",
    "ZeRO-3, the Trainer's checkpointing",
    "ZeRO-3, tied",
    "ZeRO-3, offload of the weights",
    "ZeRO-3, stream",
)
ROUNDED = ("ZeRO-2, bfloat16", "ZeRO-3, bfloat16")
BY_THREE = ("ZeRO-2, accumulation", "ZeRO-3, plain")
UNTOUCHED = (
    "ZeRO-0, plain",
    "ZeRO-1, plain",
    "ZeRO-2, accumulation",
    "ZeRO-2, lora",
    "ZeRO-2, bfloat16",
    "ZeRO-2, the engine's optimizer",
    "ZeRO-3, accumulation",
    "ZeRO-3, bfloat16",
    "ZeRO-3, the Trainer's checkpointing",
    "ZeRO-3, offload of the weights",
)
RESUMED = ("ZeRO-1, plain", "ZeRO-2, accumulation", "ZeRO-2, the engine's optimizer", "ZeRO-3, plain")


def without_stage(kind: str) -> str:
    return kind.split(", ", 1)[1]


@pytest.fixture(scope="module", autouse=True)
def on_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


def runs(folder: Path, what: str, engine: str, *kinds: str, processes: int) -> Path:
    folder.mkdir()
    torchrun("sharded", folder, what, engine, *kinds, processes=processes)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The runs of one process without DeepSpeed."""
    kinds = sorted({without_stage(each) for each in EXACT})
    return runs(tmp_path_factory.mktemp("whole") / "runs", "scores", "nothing", *kinds, processes=1)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> Path:
    """The runs of two processes."""
    return runs(tmp_path_factory.mktemp("two") / "runs", "scores", "deepspeed", *EXACT, *ROUNDED, processes=2)


@pytest.mark.parametrize("kind", EXACT)
def test_two_processes_measure_and_keep_what_one_does(kind, whole, by_two):
    tolerance = 1e-9 if "double" in kind else 1e-5
    assert_same(load(by_two, "scores", kind), load(whole, "scores", without_stage(kind)), tolerance)


@pytest.mark.parametrize("kind", EXACT)
def test_their_ledger_has_the_losses_and_norms_that_are_logged(kind, by_two):
    found = load(by_two, "scores", kind)
    assert len(found["logged"][0]) == found["steps"] >= 6
    assert np.isnan(found["logged"]).any() == kind.startswith("ZeRO-0")  # whose engine tells no norm
    np.testing.assert_allclose(found["recorded"], found["logged"], rtol=1e-6)


def test_so_do_three(whole, tmp_path):
    by_three = runs(tmp_path / "three", "scores", "deepspeed", *BY_THREE, processes=3)
    for kind in BY_THREE:
        assert_same(load(by_three, "scores", kind), load(whole, "scores", without_stage(kind)), 1e-5)


def test_in_bfloat16_the_scores_agree_as_far_as_its_rounding_lets_them(by_two, tmp_path):
    """With one process of the same engine, which rounds the weights: the Trainer's own bf16 does not."""
    by_one = runs(tmp_path / "one", "scores", "deepspeed", *ROUNDED, processes=1)
    for kind in ROUNDED:
        found, truth = load(by_two, "scores", kind), load(by_one, "scores", kind)
        first = np.abs(found["measured"] - truth["measured"])[truth["epoch"] == 0]
        assert first.max() <= 3e-2 * np.ptp(truth["measured"])


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> Path:
    return runs(tmp_path_factory.mktemp("untouched") / "runs", "untouched", "deepspeed", *UNTOUCHED, processes=2)


@pytest.mark.parametrize("kind", UNTOUCHED)
def test_with_all_rows_kept_the_weights_are_those_without_the_callback(kind, untouched):
    found = load(untouched, "untouched", kind)
    assert np.array_equal(found["with"], found["without"])
    assert np.ptp(found["with"]) > 0


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    return runs(tmp_path_factory.mktemp("resumed") / "runs", "resumed", "deepspeed", *RESUMED, processes=2)


@pytest.mark.parametrize("kind", RESUMED)
def test_the_end_is_the_same_from_every_checkpoint(kind, resumed):
    assert load(resumed, "resumed", kind)["checkpoints"] >= 2


def test_what_the_engine_cannot_measure_is_refused(tmp_path):
    of_two, of_three = ("plain", "a schedule"), ("lora", "experts", "packing")
    kinds = [*(f"ZeRO-2, {each}" for each in of_two), *(f"ZeRO-3, {each}" for each in of_three)]
    found = runs(tmp_path / "refused", "refused", "deepspeed", *kinds, processes=2)
    said = {kind: load(found, "refused", kind) for kind in kinds}
    assert {*said["ZeRO-2, plain"]} == {"before", "cleaning", "optimizer"}
    cannot = "ResonanceCallback cannot work with"
    assert str(said["ZeRO-2, plain"]["before"]).startswith(f"{cannot} when='before' under DeepSpeed, whose engine")
    assert str(said["ZeRO-2, plain"]["cleaning"]).startswith(f"{cannot} token_cleaning under DeepSpeed, which makes")
    assert str(said["ZeRO-2, plain"]["optimizer"]).startswith(f"{cannot} update='optimizer' under DeepSpeed, which")
    expected = {
        "ZeRO-2, a schedule": f"{cannot} a scheduler in DeepSpeed's configuration, which counts",
        "ZeRO-3, lora": "up_proj' has an adapter, and under DeepSpeed's ZeRO-3 only",
        "ZeRO-3, experts": "' sees only the tokens routed to it, and under",
        "ZeRO-3, packing": f"{cannot} packing=True or padding_free=True under DeepSpeed's ZeRO-3, which",
    }
    for kind, part in expected.items():
        assert part in str(said[kind]["in training"])
