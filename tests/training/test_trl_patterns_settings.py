"""The settings of SFTConfig and SFTTrainer: keeping all rows changes nothing, keeping half keeps the right ones.

PATTERNS is the table of settings. What needs assertions of its own follows it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.sft import EPS, Batches, Pattern, assert_right_rows, assert_untouched, patterns, plain_scores
from helpers.training import llama
from helpers.zen import TEMPLATE, zen, zen_tokenizer
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from resofilter_trainer import InputError, ResonanceCallback

EACH_EPOCH = {"eval_strategy": "epoch"}
NLL = {"loss_type": "nll"}  # TRL before 1.15 has another default, without logits and with no label smoothing
CHECKPOINTING = {"activation_checkpointing": True}


def with_eval() -> dict[str, Any]:
    return {"eval_dataset": zen("prompt-completion", 5)}


def with_eval_sets() -> dict[str, Any]:
    return {"eval_dataset": {"few": zen("prompt-completion", 3), "more": zen("prompt-completion", 6)}}


def with_metrics() -> dict[str, Any]:
    def right(predicted: Any) -> dict[str, float]:
        return {"right": float((predicted.predictions[:, :-1] == predicted.label_ids[:, 1:]).mean())}

    best = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    return {**with_eval(), "compute_metrics": right, **best}


def with_early_stopping() -> dict[str, Any]:
    return {**with_eval(), "callbacks": [EarlyStoppingCallback(1)]}


def padding_left() -> dict[str, Any]:
    tokenizer = zen_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "left", None
    return {"processing_class": tokenizer}


def own_optimizer() -> dict[str, Any]:
    return {"optimizer_cls_and_kwargs": (torch.optim.RMSprop, {"lr": 1e-3})}


PATTERNS = {
    # what is learnt
    "completion_only_loss=False": Pattern(config={"completion_only_loss": False}),
    "completion_only_loss=True": Pattern(config={"completion_only_loss": True}, slow=True),
    "completion_only_loss=True, tokens": Pattern("input_ids and completion_mask", {"completion_only_loss": True}),
    "completion_only_loss=True, text": Pattern("text", {"completion_only_loss": True}, slow=True),
    "assistant_only_loss": Pattern("messages", {"assistant_only_loss": True}),
    "assistant_only_loss, tools": Pattern("messages and tools", {"assistant_only_loss": True}, slow=True),
    "both": Pattern("prompt-completion and tools", {"assistant_only_loss": True, "completion_only_loss": True}),
    "max_length, which leaves rows out": Pattern(config={"max_length": 24}),
    "max_length=None": Pattern(config={"max_length": None}, slow=True),
    # how rows become tokens
    "eos_token": Pattern("text", {"eos_token": "<|end|>"}),
    "dataset_text_field": Pattern("text under another name", {"dataset_text_field": "body"}),
    "dataset_num_proc": Pattern(config={"dataset_num_proc": 2}, slow=True),
    "formatting_func": Pattern(
        "question and answer", trainer=lambda: {"formatting_func": lambda row: row["question"] + row["answer"]},
        scorable=False,
    ),
    "skip_prepare_dataset": Pattern("input_ids and labels", {"dataset_kwargs": {"skip_prepare_dataset": True}}),
    # how tokens become batches
    "padding_free": Pattern("messages", {"padding_free": True, "max_length": None}),
    "pad_to_multiple_of": Pattern(config={"pad_to_multiple_of": 8}, slow=True),
    "left padding, no pad token": Pattern(trainer=padding_left),
    "a collator": Pattern(
        trainer=lambda: {"data_collator": DataCollatorForLanguageModeling(0, pad_to_multiple_of=4)}, slow=True
    ),
    "accumulation": Pattern("messages", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "shuffle_dataset": Pattern("messages", {"shuffle_dataset": True, "max_length": 60}),
    "group_by_length": Pattern(config={"train_sampling_strategy": "group_by_length"}),
    "sequential": Pattern(config={"train_sampling_strategy": "sequential"}, slow=True),
    "data_seed": Pattern(config={"data_seed": 5}, slow=True),
    "remove_unused_columns=False": Pattern(config={"remove_unused_columns": False}, slow=True),
    # how it is learnt
    "checkpointing": Pattern("messages", CHECKPOINTING),
    "reentrant checkpointing": Pattern(
        config={**CHECKPOINTING, "activation_checkpointing_kwargs": {"use_reentrant": True}}, slow=True
    ),
    "bf16": Pattern(config={"bf16": True}, scorable=False),
    "NEFTune": Pattern(config={"neftune_noise_alpha": 5.0}, scorable=False),
    "loss_type='dft'": Pattern(config={"loss_type": "dft"}, scorable=False),
    "average_tokens_across_devices=False": Pattern(config={"average_tokens_across_devices": False}, slow=True),
    "optim='adafactor', weight_decay": Pattern(config={"optim": "adafactor", "weight_decay": 0.1}, slow=True),
    "optimizer_cls_and_kwargs": Pattern(trainer=own_optimizer, scorable=False, slow=True),
    "lr_scheduler_type, warmup_steps": Pattern(config={"lr_scheduler_type": "cosine", "warmup_steps": 2}, slow=True),
    # what is looked at
    "eval_dataset": Pattern(config=EACH_EPOCH, trainer=with_eval, slow=True),
    "several eval datasets": Pattern(config=EACH_EPOCH, trainer=with_eval_sets),
    "eval_packing": Pattern(config={**EACH_EPOCH, "eval_packing": True, "max_length": 64}, trainer=with_eval),
    "eval_steps": Pattern(
        config={"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}, trainer=with_eval, slow=True
    ),
    "EarlyStoppingCallback": Pattern(
        config={**EACH_EPOCH, "load_best_model_at_end": True}, trainer=with_early_stopping
    ),
    "include_num_input_tokens_seen": Pattern(config={"include_num_input_tokens_seen": "all"}, slow=True),
    "logging_strategy='epoch'": Pattern(config={"logging_strategy": "epoch", "logging_first_step": True}, slow=True),
    "save_steps": Pattern("messages", {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")  # before transformers 5, of quick steps
@pytest.mark.parametrize("pattern", patterns(PATTERNS))
def test_where_every_row_is_kept_nothing_changes(pattern, tmp_path):
    assert_untouched(pattern, tmp_path)


@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")  # before transformers 5, of quick steps
@pytest.mark.parametrize("pattern", patterns(PATTERNS))
def test_where_half_is_kept_it_is_the_half_with_the_lower_scores(pattern, tmp_path):
    assert_right_rows(pattern, tmp_path)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # TRL's own, wherever metrics are computed
def test_metrics_are_those_of_a_run_without_the_callback(tmp_path):
    assert_untouched(Pattern(config={**EACH_EPOCH, **NLL}, trainer=with_metrics), tmp_path)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # TRL's own
def test_selective_checkpointing(tmp_path):
    checkpointing = {**CHECKPOINTING, "activation_checkpointing_kwargs": {"selective": True}}
    pattern = Pattern("messages", checkpointing, scorable=False)
    assert_untouched(pattern, tmp_path)
    assert_right_rows(pattern, tmp_path)


DEPRECATED = {
    "pad_token": Pattern(config={"pad_token": "<eos>"}),
    "loss_type='chunked_nll'": Pattern(config={"loss_type": "chunked_nll"}),
    "truncation_mode='keep_end'": Pattern(config={"truncation_mode": "keep_end", "max_length": 24}),
    "label_smoothing_factor": Pattern(config={"label_smoothing_factor": 0.1, **NLL}, scorable=False),
}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # TRL's own
@pytest.mark.parametrize("pattern", patterns(DEPRECATED))
def test_settings_that_trl_is_about_to_remove(pattern, tmp_path):
    assert_right_rows(pattern, tmp_path)


def dft(model: Any, batch: Any) -> Tensor:
    """Dynamic fine-tuning (arXiv 2508.05629): each token's loss times its probability, which is a constant."""
    logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
    return -(log_probs * log_probs.exp().detach()).mean()


