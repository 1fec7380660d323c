"""What was measured is let go of: a step leaves no tensor behind, and a training no model."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers.training import arguments, llama, rows
from transformers import TrainerCallback
from trl import SFTTrainer

from resofilter_trainer import ResonanceCallback

WAYS = {
    "measuring": {"keep": 1.0},
    "dropping": {"keep": 0.5},
    "scores at the start": {"keep": 0.5, "when": "before"},
    "the optimizer's own step": {"keep": 1.0, "update": "optimizer"},
}


@pytest.fixture(autouse=True)
def only_new_objects() -> None:
    """The collector leaves alone what other tests and imports made: a collection takes milliseconds, not a second."""
    gc.collect()
    gc.freeze()


class CountTensors(TrainerCallback):
    """After every step, how many tensors there are; what was measured waits for the epoch's end in small ones."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, **kwargs):
        gc.collect()
        tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
        self.counts.append(sum(each.numel() > 10 for each in tensors))


def trained(folder, tokenizer, batch: int, *callbacks: TrainerCallback) -> tuple[list[int], weakref.ref]:
    """Tensors after every step; and the model, if it is still there."""
    count, model = CountTensors(), llama(len(tokenizer))
    trainer = SFTTrainer(
        model,
        arguments(folder, num_train_epochs=2, per_device_train_batch_size=batch),
        train_dataset=rows(12),
        processing_class=tokenizer,
        callbacks=[*callbacks, count],
    )
    trainer.train()
    return count.counts, weakref.ref(model)


@pytest.mark.parametrize("way", WAYS)
def test_no_tensor_outlives_its_step_and_no_model_its_training(way, tmp_path, tokenizer):
    batch = 1 if way == "the optimizer's own step" else 2
    without, _ = trained(tmp_path / "without", tokenizer, batch)
    with_it, model = trained(tmp_path / "with", tokenizer, batch, ResonanceCallback(n_layers=2, **WAYS[way]))
    more = [ours - theirs for ours, theirs in zip(with_it, without, strict=False)]
    gc.collect()

    assert model() is None
    assert max(more) <= more[0]
