"""The callback in a run: it changes nothing, measures rightly, plans rightly, and says so where it cannot work."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shlex
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.families import tiny
from helpers.training import Outcome, arguments, assert_same_weights, llama, rows, train
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments
from trl import SFTTrainer

from resofilter_trainer import (
    DataSelector,
    InputError,
    ResonanceCallback,
    ResonanceConfig,
    ScoreTable,
    Selection,
    score_dataset,
)
from resofilter_trainer.training.run import STATE

EVERYTHING_STAYS = {
    "plain": {},
    "ragged accumulation, cosine": {"gradient_accumulation_steps": 4, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "lora": {"peft": "lora"},
    "padding-free": {"padding_free": True, "max_length": None},
    "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "grouped by length": {"train_sampling_strategy": "group_by_length"},
    "sequential, part of an epoch": {"train_sampling_strategy": "sequential", "num_train_epochs": 1.7},
    "checkpointing": {"activation_checkpointing": True},
    "by epoch": {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch", "evaluate": True},
    "ratios": {"logging_steps": 0.2, "save_strategy": "steps", "save_steps": 0.25},
    "max_steps": {"max_steps": 17},
    "dropout": {"dropout": 0.1},
    "drop_last": {"dataloader_drop_last": True},
}


@pytest.mark.parametrize("name", EVERYTHING_STAYS)
def test_where_everything_stays_nothing_changes(name, tmp_path, tokenizer):
    """Weights, logs and checkpoints: bit for bit."""
    changes = {"save_strategy": "steps", "save_steps": 5, "seed": 7, **EVERYTHING_STAYS[name]}
    dropout = changes.pop("dropout", 0.0)
    runs = []
    for callback in (None, ResonanceCallback(keep=1.0)):
        if changes.get("peft"):
            changes["peft"] = LoraConfig(r=2, target_modules=["up_proj", "q_proj"], lora_dropout=0.1)
        model = llama(len(tokenizer), attention_dropout=dropout)
        runs.append(train(tmp_path / "run", tokenizer, callback, model=model, **changes))
        (tmp_path / "run").rename(tmp_path / f"{len(runs)}")
    without, with_callback = runs
    assert_same_weights(with_callback, without)
    assert with_callback.logs == without.logs
    assert list(with_callback.seen) == list(without.seen)
    checkpoints = sorted(path.name for path in (tmp_path / "1").glob("checkpoint-*"))
    assert checkpoints == sorted(path.name for path in (tmp_path / "2").glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert_same_files(tmp_path / "1" / checkpoint, tmp_path / "2" / checkpoint)


def assert_same_files(one: Path, other: Path) -> None:
    mine = {path.name for path in one.iterdir()}
    assert {path.name for path in other.iterdir()} == mine | {STATE}
    for name in mine - {"trainer_state.json", "README.md"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (one, other)]
    for state in states:
        state["log_history"] = [entry for entry in state["log_history"] if f"{STATE}/kept_share" not in entry]
        for entry in state["log_history"]:
            for key in [key for key in entry if "runtime" in key or "per_second" in key]:
                del entry[key]
        state["stateful_callbacks"].pop(STATE, None)
    assert states[0] == states[1]


MEASURED = {
    "plain": {},
    "accumulation and clipping": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.01},
    "batches of one": {"per_device_train_batch_size": 1},
    "one batch": {"per_device_train_batch_size": 21},
    "padding-free": {"padding_free": True, "max_length": None, "gradient_accumulation_steps": 2},
    "checkpointing": {"activation_checkpointing": True},
    "reentrant checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "workers": {"dataloader_num_workers": 2},
}
UPDATES = {
    "adamw": ResonanceConfig(eps=1e-4),
    "sgd": ResonanceConfig(update="sgd"),
    "l2": ResonanceConfig(update="sgd", norm="l2"),
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", MEASURED)
def test_scores_are_the_recorders_on_the_same_weights(name, update, tmp_path, tokenizer):
    outcome = still(tmp_path, tokenizer, UPDATES[update], **MEASURED[name])
    truth = recorded(outcome, UPDATES[update])
    assert_close(outcome.callback.scores, truth)


@pytest.mark.parametrize("targets", [["up_proj"], ["q_proj", "v_proj"]])
@pytest.mark.parametrize("dora", [False, True])
def test_with_lora_the_gradient_is_the_full_weights(targets, dora, tmp_path, tokenizer):
    peft = LoraConfig(r=2, target_modules=targets, use_dora=dora, lora_dropout=0.0)
    outcome = still(tmp_path, tokenizer, UPDATES["adamw"], peft=peft)
    assert_close(outcome.callback.scores, recorded(outcome, UPDATES["adamw"]))


NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "opt": {"dropout": 0.0}}


@pytest.mark.parametrize("family", ["gpt2", "phi3", "opt", "mixtral", "gemma2", "gpt_oss"])
def test_other_families(family, tmp_path, tokenizer):
    model = tiny(family, vocab_size=len(tokenizer), **NO_DROPOUT.get(family, {}))
    outcome = still(tmp_path, tokenizer, UPDATES["adamw"], model=model, gradient_accumulation_steps=2)
    assert_close(outcome.callback.scores, recorded(outcome, UPDATES["adamw"]))


def test_frozen_below_and_measured_all_the_same(tmp_path, tokenizer):
    model = llama(len(tokenizer))
    model.model.requires_grad_(False)
    outcome = still(tmp_path, tokenizer, UPDATES["adamw"], model=model)
    assert_close(outcome.callback.scores, recorded(outcome, UPDATES["adamw"]))


def test_bf16_autocast_ranks_alike(tmp_path, tokenizer):
    outcome = still(tmp_path, tokenizer, UPDATES["adamw"], bf16=True)
    truth = recorded(outcome, UPDATES["adamw"])
    found = outcome.callback.scores.column("measured")
    assert np.corrcoef(np.argsort(np.argsort(found)), np.argsort(np.argsort(truth.score)))[0, 1] > 0.98


def still(output, tokenizer, config: ResonanceConfig, **changes) -> Outcome:
    """One epoch with a learning rate of zero: the weights stay where they are."""
    settings = {name: getattr(config, name) for name in ("update", "norm", "eps")}
    with warnings.catch_warnings(action="ignore"):
        callback = ResonanceCallback(keep=1.0, **settings)
        return train(output, tokenizer, callback, learning_rate=0.0, num_train_epochs=1, **changes)


def recorded(outcome: Outcome, config: ResonanceConfig):
    """The recorder's own measurement of the rows as the trainer holds them, one by one."""
    from helpers.samples import record_all

    dataset = outcome.trainer.train_dataset.with_format("torch")
    samples = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in dataset]
    return record_all(outcome.trainer.model, samples, config, size=1)


