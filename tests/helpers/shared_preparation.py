"""A few rows that are prepared by all processes together, and alone, in small blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig

from helpers.tokenizers import make_tokenizer
from resofilter_trainer.config import ColumnMapping
from resofilter_trainer.data import shared_rows, sharing, surveys
from resofilter_trainer.data.preparation import PreparedRows, prepare
from resofilter_trainer.data.sharing import Sharing
from resofilter_trainer.data.usable import usable_rows
from resofilter_trainer.io import digest

PAIRS = [{"prompt": f"what is {i % 7} + 1 ? ", "completion": "x " * (i % 4) + str(i)} for i in range(23)]
PAIRS[3]["prompt"] = "what " * 60  # longer than max_length
PAIRS[8]["completion"] = PAIRS[22]["completion"] = " \u00a0\x1c"  # blank, by Python's rules
PAIRS[9]["completion"] = "\u00e9"  # no ASCII, and not blank
MAPPING = {"prompt_column": "prompt", "completion_column": "completion"}


def chat(*contents: str, **last: Any) -> list[dict[str, Any]]:
    said = [{"role": ("user", "assistant")[turn % 2], "content": content} for turn, content in enumerate(contents)]
    return [*said[:-1], {**said[-1], **last}]


def sometimes_null() -> list[dict[str, Any]]:
    return [{**row, "prompt": None if i in (2, 17) else row["prompt"]} for i, row in enumerate(PAIRS)]


TEMPLATE = "{% for m in messages if m.role != 'odd' %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def arguments(**settings: Any) -> SFTConfig:
    given = {"max_length": 24, **settings}
    return SFTConfig(output_dir="unused", bf16=False, report_to="none", use_cpu=True, **given)


def tokenizer_of(template: str = TEMPLATE) -> Any:
    made = make_tokenizer()
    made.chat_template = template
    return made


def alone(
    dataset: Dataset, mapping: dict, repeated: bool = False, drop: bool = True, **settings: Any
) -> tuple[PreparedRows, dict[int, str], list[str]]:
    notes: list[str] = []
    args = arguments(**settings)
    rows, skipped = usable_rows(dataset, ColumnMapping(**mapping), args, repeated, drop, notes)
    return prepare(rows, tokenizer_of(), args, drop), skipped, notes


def shared(
    dataset: Dataset, mapping: dict, place: Path, repeated: bool = False, drop: bool = True, **settings: Any
) -> tuple[PreparedRows, dict[int, str], list[str], str]:
    how = Sharing(dataset, ColumnMapping(**mapping), arguments(**settings), repeated, drop, place)
    rows = how.rows()
    return how.prepared(rows, tokenizer_of()), rows.skipped, rows.notes, rows.content


def assert_same(found: PreparedRows, expected: PreparedRows) -> None:
    for column in (surveys.ROW_POSITION, "input_ids", "labels"):
        assert list(found.dataset[column]) == list(expected.dataset[column])
    for name in ("fingerprint", "largest_token", "reasons", "template", "rendered"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("lengths", "num_tokens", "sample_ids"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype, name
    for name in ("hashes", "lengths", "beginning"):
        assert getattr(found.prompts, name).tolist() == getattr(expected.prompts, name).tolist(), name


def in_small_blocks(monkeypatch: Any) -> None:
    for module in (digest, surveys, shared_rows):
        monkeypatch.setattr(module, "BLOCK", 5)
    monkeypatch.setattr(sharing, "LEAST", 5)
    monkeypatch.setattr(shared_rows, "SORTED", 7)
