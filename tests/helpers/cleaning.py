"""Rows to clean the tokens of."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from helpers.training import arguments, rows

COUNT = 24


ARGS = arguments(Path("unused"))


def data() -> Dataset:
    return rows(COUNT).add_column("source", ["ab"[i % 2] for i in range(COUNT)])


def prepared_by_trl(dataset: Dataset, base: str, tokenizer) -> Dataset:
    model = AutoModelForCausalLM.from_pretrained(base)
    return SFTTrainer(model, ARGS, train_dataset=dataset, processing_class=tokenizer).train_dataset
