"""Killed at any moment, a run goes on from its last checkpoint and ends as if nothing had happened."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import rows, train

from resofilter_trainer import ResonanceCallback, ScoreTable, Selection
from resofilter_trainer.training_run import STATE

KILLS = 20
ATTEMPTS = 60
LIMIT = 120  # seconds, for a run of two


def run(output: Path, tokenizer, resume: str | None) -> None:
    warnings.simplefilter("ignore")
    train(
        output,
        tokenizer,
        ResonanceCallback(keep=[1.0, 0.6, 0.3]),
        dataset=rows(40),
        gradient_accumulation_steps=3,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=3,
        resume=resume,
    )


def last_complete(output: Path) -> str | None:
    """The last checkpoint that the Trainer finished: its state is what it writes last."""
    finished = [path.parent for path in output.glob("checkpoint-*/trainer_state.json")]
    return str(max(finished, key=lambda path: int(path.name.split("-")[1]))) if finished else None


def end_of(output: Path) -> tuple[dict[str, torch.Tensor], ScoreTable, list[list[bool]]]:
    folder = Path(str(last_complete(output)))
    selections = sorted((output / STATE).glob("selection-epoch-*.parquet"))
    weights = load_file(folder / "model.safetensors")
    return weights, ScoreTable.load(output / STATE), [Selection.load(each).keep.tolist() for each in selections]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, tokenizer):
    fork = multiprocessing.get_context("fork")  # the child need not import everything again
    whole = tmp_path / "whole"
    begun = time.monotonic()
    child = fork.Process(target=run, args=(whole, tokenizer, None))
    child.start()
    child.join(LIMIT)
    assert child.exitcode == 0
    duration = time.monotonic() - begun
    weights, scores, selections = end_of(whole)
    assert len(selections) == 3
    moments = random.Random(0)
    killed = 0
    for attempt in range(ATTEMPTS):
        output = tmp_path / "killed"
        shutil.rmtree(output, ignore_errors=True)
        begun = time.monotonic()
        child = fork.Process(target=run, args=(output, tokenizer, None))
        child.start()
        child.join(moments.uniform(0.2, 1.0) * duration)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            killed += 1
        else:  # the first run was slower: it had a cold or a busy machine
            duration = min(duration, time.monotonic() - begun)
        child.join()
        child = fork.Process(target=run, args=(output, tokenizer, last_complete(output)))
        child.start()
        child.join(LIMIT)
        assert child.exitcode == 0, attempt
        found_weights, found_scores, found_selections = end_of(output)
        assert all(torch.equal(value, found_weights[name]) for name, value in weights.items()), attempt
        assert found_scores.table.equals(scores.table), attempt
        assert found_selections == selections, attempt
        if killed == KILLS:
            break
    assert killed == KILLS
