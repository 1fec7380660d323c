"""What is scored is what the model trains on: tokens and labels, read off its inputs, under any supported versions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from helpers.sft import Pattern
from helpers.zen import SFT, TEMPLATE, zen, zen_tokenizer
from transformers import TrainerCallback

from resofilter_trainer.data.preparation import prepare
from resofilter_trainer.data.surveys import ROW_POSITION

Sample = tuple[tuple[int, ...], tuple[int, ...]]  # tokens and labels


class Inputs(TrainerCallback):
    """The samples of every forward in training, without their padding, as the model receives them."""

    def __init__(self) -> None:
        self.samples: Counter[Sample] = Counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        columns = (kwargs[name] for name in ("input_ids", "labels", "attention_mask"))
        for ids, labels, mask in zip(*columns, strict=True):
            there = mask.bool()
            self.samples[tuple(ids[there].tolist()), tuple(labels[there].tolist())] += 1


def scored(rows: Dataset, pattern: Pattern, folder: Path) -> Counter[Sample]:
    """The samples that `score_dataset` measures: those with a token to learn."""
    numbered = rows.add_column(ROW_POSITION, np.arange(len(rows)))
    prepared = prepare(numbered, zen_tokenizer(), pattern.args(folder))
    chosen = (row for row in prepared.dataset if row[ROW_POSITION] not in prepared.reasons)
    return Counter((tuple(row["input_ids"]), tuple(row["labels"])) for row in chosen)


def trained(rows: Dataset, pattern: Pattern, folder: Path) -> Counter[Sample]:
    """The samples that one epoch of SFTTrainer trains on, without those that teach nothing."""
    pattern.trainer = lambda: {"train_dataset": rows}
    inputs = Inputs()
    pattern.build(folder, inputs, num_train_epochs=1, save_strategy="no").train()
    return Counter(
        {sample: times for sample, times in inputs.samples.items() if any(label != -100 for label in sample[1][1:])}
    )


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in SFT},
    "truncated text": ("text", {"max_length": 12}),
    "truncated pair, some down to their prompt": ("prompt-completion", {"max_length": 20}),
    "truncated messages, the answers only": ("messages and tools", {"max_length": 24, "assistant_only_loss": True}),
    "a pair, all of it": ("prompt-completion", {"completion_only_loss": False}),
    "a conversational pair, all of it": ("conversational prompt-completion", {"completion_only_loss": False}),
    "the assistant's turns": ("messages", {"assistant_only_loss": True}),
    "another end-of-sequence token": ("text", {"eos_token": "<|end|>"}),
    "tokens as they are": ("input_ids and labels", {"dataset_kwargs": {"skip_prepare_dataset": True}}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_scored_is_what_is_trained_on(name, tmp_path):
    kind, settings = SETTINGS[name]
    pattern, rows = Pattern(kind, settings), zen(kind)
    samples = scored(rows, pattern, tmp_path)
    assert samples.total() > 0
    assert samples == trained(rows, pattern, tmp_path)


def test_a_template_from_a_file(tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(TEMPLATE.replace("<|end|>", "<|end|> ."))
    plain, own = Pattern("messages"), Pattern("messages", {"chat_template_path": str(template)})
    samples = scored(zen("messages"), own, tmp_path)
    assert samples == trained(zen("messages"), own, tmp_path)
    assert samples != scored(zen("messages"), plain, tmp_path)


def test_duplicates_are_scored_and_trained_on_as_often_as_they_occur(tmp_path):
    rows = zen("prompt-completion")
    twice = concatenate_datasets([rows, rows.select(range(5)), rows.select(range(2))])
    pattern = Pattern("prompt-completion")
    samples = scored(twice, pattern, tmp_path)
    assert sorted(samples.values())[-5:] == [2, 2, 2, 3, 3]
    assert samples == trained(twice, pattern, tmp_path)