def smoothed(model: Any, batch: Any) -> Tensor:
    logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    learnt = labels != -100
    return torch.nn.functional.cross_entropy(logits[learnt], labels[learnt], label_smoothing=0.1)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # TRL's own
@pytest.mark.parametrize(
    ("config", "loss"),
    [({"loss_type": "dft"}, dft), ({"label_smoothing_factor": 0.1, **NLL}, smoothed)],
    ids=["dft", "smooth"],
)
def test_with_another_loss_the_scores_are_of_that_loss(config, loss, tmp_path):
    callback = ResonanceCallback(keep=1.0, eps=EPS, correct_drift=False)
    trainer = Pattern(config=config).build(tmp_path, callback, learning_rate=0.0, num_train_epochs=1)
    rows = trainer.train_dataset.with_format("torch")
    batches = [{name: row[name][None] for name in ("input_ids", "labels")} for row in rows]
    truth = plain_scores(trainer.model, batches, loss)
    trainer.train()
    assert np.allclose(callback.scores.column("measured"), truth, rtol=1e-4, atol=0)


def test_a_template_from_a_file(tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATE.replace("<|end|>", "<|end|> ."))
    pattern = Pattern("messages", {"chat_template_path": str(tmp_path / "own.jinja"), "assistant_only_loss": True})
    assert_right_rows(pattern, tmp_path)


