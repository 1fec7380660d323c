"""Token cleaning where it is easy to be silently wrong: odd rows, odd collators, odd references, odd moments."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.training import arguments, assert_same_weights, in_order, llama, rows, train
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer
from trl import SFTTrainer

from resofilter_trainer import InputError, ResonanceCallback, TokenCleaning, TokenSelector, clean_dataset, self_evolve
from resofilter_trainer.config.compatibility import has
from resofilter_trainer.data.reference_model import adapted
from resofilter_trainer.scores.token_scores import TOKEN_SCORES_FILE
from resofilter_trainer.scoring import token_losses as loss_pass
from resofilter_trainer.tokens import losses as token_losses
from resofilter_trainer.tokens.cleaned_dataset import SUMMARY_FILE

ARGS = arguments(Path("unused"))


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """base, reference, and an adapter on the base."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("reference", 1)):
        llama(len(tokenizer), seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    torch.manual_seed(3)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(base_of(folder), config).save_pretrained(folder / "adapter")
    return folder


def base_of(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, **settings)


def clean(place, dataset=None, output=None, reference="reference", **settings):
    cleaning = TokenCleaning(reference=str(place / reference), **settings)
    return clean_dataset(str(place / "base"), rows(20) if dataset is None else dataset, cleaning, None, ARGS, output)


def callback(place, reference="reference", keep=0.5, **settings):
    return ResonanceCallback(token_cleaning=TokenCleaning(keep, reference=str(place / reference), **settings))


def evolve(place, output, **changes):
    args = in_order(arguments(output, **{"num_train_epochs": 1, **changes}))
    return self_evolve(str(place / "base"), rows(24), TokenCleaning(parts=3), args)


def plain_trainer(place, output, dataset, collator, **settings):
    model = base_of(place)
    args = arguments(output, remove_unused_columns=False, num_train_epochs=1)
    return Trainer(model, args, collator, dataset, callbacks=[callback(place, **settings)])


# ---- rows and collators


def test_packed_rows_are_refused(place):
    packed = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]], "labels": [[5, 6, 7, 8]], "seq_lengths": [[2, 2]]})
    with pytest.raises(InputError, match="packed already"):
        clean(place, packed)


def test_a_collator_that_makes_labels_of_its_own_is_refused(place, tokenizer, tmp_path):
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 6, "labels": [[-100, -100, 7, 8]] * 6})
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with pytest.raises(InputError, match="learns other tokens in its batch"):
        plain_trainer(place, tmp_path, dataset, collator).train()


def test_masks_do_not_reach_inputs_that_share_their_memory_with_labels(place, tmp_path):
    def collator(examples):
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "labels": ids}

    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7, 8 + i] for i in range(12)]})
    trainer = plain_trainer(place, tmp_path, dataset, collator)
    trainer.train()
    assert trainer.state.global_step == 6
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_row_that_never_had_a_token_is_not_said_to_have_lost_them(place, tmp_path, tokenizer):
    def collator(examples):
        return {name: torch.tensor([example[name] for example in examples]) for name in ("input_ids", "labels")}

    labels = [[-100, 6, 7, 8]] * 7 + [[-100] * 4]
    dataset = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 8, "labels": labels})
    trainer = plain_trainer(place, tmp_path, dataset, collator)
    trainer.train()
    own = next(each for each in trainer.callback_handler.callbacks if isinstance(each, ResonanceCallback))
    assert own.scores.reasons[7] != "every token was cleaned away"


# ---- references


def test_an_adapter_as_reference_draws_no_random_number(place, tmp_path, tokenizer):
    settings = {"attention_dropout": 0.2}
    ends = []
    for reference in (None, "adapter", "reference"):
        mine = None if reference is None else callback(place, reference, keep=1.0)
        model = llama(len(tokenizer), **settings)
        ends.append(train(tmp_path / str(reference), tokenizer, mine, model=model, num_train_epochs=1))
    for other in ends[1:]:
        assert_same_weights(ends[0], other)


