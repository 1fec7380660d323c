"""Token cleaning inside a run: the same tokens, weights and steps as when it is done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, get_constant_schedule
from training import arguments, assert_same_end, assert_same_weights, llama, rows, train
from trl import SFTTrainer

from resofilter_trainer import InputError, ResonanceCallback, TokenCleaning, clean_dataset
from resofilter_trainer.losses import IGNORE
from resofilter_trainer.modes import evaluating


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
    """Labels of a part: all tokens sorted by score, the first int(N * keep) stay."""
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
            for ids, labels, mask in zip(
                kwargs["input_ids"], kwargs["labels"], kwargs["attention_mask"], strict=True
            ):
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
    """One epoch per part, the optimizer going on; the last update of every part is full."""
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
    for part, chosen in enumerate(np.array_split(np.arange(len(prepared)), parts)):
        examples = [prepared[row] for row in chosen]
        labels = [example["labels"] for example in examples]
        if part:
            losses = [[plain_losses(model, each) for each in examples] for model in (first, latest)]
            labels = masked_by_hand(examples, *losses, keep)
        for example, wanted in zip(examples, labels, strict=True):
            assert spy.seen.get(tuple(example["input_ids"]), [[IGNORE] * len(wanted)]) == [wanted]
        stage = mine.trainer.train_dataset.select(chosen).remove_columns("labels").add_column("labels", labels)
        trainer = SFTTrainer(
            latest, arguments(tmp_path / f"stage-{part}", **args), train_dataset=stage, processing_class=tokenizer,
            optimizers=(optimizer, get_constant_schedule(optimizer)),
        )  # fmt: skip
        trainer.train()
    for name, value in latest.state_dict().items():
        assert torch.equal(value, mine.weights[name]), name
    assert [each["part"] for each in callback.token_stages] == list(range(parts))
