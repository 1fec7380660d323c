"""Token cleaning inside a run: the same tokens, weights and steps as when it is done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.training import arguments, assert_same_end, assert_same_weights, llama, rows, train
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, get_constant_schedule
from trl import SFTTrainer

from resofilter_trainer import InputError, ResonanceCallback, TokenCleaning, clean_dataset
from resofilter_trainer.model.losses import IGNORE
from resofilter_trainer.model.modes import evaluating
from resofilter_trainer.tokens import losses as token_losses


@pytest.fixture
def place(tmp_path, tokenizer):
    """A base and a reference model in their folders."""
    for name, seed in (("base", 0), ("reference", 1)):
        llama(len(tokenizer), seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def cleaning(place, keep=0.6, **settings):
    return TokenCleaning(keep, **{"reference": str(place / "reference"), **settings})


def base(place):
    return AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)


def plain_losses(model, example):
    """Each learnt token's loss, of one row alone: the slow, obvious way."""
    ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
    with torch.no_grad(), evaluating(model):
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    losses = -log_probs[torch.arange(len(labels) - 1), ids[0, 1:]]
    return losses[labels[1:] != IGNORE].tolist()


def masked_by_hand(examples, base_losses, latest_losses, keep):
    """Labels of a stage: all tokens sorted by score, the first int(N * keep) are kept."""
    scored = [
        (one - other, row, token)
        for row, (ones, others) in enumerate(zip(base_losses, latest_losses, strict=True))
        for token, (one, other) in enumerate(zip(ones, others, strict=True))
    ]
    kept = {(row, token) for _, row, token in sorted(scored, key=lambda each: -each[0])[: int(len(scored) * keep)]}
    found = []
    for row, example in enumerate(examples):
        learnt = [i for i, label in enumerate(example["labels"]) if i and label != IGNORE]
        away = {position for token, position in enumerate(learnt) if (row, token) not in kept}
        found.append([IGNORE if i in away else label for i, label in enumerate(example["labels"])])
    return found


class LabelSpy:
    """The labels that the model is trained on, by the row's tokens."""

    def __init__(self, model):
        self.seen = {}
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model, args, kwargs):
        if model.training and torch.is_grad_enabled():
            for ids, labels, mask in zip(kwargs["input_ids"], kwargs["labels"], kwargs["attention_mask"], strict=True):
                if (labels != IGNORE).any():
                    self.seen.setdefault(tuple(ids[mask.bool()].tolist()), []).append(labels[mask.bool()].tolist())


@pytest.mark.parametrize("ranking", ["global", "sample"])
@pytest.mark.parametrize("keep", [0.6, 0.1])
def test_fixed_reference_trains_as_on_the_cleaned_dataset(ranking, keep, place, tokenizer):
    settings = cleaning(place, keep, ranking=ranking)
    cleaned = clean_dataset(base(place), rows(21), settings, tokenizer, arguments(place / "a"))
    assert (len(cleaned.reasons) > 0) == (keep == 0.1)
    callback = ResonanceCallback(token_cleaning=settings)
    mine = train(place / "mine", tokenizer, callback, model=base(place), gradient_accumulation_steps=2)
    by_hand = train(
        place / "hand", tokenizer, model=base(place), dataset=cleaned.dataset, gradient_accumulation_steps=2,
        train_sampling_strategy="random",
    )  # fmt: skip
    assert mine.trainer.state.global_step == by_hand.trainer.state.global_step
    assert callback.selections[0].sample_ids.tolist() == cleaned.dataset["sample_id"][:]
    for row, reason in cleaned.reasons.items():
        assert callback.selections[0].reason[row] == callback.scores.reasons[row] == reason
    if not cleaned.reasons:  # else the same rows come in another order
        assert [each["loss"] for each in mine.logs if "loss" in each] == [each["loss"] for each in by_hand.logs]
        assert_same_weights(mine, by_hand)


