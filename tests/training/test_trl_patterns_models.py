"""The kinds of model that SFTTrainer trains: dense, of experts, with vision, with adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.families import tiny
from helpers.sft import (
    EPS,
    Pattern,
    assert_right_rows,
    assert_same_weights,
    assert_untouched,
    patterns,
    plain_scores,
    right_or_refused,
)
from helpers.training import llama
from helpers.versions import older_than
from helpers.vision import image_rows, make_processor, vision_model
from helpers.zen import zen
from peft import (
    IA3Config,
    LoraConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from resofilter_trainer import InputError, ResonanceCallback


def of_family(family: str) -> Callable[[int], Any]:
    return lambda size: tiny(family, vocab_size=size, max_position_embeddings=256)


def tied(size: int) -> Any:
    return llama(size, max_position_embeddings=256, tie_word_embeddings=True)


def adapted(size: int) -> Any:
    """A model that is a PeftModel before the trainer sees it."""
    return get_peft_model(llama(size, max_position_embeddings=256), LoraConfig(r=2, target_modules=["up_proj"]))


def lora(**settings: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"peft_config": LoraConfig(r=2, **settings)}


def processor() -> dict[str, Any]:
    return {"processing_class": make_processor()}


NLL = {"loss_type": "nll"}  # TRL before 1.15 has another default, which fails with these models of transformers 4
ROUTED = {"router_aux_loss_coef": 0.0}
PATTERNS = {
    # dense
    "qwen3": Pattern("messages", model=of_family("qwen3")),
    "gemma3": Pattern("prompt-completion", NLL, model=of_family("gemma3_text"), slow=True),
    "tied embeddings": Pattern("text", model=tied),
    # experts, with the auxiliary loss that their configuration asks for, and without
    "qwen3_moe": Pattern("messages", model=of_family("qwen3_moe")),
    "qwen3_moe, no auxiliary loss": Pattern("messages", ROUTED, model=of_family("qwen3_moe"), slow=True),
    "olmoe": Pattern("prompt-completion", model=of_family("olmoe"), slow=True),
    "olmoe, no auxiliary loss": Pattern("prompt-completion", ROUTED, model=of_family("olmoe")),
    "gpt_oss": Pattern("messages and tools", model=of_family("gpt_oss"), slow=True),
    # vision-language models on text
    "qwen2_vl": Pattern("messages", model=vision_model("qwen2_vl")),
    "gemma3 with vision": Pattern("prompt-completion", NLL, model=vision_model("gemma3"), slow=True),
    "llava": Pattern("messages and tools", NLL, model=vision_model("llava"), slow=True),
    "llava and its processor": Pattern("messages", model=vision_model("llava"), trainer=processor, scorable=False),
    "llava and its processor, text": Pattern(
        "prompt-completion", model=vision_model("llava"), trainer=processor, scorable=False, slow=True
    ),
    # adapters
    "LoRA": Pattern("messages", trainer=lora()),
    "LoRA, checkpointing": Pattern("text", {"activation_checkpointing": True}, trainer=lora(), slow=True),
    "LoRA on the up-projection": Pattern(
        "prompt-completion", trainer=lora(target_modules=["up_proj"], use_rslora=True), slow=True
    ),
    "LoRA and a whole lm_head": Pattern("messages", trainer=lora(modules_to_save=["lm_head"]), slow=True),
    "DoRA": Pattern("prompt-completion", trainer=lora(use_dora=True, target_modules="all-linear")),
    "IA3": Pattern("messages", trainer=lambda: {"peft_config": IA3Config(task_type="CAUSAL_LM")}, slow=True),
    "a PeftModel": Pattern("prompt-completion", model=adapted, slow=True),
}


TIED = "ignore:Model has `tie_word_embeddings=True`:UserWarning"  # peft 0.18, of any model with a whole lm_head


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize("pattern", patterns(PATTERNS))
def test_where_every_row_is_kept_nothing_changes(pattern, tmp_path):
    assert_untouched(pattern, tmp_path)


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize("pattern", patterns(PATTERNS))
def test_where_half_is_kept_it_is_the_half_with_the_lower_scores(pattern, tmp_path):
    assert_right_rows(pattern, tmp_path)


# A router's auxiliary loss is the batch's: it trains, and is no part of a row's score.
BALANCED = {
    "qwen3_moe": ("qwen3_moe", {}),
    "mixtral, accumulation": ("mixtral", {"gradient_accumulation_steps": 2}),
    "olmoe, checkpointing": ("olmoe", {"activation_checkpointing": True}),
    "qwen3_moe, padding-free": ("qwen3_moe", {"padding_free": True, "max_length": None}),
    "jetmoe, padding-free": ("jetmoe", {"padding_free": True, "max_length": None}),
}


def balanced(family: str, settings: dict[str, Any]) -> Pattern:
    return Pattern("messages", {"router_aux_loss_coef": 0.5, **settings}, model=of_family(family))


@pytest.mark.parametrize("name", BALANCED)
def test_an_auxiliary_loss_that_weighs_much_is_no_part_of_a_rows_score(name, tmp_path):
    if name == "jetmoe, padding-free" and older_than("transformers", "5.0"):
        pytest.skip("jetmoe keeps the samples of a padding-free row apart since transformers 5.0")
    assert_right_rows(balanced(*BALANCED[name]), tmp_path)


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe, checkpointing"])
def test_an_auxiliary_loss_that_weighs_much_trains_as_without_the_callback(name, tmp_path):
    assert_untouched(balanced(*BALANCED[name]), tmp_path)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # TRL's own
def test_an_auxiliary_loss_that_cannot_be_taken_out_is_refused_with_what_to_change(tmp_path):
    """Selective checkpointing allows one backward only."""
    selective = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"selective": True}}
    trainer = balanced("qwen3_moe", selective).build(tmp_path, ResonanceCallback(keep=0.5))
    with pytest.raises(InputError, match=r"auxiliary loss.*selective.*router_aux_loss_coef=0") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert trainer.state.global_step == 0
    without = balanced("qwen3_moe", {**selective, "router_aux_loss_coef": 0.0})
    assert_right_rows(without, tmp_path / "without")


def test_an_auxiliary_loss_trains_an_epoch_on_fewer_rows_as_one_on_a_smaller_dataset(tmp_path):
    """Bit for bit: the micro-batches that complete its last step have no auxiliary loss either."""
    settings = {"gradient_accumulation_steps": 3, "num_train_epochs": 1, "train_sampling_strategy": "sequential"}
    pattern, callback = balanced("qwen3_moe", settings), ResonanceCallback(keep=0.5, when="before")
    ours = pattern.build(tmp_path / "ours", callback)
    ours.train()
    kept = zen(pattern.kind).select(callback.selections[0].sample_ids)
    smaller = dataclasses.replace(pattern, trainer=lambda: {"train_dataset": kept}).build(tmp_path / "smaller")
    smaller.train()
    assert len(kept) % 12
    assert_same_weights(ours.model.state_dict(), smaller.model.state_dict())
    assert ours.state.log_history[-2]["aux_loss"] == smaller.state.log_history[-2]["aux_loss"]


@pytest.mark.parametrize("family", ["gpt_oss", "opt", *(["falcon"] if older_than("transformers", "5.24") else [])])
def test_models_in_which_samples_of_a_padding_free_row_see_each_other_are_refused(family, tmp_path):
    pattern = Pattern("messages", {"padding_free": True, "max_length": None}, model=of_family(family))
    trainer = pattern.build(tmp_path, ResonanceCallback(keep=0.5))
    with pytest.raises(InputError, match=r"see each other.*padding_free=False.*attn_implementation") as error:
        trainer.train()
    assert "\n" not in str(error.value)


VIRTUAL = {
    "prompt tuning": PromptTuningConfig,
    "p-tuning": PromptEncoderConfig,
}


@pytest.mark.parametrize("kind", VIRTUAL)
def test_prompt_learning_is_refused_before_the_first_step(kind, tmp_path):
    config = VIRTUAL[kind](task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = Pattern("messages", trainer=lambda: {"peft_config": config}).build(tmp_path, ResonanceCallback(keep=0.5))
    with pytest.raises(InputError, match="adds tokens that are in no row"):
        trainer.train()
    assert trainer.state.global_step == 0


def on_images(folder: Any, when: str) -> tuple[Any, ResonanceCallback]:
    callback = ResonanceCallback(keep=1.0, eps=EPS, correct_drift=False, when=when)
    pattern = Pattern(
        "messages",
        {"max_length": None, "learning_rate": 0.0, "num_train_epochs": 1},
        model=vision_model("llava"),
        trainer=lambda: {"train_dataset": image_rows(), **processor()},
    )
    return pattern.build(folder, callback), callback


def true_scores(trainer: Any) -> np.ndarray:
    """Each row with its image, one at a time."""
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return plain_scores(trainer.model, batches, lambda model, batch: model(**batch).loss)


def test_rows_with_images_are_measured_with_them(tmp_path):
    trainer, callback = on_images(tmp_path, "training")
    truth = true_scores(trainer)
    trainer.train()
    assert np.allclose(callback.scores.column("measured"), truth, rtol=1e-4, atol=0)


def test_rows_with_images_are_measured_with_them_before_a_run_or_refused(tmp_path):
    trainer, callback = on_images(tmp_path, "before")
    truth = true_scores(trainer)

    def measured() -> None:
        trainer.train()
        assert np.allclose(callback.scores.column("measured"), truth, rtol=1e-4, atol=0)

    right_or_refused(measured, "image")