def assert_close(scores: ScoreTable, truth) -> None:
    found = scores.column("measured")
    assert np.allclose(found, truth.score, rtol=1e-5, atol=0)
    assert np.abs(found - truth.score).max() < 1e-3 * np.ptp(truth.score)
    assert np.allclose(scores.column("loss"), truth.loss, rtol=1e-5)
    assert np.array_equal(scores.column("num_tokens"), truth.num_tokens)


def test_plain_trainer_and_its_own_collator(tmp_path, tokenizer):
    dataset = Dataset.from_list(
        [{"input_ids": tokenizer(f"the quick {'fox ' * (i % 6 + 1)}").input_ids} for i in range(12)]
    )
    model = llama(len(tokenizer))
    settings = {"output_dir": str(tmp_path), "per_device_train_batch_size": 5, "num_train_epochs": 2, "use_cpu": True}
    callback = ResonanceCallback(keep=0.5, eps=1e-4)
    trainer = Trainer(
        model,
        TrainingArguments(**settings, learning_rate=0.0, report_to="none", save_strategy="no", disable_tqdm=True),
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        dataset,
        callbacks=[callback],
    )
    trainer.train()
    assert trainer.state.global_step == 3 + 2
    ids = [torch.tensor(row["input_ids"]) for row in dataset]
    from helpers.samples import record_all

    truth = record_all(model, [{"input_ids": each, "labels": each} for each in ids], callback.config, size=1)
    assert np.allclose(callback.scores.column("measured"), truth.score, rtol=1e-5, atol=0)
    assert np.allclose(callback.scores.column("loss"), truth.loss, rtol=1e-5)


def test_ids_are_the_users_rows_though_rows_are_dropped_and_shuffled(tmp_path, tokenizer):
    dataset = Dataset.from_list(
        [{"prompt": "fox " * (60 if i % 4 == 0 else 2), "completion": f" answer: {i}"} for i in range(20)]
    ).select(range(19, -1, -1))  # the user's own indices must not be taken for TRL's
    outcome = train(
        tmp_path, tokenizer, ResonanceCallback(keep=0.5), dataset=dataset, max_length=32, shuffle_dataset=True
    )
    scores, table = outcome.callback.scores, outcome.callback.scores.to_pandas()
    long = np.array([row["prompt"] == "fox " * 60 for row in dataset])
    assert np.array_equal(long, ~scores.scored)
    assert set(table.reason[long]) == {"no token to learn within max_length 32"}
    lengths = [len(tokenizer(row["prompt"] + row["completion"]).input_ids) + 1 for row in dataset]
    assert np.array_equal(table.length[~long], np.array(lengths)[~long])
    last = outcome.callback.selections[-1]
    assert last.keep.sum() == 15 - 7
    assert not last.keep[long].any()
    assert len(last.apply(dataset)) == 8


MASKED = np.isin(np.arange(14), [1, 4, 5, 10])


