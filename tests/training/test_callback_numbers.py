"""A run resumes with other numbers: more epochs or steps, and batches divided in another way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.training import Outcome, arguments, assert_same_end, llama, rows, train
from helpers.versions import takes_its_own_batch_size
from trl import SFTTrainer

from resofilter_trainer import DataSelector, InputError, ResonanceCallback, SampleWeights
from resofilter_trainer.config.compatibility import need

ROWS = 21
EACH_STEP = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
EPOCHS = {epochs: {"num_train_epochs": epochs} for epochs in (1, 1.5, 2, 2.5, 3, 4)}
THRESHOLD = {"selector": DataSelector(threshold=5.6, by="loss")}
PACKED = {"packing": True, "max_length": 64}
LONGER = {
    "keep": ({"keep": 0.5}, {}, EPOCHS[2], EPOCHS[4]),
    "saved by epoch": ({"keep": 0.5}, {"save_strategy": "epoch"}, EPOCHS[2], EPOCHS[4]),
    "shares": ({"keep": [1.0, 0.6]}, {"gradient_accumulation_steps": 2}, EPOCHS[2], EPOCHS[3]),
    "threshold": (THRESHOLD, {}, EPOCHS[2], EPOCHS[4]),
    "a part of an epoch": ({"keep": 0.5}, {}, EPOCHS[1.5], EPOCHS[2.5]),
    "fewer": ({"keep": 0.5}, {}, EPOCHS[4], EPOCHS[3]),
    "steps": ({"keep": 0.5}, {}, {"max_steps": 9}, {"max_steps": 14}),
    "before": ({"keep": 0.5, "when": "before"}, {}, EPOCHS[1], EPOCHS[2]),
    "packed": ({"keep": 0.5, "readmit": True, "dataset": rows(ROWS)}, PACKED, EPOCHS[2], EPOCHS[3]),
}  # fmt: skip


def run(output: Path, tokenizer, settings, resume=None, **changes) -> Outcome:
    arguments = {**EACH_STEP, "lr_scheduler_type": "constant", "dataset": rows(ROWS), **changes}
    return train(output, tokenizer, ResonanceCallback(**settings), resume=resume, **arguments)


FAST = ("keep", "saved by epoch")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LONGER]
)
def test_from_every_checkpoint_a_longer_run_ends_as_if_it_had_always_been(name, tmp_path, tokenizer):
    """At a constant learning rate; a checkpoint's weights come from the schedule that it was trained under."""
    settings, common, there, here = LONGER[name]
    run(tmp_path / "first", tokenizer, settings, **common, **there)
    whole = run(tmp_path / "whole", tokenizer, settings, **common, **here)
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "first").glob("checkpoint-*"))
    steps = [step for step in steps if step <= whole.trainer.state.global_step]
    assert steps
    for step in steps[-3:]:
        checkpoint = str(tmp_path / "first" / f"checkpoint-{step}")
        assert_same_end(run(tmp_path / "resumed", tokenizer, settings, resume=checkpoint, **common, **here), whole)


@pytest.mark.slow
def test_more_epochs_follow_the_learning_rate_of_a_run_that_has_them(tmp_path, tokenizer):
    linear = {"lr_scheduler_type": "linear"}
    first = run(tmp_path / "first", tokenizer, {"keep": 0.5}, num_train_epochs=2, **linear)
    whole = run(tmp_path / "whole", tokenizer, {"keep": 0.5}, num_train_epochs=4, **linear)
    checkpoint = tmp_path / "first" / f"checkpoint-{first.trainer.state.global_step}"
    resumed = run(tmp_path / "resumed", tokenizer, {"keep": 0.5}, resume=str(checkpoint), num_train_epochs=4, **linear)
    assert first.trainer.state.global_step == 6 + 3
    assert resumed.trainer.state.global_step == whole.trainer.state.global_step == 6 + 3 * 3
    assert resumed.trainer.state.max_steps == 15
    assert [step[-1] for step in resumed.seen] == [step[-1] for step in whole.seen[9:]]
    assert [entry["learning_rate"] for entry in resumed.logs][9:] == [entry["learning_rate"] for entry in whole.logs][
        9:
    ]
    settings = resumed.callback.scores.provenance.preparation["run"]
    assert settings["epochs"] == 4


@pytest.mark.parametrize(
    ("keep", "there", "here"),
    [
        pytest.param(1.0, EPOCHS[1], EPOCHS[3], marks=pytest.mark.slow, id="all rows"),
        pytest.param(0.5, {"max_steps": 9}, {"max_steps": 14}, id="steps"),
    ],
)
def test_the_first_step_of_a_longer_run_has_its_learning_rate(keep, there, here, tmp_path, tokenizer):
    """The checkpoint's last rate is 0, and the Trainer's schedule is that of the longer run already."""
    linear = {"lr_scheduler_type": "linear"}
    first = run(tmp_path / "first", tokenizer, {"keep": keep}, **there, **linear)
    whole = run(tmp_path / "whole", tokenizer, {"keep": keep}, **here, **linear)
    done = first.trainer.state.global_step
    checkpoint = str(tmp_path / "first" / f"checkpoint-{done}")
    resumed = run(tmp_path / "resumed", tokenizer, {"keep": keep}, resume=checkpoint, **here, **linear)
    rates = [step[-1] for step in resumed.seen]
    assert rates == [step[-1] for step in whole.seen[done:]]
    assert rates[0] > 0


