"""unsloth's trainer, no subclass of SFTTrainer but a copy of its source. Its kernels: `model/test_unreached.py`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import Trainer

from resofilter_trainer.training.trainer_access import is_sft, rows_of

Copy = type("UnslothSFTTrainer", (type("_UnslothSFTTrainer", (), {}),), {})


def test_its_rows_are_those_of_the_users_dataset():
    trainer = Copy()
    trainer.train_dataset = Dataset.from_dict({"input_ids": [[row] for row in range(6)]}).filter(
        lambda example: example["input_ids"][0] % 2 == 1
    )
    trainer._skip_prepare_dataset, trainer.args = False, SimpleNamespace(max_length=8, shuffle_dataset=False, seed=0)
    found = rows_of(trainer)
    assert found.sample_ids.tolist() == [1, 3, 5]
    assert found.total == 6


@pytest.mark.parametrize(("kind", "prepares"), [(Copy, True), (type("Mine", (Copy,), {}), True), (Trainer, False)])
def test_it_is_known_by_its_name(kind, prepares):
    assert is_sft(object.__new__(kind)) == prepares