def some_masked(tokenizer) -> dict:
    """14 rows, of which 4 have no label, and what makes SFTTrainer leave them in."""
    tokens = [tokenizer(f"the quick {'fox ' * i}").input_ids for i in range(14)]
    labels = [[-100] * len(ids) if mask else ids for ids, mask in zip(tokens, MASKED, strict=True)]
    dataset = Dataset.from_dict({"input_ids": tokens, "labels": labels})
    return {"dataset": dataset, "dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}


@pytest.mark.parametrize(
    ("settings", "rows_of_epochs"),
    [
        ({}, [14, 5, 5]),
        ({"when": "before"}, [5, 5, 5]),
        ({"keep": [1.0, 0.8, 0.5]}, [14, 8, 5]),
        ({"readmit": True}, [14, 5, 5]),
        ({"readmit": True, "when": "before"}, [5, 5, 5]),
        ({"readmit": True, "when": "before", "end_epoch": 2}, [5, 5, 14]),
        ({"keep": [1.0, 0.5, 1.0], "readmit": True}, [14, 5, 14]),
    ],
    ids=str,
)
def test_rows_whose_labels_are_all_masked_count_in_no_share(settings, rows_of_epochs, tmp_path, tokenizer):
    """Once they are known, which is after the first epoch or the pass before it, the plan of all epochs is right."""
    plans = []

    class Plans(TrainerCallback):
        def on_epoch_begin(self, *args, **kwargs):
            plans.append(json.loads((tmp_path / "resofilter" / "plan.json").read_text()))

    callback = ResonanceCallback(**{"keep": 0.5, "eps": 1e-4, **settings})
    outcome = train(tmp_path, tokenizer, callback, callbacks=[Plans()], **some_masked(tokenizer))
    for plan in plans[settings.get("when") != "before" :]:
        assert [epoch["rows"] for epoch in plan] == rows_of_epochs
    assert outcome.trainer.state.global_step == sum(math.ceil(count / 2) for count in rows_of_epochs)
    assert np.array_equal(callback.scores.scored, ~MASKED)
    assert {callback.scores.reasons[row] for row in np.flatnonzero(MASKED)} == {"no token to learn"}
    for selection, count in zip(callback.selections, rows_of_epochs, strict=True):
        assert selection.keep.sum() == count
        assert selection.keep[MASKED].all() == (count == 14)


@pytest.mark.slow
def test_rows_whose_labels_are_all_masked_are_known_again_after_resuming(tmp_path, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 1, **some_masked(tokenizer)}
    whole = train(tmp_path, tokenizer, ResonanceCallback(keep=[1.0, 0.8, 0.5], eps=1e-4), **settings)
    for step in (3, 6, 7, 9, 11):
        callback = ResonanceCallback(keep=[1.0, 0.8, 0.5], eps=1e-4)
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        resumed = train(tmp_path, tokenizer, callback, resume=checkpoint, **settings)
        assert_same_weights(resumed, whole)
        assert callback.scores.table.equals(whole.callback.scores.table)
        for mine, other in zip(callback.selections, whole.callback.selections, strict=True):
            assert np.array_equal(mine.keep, other.keep)


def test_where_all_rows_are_kept_those_without_a_learnt_token_stay(tmp_path, tokenizer):
    tokens = [tokenizer(f"the quick {'fox ' * i}").input_ids for i in range(6)]
    dataset = Dataset.from_dict({"input_ids": tokens, "labels": [[-100] * len(tokens[0]), *tokens[1:]]})
    callback, skip = ResonanceCallback(keep=1.0), {"skip_prepare_dataset": True}
    with_callback = train(tmp_path, tokenizer, callback, dataset=dataset, dataset_kwargs=skip, max_length=None)
    assert callback.selections[-1].keep.all()
    assert not callback.scores.scored[0]
    without = train(tmp_path, tokenizer, dataset=dataset, dataset_kwargs=skip, max_length=None)
    assert_same_weights(with_callback, without)


def test_ids_when_nothing_is_mapped_but_shuffled(tmp_path, tokenizer):
    tokens = [tokenizer(f"the quick {'fox ' * i}").input_ids for i in range(12)]
    dataset = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in tokens])
    outcome = train(
        tmp_path, tokenizer, ResonanceCallback(keep=0.5), dataset=dataset, max_length=None, shuffle_dataset=True
    )
    assert outcome.callback.scores.column("length").tolist() == [len(ids) for ids in tokens]


