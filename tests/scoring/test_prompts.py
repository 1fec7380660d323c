"""The column `prompt`: equal for rows with the same prompt, whatever measured them and wherever they stand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from datasets import Dataset
from helpers.scoring import arguments

from resofilter_trainer import OnePerPrompt, score_by, score_dataset, score_layers, score_stream
from resofilter_trainer.config import InputError
from resofilter_trainer.data.surveys import Prompts

PROMPTS = ["what is 1 ? ", "what is 2 ? ", "what is 1 ? ", "", "what is 2 ? ", "what is 1 ? "]
ROWS = [{"prompt": text, "completion": f"answer: {'3 ' * (1 + row)}"} for row, text in enumerate(PROMPTS)]
SAME = {(0, 2), (0, 5), (1, 4), (2, 5)}


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def prompts(model, tokenizer) -> list[int | None]:
    return score_dataset(model, Dataset.from_list(ROWS), tokenizer, arguments()).table["prompt"].to_pylist()


def test_rows_with_the_same_prompt_have_the_same_hash(prompts):
    pairs = itertools.combinations(range(6), 2)
    assert {(a, b) for a, b in pairs if prompts[a] is not None and prompts[a] == prompts[b]} == SAME
    assert prompts[3] is None
    assert all(-(2**63) <= each < 2**63 for each in prompts if each is not None)


@pytest.mark.filterwarnings("ignore:1 of 6 rows have no prompt")
def test_every_pass_and_every_order_agree(prompts, model, tokenizer, tmp_path):
    order = [4, 2, 0, 5, 3, 1]
    dataset = Dataset.from_list(ROWS)
    found = [
        score_dataset(model, dataset.select(order), tokenizer, arguments()),
        score_stream(model, dataset.select(order).to_iterable_dataset(), tmp_path, tokenizer, arguments()),
        score_by("ifd", model, dataset.select(order), tokenizer, arguments()),
    ]
    for scores in found:
        assert scores.table["prompt"].to_pylist() == [prompts[row] for row in order]
    assert score_layers(model, dataset, tokenizer, arguments(), limit=6).table["prompt"].to_pylist() == prompts


def test_the_type_of_the_tokens_does_not_matter():
    ids, labels = [[7, 8, 9], [7, 9, 9], [7, 8, 5]], [[-100, -100, 9], [-100, 9, 9], [-100, -100, 5]]
    found = []
    for kind in (np.int32, np.int64):
        columns = {"input_ids": [np.array(row, kind) for row in ids], "labels": labels}
        found.append(Prompts.of(Dataset.from_dict(columns)).column(7))
    assert found[0].equals(found[1])
    assert found[0][0] == found[0][2]
    assert found[0].is_null().to_pylist() == [False, True, False]


def test_the_answer_with_the_lowest_loss_is_kept(model, tokenizer):
    scores = score_dataset(model, Dataset.from_list(ROWS), tokenizer, arguments())
    loss = scores.column("loss")
    best = [min((row for row in range(6) if PROMPTS[row] == text), key=lambda row: loss[row]) for text in PROMPTS[:2]]
    assert OnePerPrompt().select(scores).sample_ids.tolist() == sorted([*best, 3])


def test_a_text_has_no_prompt(model, tokenizer):
    texts = Dataset.from_list([{"text": "what is 1 ? answer: 3"}] * 2)
    scores = score_dataset(model, texts, tokenizer, arguments())
    assert scores.table["prompt"].null_count == 2
    with pytest.raises(InputError, match="No row has a prompt apart from what is learnt"):
        OnePerPrompt().select(scores)
    assert OnePerPrompt().select(scores, groups=["a", "b"]).keep.all()
    with pytest.raises(InputError, match="no column 'prompt' of numbers"):
        scores.column("prompt")
