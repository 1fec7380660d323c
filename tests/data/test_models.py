"""Loading a model: what is no model is refused with what to pass instead, and no weight is made up without a word."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.samples import make_samples
from helpers.scoring import arguments
from helpers.training import llama, rows
from helpers.versions import older_than
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from resofilter_trainer import InputError, ResonanceCallback, score_by, score_dataset
from resofilter_trainer.data.models import load_model, load_weights

WEIGHTS = "model.safetensors"


@pytest.fixture
def whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a model and its tokenizer."""
    folder = tmp_path / "whole"
    llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=make_samples(1)[0]["input_ids"][None]).logits


def without(folder: Path, weight: str) -> Path:
    """The folder with a weight taken out of its file."""
    kept = {name: value for name, value in load_file(folder / WEIGHTS).items() if weight not in name}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def as_gguf(folder: Path) -> Path:
    for each in folder.iterdir():
        each.unlink()
    (folder / "tiny-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(64))
    return folder


def as_pickle(folder: Path) -> Path:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


def inside_a_run(folder: Path) -> Path:
    shutil.copytree(folder, folder.parent / "run" / "checkpoint-12")
    return folder.parent / "run"


def without_file(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


NO_MODEL = {
    "a GGUF file": (
        lambda folder: as_gguf(folder) / "tiny-Q4_K_M.gguf",
        r"GGUF file.*gguf_file='tiny-Q4_K_M.gguf'",
    ),
    "a folder of GGUF files": (as_gguf, r"holds a model as GGUF \(tiny-Q4_K_M.gguf\).*the model that it was made from"),
    "a file of weights": (lambda folder: folder / WEIGHTS, "is a file.*Pass its folder: '.*whole'"),
    "its config": (lambda folder: folder / "config.json", "is a file.*Pass its folder: '.*whole'"),
    "weights alone": (lambda folder: without_file(folder, "config.json") / WEIGHTS, "is a file.*Pass a folder with"),
    "a folder without config": (lambda folder: without_file(folder, "config.json"), "the folder has no config.json"),
    "a run's folder": (inside_a_run, "no config.json. Did you mean '.*checkpoint-12'"),
    "a folder that is not there": (lambda folder: folder / "none", "There is no model at"),
    "folders that are not there": (lambda folder: "no/such/model", "There is no model at 'no/such/model'"),
    "pickled weights": (as_pickle, r"a pickle \(pytorch_model.bin\).*save_pretrained"),
    "no weights": (lambda folder: without_file(folder, WEIGHTS), f"cannot be loaded: .*{WEIGHTS}"),
}


@pytest.mark.parametrize(("make", "told"), NO_MODEL.values(), ids=list(NO_MODEL))
def test_what_is_no_model_is_refused_with_what_to_pass_instead(make, told, whole):
    with pytest.raises(InputError, match=told) as refused:
        load_model(str(make(whole)), None, arguments())
    assert "\n" not in str(refused.value)


def test_the_remedy_for_a_pickle_works(whole, tmp_path):
    """The one that the message names: load it knowingly, save it to a new folder."""
    expected = logits(load_weights(str(whole), arguments()))
    model = AutoModelForCausalLM.from_pretrained(as_pickle(whole))
    model.save_pretrained(tmp_path / "new")
    assert torch.equal(logits(load_weights(str(tmp_path / "new"), arguments())), expected)


def test_a_model_without_its_tokenizer_says_how_to_pass_one(whole, tokenizer):
    for each in whole.glob("*token*"):
        each.unlink()
    with pytest.raises(InputError, match=r"The tokenizer of '.*' cannot be loaded: .*processing_class"):
        load_model(str(whole), None, arguments())
    assert load_model(str(whole), tokenizer, arguments())[1] is tokenizer


def as_classifier(folder: Path) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.save_pretrained(folder)
    return folder


def as_layers(folder: Path) -> Path:
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    return folder


MADE_UP = {
    "a classifier": (as_classifier, r"lack lm_head.weight of LlamaForCausalLM, and hold score.weight instead"),
    "the layers alone": (as_layers, "lack lm_head.weight of LlamaForCausalLM"),
    "an up-projection": (lambda folder: without(folder, "2.mlp.up_proj"), "lack model.layers.2.mlp.up_proj.weight"),
    "many weights": (lambda folder: without(folder, "mlp"), "lack .* and 9 more of LlamaForCausalLM"),
}


@pytest.mark.parametrize(("make", "told"), MADE_UP.values(), ids=list(MADE_UP))
def test_a_weight_that_the_files_lack_is_never_a_random_number(make, told, whole):
    with pytest.raises(InputError, match=f"{told}.*would be random numbers"):
        load_weights(str(make(whole)), arguments())


def test_a_weight_of_another_shape_is_never_a_random_number(whole):
    settings = {"ignore_mismatched_sizes": True, "num_key_value_heads": 2}
    with pytest.raises(InputError, match=r"lack .*k_proj.weight.*would be random numbers"):
        load_weights(str(whole), arguments(model_init_kwargs=settings))


def test_a_tied_head_and_what_a_model_does_not_use_are_no_fault(tmp_path, tokenizer):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=3, n_head=2, n_positions=64))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    as_classifier(tmp_path)  # its file has `score.weight`, and the head is the embedding
    assert torch.equal(logits(load_weights(str(tmp_path), arguments())), expected)


