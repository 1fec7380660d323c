"""From every checkpoint of many kinds of run, the end is the same: bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.training import Outcome, assert_same_end, rows, train
from peft import LoraConfig

from resofilter_trainer import DataSelector, ResonanceCallback, SoftPruning, TokenCleaning

LARGER = {"per_device_train_batch_size": 4}  # half as many checkpoints; every epoch still has a ragged end
CASES = {
    "plain": (ResonanceCallback, {"keep": 0.5}, LARGER),
    "ragged accumulation": (ResonanceCallback, {"keep": [1.0, 0.7, 0.4]}, {"gradient_accumulation_steps": 3}),
    "accumulation, few dropped": (ResonanceCallback, {"keep": 0.9}, {"gradient_accumulation_steps": 3}),
    "workers": (ResonanceCallback, {"keep": 0.5}, {**LARGER, "dataloader_num_workers": 2}),
    "lora": (
        ResonanceCallback,
        {"keep": 0.6},
        {**LARGER, "peft": LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0)},
    ),
    "padding-free": (ResonanceCallback, {"keep": 0.5}, {**LARGER, "padding_free": True, "max_length": None}),
    "threshold": (
        ResonanceCallback,
        {"selector": DataSelector(threshold=5.6, by="loss")},
        {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 3},
    ),
    "before": (ResonanceCallback, {"keep": 0.5, "when": "before"}, {"gradient_accumulation_steps": 2}),
    "grouped by length": (ResonanceCallback, {"keep": 0.5}, {**LARGER, "train_sampling_strategy": "group_by_length"}),
    "readmitted": (ResonanceCallback, {"keep": [1.0, 0.3, 0.8], "readmit": True}, {"gradient_accumulation_steps": 2}),
    "back to all rows": (
        ResonanceCallback,
        {"keep": [1.0, 0.3, 1.0], "readmit": True},
        {"gradient_accumulation_steps": 4},
    ),
    "saved by epoch": (ResonanceCallback, {"keep": 0.5}, {"save_strategy": "epoch", "gradient_accumulation_steps": 2}),
    "max_steps": (ResonanceCallback, {"keep": 0.5}, {**LARGER, "max_steps": 15}),
    "dropout": (ResonanceCallback, {"keep": 0.5}, {**LARGER, "dropout": 0.1}),
    "drop_last": (ResonanceCallback, {"keep": 0.5}, {"dataloader_drop_last": True, "gradient_accumulation_steps": 2}),
    "tokens": (ResonanceCallback, {"token_cleaning": TokenCleaning(0.6, parts=3)}, {"gradient_accumulation_steps": 2}),
    "tokens and rows": (ResonanceCallback, {"token_cleaning": TokenCleaning(0.3, parts=2), "keep": 0.5}, LARGER),
    "weights": (ResonanceCallback, {"selector": SoftPruning(), "readmit": True}, {"gradient_accumulation_steps": 2}),
    "two epochs and a part": (ResonanceCallback, {"keep": 0.5}, {**LARGER, "num_train_epochs": 2.4}),
}


def run(name: str, output: Path, tokenizer, **changes) -> Outcome:
    make, settings, arguments = CASES[name]
    arguments = {"dataset": rows(21), **arguments, **changes}
    if "dropout" in arguments:
        from helpers.training import llama

        arguments["model"] = llama(len(tokenizer), attention_dropout=arguments.pop("dropout"))
    return train(output, tokenizer, make(**settings), **arguments)


FAST = ("ragged accumulation", "saved by epoch")  # two positions


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_end_is_the_same_from_every_checkpoint(name, tmp_path, tokenizer):
    changes = {} if "save_strategy" in CASES[name][2] else {"save_strategy": "steps", "save_steps": 1}
    whole = run(name, tmp_path, tokenizer, **changes)
    cleaned = whole.callback.token_cleaning is not None and whole.callback.token_stages
    assert cleaned or any(not selection.keep.all() for selection in whole.callback.selections)
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == (3 if "save_strategy" in CASES[name][2] else whole.trainer.state.global_step)
    for checkpoint in checkpoints:
        resumed = run(name, tmp_path / "resumed", tokenizer, resume=str(checkpoint))
        assert_same_end(resumed, whole)
        assert resumed.callback.token_stages == whole.callback.token_stages