def test_planned_as_if_from_the_start(tmp_path, tokenizer):
    """Sizes, steps, learning rate, intervals, epochs, final save and evaluation."""
    outcome = train(
        tmp_path,
        tokenizer,
        ResonanceCallback(keep=[1.0, 0.5, 0.25]),
        dataset=rows(20),
        lr_scheduler_type="linear",
        warmup_steps=0.2,
        save_strategy="steps",
        save_steps=0.5,
        eval_strategy="no",
    )
    state = outcome.trainer.state
    steps = [10, 5, 3]
    assert state.global_step == state.max_steps == sum(steps)
    assert [selection.keep.sum() for selection in outcome.callback.selections] == [20, 10, 5]
    rates = [update[-1] for update in outcome.seen]
    warm = math.ceil(0.2 * 18)
    expected = [min(k / warm, max(0, (18 - k) / (18 - warm))) * 1e-3 for k in range(1, 19)]
    assert np.allclose(rates, expected)
    assert rates[-1] == 0
    epochs = [entry["epoch"] for entry in outcome.logs]
    assert np.allclose(epochs, [*np.arange(1, 11) / 10, *(1 + np.arange(1, 6) / 5), *(2 + np.arange(1, 4) / 3)])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-18", "checkpoint-9"]


@pytest.mark.parametrize("accumulation", [1, 2, 3, 5])
def test_every_kept_row_counts_once_whatever_the_rounding(accumulation, tmp_path, tokenizer):
    spy = GradientSpy()
    callback = ResonanceCallback(keep=0.6)
    trainer = SFTTrainer(
        model=llama(len(tokenizer)),
        args=arguments(tmp_path, gradient_accumulation_steps=accumulation, num_train_epochs=2),
        train_dataset=rows(11),
        processing_class=tokenizer,
        callbacks=[callback, spy],
    )
    trainer.train()
    kept = callback.selections[1].sample_ids
    assert len(kept) == 11 - 4
    tokens = callback.scores.column("num_tokens")
    steps = math.ceil(math.ceil(11 / 2) / accumulation)
    assert sum(spy.tokens[steps:]) == tokens[kept].sum()
    assert len(spy.tokens) == trainer.state.max_steps == steps + math.ceil(math.ceil(7 / 2) / accumulation)
    assert spy.leaked == 0


