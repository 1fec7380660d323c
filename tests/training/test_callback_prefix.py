"""Prefix tuning in training: rows are scored with the prefix that they see, and dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.training import arguments, rows, train
from peft import PrefixTuningConfig, PromptTuningConfig

from resofilter_trainer import InputError, ResonanceCallback, ResonanceConfig, score_dataset

COUNT = 12
PREFIX = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def test_prefix_tuning_is_measured_and_filtered(tmp_path, tokenizer):
    settings = {"dataset": rows(COUNT), "peft": PREFIX, "per_device_train_batch_size": 4, "num_train_epochs": 2}
    still = ResonanceCallback(keep=1.0, eps=1e-4, correct_drift=False)
    model = train(tmp_path / "still", tokenizer, still, learning_rate=0.0, **settings).trainer.model
    oracle = score_dataset(
        model.eval(),
        rows(COUNT),
        processing_class=tokenizer,
        args=arguments(tmp_path / "scores"),
        config=ResonanceConfig(eps=1e-4),
    )
    expected = oracle.column("score")
    np.testing.assert_allclose(still.scores.column("score"), expected, rtol=0, atol=1e-5 * np.ptp(expected))

    torch.manual_seed(0)
    mine = train(tmp_path / "mine", tokenizer, ResonanceCallback(keep=1.0), **settings)
    torch.manual_seed(0)
    other = train(tmp_path / "other", tokenizer, None, **settings)
    for name, weight in mine.weights.items():
        assert torch.equal(weight, other.weights[name]), name

    half = ResonanceCallback(keep=0.5)
    outcome = train(tmp_path / "half", tokenizer, half, **settings)
    assert [int(each.keep.sum()) for each in half.selections] == [12, 6]
    assert outcome.trainer.state.global_step == 3 + 2


def test_prompt_tuning_is_refused_with_its_reason(tmp_path, tokenizer):
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(InputError, match="kind PROMPT_TUNING cannot be scored: it adds tokens that are in no row"):
        train(tmp_path, tokenizer, ResonanceCallback(), dataset=rows(COUNT), peft=prompt)
