"""What a run with the callback adds to the logs: scalars for the trackers, and nothing in the Trainer's own history."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.training import UNSTABLE, arguments, llama, rows, train
from transformers import TrainerCallback
from trl import SFTTrainer

from resofilter_trainer import ResonanceCallback, TokenCleaning


class Tracker(TrainerCallback):
    """Keeps every entry that a tracker is given, with its step."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.entries.append({**kwargs["logs"], "step": state.global_step})


def test_the_history_is_that_of_a_run_without_the_callback(tmp_path, tokenizer):
    """Entry by entry, with TRL's own metrics, evaluations and the summary at the end."""
    histories = []
    for callback in (None, ResonanceCallback(keep=1.0)):
        trained = train(tmp_path, tokenizer, callback, evaluate=True, eval_strategy="epoch", logging_steps=3)
        stable = [
            {name: value for name, value in entry.items() if not any(word in name for word in UNSTABLE[:2])}
            for entry in trained.trainer.state.log_history
        ]
        histories.append(stable)
    assert histories[0] == histories[1]
    assert "mean_token_accuracy" in histories[0][0]


def test_trackers_are_told_of_every_epoch_and_the_callback_remembers_it(tmp_path, tokenizer):
    tracker, callback = Tracker(), ResonanceCallback(keep=0.5)
    trainer = SFTTrainer(
        llama(len(tokenizer)), arguments(tmp_path), train_dataset=rows(12), processing_class=tokenizer,
        callbacks=[callback, tracker],
    )  # fmt: skip
    trainer.train()
    told = [entry for entry in tracker.entries if "resofilter/kept_share" in entry]
    assert told == callback.log_history
    assert [(entry["step"], entry["resofilter/kept_share"]) for entry in told] == [(6, 0.5), (9, 0.5), (12, 0.5)]
    assert [entry["epoch"] for entry in told] == pytest.approx([1, 2, 3])


@pytest.mark.parametrize("cleaning", [None, TokenCleaning(0.5, parts=3)])
def test_a_resumed_run_remembers_what_was_logged_before(tmp_path, tokenizer, cleaning):
    def callback() -> ResonanceCallback:
        return ResonanceCallback(keep=0.5, token_cleaning=cleaning)

    whole = train(tmp_path, tokenizer, callback(), save_strategy="steps", save_steps=4).callback
    checkpoint = str(tmp_path / "checkpoint-12")
    resumed = train(tmp_path, tokenizer, callback(), resume=checkpoint, save_strategy="steps", save_steps=4).callback
    assert whole.log_history == resumed.log_history
    assert len(whole.log_history) >= 3


def test_a_checkpoint_without_the_optimizers_state_is_resumed_with_a_warning(tmp_path, tokenizer):
    settings = {"save_strategy": "epoch", "save_only_model": True}
    train(tmp_path, tokenizer, ResonanceCallback(keep=0.5), **settings)
    with pytest.warns(UserWarning, match="lacks the optimizer, scheduler, random state .*save_only_model"):
        resumed = train(
            tmp_path, tokenizer, ResonanceCallback(keep=0.5), resume=str(tmp_path / "checkpoint-11"), **settings
        )
    assert resumed.trainer.state.global_step == 23
    assert [int(each.keep.sum()) for each in resumed.callback.selections] == [21, 11, 11]
