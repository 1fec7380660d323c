"""`score_dataset` over every kind of dataset, model and setting of SFTTrainer: its tokens, and the literal scores."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from helpers.sft import EPS, Pattern, learnt_rows, plain_scores, right_or_refused, sft_config
from helpers.training import llama
from helpers.vision import image_rows, make_processor, vision_model
from helpers.zen import OTHERS, SFT, TEMPLATE, zen, zen_tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from resofilter_trainer import InputError, ResonanceConfig, ScoreTable, literal, score_dataset

CONFIG = ResonanceConfig(eps=EPS)
CHECKED = [0, 7, 16]  # rows whose scores are also measured literally


def model() -> Any:
    return llama(len(zen_tokenizer()), max_position_embeddings=256)


def assert_scored(scores: ScoreTable, rows: dict[int, dict[str, torch.Tensor]], measured: Any) -> None:
    """The rows that SFTTrainer trains on have a score, by their tokens there; the others have a reason."""
    assert np.flatnonzero(scores.scored).tolist() == sorted(rows)
    for number, row in rows.items():
        assert scores.column("length")[number] == len(row["input_ids"])
        assert scores.column("num_tokens")[number] == (row["labels"][1:] != -100).sum()
    some = [number for number in CHECKED if number in rows]
    assert some
    truth = literal(measured, [rows[number] for number in some], CONFIG)
    assert np.allclose(scores.column("score")[some], truth.score, rtol=1e-5, atol=0)
    assert np.allclose(scores.column("loss")[some], truth.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", SFT)
def test_the_tokens_are_sfttrainers_and_the_scores_the_literal_ones(kind, tmp_path):
    pattern = Pattern(kind, model=lambda size: model())
    assert_scored(pattern.scores(model(), tmp_path), learnt_rows(pattern.build(tmp_path)), model())


SETTINGS = {
    "completion_only_loss=False": Pattern("prompt-completion and tools", {"completion_only_loss": False}),
    "completion_only_loss=True, tokens": Pattern("input_ids and completion_mask", {"completion_only_loss": True}),
    "completion_only_loss=True, text": Pattern("text", {"completion_only_loss": True}),
    "assistant_only_loss": Pattern("messages and tools", {"assistant_only_loss": True}),
    "both": Pattern("conversational prompt-completion", {"assistant_only_loss": True, "completion_only_loss": True}),
    "max_length": Pattern("prompt-completion", {"max_length": 24}),
    "max_length=None": Pattern("messages", {"max_length": None}),
    "eos_token": Pattern("text", {"eos_token": "<|end|>"}),
    "dataset_text_field": Pattern("text under another name", {"dataset_text_field": "body"}),
    "skip_prepare_dataset": Pattern("input_ids and labels", {"dataset_kwargs": {"skip_prepare_dataset": True}}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_change_the_tokens_or_what_is_learnt(name, tmp_path):
    pattern = SETTINGS[name]
    assert_scored(pattern.scores(model(), tmp_path), learnt_rows(pattern.build(tmp_path)), model())


def test_a_template_from_a_file(tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATE.replace("<|end|>", "<|end|> ."))
    pattern = Pattern("messages", {"chat_template_path": str(tmp_path / "own.jinja")})
    scores = pattern.scores(model(), tmp_path)
    assert_scored(scores, learnt_rows(pattern.build(tmp_path)), model())
    assert scores.provenance.source["chat_template_path"] == str(tmp_path / "own.jinja")


CHANGES_NO_SCORE = {
    "packing": {"packing": True, "max_length": 1024},
    "padding_free": {"padding_free": True, "max_length": None},
    "shuffle_dataset": {"shuffle_dataset": True},
    "pad_to_multiple_of": {"pad_to_multiple_of": 8},
    "checkpointing": {"activation_checkpointing": True},
    "offloading": {"activation_offloading": True},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "router_aux_loss_coef": {"router_aux_loss_coef": 0.1},
    "batches": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
}


@pytest.mark.parametrize("name", CHANGES_NO_SCORE)
def test_settings_of_training_that_change_no_score(name, tmp_path):
    plain, changed = (Pattern("messages", each).scores(model(), tmp_path) for each in ({}, CHANGES_NO_SCORE[name]))
    assert changed.table.equals(plain.table)


def test_selective_checkpointing_changes_no_score(tmp_path):
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"selective": True}}
    plain, changed = (Pattern("messages", each).scores(model(), tmp_path) for each in ({}, settings))
    assert changed.table.equals(plain.table)


def dft(measured: Any, row: Any) -> torch.Tensor:
    log_probs = measured(input_ids=row["input_ids"][None]).logits[0, :-1].log_softmax(-1)
    learnt = row["labels"][1:] != -100
    own = log_probs[learnt, row["labels"][1:][learnt]]
    return -(own * own.exp().detach()).mean()


def smoothed(measured: Any, row: Any) -> torch.Tensor:
    logits = measured(input_ids=row["input_ids"][None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, row["labels"][1:], label_smoothing=0.1)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # TRL's own
@pytest.mark.parametrize(
    ("name", "value", "loss"), [("loss_type", "dft", dft), ("label_smoothing_factor", 0.1, smoothed)]
)
def test_a_loss_of_the_arguments_is_measured_or_refused(name, value, loss, tmp_path):
    pattern = Pattern("messages", {name: value})
    rows = learnt_rows(pattern.build(tmp_path))

    def measured() -> None:
        scores = pattern.scores(model(), tmp_path)
        truth = plain_scores(model(), [rows[number] for number in sorted(rows)], loss)
        assert np.allclose(scores.column("score"), truth, rtol=1e-4, atol=0)

    right_or_refused(measured, name)


# What is no dataset of SFTTrainer's


@pytest.mark.parametrize("kind", OTHERS)
def test_rows_made_for_another_trainer_are_refused_in_a_line_that_names_their_columns(kind, tmp_path):
    said = refused(tmp_path, zen(kind))
    assert all(name in said for name in OTHERS[kind](0, "a", "b"))
    assert "\n" not in said


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_refused_in_python_names_pythons_arguments(kind, tmp_path):
    said = refused(tmp_path, zen(kind))
    assert "_column=" in said
    assert "--" not in said


SHAPES = {
    "several splits": lambda: DatasetDict({"train": zen("messages")}),
    "a dict": lambda: {"train": zen("messages")},
    "a stream": lambda: zen("messages").to_iterable_dataset(),
    "a list": lambda: list(zen("messages")),
    "no rows": lambda: zen("messages").select([]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_no_dataset_is_refused_in_one_line(name, tmp_path):
    assert "\n" not in refused(tmp_path, SHAPES[name]())


ARGUMENTS = {
    "assistant_only_loss": ("text", {"assistant_only_loss": True}, "not conversational"),
    "eos_token": ("text", {"eos_token": "nope"}, "eos_token"),
    "loss_type": ("text", {"loss_type": "nope"}, "loss_type"),
    "truncation_mode": ("text", {"truncation_mode": "middle"}, "truncation mode"),
    "skip_prepare_dataset": (
        "input_ids and completion_mask",
        {"dataset_kwargs": {"skip_prepare_dataset": True}},
        "skip_prepare_dataset",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_do_not_fit_the_rows_are_refused_in_one_line(name, tmp_path):
    kind, settings, said = ARGUMENTS[name]
    line = refused(tmp_path, zen(kind), **settings)
    assert said in line
    assert "\n" not in line


def test_rows_that_are_no_tokens_cannot_skip_their_preparation(tmp_path):
    assert "skip_prepare_dataset" in refused(tmp_path, zen("text"), dataset_kwargs={"skip_prepare_dataset": True})


def refused(folder: Any, dataset: Any, measured: Any = None, processing_class: Any = None, **settings: Any) -> str:
    args, tokenizer = sft_config(folder, **settings), processing_class or zen_tokenizer()
    with pytest.raises(InputError) as error:
        score_dataset(measured or model(), dataset, tokenizer, args, CONFIG)
    return str(error.value)


# Models


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_a_vision_model_is_scored_on_text_as_an_instance(family, tmp_path):
    pattern = Pattern("messages", model=vision_model(family))
    trainer = pattern.build(tmp_path)
    assert_scored(pattern.scores(trainer.model, tmp_path), learnt_rows(trainer), trainer.model)


@pytest.mark.parametrize("family", ["gemma3", "llava", "qwen2_vl"])
def test_a_vision_model_is_scored_on_text_by_its_folder(family, tmp_path):
    """SFTTrainer takes the class that the configuration names."""
    whole = vision_model(family)(len(zen_tokenizer()))
    whole.save_pretrained(tmp_path / "model")
    by_folder, as_instance = (Pattern("messages").scores(each, tmp_path) for each in (str(tmp_path / "model"), whole))
    assert np.array_equal(by_folder.column("score"), as_instance.column("score"))


@pytest.mark.parametrize("kind", ["messages", "prompt-completion"])
def test_a_processor_scores_text_as_its_tokenizer_or_is_refused(kind, tmp_path):
    measured, processor = vision_model("llava")(len(zen_tokenizer())), make_processor()
    extra = {"processing_class": processor}
    rows = learnt_rows(Pattern(kind, model=vision_model("llava"), trainer=lambda: extra).build(tmp_path))

    def scored() -> None:
        with warnings.catch_warnings(action="ignore"):
            scores = score_dataset(measured, zen(kind), processor, sft_config(tmp_path), CONFIG)
        assert_scored(scores, rows, measured)

    right_or_refused(scored, "tokenizer")


def test_images_are_refused_in_one_line(tmp_path):
    measured = vision_model("llava")(len(zen_tokenizer()))
    tokenizer = make_processor().tokenizer
    said = refused(tmp_path, image_rows(), measured, tokenizer, max_length=None)
    assert "image" in said
    assert "\n" not in said


def test_images_and_a_processor_are_refused_in_one_line(tmp_path):
    measured = vision_model("llava")(len(zen_tokenizer()))
    said = refused(tmp_path, image_rows(), measured, make_processor(), max_length=None)
    assert "image" in said
    assert "\n" not in said


ADAPTERS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "trained embeddings of some tokens": LoraConfig(r=2, trainable_token_indices=[3, 4]),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_trls_tests_is_measured_or_refused(name, tmp_path):
    adapted = get_peft_model(model(), ADAPTERS[name])

    def measured() -> None:
        scores = Pattern("messages").scores(adapted, tmp_path)
        assert np.isfinite(scores.column("score")).all()

    right_or_refused(measured, "prompt|token")