@pytest.mark.parametrize("lora", [False, True])
def test_an_adapter_leaves_hooks_attributes_and_randomness_as_they_were(lora, place):
    model = base_of(place)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"]))
    enable = "activation_checkpointing_enable" if has("activation_checkpointing") else "gradient_checkpointing_enable"
    getattr(model, enable)()
    model.enable_input_require_grads()
    model.train()

    def state():
        hooks = [(name, len(module._forward_hooks), module.training) for name, module in model.named_modules()]
        attributes = [(name, sorted(vars(module))) for name, module in model.named_modules()]
        return hooks, attributes, torch.get_rng_state().tolist()

    before = state()
    with adapted(model, str(place / "adapter")):
        pass
    assert state() == before


def test_scores_of_an_adapter_with_another_scale_are_not_used_again(place, tmp_path):
    clean(place, reference="adapter", output=tmp_path / "out")
    file = place / "adapter" / "adapter_config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "lora_alpha": 64}))
    try:
        with pytest.raises(InputError, match="reference_settings"):
            clean(place, reference="adapter", output=tmp_path / "out")
    finally:
        file.write_text(before)


def test_an_adapter_that_brings_another_tokenizer_is_refused(place, tokenizer):
    other = AutoTokenizer.from_pretrained(place / "base")
    other.add_tokens(["fox_fox"])
    other.save_pretrained(place / "adapter")
    try:
        with pytest.raises(InputError, match="another vocabulary"):
            clean(place, reference="adapter")
    finally:
        for path in (place / "adapter").glob("*token*"):
            path.unlink()


def test_a_reference_that_only_gained_a_pad_token_is_accepted(place, tmp_path, tokenizer):
    llama(len(tokenizer) + 1, seed=1).save_pretrained(tmp_path / "padded")
    other = AutoTokenizer.from_pretrained(place / "base")
    other.add_special_tokens({"pad_token": "<padding>"})
    other.save_pretrained(tmp_path / "padded")
    assert clean(place, reference=tmp_path / "padded").summary["tokens_kept"] > 0


def test_an_adapter_without_weights_says_so(place, tmp_path):
    (tmp_path / "adapter_config.json").write_text((place / "adapter" / "adapter_config.json").read_text())
    with pytest.raises(InputError, match="no adapter_model"):
        clean(place, reference=tmp_path)


# ---- settings and moments


def test_shares_and_counts_of_numpy_and_fractions_are_numbers(place, tmp_path):
    cleaning = TokenCleaning(keep=np.float32(0.5), parts=np.int64(2), tokens_per_batch=np.int32(64))
    assert (type(cleaning.keep), type(cleaning.parts), type(cleaning.tokens_per_batch)) == (float, int, int)
    assert TokenSelector(Fraction(3, 5)).keep == 0.6
    clean(place, output=tmp_path, keep=Fraction(3, 5))
    assert json.loads((tmp_path / SUMMARY_FILE).read_text())["keep_tokens"] == 0.6


