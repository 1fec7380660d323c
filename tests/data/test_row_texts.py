"""Rows as people read them, whatever their format."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from resofilter_trainer.config import ColumnMapping
from resofilter_trainer.data.layout import scored_columns
from resofilter_trainer.data.row_texts import RowTexts, TokenTexts, decoder, said

SAYS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
ANSWER = {"role": "assistant", "content": "hello"}
FORMATS = {
    "prompt and completion": ({"prompt": "a", "completion": "b"}, {}, ("a", "b")),
    "mapped": ({"q": "a", "r": "b"}, {"prompt_column": "q", "completion_column": "r"}, ("a\n", "b")),
    "several columns": (
        {"i": "do", "x": "this", "r": "b"},
        {"prompt_column": ["i", "x"], "completion_column": "r"},
        ("do\n\nthis\n", "b"),
    ),
    "messages": ({"messages": [*SAYS, ANSWER]}, {}, ("system: be brief\n\nuser: hi", "hello")),
    "mapped messages": ({"chat": [SAYS[1], ANSWER]}, {"messages_column": "chat"}, ("hi", "hello")),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {},
        ("hi", "hello"),
    ),
    "conversational pair": ({"prompt": SAYS[1:], "completion": [ANSWER]}, {}, ("hi", "hello")),
    "a system beside the turns": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": "be brief"},
        {},
        ("system: be brief\n\nuser: hi", "hello"),
    ),
    "earlier turns": (
        {"q": "hi", "r": "hello", "history": [["a", "b"]]},
        {"prompt_column": "q", "completion_column": "r", "conversational": True},
        ("user: a\n\nassistant: b\n\nuser: hi", "hello"),
    ),
    "a row that was refused": (
        {"messages": [None, dict(sorted(ANSWER.items()))]},  # as older pyarrow orders them
        {},
        ("", '[null, {"content": "hello", "role": "assistant"}]'),
    ),
    "a number that 0.1.0 took for text": (
        {"i": "do", "x": 2.5, "r": 3.5},
        {"prompt_column": ["i", "x"], "completion_column": "r"},
        ("do\n\n2.5", "3.5"),
    ),
    "text": ({"text": "all of it"}, {}, ("", "all of it")),
    "mapped text": ({"story": "all of it"}, {"text_column": "story"}, ("", "all of it")),
    "nothing": ({"text": None}, {}, ("", "")),
    "no text at all": ({"number": 3}, {}, ("", "")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_a_pair(name):
    example, mapping, expected = FORMATS[name]
    texts = RowTexts(Dataset.from_list([example] * 3), ColumnMapping(**mapping))

    assert len(texts) == 3
    assert texts[1] == expected
    assert list(texts) == [expected] * 3


def test_parts_of_a_message_that_are_text():
    parts = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    assert said([{"role": "user", "content": parts}]) == "what is it?"


def test_tokens_become_text_and_rows_without_tokens_have_none(tokenizer):
    prompt, completion = "what is 1 + 2 ?", " answer: 3"
    ids = [tokenizer(each)["input_ids"] for each in (prompt, completion)]
    dataset = Dataset.from_list(
        [
            {"input_ids": ids[0] + ids[1], "labels": [-100] * len(ids[0]) + ids[1]},
            {"input_ids": ids[1], "labels": ids[1]},
        ]
    )
    texts = TokenTexts(dataset, np.array([3, 1]), 4, tokenizer)

    assert [texts[row] for row in range(4)] == [("", ""), ("", completion), ("", ""), (prompt, completion)]
    assert list(texts) == [texts[row] for row in range(4)]


def test_the_mapping_that_scores_were_made_with():
    preparation = {
        "prompt_column": ["i", "x"],
        "completion_column": "r",
        "messages_column": None,
        "separator": " ",
        "max_length": 3,
    }
    assert scored_columns(preparation) == ColumnMapping(["i", "x"], "r", separator=" ")
    assert scored_columns({"max_length": 3}) == ColumnMapping()


def test_a_missing_tokenizer_is_named(capsys, tiny_model_dir, tokenizer):
    assert decoder("/nowhere/model") is None
    assert "cannot be loaded" in capsys.readouterr().out
    ids = tokenizer(" answer: 3")["input_ids"]
    assert "".join(decoder(str(tiny_model_dir))(ids)) == " answer: 3"