class GradientSpy(TrainerCallback):
    """Tokens of each step, and gradients that are left over when a step begins."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.leaked, self.count = 0, 0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        kwargs["model"].register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, model, args, kwargs) -> None:
        if model.training:
            self.count += int((kwargs["labels"][:, 1:] != -100).sum())

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        self.leaked += sum(p.grad is not None and bool(p.grad.any()) for p in kwargs["model"].parameters())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.tokens.append(self.count)
        self.count = 0


def test_an_epoch_on_fewer_rows_is_an_epoch_on_a_smaller_dataset(tmp_path, tokenizer):
    """Bit for bit, though its last step is completed with batches that have nothing to learn."""
    settings = {"gradient_accumulation_steps": 4, "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    callback = ResonanceCallback(keep=0.5, when="before")
    ours = train(tmp_path, tokenizer, callback, **settings)
    kept = callback.selections[0].sample_ids
    smaller = train(tmp_path / "smaller", tokenizer, dataset=rows(21).select(kept), **settings)
    assert smaller.trainer.state.global_step == ours.trainer.state.global_step == 2
    assert_same_weights(ours, smaller)


def test_max_steps_is_kept_and_the_kept_rows_come_more_often(tmp_path, tokenizer):
    outcome = train(tmp_path, tokenizer, ResonanceCallback(keep=0.5), dataset=rows(20), max_steps=27)
    assert outcome.trainer.state.global_step == 27
    second = np.concatenate([update[:-1] for update in outcome.seen[10:20]])
    values, counts = np.unique(second, return_counts=True)
    assert (counts.sum(), set(counts) <= {1, 2, 3, 4}) == (20, True)
    assert len(values) <= 10


def test_threshold_replans_and_the_learning_rate_ends_where_it_should(tmp_path, tokenizer):
    outcome = train(
        tmp_path, tokenizer, ResonanceCallback(selector=DataSelector(threshold=5.6, by="loss")), dataset=rows(20)
    )
    sizes = [int(selection.keep.sum()) for selection in outcome.callback.selections]
    assert sizes[1] < 20
    assert outcome.trainer.state.global_step == outcome.trainer.state.max_steps == sum(math.ceil(k / 2) for k in sizes)
    rates = [update[-1] for update in outcome.seen]
    assert rates[-1] == 0
    assert all(earlier > later for earlier, later in itertools.pairwise(rates))
    assert max(np.abs(np.diff(rates))) < 3 * min(np.abs(np.diff(rates)))


def test_before_is_score_select_train_in_one_line(tmp_path, tokenizer, tiny_llama):
    callback = ResonanceCallback(keep=0.5, when="before")
    outcome = train(tmp_path, tokenizer, callback, model=tiny_llama())
    with warnings.catch_warnings(action="ignore"):
        scores = score_dataset(tiny_llama(), rows(21), tokenizer, arguments(tmp_path / "scores"))
    assert np.array_equal(callback.scores.column("score"), scores.column("score"))
    chosen = DataSelector(keep=0.5).select(scores)
    assert [np.array_equal(each.keep, chosen.keep) for each in callback.selections] == [True] * 3
    assert outcome.trainer.state.global_step == 3 * math.ceil(chosen.keep.sum() / 2)


def test_the_folder_holds_what_the_callback_holds(tmp_path, tokenizer):
    callback = train(tmp_path, tokenizer, ResonanceCallback(keep=0.5)).callback
    assert ScoreTable.load(tmp_path / STATE).table.equals(callback.scores.table)
    for epoch, selection in enumerate(callback.selections):
        loaded = Selection.load(tmp_path / STATE / f"selection-epoch-{epoch + 1}.parquet")
        assert np.array_equal(loaded.keep, selection.keep)
        assert loaded.policy["epoch"] == selection.policy["epoch"]
    assert np.array_equal(
        DataSelector(keep=0.5).select(ScoreTable.load(tmp_path / STATE)).keep.sum(), 11
    )  # the cheap half takes it


def test_a_second_run_leaves_nothing_of_the_first(tmp_path, tokenizer):
    train(tmp_path, tokenizer, ResonanceCallback(keep=0.5))
    train(tmp_path, tokenizer, ResonanceCallback(keep=0.5), num_train_epochs=2)
    assert sorted(path.name for path in (tmp_path / STATE).glob("selection*")) == [
        "selection-epoch-1.parquet",
        "selection-epoch-2.parquet",
    ]


def test_scalars_go_through_the_trackers_and_a_line_to_the_console(tmp_path, tokenizer, capsys):
    tracker = LogSpy()
    trainer = SFTTrainer(
        model=llama(len(tokenizer)),
        args=arguments(tmp_path, logging_strategy="epoch"),
        train_dataset=rows(20),
        processing_class=tokenizer,
        callbacks=[tracker, ResonanceCallback(keep=0.5)],
    )
    trainer.train()
    ours = [entry for entry in tracker.entries if f"{STATE}/kept_share" in entry]
    assert [entry[f"{STATE}/kept_share"] for entry in ours] == [0.5, 0.5, 0.5]
    assert {"dropped_token_share", "score_q25", "score_q50", "score_q75"} <= {key.split("/")[-1] for key in ours[0]}
    assert len([entry for entry in tracker.entries if "loss" in entry]) == 3  # the Trainer's own are still logged
    printed = [line.removeprefix("resofilter: ") for line in capsys.readouterr().out.splitlines()]
    assert [line for line in printed if line.startswith("epoch")] == [
        "epoch 1: 20 of 20 rows, 10 steps, 20 in all (no scores yet)",
        "epoch 2: 10 of 20 rows, 5 steps, 20 in all (keep 0.5)",
        "epoch 3: 10 of 20 rows, 5 steps, 20 in all (keep 0.5)",
    ]
    scores = [line for line in printed if line.startswith("scores after epoch")]
    assert len(scores) == 3
    assert "kept: 10 of 20 rows with" in scores[0]
    assert scores[0].endswith("% of the tokens; dropped: 10 largest 50 %, after epoch 1")
    command = f"resofilter report {shlex.quote(str(tmp_path))}"
    assert printed[-2:] == [
        f"scores, selections and plan: {tmp_path / STATE}",
        f"Next: {command} (report=True writes it with the rows' texts)",
    ]


class LogSpy(TrainerCallback):
    def __init__(self) -> None:
        self.entries: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.entries.append(dict(logs))


def test_optimizer_update_is_what_the_optimizer_did(tmp_path, tokenizer):
    spy = WeightSpy()
    callback = ResonanceCallback(keep=0.5, update="optimizer", n_layers=2)
    trainer = SFTTrainer(
        model=llama(len(tokenizer)),
        args=arguments(tmp_path, per_device_train_batch_size=1, num_train_epochs=1),
        train_dataset=rows(9),
        processing_class=tokenizer,
        callbacks=[spy, callback],
    )
    with pytest.warns(UserWarning, match="no row is ever dropped"):
        trainer.train()
    table = callback.scores.to_pandas().sort_values("step")
    assert np.allclose(table.measured, spy.changes, rtol=1e-5)
    config = callback.scores.provenance.config
    assert config["update"] == "optimizer"
    assert config["lr"] is config["eps"] is config["weight_decay"] is None  # they are the run's own


def test_optimizer_update_under_lora_is_the_merged_weights(tmp_path, tokenizer):
    spy = WeightSpy()
    callback = ResonanceCallback(keep=1.0, update="optimizer", n_layers=2)
    trainer = SFTTrainer(
        model=llama(len(tokenizer)),
        args=arguments(tmp_path, per_device_train_batch_size=1, num_train_epochs=1),
        train_dataset=rows(6),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["up_proj"], lora_dropout=0.0),
        callbacks=[spy, callback],
    )
    trainer.train()
    changes = callback.scores.to_pandas().sort_values("step").measured
    assert np.allclose(changes, spy.changes, rtol=1e-3)
    assert (changes > 0).all()


class WeightSpy(TrainerCallback):
    """The last two layers' up-projections, after every step against before."""

    def __init__(self) -> None:
        self.changes: list[float] = []

    def weights(self, model) -> list[torch.Tensor]:
        """Merged, where there is an adapter: by PEFT itself, on a copy."""
        whole = copy.deepcopy(model)
        for module in whole.modules():
            module._forward_hooks.clear()
        whole = whole.merge_and_unload() if hasattr(whole, "merge_and_unload") else whole
        return [layer.mlp.up_proj.weight.detach() for layer in whole.model.layers[-2:]]

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.before = self.weights(kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs) -> None:
        after = self.weights(kwargs["model"])
        pairs = zip(self.before, after, strict=True)
        self.changes.append(float(np.mean([(one - two).abs().mean().item() for one, two in pairs])))