ADAPTERS = {
    "lora": LoraConfig(target_modules=["up_proj"], init_lora_weights=False),
    "ia3": IA3Config(target_modules=["up_proj", "q_proj"], feedforward_modules=["up_proj"]),
    "a copy of the head": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
}


def adapter(folder: Path, config: Any) -> Path:
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapted.save_pretrained(folder.parent / "adapter")
    return folder.parent / "adapter"


AN_ADAPTER = r"It is an adapter.*AutoPeftModelForCausalLM.*merge_and_unload"
LOSES_A_COPY = not older_than("transformers", "5.16") and older_than("transformers", "5.17")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # peft 0.18, of any model
@pytest.mark.parametrize("config", ADAPTERS.values(), ids=list(ADAPTERS))
def test_an_adapters_folder_is_the_model_with_the_adapter(config, whole):
    found = adapter(whole, config)
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(found))
    if getattr(config, "modules_to_save", None) and LOSES_A_COPY:
        with pytest.raises(InputError, match=AN_ADAPTER):
            load_weights(str(found), arguments())
    else:
        assert torch.equal(logits(load_weights(str(found), arguments())), expected)
    assert not torch.equal(expected, logits(load_weights(str(whole), arguments())))


def test_an_adapter_whose_magnitudes_transformers_loses_has_a_remedy_that_works(whole, tokenizer):
    found = adapter(whole, LoraConfig(target_modules=["up_proj"], use_dora=True))
    adapted = AutoPeftModelForCausalLM.from_pretrained(found)
    expected = logits(adapted)
    if older_than("transformers", "5.0"):  # loses none
        assert torch.equal(logits(load_weights(str(found), arguments())), expected)
    else:
        with pytest.raises(InputError, match=AN_ADAPTER):
            load_weights(str(found), arguments())
    new = found.parent / "merged"
    adapted.merge_and_unload().save_pretrained(new)
    tokenizer.save_pretrained(new)
    assert torch.allclose(logits(load_model(str(new), None, arguments())[0]), expected, atol=1e-6)


def test_an_adapter_that_is_a_prompt_is_refused(whole):
    with pytest.raises(InputError, match=AN_ADAPTER):
        load_weights(str(adapter(whole, PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))), arguments())


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_a_model_without_a_language_models_head_is_refused(kind, whole, tokenizer):
    model = kind.from_pretrained(whole)
    for score in (score_dataset, lambda *given: score_by("loss", *given)):
        with pytest.raises(InputError, match=f"{type(model).__name__} predicts no next token.*AutoModelForCausalLM"):
            score(model, rows(4), tokenizer, arguments())


def test_a_classifier_in_a_trainer_is_refused(whole, tmp_path, tokenizer):
    labelled = Dataset.from_list(
        [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(4)]
    )
    trainer = Trainer(
        AutoModelForSequenceClassification.from_pretrained(whole),
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no"),
        train_dataset=labelled,
        processing_class=tokenizer,
        callbacks=[ResonanceCallback(keep=0.5)],
    )
    with pytest.raises(InputError, match="LlamaForSequenceClassification predicts no next token"):
        trainer.train()
