"""Steps that are completed, in a trainer that averages its micro-batches: their gradient, resuming, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.training import arguments, assert_same_end, llama, rows, train
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments
from trl import SFTTrainer

from resofilter_trainer import InputError, ResonanceCallback

ROWS, KEEP = 21, 0.4
ACCUMULATION = 3
STEPS = [3, 3, 3, 2, 3, 2]  # micro-batches of 2 rows: an epoch on 21 rows, then one on 9


class Gradients(TrainerCallback):
    """The gradient of every step, and the micro-batches that the model was given in it."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]] = []
        self._seen: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._hook = kwargs["model"].register_forward_pre_hook(self._see, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs):
        self._hook.remove()

    def _see(self, model, args, kwargs):
        self._seen.append({name: kwargs[name].clone() for name in ("input_ids", "attention_mask", "labels")})

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        found = {name: each.grad.clone() for name, each in kwargs["model"].named_parameters()}
        self.steps.append((found, self._seen))
        self._seen = []


def averaging(tokenizer, **config):
    """A model whose forward takes no number of items, so that the Trainer averages its micro-batches."""
    model = llama(len(tokenizer), **config)
    model.accepts_loss_kwargs = False
    return model


def test_a_step_is_the_mean_of_the_micro_batches_that_there_are(tmp_path, tokenizer):
    spy, model = Gradients(), averaging(tokenizer)
    settings = {"gradient_accumulation_steps": ACCUMULATION, "num_train_epochs": 2, "max_grad_norm": 0.0}
    trainer = SFTTrainer(
        model,
        arguments(tmp_path, learning_rate=0.0, **settings),
        train_dataset=rows(ROWS),
        processing_class=tokenizer,
        callbacks=[ResonanceCallback(keep=KEEP, eps=1e-4), spy],
    )
    trainer.train()
    assert [len(seen) for _, seen in spy.steps] == STEPS
    for found, seen in spy.steps:
        model.zero_grad()
        for batch in seen:
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
            (loss / len(seen)).backward()
        for name, each in model.named_parameters():
            torch.testing.assert_close(found[name], each.grad, rtol=1e-4, atol=1e-7)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(STEPS)
    assert np.isfinite(losses).all()
    assert "training_step" not in vars(trainer)


@pytest.mark.parametrize("step", [1, 4, 5, 6, 7])
def test_it_resumes_bit_for_bit(step, tmp_path, tokenizer):
    changes = {"gradient_accumulation_steps": ACCUMULATION, "save_strategy": "steps", "save_steps": 1, "seed": 5}

    def run(resume=None):
        model = averaging(tokenizer, attention_dropout=0.1)
        return train(tmp_path, tokenizer, ResonanceCallback(keep=KEEP, eps=1e-4), model=model, resume=resume, **changes)

    whole = run()
    assert whole.trainer.state.global_step == 8
    assert_same_end(run(str(tmp_path / f"checkpoint-{step}")), whole)


def test_several_processes_need_whole_batches(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(InputError, match=r"several processes, .* no row left\. Set dataloader_drop_last=True\."):
        train(tmp_path, tokenizer, ResonanceCallback(keep=KEEP), model=averaging(tokenizer))