def test_the_trainer_and_the_model_are_left_as_they_were_found(tmp_path, tokenizer):
    outcome = train(tmp_path, tokenizer, ResonanceCallback(keep=0.5))
    assert "get_batch_samples" not in vars(outcome.trainer)
    hooks = [m for m in outcome.trainer.model.modules() if m._forward_hooks]
    assert not hooks


def test_an_interrupted_training_is_begun_anew(tmp_path, tokenizer):
    class Interrupt(TrainerCallback):
        armed = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.armed and state.global_step == 7:
                self.armed = False
                raise KeyboardInterrupt

    callback = ResonanceCallback(keep=0.5)
    trainer = SFTTrainer(
        model=llama(len(tokenizer)),
        args=arguments(tmp_path, save_strategy="steps", save_steps=3),
        train_dataset=rows(20),
        processing_class=tokenizer,
        callbacks=[callback, Interrupt()],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    whole = train(tmp_path / "whole", tokenizer, ResonanceCallback(keep=0.5), dataset=rows(20))
    assert callback.scores.table.equals(whole.callback.scores.table)
    assert trainer.state.global_step == whole.trainer.state.global_step


def test_rows_whose_score_is_no_number_go_and_are_counted(tmp_path, tokenizer, capsys):
    class Poison(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.model = kwargs["model"]
            self.model.model.layers[3].mlp.up_proj.register_forward_hook(self.spoil)

        def spoil(self, module, args, output):
            if module.training and output.requires_grad and output.shape[0] == 2 and self.count == 3:
                output.register_hook(lambda gradient: gradient * torch.tensor([float("nan"), 1.0])[:, None, None])

        def on_step_begin(self, args, state, control, **kwargs):
            self.count = state.global_step

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0.0)

    callback = ResonanceCallback(keep=0.9)
    trainer = SFTTrainer(
        model=llama(len(tokenizer)),
        args=arguments(tmp_path, max_grad_norm=0, num_train_epochs=2),
        train_dataset=rows(20),
        processing_class=tokenizer,
        callbacks=[Poison(), callback],
    )
    trainer.train()
    reasons = callback.selections[1].to_pandas().reason
    assert (reasons == "score is nan, after epoch 1").sum() == 1
    assert callback.selections[1].keep.sum() == 18
    assert "1 rows have a score that is not a number" in capsys.readouterr().out


def test_sequential_order_is_not_taken_for_drift(tmp_path, tokenizer):
    outcome = train(
        tmp_path, tokenizer, ResonanceCallback(keep=0.5), dataset=rows(120), train_sampling_strategy="sequential",
        num_train_epochs=2, per_device_train_batch_size=8,
    )  # fmt: skip
    assert isinstance(outcome.trainer._get_train_sampler(), SequentialSampler)
    first = outcome.callback.scores.column("epoch") == 0
    scores = outcome.callback.scores
    assert np.array_equal(scores.column("score")[first], scores.column("measured")[first])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"packing": True, "max_length": 64}, "dataset=dataset"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({"twice": True}, "added twice"),
        ({"callback": {"update": "optimizer"}}, "Use 1 sample"),
        ({"callback": {"keep": [1.0, 0.5, 0.4, 0.3]}}, "4 shares and the run 3 epochs"),
        ({"callback": {"n_layers": 9}}, "between 1 and 4"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 64, "max_steps": 4}, "not fill a batch"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(changes, said, tmp_path, tokenizer):
    changes = dict(changes)
    callbacks = [ResonanceCallback(**changes.pop("callback", {})) for _ in range(1 + changes.pop("twice", False))]
    trainer = SFTTrainer(
        model=llama(len(tokenizer)),
        args=arguments(tmp_path, **changes),
        train_dataset=rows(20),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    with pytest.raises(InputError, match=said) as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert trainer.state.global_step == 0


def test_an_epoch_without_rows_ends_the_training_and_loses_nothing(tmp_path, tokenizer):
    callback = ResonanceCallback(threshold=1e-9)
    with pytest.raises(InputError, match="Epoch 2 would have no batch"):
        train(tmp_path, tokenizer, callback, save_strategy="steps", save_steps=100)
    assert (tmp_path / "checkpoint-11" / "model.safetensors").exists()
    assert ScoreTable.load(tmp_path / STATE).scored.all()


def test_a_checkpoint_without_the_callback_is_refused(tmp_path, tokenizer):
    train(tmp_path, tokenizer, save_strategy="steps", save_steps=5)
    with pytest.raises(InputError, match="made without ResonanceCallback"):
        train(tmp_path, tokenizer, ResonanceCallback(), resume=str(tmp_path / "checkpoint-5"))


def test_other_settings_are_refused_on_resuming(tmp_path, tokenizer):
    train(tmp_path, tokenizer, ResonanceCallback(keep=0.5), save_strategy="steps", save_steps=5)
    with pytest.raises(InputError, match=r"keep \(0.5 / 0.4\)"):
        train(tmp_path, tokenizer, ResonanceCallback(keep=0.4), resume=str(tmp_path / "checkpoint-5"))


def test_a_checkpoint_whose_tables_are_gone_is_refused(tmp_path, tokenizer):
    train(tmp_path, tokenizer, ResonanceCallback(), save_strategy="steps", save_steps=5)
    shutil.rmtree(tmp_path / "checkpoint-5" / STATE)
    with pytest.raises(InputError, match="No measurements of a training run"):
        train(tmp_path, tokenizer, ResonanceCallback(), resume=str(tmp_path / "checkpoint-5"))


def test_a_compiled_model_is_never_silently_unmeasured(tmp_path, tokenizer):
    class Unhook(TrainerCallback):
        """As a compiled model does: the hooks inside are dropped."""

        def on_train_begin(self, args, state, control, **kwargs):
            for layer in kwargs["model"].model.layers:
                layer.mlp.up_proj._forward_hooks.clear()

    trainer = SFTTrainer(
        model=llama(len(tokenizer)),
        args=arguments(tmp_path),
        train_dataset=rows(8),
        processing_class=tokenizer,
        callbacks=[ResonanceCallback(), Unhook()],
    )
    with pytest.raises(InputError, match=r"did not call 'model\.layers\.1\.mlp\.up_proj'.* or compiled"):
        trainer.train()


def test_a_dataset_smaller_than_one_update(tmp_path, tokenizer):
    outcome = train(tmp_path, tokenizer, ResonanceCallback(keep=0.5), dataset=rows(5), gradient_accumulation_steps=8)
    assert [selection.keep.sum() for selection in outcome.callback.selections] == [5, 3, 3]
    assert outcome.trainer.state.global_step == 3


def test_begun_anew_with_a_smaller_batch(tmp_path, tokenizer):
    class OutOfMemory(TrainerCallback):
        armed = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.armed and state.global_step == 3:
                self.armed = False
                raise RuntimeError("CUDA out of memory.")

    callback = ResonanceCallback(keep=0.5)
    trainer = SFTTrainer(
        model=llama(len(tokenizer)),
        args=arguments(tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True),
        train_dataset=rows(20),
        processing_class=tokenizer,
        callbacks=[callback, OutOfMemory()],
    )
    trainer.train()
    assert [selection.keep.sum() for selection in callback.selections] == [20, 10, 10]
    assert trainer.state.global_step == math.ceil(20 / 3) + 2 * math.ceil(10 / 3)
    assert callback.scores.scored.all()


def test_a_callback_and_a_trainer_can_be_used_again(tmp_path, tokenizer):
    callback = ResonanceCallback(keep=0.5)
    first = train(tmp_path, tokenizer, callback)
    scores = callback.scores
    train(tmp_path / "other", tokenizer, callback)
    assert callback.scores.table.equals(scores.table)
    first.trainer.train()
    assert not callback.scores.table.equals(scores.table)  # the weights went on
    assert len(callback.selections) == 3


def test_stopped_within_an_epoch_the_scores_so_far_are_there(tmp_path, tokenizer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    callback = ResonanceCallback(keep=0.5)
    trainer = SFTTrainer(
        model=llama(len(tokenizer)),
        args=arguments(tmp_path),
        train_dataset=rows(20),
        processing_class=tokenizer,
        callbacks=[callback, Stop()],
    )
    trainer.train()
    assert trainer.state.global_step == 5
    assert callback.scores.scored.sum() == 10
    assert set(callback.scores.reasons) == {None, "not measured yet"}
    assert ScoreTable.load(tmp_path / STATE).table.equals(callback.scores.table)


@pytest.mark.slow
def test_workers_that_persist_see_the_rows_that_are_kept(tmp_path, tokenizer):
    settings = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "eval_strategy": "epoch"}
    persistent = train(tmp_path, tokenizer, ResonanceCallback(keep=0.5), evaluate=True, **settings)
    without = train(tmp_path, tokenizer, ResonanceCallback(keep=0.5), evaluate=True, eval_strategy="epoch")
    assert list(persistent.seen) == list(without.seen)
    assert_same_weights(persistent, without)


def test_padding_free_batches_that_are_padded_to_a_multiple(tmp_path, tokenizer):
    settings = {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16, "gradient_accumulation_steps": 3}
    outcome = still(tmp_path, tokenizer, UPDATES["adamw"], **settings)
    assert_close(outcome.callback.scores, recorded(outcome, UPDATES["adamw"]))
    shrunk = train(tmp_path, tokenizer, ResonanceCallback(keep=0.3), **settings)
    assert shrunk.trainer.state.global_step == 4 + 2 + 2


def test_a_loss_that_is_its_own_batchs_mean(tmp_path, tokenizer):
    """A model whose forward takes no number of items."""
    model = llama(len(tokenizer))
    model.accepts_loss_kwargs = False
    outcome = still(tmp_path, tokenizer, UPDATES["adamw"], model=model)
    assert_close(outcome.callback.scores, recorded(outcome, UPDATES["adamw"]))
    outcome = still(tmp_path, tokenizer, UPDATES["adamw"], model=model, gradient_accumulation_steps=2)
    assert_close(outcome.callback.scores, recorded(outcome, UPDATES["adamw"]))


def test_without_preparation_the_users_rows_are_the_trainers(tmp_path, tokenizer):
    tokens = [tokenizer(f"the quick {'fox ' * i}").input_ids for i in range(12)]
    dataset = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in tokens]).shuffle(seed=3)
    changes = {"dataset_kwargs": {"skip_prepare_dataset": True}, "shuffle_dataset": True}
    outcome = train(tmp_path, tokenizer, ResonanceCallback(keep=0.5), dataset=dataset, **changes)
    assert outcome.callback.scores.column("length").tolist() == [len(ids) for ids in dataset["input_ids"]]


