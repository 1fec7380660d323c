"""Tiny trainings, and what two of them must have in common. Not a test itself."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from helpers.versions import arguments_here
from resofilter_trainer import ResonanceCallback
from resofilter_trainer.config.compatibility import set_sequential

gc.freeze()  # the collection of garbage at the end of every training does not look through what was imported

UNSTABLE = ("runtime", "per_second", "num_tokens")  # log entries that depend on the clock, or that TRL restarts


def llama(vocab_size: int, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """Four layers, without dropout unless told otherwise."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    settings = {"num_key_value_heads": 1, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, bos_token_id=None, **{**shape, **settings, **config}))


def rows(count: int) -> Dataset:
    """Prompts and completions of many lengths."""
    return Dataset.from_list(
        [
            {"prompt": f"question: what is {i} + {i * 7 % 13} ?", "completion": f" answer: {i}" + " fox" * (i * 5 % 7)}
            for i in range(count)
        ]
    )


def arguments(output: Path, **changes: Any) -> SFTConfig:
    """Three epochs in float32 on the CPU, nothing saved, every step logged."""
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
        "max_length": 64,
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return SFTConfig(**arguments_here({**settings, **changes}))


class InOrder(SFTTrainer):
    """Takes its rows in their order, which transformers before 5.2 has no setting for."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def in_order(args: SFTConfig) -> SFTConfig:
    """The same arguments, for a training of the package that takes its rows in their order."""
    set_sequential(args)
    return args


class OrderSpy(TrainerCallback):
    """The inputs of the model, step by step, and the learning rate of each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, ...]] = []
        self._update: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        in_training = model.training and torch.is_grad_enabled()
        if in_training and (kwargs["labels"] != -100).any():  # otherwise it only completes a step
            self._update += (kwargs["input_ids"] * (kwargs["labels"] != -100)).sum(-1).tolist()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append((*self._update, kwargs["lr_scheduler"].get_last_lr()[0]))
        self._update = []


@dataclass(frozen=True)
class Outcome:
    """Of one training."""

    trainer: Trainer
    callback: ResonanceCallback | None
    seen: Sequence[tuple[float, ...]]

    @property
    def weights(self) -> dict[str, Tensor]:
        return self.trainer.model.state_dict()

    @property
    def logs(self) -> list[dict[str, float]]:
        """Without what no two runs have in common."""
        history = self.trainer.state.log_history
        stable = [{k: v for k, v in entry.items() if not any(word in k for word in UNSTABLE)} for entry in history]
        return [entry for entry in stable if "loss" in entry or "eval_loss" in entry]


def train(
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    callback: ResonanceCallback | None = None,
    *,
    dataset: Dataset | None = None,
    model: Any = None,
    resume: str | None = None,
    collator: Callable | None = None,
    peft: Any = None,
    evaluate: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **changes: Any,
) -> Outcome:
    """Train with SFTTrainer."""
    spy = OrderSpy()
    trainer = SFTTrainer(
        model=llama(len(tokenizer)) if model is None else model,
        args=arguments(output, **changes),
        train_dataset=rows(21) if dataset is None else dataset,
        eval_dataset=rows(5) if evaluate else None,
        processing_class=tokenizer,
        data_collator=collator,
        peft_config=peft,
        callbacks=[spy, *([callback] if callback else []), *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return Outcome(trainer, callback, spy.seen)


def without_averages(entry: dict[str, float]) -> dict[str, float]:
    """Without TRL's averages over micro-batches, of which a completed step has more."""
    return {name: value for name, value in entry.items() if name not in ("entropy", "mean_token_accuracy")}


def assert_same_weights(mine: Outcome, other: Outcome) -> None:
    for name, value in mine.weights.items():
        assert torch.equal(value, other.weights[name]), name


def assert_same_end(mine: Outcome, other: Outcome) -> None:
    """Weights, steps, order and learning rates of what both have seen, logs, scores and selections: bit for bit."""
    assert mine.trainer.state.global_step == other.trainer.state.global_step
    assert mine.trainer.state.epoch == other.trainer.state.epoch
    assert list(mine.seen) == list(other.seen)[len(other.seen) - len(mine.seen) :]
    assert [without_averages(entry) for entry in mine.logs] == [without_averages(entry) for entry in other.logs]
    assert_same_weights(mine, other)
    assert mine.callback is not None
    assert other.callback is not None
    assert mine.callback.scores.table.equals(other.callback.scores.table)
    assert len(mine.callback.selections) == len(other.callback.selections)
    for one, two in zip(mine.callback.selections, other.callback.selections, strict=True):
        assert np.array_equal(one.keep, two.keep)
        assert list(one.reason) == list(two.reason)
