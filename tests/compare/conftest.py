"""Rows of one's own to compare selectors on, and what a tiny model needs."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset


@pytest.fixture
def own_rows(tmp_path, monkeypatch):
    rows = [
        {"q": f"what is {i} + 1 ?\n", "a": f"{i}+1={i + 1 + i % 2}. #### {i + 1 + i % 2}", "bad": i % 2, "quality": i}
        for i in range(12)
    ]
    tests = [{"q": f"what is {i} + 2 ?\n", "a": f"#### {i + 2}"} for i in range(3)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    Dataset.from_list(tests).to_json(tmp_path / "tests.jsonl")
    monkeypatch.chdir(tmp_path)
    return "rows.jsonl"


@pytest.fixture
def tiny_settings(own_rows, tiny_model_dir, tmp_path) -> dict[str, Any]:
    """The settings of a comparison of the tiny model on these rows, in seconds; without selectors."""
    training = {
        "num_train_epochs": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4, "activation_checkpointing": False, "use_cpu": True,
    }  # fmt: skip
    return {
        "model": str(tiny_model_dir), "dataset": own_rows, "prompt_column": "q", "completion_column": "a",
        "test_dataset": "tests.jsonl", "wrong_column": "bad", "seeds": [0], "max_new_tokens": 4, "training": training,
        "output": str(tmp_path / "out"),
    }  # fmt: skip
