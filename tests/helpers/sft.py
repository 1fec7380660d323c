"""Runs of SFTTrainer with the callback and without it, and what must hold of them for all rows, models and settings."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from helpers.training import UNSTABLE, arguments, llama
from helpers.zen import zen, zen_tokenizer
from resofilter_trainer import InputError, ResonanceCallback, ResonanceConfig, ScoreTable, score_dataset
from resofilter_trainer.training.run import STATE

EPS = 1e-4  # far from AdamW's saturation, so that scores differ clearly
Tokens = tuple[int, ...]


class Batches(TrainerCallback):
    """The tokens of every row that is learnt, of every forward in training, epoch by epoch, from the model's inputs."""

    def __init__(self) -> None:
        self.epochs: list[list[Tokens]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook = kwargs["model"].register_forward_pre_hook(self._see, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook.remove()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epochs.append([])

    def _see(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        learnt = kwargs.get("labels", torch.zeros(1)) != -100  # without any, it only completes a step
        if model.training and torch.is_grad_enabled() and learnt.any():
            self.epochs[-1] += rows_of(kwargs)


def rows_of(batch: Mapping[str, Any]) -> list[Tokens]:
    """The tokens of each row with a token to learn, of a padded or padding-free batch; of each row without labels."""
    ids, labels = batch["input_ids"], batch.get("labels", batch["input_ids"])
    if "attention_mask" in batch:
        masks = batch["attention_mask"].bool()
        rows = [(one[mask], other[mask]) for one, other, mask in zip(ids, labels, masks, strict=True)]
    else:
        starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        pieces = [slice(a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]
        rows = [(ids[0][piece], labels[0][piece]) for piece in pieces]
    return [tuple(ids.tolist()) for ids, labels in rows if learns(labels)]


def learns(labels: Tensor) -> bool:
    """Whether a row has a token to learn. TRL before 1.9 keeps rows that have none."""
    return bool((labels[1:] != -100).any())


def learnt_rows(trainer: SFTTrainer) -> dict[int, dict[str, Tensor]]:
    """The tokens and labels of every row that a trainer learns from, by the number of the row."""
    rows = trainer.train_dataset.with_format("torch")
    return {
        int(row["number"]): {name: row[name] for name in ("input_ids", "labels")}
        for row in rows
        if learns(row["labels"])
    }


@dataclass
class Pattern:
    """One way to use SFTTrainer.

    Attributes:
        kind: the rows, a kind of `helpers.zen`.
        config: the arguments of SFTConfig.
        trainer: a function that makes the arguments of SFTTrainer beside rows, model and configuration.
        model: a function that makes the model, or its folder, from the size of the vocabulary.
        scorable: whether `score_dataset` measures the same as a run at the same weights.
        slow: whether the pattern is tried only with the slow tests, as it varies another one.
    """

    kind: str = "prompt-completion"
    config: dict[str, Any] = field(default_factory=dict)
    trainer: Callable[[], dict[str, Any]] = dict
    model: Callable[[int], Any] = lambda size: llama(size, max_position_embeddings=256)
    scorable: bool = True
    slow: bool = False

    def args(self, output: Path, **changes: Any) -> SFTConfig:
        """Two epochs of 17 rows in batches of 4, in float32 on the CPU."""
        return sft_config(output, **{**self.config, **changes})

    def build(self, output: Path, *callbacks: Any, **changes: Any) -> SFTTrainer:
        """The trainer, with a tokenizer of its own, as TRL may change it."""
        tokenizer = zen_tokenizer()
        extra = {"train_dataset": zen(self.kind), "processing_class": tokenizer, **self.trainer()}
        extra["callbacks"] = [*extra.get("callbacks", ()), *callbacks]
        return SFTTrainer(self.model(len(tokenizer)), self.args(output, **changes), **extra)

    def scores(self, model: Any, folder: Path, **changes: Any) -> ScoreTable:
        """What `score_dataset` says of the same rows, with the same arguments, at the weights of the model."""
        with warnings.catch_warnings(action="ignore"):  # few rows: whether to trust the ranking is another test's
            args = self.args(folder / "scores", **changes)
            return score_dataset(model, zen(self.kind), zen_tokenizer(), args, ResonanceConfig(eps=EPS))


def sft_config(output: Path, **settings: Any) -> SFTConfig:
    """Two epochs in batches of 4, in float32 on the CPU; the last step is saved, every step logged."""
    usual = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "max_length": 1024, "save_strategy": "epoch"}
    return arguments(output, **{**usual, **settings})


def assert_untouched(pattern: Pattern, folder: Path) -> None:
    """With `keep=1.0`, weights, batches, losses, metrics and checkpoints are those of a run without the callback."""
    runs = []
    for name, callbacks in (("without", []), ("with", [ResonanceCallback(keep=1.0)])):
        batches = Batches()
        trainer = pattern.build(folder / "run", batches, *callbacks)
        trainer.train()
        (folder / "run").rename(folder / name)
        runs.append((trainer, batches))
    (without, plain), (with_callback, watched) = runs
    assert watched.epochs == plain.epochs
    assert_same_weights(with_callback.model.state_dict(), without.model.state_dict())
    assert history(with_callback.state.log_history) == history(without.state.log_history)
    assert with_callback.state.global_step == without.state.global_step
    assert_same_checkpoints(folder / "without", folder / "with")


def assert_same_weights(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert torch.equal(value, other[name]), name


def history(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged of losses, metrics and learning rates, without ours and without what depends on the clock."""
    own = [entry for entry in entries if not any(STATE in name for name in entry)]
    return [{k: v for k, v in entry.items() if not any(word in k for word in UNSTABLE[:2])} for entry in own]


def assert_same_checkpoints(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.glob("checkpoint-*"))
    assert names == sorted(path.name for path in other.glob("checkpoint-*"))
    for name in names:
        states = [json.loads((folder / name / "trainer_state.json").read_text()) for folder in (one, other)]
        for state in states:
            state["log_history"] = history(state["log_history"])
            state["stateful_callbacks"].pop(STATE, None)
        assert states[0] == states[1]
        for path in (one / name).glob("*.safetensors"):
            assert path.read_bytes() == (other / name / path.name).read_bytes()


def assert_right_rows(pattern: Pattern, folder: Path) -> None:
    """With `keep=0.5`, the second epoch trains on the half with the lower scores, and the scores are the right ones.

    The learning rate is zero, so the scores of the run and those of `score_dataset` are of the same weights.
    """
    callback, batches = ResonanceCallback(keep=0.5, eps=EPS, correct_drift=False), Batches()
    trainer = pattern.build(folder / "run", batches, callback, learning_rate=0.0)
    truth = pattern.scores(trainer.model, folder) if pattern.scorable else None
    trainer.train()
    tokens = {number: tuple(row["input_ids"].tolist()) for number, row in learnt_rows(trainer).items()}
    scores, selection = callback.scores, callback.selections[1]
    assert scores is not None
    assert np.array_equal(np.flatnonzero(scores.scored), sorted(tokens))
    assert Counter(batches.epochs[0]) == Counter(tokens.values())
    first = ScoreTable.load(folder / "run" / STATE / "scores-epoch-1.parquet")
    kept = lower_half(first.column("score"))
    assert selection.sample_ids.tolist() == kept
    assert Counter(batches.epochs[1]) == Counter(tokens[row] for row in kept)
    if truth is not None:
        assert_agree(scores, truth)


def patterns(table: Mapping[str, Pattern]) -> list[Any]:
    """The parameters of a test over a table of patterns."""
    return [pytest.param(each, id=name, marks=[pytest.mark.slow] * each.slow) for name, each in table.items()]


def plain_scores(model: Any, batches: Sequence[Mapping[str, Tensor]], loss: Callable[..., Tensor]) -> np.ndarray:
    """The score of each batch of one row, from autograd's own gradient of `loss(model, batch)`.

    lr * |g / (|g| + eps) + wd * w|, the mean over the last three up-projections of the language model.
    """
    config, scores = ResonanceConfig(eps=EPS), []
    weights = [value for name, value in model.named_parameters() if name.endswith("mlp.up_proj.weight")][-3:]
    for batch in batches:
        gradients = torch.autograd.grad(loss(model, batch), weights)
        steps = [g / (g.abs() + EPS) + config.weight_decay * w for g, w in zip(gradients, weights, strict=True)]
        scores.append(np.mean([config.lr * each.abs().double().mean().item() for each in steps]))
    return np.array(scores)


def right_or_refused(check: Callable[[], None], said: str) -> None:
    """What cannot be measured may also be refused: in one line that says `said`."""
    refused = None
    try:
        check()
    except InputError as error:
        refused = str(error)
    assert refused is None or (re.search(said, refused) and "\n" not in refused), refused


def lower_half(score: np.ndarray) -> list[int]:
    """The rows that are left when the larger half, rounded down, is dropped, in plain code."""
    scored = np.flatnonzero(np.isfinite(score))
    order = sorted(scored, key=lambda row: score[row])
    return sorted(int(row) for row in order[: len(scored) - len(scored) // 2])


def assert_agree(measured: ScoreTable, truth: ScoreTable) -> None:
    """The callback's scores of all rows are those of `score_dataset`, in value, and so in rank."""
    rows = truth.scored
    assert np.array_equal(measured.scored, rows)
    for name in ("num_tokens", "length"):
        assert np.array_equal(measured.column(name)[rows], truth.column(name)[rows])
    found, expected = measured.column("measured")[rows], truth.column("score")[rows]
    assert np.allclose(found, expected, rtol=1e-4, atol=0)
    assert np.abs(found - expected).max() < 2e-3 * np.ptp(expected)
    assert np.allclose(measured.column("loss")[rows], truth.column("loss")[rows], rtol=1e-4)