def test_other_rows_are_refused_on_resuming(tmp_path, tokenizer):
    train(tmp_path, tokenizer, ResonanceCallback(), save_strategy="steps", save_steps=5)
    other = rows(21).map(lambda row: {"completion": row["completion"] + " dog"})
    with pytest.raises(InputError, match="dataset"):
        train(tmp_path, tokenizer, ResonanceCallback(), dataset=other, resume=str(tmp_path / "checkpoint-5"))


def test_an_epoch_without_rows_is_said_again_on_resuming(tmp_path, tokenizer):
    for resume in (None, str(tmp_path / "checkpoint-11")):
        with pytest.raises(InputError, match="Epoch 2 would have no batch"):
            train(tmp_path, tokenizer, ResonanceCallback(threshold=1e-9), save_strategy="steps", save_steps=11,
                  resume=resume)  # fmt: skip


def test_after_an_exception_the_trainer_takes_another_callback_or_none(tmp_path, tokenizer):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    first, fail = ResonanceCallback(), Fail()
    trainer = SFTTrainer(
        model=llama(len(tokenizer)),
        args=arguments(tmp_path, num_train_epochs=2),
        train_dataset=rows(8),
        processing_class=tokenizer,
        callbacks=[first, fail],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(fail)
    trainer.remove_callback(first)
    trainer.train()
    assert trainer.state.global_step == 8
    second = ResonanceCallback(keep=0.5)
    trainer.add_callback(second)
    trainer.train()
    assert trainer.state.global_step == 4 + 2
    assert second.scores.scored.all()


def test_a_sampler_that_repeats_rows_is_refused(tmp_path, tokenizer):
    class Weighted(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.WeightedRandomSampler([1.0] * 20, 20)

    trainer = Weighted(
        model=llama(len(tokenizer)),
        args=arguments(tmp_path),
        train_dataset=rows(20),
        processing_class=tokenizer,
        callbacks=[ResonanceCallback()],
    )
    with pytest.raises(InputError, match="repeats rows or leaves some out"):
        trainer.train()


def test_an_epoch_that_another_callback_ends_is_refused(tmp_path, tokenizer):
    class EndEpoch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 5

    trainer = SFTTrainer(
        model=llama(len(tokenizer)),
        args=arguments(tmp_path),
        train_dataset=rows(20),
        processing_class=tokenizer,
        callbacks=[ResonanceCallback(), EndEpoch()],
    )
    with pytest.raises(InputError, match="ended epoch 1 early"):
        trainer.train()


def test_optimizer_update_of_weights_that_are_not_trained_is_refused(tmp_path, tokenizer):
    peft = LoraConfig(r=2, target_modules=["q_proj"])
    callback = ResonanceCallback(update="optimizer")
    with pytest.raises(InputError, match="no measured up-projection is trained"):
        train(tmp_path, tokenizer, callback, peft=peft, per_device_train_batch_size=1)