@takes_its_own_batch_size
@pytest.mark.parametrize("keep", [0.5, pytest.param([1.0, 0.7, 0.4], marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("size", "accumulation"), [(2, 2), pytest.param(1, 4, marks=pytest.mark.slow)])
def test_rows_of_a_step_may_be_divided_in_another_way(size, accumulation, keep, tmp_path, tokenizer):
    whole = run(tmp_path / "whole", tokenizer, {"keep": keep, "eps": 1e-4})
    steps = whole.trainer.state.global_step
    for step in (1, 5, 6, 8, steps):
        resumed = run(
            tmp_path / "resumed",
            tokenizer,
            {"keep": keep, "eps": 1e-4},
            resume=str(tmp_path / "whole" / f"checkpoint-{step}"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        assert resumed.trainer.state.global_step == steps
        assert list(resumed.seen) == list(whole.seen)[step:]
        for mine, other in zip(resumed.callback.selections, whole.callback.selections, strict=True):
            assert np.array_equal(mine.keep, other.keep)
        for name, weight in resumed.weights.items():
            torch.testing.assert_close(weight, whole.weights[name], rtol=0, atol=2e-6)
        score = whole.callback.scores.column("score")
        np.testing.assert_allclose(resumed.callback.scores.column("score"), score, rtol=0, atol=1e-5 * np.ptp(score))


REFUSED = {
    "another product": (
        {},
        {"per_device_train_batch_size": 2},
        "made with 4 rows per device x 1 accumulated x 1 process = 4 rows in a step, and this run has 2 rows per "
        "device x 1 accumulated x 1 process = 2. Keep the product the same: "
        "per_device_train_batch_size, gradient_accumulation_steps and the number of processes may change.",
    ),
    "drop_last": (
        {"dataloader_drop_last": True},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "with dataloader_drop_last=True, other rows would fill no batch",
    ),
    "steps for epochs": ({}, {"max_steps": 30}, "made with num_train_epochs=3, and this run has max_steps=30"),
    "ends before": ({}, {"num_train_epochs": 1}, "made after step 8, and this run ends before it. Resume with more"),
    "ends in the epoch": ({}, {"num_train_epochs": 1.2}, "made after step 8, and this run ends before it"),
}


DIVIDED = ("another product", "drop_last")


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[takes_its_own_batch_size] * (each in DIVIDED)) for each in REFUSED]
)
def test_numbers_that_cannot_work_are_refused_in_one_line(name, tmp_path, tokenizer):
    there, here, said = REFUSED[name]
    run(tmp_path / "first", tokenizer, {"keep": 0.5}, **there)
    with pytest.raises(InputError) as refused:
        run(tmp_path / "resumed", tokenizer, {"keep": 0.5}, resume=str(tmp_path / "first" / "checkpoint-8"), **here)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@takes_its_own_batch_size
def test_a_loss_of_each_batchs_own_mean_is_not_divided_in_another_way(tmp_path, tokenizer):
    def trained(output, resume=None, **changes):
        trainer = SFTTrainer(
            llama(len(tokenizer)),
            arguments(output, **{**EACH_STEP, **changes}),
            train_dataset=rows(12),
            processing_class=tokenizer,
            callbacks=[ResonanceCallback(keep=0.5)],
        )
        trainer.model_accepts_loss_kwargs = False
        trainer.train(resume_from_checkpoint=resume)

    trained(tmp_path / "first")
    with pytest.raises(InputError, match="the loss of a step is the mean of its micro-batches' own means"):
        trained(
            tmp_path / "second",
            str(tmp_path / "first" / "checkpoint-2"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
        )


def test_a_checkpoint_that_was_trained_further_without_the_callback_is_refused(tmp_path, tokenizer):
    run(tmp_path, tokenizer, {"keep": 0.5})
    train(tmp_path / "without", tokenizer, dataset=rows(ROWS), resume=str(tmp_path / "checkpoint-7"), **EACH_STEP)
    with pytest.raises(InputError, match="damaged, or was trained further without ResonanceCallback: step 9 is not"):
        run(tmp_path / "again", tokenizer, {"keep": 0.5}, resume=str(tmp_path / "without" / "checkpoint-9"))


def test_sample_weights_notice_that_the_callback_is_missing(tmp_path, tokenizer):
    need("log_probs", "A weight for each row")
    run(tmp_path, tokenizer, {"keep": 0.5})
    with pytest.raises(InputError, match="made with ResonanceCallback, which is missing here"):
        train(
            tmp_path / "without",
            tokenizer,
            dataset=rows(ROWS),
            callbacks=[SampleWeights(np.ones(ROWS))],
            resume=str(tmp_path / "checkpoint-7"),
            **EACH_STEP,
        )


def test_the_trainers_own_option_names_the_missing_callback(tmp_path, tokenizer, monkeypatch):
    """Without any code of this package in the run, only the Trainer itself can say so."""
    said: list[str] = []
    run(tmp_path, tokenizer, {"keep": 0.5})
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda message, *args: said.append(message))
    train(
        tmp_path / "without",
        tokenizer,
        dataset=rows(ROWS),
        resume=str(tmp_path / "checkpoint-7"),
        restore_callback_states_from_checkpoint=True,
        **EACH_STEP,
    )
    assert any("callbacks not included in current configuration. Ignoring. (resofilter)" in each for each in said)