def test_self_evolving_in_one_run_is_the_staged_pipeline_by_hand(tmp_path, tokenizer):
    """One epoch per stage with one optimizer for all; the last step of every stage is full."""
    args = {"num_train_epochs": 1, "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    args |= {"gradient_accumulation_steps": 2, "learning_rate": 3e-3}
    dataset, parts, keep = rows(40), 5, 0.7
    model = llama(len(tokenizer))
    spy = LabelSpy(model)
    callback = ResonanceCallback(token_cleaning=TokenCleaning(keep, parts=parts))
    mine = train(tmp_path / "mine", tokenizer, callback, model=model, dataset=dataset, **args)
    prepared = [dict(example) for example in mine.trainer.train_dataset]

    latest, first = llama(len(tokenizer)), llama(len(tokenizer))
    optimizer = SFTTrainer(
        latest, arguments(tmp_path, **args), train_dataset=dataset, processing_class=tokenizer
    ).create_optimizer()
    for number, chosen in enumerate(np.array_split(np.arange(len(prepared)), parts)):
        examples = [prepared[row] for row in chosen]
        labels = [example["labels"] for example in examples]
        if number:
            losses = [[plain_losses(model, each) for each in examples] for model in (first, latest)]
            labels = masked_by_hand(examples, *losses, keep)
        for example, wanted in zip(examples, labels, strict=True):
            assert spy.seen.get(tuple(example["input_ids"]), [[IGNORE] * len(wanted)]) == [wanted]
        stage = mine.trainer.train_dataset.select(chosen).remove_columns("labels").add_column("labels", labels)
        trainer = SFTTrainer(
            latest, arguments(tmp_path / f"stage-{number}", **args), train_dataset=stage, processing_class=tokenizer,
            optimizers=(optimizer, get_constant_schedule(optimizer)),
        )  # fmt: skip
        trainer.train()
    for name, value in latest.state_dict().items():
        assert torch.equal(value, mine.weights[name]), name
    assert [each["part"] for each in callback.token_stages] == list(range(parts))


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"padding_free": True, "max_length": None},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    ],
    ids=["accumulation", "padding-free", "persistent workers"],
)
def test_all_tokens_kept_is_a_run_without_cleaning(changes, tmp_path, tokenizer):
    callback = ResonanceCallback(token_cleaning=TokenCleaning(1.0, parts=2))
    mine = train(tmp_path / "mine", tokenizer, callback, **changes)
    without = train(tmp_path / "without", tokenizer, **changes)
    assert list(mine.seen) == list(without.seen)
    assert mine.logs == without.logs
    assert_same_weights(mine, without)


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_of_a_later_part_reach_batches_that_workers_made_before(workers, tmp_path, tokenizer):
    settings = {"dataloader_num_workers": workers, "dataloader_persistent_workers": bool(workers)}
    callback = ResonanceCallback(token_cleaning=TokenCleaning(0.5, parts=4))
    model = llama(len(tokenizer))
    spy = LabelSpy(model)
    trained = train(tmp_path, tokenizer, callback, model=model, **settings)
    kept = sum(label != IGNORE for labels in spy.seen.values() for each in labels for label in each[1:])
    assert kept == sum(stage["tokens_kept"] for stage in callback.token_stages)
    assert [stage["part"] for stage in callback.token_stages] == list(range(4)) * 3
    first, *others = callback.token_stages
    assert first["tokens_kept"] == first["tokens"]
    assert all(stage["tokens_kept"] == int(stage["tokens"] * 0.5) for stage in others)
    assert np.isfinite([entry["loss"] for entry in trained.logs if "loss" in entry]).all()


def test_what_each_group_keeps_is_logged(tmp_path, tokenizer):
    dataset = rows(21).add_column("source", ["web", "book", None] * 7)
    callback = ResonanceCallback(token_cleaning=TokenCleaning(0.5, parts=3, group_by="source"))
    train(tmp_path, tokenizer, callback, dataset=dataset)
    logged = [entry for entry in callback.log_history if "resofilter/kept_token_share" in entry]
    assert len(logged) == len(callback.token_stages) == 9
    for entry, stage in zip(logged, callback.token_stages, strict=True):
        assert set(stage["share_of_groups"]) <= {"web", "book", "None"}
        for group, share in stage["share_of_groups"].items():
            assert entry[f"resofilter/kept_token_share/{group}"] == share
        assert entry["resofilter/kept_token_share"] == stage["tokens_kept"] / stage["tokens"]
    assert (tmp_path / "resofilter" / "token_cleaning.json").is_file()


