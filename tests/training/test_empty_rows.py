"""Rows with an empty completion in a training: it says which they are, and what is learnt there."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from helpers.training import arguments, llama, rows
from trl import SFTTrainer

from resofilter_trainer import ResonanceCallback
from resofilter_trainer.training.empty_rows import tell_of_empty_rows, without_answer


def test_a_training_names_the_rows_that_scoring_refuses(tmp_path, tokenizer, capsys):
    """SFTTrainer's own end of text is all that is learnt of them."""
    texts = rows(8).to_list()
    texts[3]["completion"], texts[6]["completion"] = " \n", ""
    callback = ResonanceCallback(keep=1.0, n_layers=2)
    trainer = SFTTrainer(
        llama(len(tokenizer)),
        arguments(tmp_path, num_train_epochs=1),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    said = [line for line in capsys.readouterr().out.splitlines() if "empty completion" in line]
    assert said == [
        "resofilter: warning: 2 rows have an empty completion (rows 3, 6), and the model learns to end at once there. "
        "score_dataset refuses such rows: remove them, unless they are meant."
    ]
    assert callback.scores.column("num_tokens")[6] == 1


def messages(*contents: str | None) -> list[dict[str, str | None]]:
    return [{"role": "user", "content": "a"}, *({"role": "assistant", "content": each} for each in contents)]


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"completion": ["a<eos>", "<eos>", " \u3000\n<eos>", None, "<eos> b"]}, [1, 2, 3]),
        ({"completion": [messages("b"), messages(""), messages("b", " "), messages(None)]}, [1, 2, 3]),
        ({"messages": [messages("b"), messages("")]}, [1]),
        ({"input_ids": [[1, 2], []]}, []),
        ({"input_ids": [[1, 2], []], "completion": [3, 4]}, []),  # a number, such as that of an answer
    ],
)
def test_rows_without_an_answer(columns, found):
    assert without_answer(Dataset.from_dict(columns), "<eos>") == found


def test_rows_are_named_by_their_place_in_the_users_dataset(capsys):
    trainer = SimpleNamespace(args=SimpleNamespace(process_index=0), processing_class=SimpleNamespace(eos_token=None))
    tell_of_empty_rows(trainer, np.array([4, 9]), Dataset.from_dict({"completion": ["a", ""]}))
    assert "1 row has an empty completion (row 9), and" in capsys.readouterr().out
    tell_of_empty_rows(trainer, np.array([4, 9]), Dataset.from_dict({"completion": ["a", "b"]}))
    tell_of_empty_rows(trainer, np.array([4, 9]), iter(()))
    assert capsys.readouterr().out == ""