def test_too_many_stages_are_refused_before_anything_is_measured(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(token_losses, "measure_token_losses", lambda *args, **kwargs: pytest.fail("measured"))
    for keep in (1.0, [1.0, 0.1]):
        mine = ResonanceCallback(keep, token_cleaning=TokenCleaning(parts=4))
        with pytest.raises(InputError, match="too short for parts=4"):
            train(tmp_path, tokenizer, mine, per_device_train_batch_size=7 if keep == 1.0 else 2)


def test_a_threshold_that_leaves_too_few_rows_for_the_stages_saves_first(tmp_path, tokenizer):
    mine = ResonanceCallback(threshold=-1.0, token_cleaning=TokenCleaning(parts=4))
    with pytest.raises(InputError, match=r"would have no batch|too short for parts"):
        train(tmp_path, tokenizer, mine)
    assert (tmp_path / "resofilter" / "scores.parquet").is_file()


def test_an_interrupted_pass_before_training_is_resumed(place, tmp_path, tokenizer, monkeypatch):
    real, measured = loss_pass._losses_of, []

    def stops(model, dataset, batch, args):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(batch)
        return real(model, dataset, batch, args)

    monkeypatch.setattr(loss_pass, "_losses_of", stops)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, tokenizer, callback(place, tokens_per_batch=32), model=base_of(place))
    parts = list((tmp_path / "resofilter" / "parts" / "tokens" / "base").glob("part-*.parquet"))
    assert len(parts) == 1
    done = []
    monkeypatch.setattr(loss_pass, "_losses_of", lambda *args: done.append(args[2]) or real(*args))
    trained = train(tmp_path, tokenizer, callback(place, tokens_per_batch=32), model=base_of(place))
    monkeypatch.setattr(loss_pass, "_losses_of", real)
    whole = train(tmp_path / "whole", tokenizer, callback(place, tokens_per_batch=32), model=base_of(place))
    assert_same_weights(trained, whole)
    of_base = done[: (len(done) - len(measured)) // 2]  # the reference's follow, all of them
    assert all(not np.array_equal(batch, old) for batch in of_base for old in measured)
    assert not (tmp_path / "resofilter" / "parts").exists()


def test_a_later_run_without_cleaning_leaves_nothing_of_an_earlier_one(place, tmp_path, tokenizer):
    train(tmp_path, tokenizer, callback(place), model=base_of(place))
    folder = tmp_path / "resofilter"
    assert (folder / TOKEN_SCORES_FILE).is_file()
    train(tmp_path, tokenizer, ResonanceCallback(), model=base_of(place))
    assert not (folder / TOKEN_SCORES_FILE).exists()
    assert not (folder / "token_cleaning.json").exists()


def test_a_trainers_own_way_to_fetch_is_put_back(place, tmp_path, tokenizer):
    fetched = []

    trainer = SFTTrainer(
        base_of(place), arguments(tmp_path, num_train_epochs=1), train_dataset=rows(8), processing_class=tokenizer,
        callbacks=[ResonanceCallback(keep=1.0)],
    )  # fmt: skip
    real = trainer.get_batch_samples
    own = trainer.get_batch_samples = lambda *args: fetched.append(1) or real(*args)
    trainer.train()
    assert trainer.get_batch_samples is own
    assert len(fetched) == 4


# ---- stages


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"learning_rate": float("nan")}, "learning_rate must be"), ({"learning_rate": -1.0}, "learning_rate must be")],
)
def test_a_learning_rate_that_is_none_is_refused_first(changes, message, place, tmp_path):
    with pytest.raises(InputError, match=message):
        evolve(place, tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_settings_of_evaluation_and_of_raw_rows_do_not_disturb_the_stages(place, tmp_path):
    usual = evolve(place, tmp_path / "usual")
    other = evolve(place, tmp_path / "other", eval_strategy="epoch", completion_only_loss=True)
    for name, value in usual.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert not other.model.training


def test_stages_of_other_settings_of_any_kind_are_refused(place, tmp_path):
    evolve(place, tmp_path)
    for changes in ({"dataloader_drop_last": True}, {"neftune_noise_alpha": 5.0}, {"shuffle_dataset": True}):
        with pytest.raises(InputError, match=r"made from something else: they differ in training\.\w+ \("):
            evolve(place, tmp_path, **changes)
    evolve(place, tmp_path, logging_steps=7, save_strategy="no", disable_tqdm=True)


@pytest.mark.parametrize("content", [b"", b'{"a"', b"[]", b"\xff"])
def test_damaged_settings_are_refused_in_one_line(content, place, tmp_path):
    (tmp_path / "stages.json").write_bytes(content)
    with pytest.raises(InputError, match=r"damaged|made from something else"):
        evolve(place, tmp_path)


def test_what_a_stage_keeps_is_in_its_log(place, tmp_path, capsys):
    dataset = rows(24).add_column("source", ["web", "book"] * 12)
    args = in_order(arguments(tmp_path, num_train_epochs=1, save_strategy="epoch"))
    evolved = self_evolve(str(place / "base"), dataset, TokenCleaning(parts=3, group_by="source"), args)
    for number, stage in enumerate(evolved.stages):
        state = next((tmp_path / f"stage-{number}").glob("checkpoint-*/trainer_state.json"))
        history = json.loads(state.read_text())["log_history"]
        logged = next(entry for entry in history if "resofilter/kept_token_share" in entry)
        for group in ("web", "book"):
            assert logged[f"resofilter/kept_token_share/{group}"] == stage.summary["share_of_groups"][group]
    assert evolved.stages[0].summary["share_of_groups"] == {"web": 1.0, "book": 1.0}