def test_a_step_without_a_token_to_learn_changes_nothing(tmp_path, tokenizer):
    """One row per step and 5 % of a stage's tokens: most steps have nothing to learn."""
    seen, model = [], llama(len(tokenizer))

    class Watch(ResonanceCallback):
        def on_step_begin(self, *args, **kwargs):
            super().on_step_begin(*args, **kwargs)
            self.nothing, self.before = self._running.nothing_learnt, [p.clone() for p in model.parameters()]

        def on_step_end(self, *args, **kwargs):
            super().on_step_end(*args, **kwargs)
            moved = any(not torch.equal(p, old) for p, old in zip(model.parameters(), self.before, strict=True))
            seen.append((self.nothing, moved))

    callback = Watch(token_cleaning=TokenCleaning(0.05, parts=2), keep=0.9)
    changes = {"per_device_train_batch_size": 1, "weight_decay": 0.1, "num_train_epochs": 2}
    trained = train(tmp_path, tokenizer, callback, model=model, **changes)
    assert (True, False) in seen
    assert {(False, True), (True, False)} == set(seen)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert np.isfinite([entry["loss"] for entry in trained.logs if "loss" in entry]).all()
    assert np.nanmin(callback.scores.column("num_tokens")) > 0
    assert "not measured yet" in callback.scores.reasons


@pytest.mark.slow
def test_together_with_filtering_scores_are_those_of_the_learnt_tokens(place, tokenizer):
    settings = cleaning(place)
    cleaned = clean_dataset(base(place), rows(21), settings, tokenizer, arguments(place / "a"))
    for when in ("training", "before"):
        callback = ResonanceCallback(keep=0.5, when=when, token_cleaning=settings, eps=1e-4)
        train(place / "mine", tokenizer, callback, model=base(place))
        by_hand = ResonanceCallback(keep=0.5, when=when, eps=1e-4)
        train(place / "hand", tokenizer, by_hand, model=base(place), dataset=cleaned.dataset)
        for name in ("score", "loss", "num_tokens"):
            assert np.array_equal(callback.scores.column(name), by_hand.scores.column(name)), (when, name)
        for one, two in zip(callback.selections, by_hand.selections, strict=True):
            assert np.array_equal(one.keep, two.keep)


def test_rows_that_keep_no_token_stay_out_even_when_rows_are_readmitted(place, tokenizer):
    callback = ResonanceCallback(keep=[1.0, 0.5, 0.9], readmit=True, token_cleaning=cleaning(place, 0.1))
    trained = train(place / "run", tokenizer, callback, model=base(place))
    emptied = [why == "every token was cleaned away" for why in callback.scores.reasons]
    assert any(emptied)
    for selection in callback.selections:
        assert not selection.keep[emptied].any()
    assert trained.trainer.state.global_step > 0


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param(False, marks=pytest.mark.slow, id="whole model in training"),
        pytest.param(True, id="adapter in training"),
    ],
)
def test_an_adapter_as_reference_leaves_the_model_as_it_was(lora, place, tokenizer):
    """The same tokens as with the merged model as reference, and the same end: nothing is left of the adapter."""
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(base(place), config).save_pretrained(place / "adapter")
    merged = PeftModel.from_pretrained(base(place), place / "adapter").merge_and_unload()
    merged.save_pretrained(place / "merged")
    tokenizer.save_pretrained(place / "merged")
    ends = []
    for name in ("adapter", "merged"):
        peft = LoraConfig(r=2, target_modules=["v_proj"]) if lora else None
        callback = ResonanceCallback(token_cleaning=TokenCleaning(reference=str(place / name)))
        torch.manual_seed(3)  # the adapter in training begins with random weights
        ends.append(train(place / f"run-{name}", tokenizer, callback, model=base(place), peft=peft))
        numbers = callback.token_stages[0]
        assert numbers["tokens_kept"] == int(0.6 * numbers["tokens"])
    one, two = ends
    names = [(name, p.requires_grad) for name, p in one.trainer.model.named_parameters()]
    assert names == [(name, p.requires_grad) for name, p in two.trainer.model.named_parameters()]
    assert_same_weights(one, two)