def test_a_template_of_another_tokenizer_with_a_token_of_its_own(tmp_path):
    """The model gets an embedding for the new token."""
    other = zen_tokenizer()
    other.add_tokens(["<stop>"])
    other.chat_template = TEMPLATE.replace("<|end|>", "<stop>")
    other.save_pretrained(tmp_path / "other")
    pattern = Pattern("messages", {"chat_template_path": str(tmp_path / "other")})
    assert_untouched(pattern, tmp_path)
    assert_right_rows(pattern, tmp_path)


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param(None, id="float32"),
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow, id="bfloat16"),
    ],
)
def test_a_model_given_by_its_folder(kwargs, tmp_path):
    llama(len(zen_tokenizer()), max_position_embeddings=256).save_pretrained(tmp_path / "model")
    folder, is_plain = str(tmp_path / "model"), kwargs is None
    pattern = Pattern("messages", {"model_init_kwargs": kwargs}, model=lambda size: folder, scorable=is_plain)
    assert_untouched(pattern, tmp_path)
    assert_right_rows(pattern, tmp_path)


def test_with_max_steps_the_kept_rows_come_again(tmp_path):
    callback, batches = ResonanceCallback(keep=0.5), Batches()
    trainer = Pattern(config={"max_steps": 9}).build(tmp_path, batches, callback)
    trainer.train()
    tokens = {row["number"]: tuple(row["input_ids"]) for row in trainer.train_dataset}
    assert trainer.state.global_step == 9
    assert set(batches.epochs[1]) == {tokens[row] for row in callback.selections[1].sample_ids}
    assert len(batches.epochs[1]) == 4 * 4


def test_a_row_that_drop_last_leaves_out_of_the_first_epoch_is_said_to_be_unmeasured(tmp_path):
    callback, batches = ResonanceCallback(keep=1.0), Batches()
    trainer = Pattern(config={"dataloader_drop_last": True}).build(tmp_path, batches, callback, num_train_epochs=1)
    trainer.train()
    left_out = [row["number"] for row in trainer.train_dataset if tuple(row["input_ids"]) not in batches.epochs[0]]
    assert np.flatnonzero(~callback.scores.scored).tolist() == left_out
    assert len(left_out) == 1


class Events(TrainerCallback):
    """What a tracker is told, in its order."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not any(name.startswith("resofilter/") for name in logs):
            self.told.append((state.global_step, sorted(logs), logs.get("loss", logs.get("eval_loss"))))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.told.append((state.global_step, "evaluated", sorted(metrics)))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told.append((state.global_step, "saved"))


def test_a_tracker_is_told_the_same_in_the_same_order(tmp_path):
    told = []
    for callbacks in ([], [ResonanceCallback(keep=1.0)]):
        tracker = Events()
        Pattern(config=EACH_EPOCH, trainer=with_eval).build(tmp_path, tracker, *callbacks).train()
        told.append(tracker.told)
    assert told[0] == told[1]
    assert (10, "saved") in told[0]


@pytest.mark.parametrize("sets", [with_eval, with_eval_sets], ids=["one", "several"])
def test_log_history_has_the_entries_of_a_run_without_the_callback(sets, tmp_path):
    """As TRL's tests read it: from its end."""
    names = []
    for callbacks in ([], [ResonanceCallback(keep=1.0)]):
        trainer = Pattern(config=EACH_EPOCH, trainer=sets).build(tmp_path, *callbacks)
        trainer.train()
        names.append([sorted(entry) for entry in trainer.state.log_history])
    assert names[0] == names[1]


@pytest.mark.parametrize("step", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_a_run_that_resumes_ends_as_one_that_was_never_stopped(step, tmp_path):
    pattern = Pattern("messages and tools", {"save_strategy": "steps", "save_steps": 1, "assistant_only_loss": True})
    whole, batches = ResonanceCallback(keep=0.5), Batches()
    first = pattern.build(tmp_path, batches, whole)
    first.train()
    again, rest = ResonanceCallback(keep=0.5), Batches()
    second = pattern.build(tmp_path, rest, again)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert again.selections[1].sample_ids.tolist() == whole.selections[1].sample_ids.tolist()
    assert rest.epochs[-1] == batches.epochs[1][len(batches.epochs[1]) - len(rest.epochs[-1]) :]


REFUSED = {
    "packing": Pattern("messages", {"packing": True, "max_length": 64}),
    "packing_strategy='wrapped'": Pattern("text", {"packing": True, "packing_strategy": "wrapped", "max_length": 64}),
    "packing_strategy='bfd_split'": Pattern(
        "messages", {"packing": True, "packing_strategy": "bfd_split", "max_length": 64}
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of TRL, which has no attention for packed rows here
@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_cannot_be_told_apart_are_refused_in_one_line(name, tmp_path):
    trainer = REFUSED[name].build(tmp_path, ResonanceCallback(keep=0.5))
    said = "packing_strategy='wrapped', under which" if "wrapped" in name else r"ResonanceCallback\(dataset=dataset\)"
    with pytest.raises(InputError, match=said) as refused:
        trainer.train()
    assert "\n" not in str(refused.value)
    assert trainer.state.global_step == 0