@pytest.mark.parametrize(
    "kind",
    [
        "fixed",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("self", "fixed, few tokens", "self and before")),
    ],
)
def test_resuming_from_any_checkpoint(kind, place, tokenizer):
    reference = {"reference": "self", "parts": 2} if "self" in kind else {}
    when = {"when": "before", "keep": 0.7} if "before" in kind else {"keep": [1.0, 0.6]}

    def run(output, resume=None):
        callback = ResonanceCallback(token_cleaning=cleaning(place, 0.1 if "few" in kind else 0.5, **reference), **when)
        changes = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
        return train(output, tokenizer, callback, model=base(place), resume=resume, **changes)

    whole = run(place / "whole")
    for checkpoint in sorted((place / "whole").glob("checkpoint-*")):
        resumed = run(place / "resumed", str(checkpoint))
        assert_same_end(resumed, whole)
        assert resumed.callback.token_stages == whole.callback.token_stages


def test_the_base_is_measured_once(tmp_path, tokenizer, monkeypatch):
    measured, real = [], token_losses.measure_token_losses
    monkeypatch.setattr(
        token_losses, "measure_token_losses", lambda *args, **kwargs: measured.append(args[4]) or real(*args, **kwargs)
    )
    for _ in range(2):
        train(tmp_path, tokenizer, ResonanceCallback(token_cleaning=TokenCleaning(parts=2)), num_train_epochs=1)
    assert measured == ["Losses of the base model"] + ["Losses of the latest model"] * 2
    train(
        tmp_path, tokenizer, ResonanceCallback(token_cleaning=TokenCleaning(parts=2)), num_train_epochs=1,
        model=llama(len(tokenizer), seed=5),
    )  # fmt: skip
    assert measured[3:] == ["Losses of the base model", "Losses of the latest model"]


def test_resuming_without_the_base_losses_is_refused(tmp_path, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, tokenizer, ResonanceCallback(token_cleaning=TokenCleaning(parts=2)), **settings)
    (tmp_path / "resofilter" / "base_token_losses.arrow").unlink()
    callback = ResonanceCallback(token_cleaning=TokenCleaning(parts=2))
    with pytest.raises(InputError, match=r"No losses of the base model at .*base_token_losses"):
        train(tmp_path, tokenizer, callback, resume=str(tmp_path / "checkpoint-4"))
    with pytest.raises(InputError, match="token_cleaning"):
        train(tmp_path, tokenizer, ResonanceCallback(keep=1.0), resume=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reference": "/nowhere/model"}, "no reference model at '/nowhere/model'"),
        ({"reference": "{place}/small"}, "another vocabulary"),
        ({"reference": "self", "parts": 50}, "steps is too short for parts=50"),
        ({"reference": "self", "group_by": "origin"}, "no column 'origin'"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(settings, message, place, tokenizer):
    llama(len(tokenizer) - 7).save_pretrained(place / "small")
    settings = {
        name: str(value).format(place=place) if name == "reference" else value for name, value in settings.items()
    }
    callback = ResonanceCallback(token_cleaning=TokenCleaning(**settings))
    model = base(place)
    with pytest.raises(InputError, match=message):
        train(place / "run", tokenizer, callback, model=model)
    for name, value in base(place).state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_settings_that_are_none():
    for settings, message in (
        ({"keep": 0}, "above 0 and at most 1, got 0"),
        ({"keep": 1.5}, "got 1.5"),
        ({"keep": True}, "got True"),
        ({"parts": 1}, "at least 2"),
        ({"parts": 2.5}, "whole number"),
        ({"ranking": "row"}, "one of 'global', 'sample'"),
        ({"tokens_per_batch": 0}, "at least 1"),
        ({"reference": ""}, "a name, a folder or 'self'"),
    ):
        with pytest.raises(InputError, match=message):
            TokenCleaning(**settings)
    with pytest.raises(InputError, match="token_cleaning must be a TokenCleaning"):
        ResonanceCallback(token_cleaning=0.6)
