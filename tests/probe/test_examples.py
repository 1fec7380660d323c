"""Rows as prompt and answer, in every format that scoring reads, and written back with another answer."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from helpers.training import arguments
from trl import SFTConfig

from resofilter_trainer.config import ColumnMapping, InputError, NothingError
from resofilter_trainer.probe.examples import examples_of

ASKED, SAID = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, ASKED, SAID]
FORMATS = {  # rows, mapping, prompt, the row with the answer "5"
    "pair": ({"prompt": "2 + 2?\n", "completion": "4"}, {}, "2 + 2?\n", {"prompt": "2 + 2?\n", "completion": "5"}),
    "mapped": (
        {"q": "2 + 2?", "a": "4", "other": 1},
        {"prompt_column": "q", "completion_column": "a"},
        "2 + 2?\n",
        {"prompt": "2 + 2?\n", "completion": "5"},
    ),
    "conversational": (
        {"q": "2 + 2?", "a": "4"},
        {"prompt_column": "q", "completion_column": "a", "conversational": True},
        "2 + 2?",
        {"prompt": [ASKED], "completion": [{**SAID, "content": "5"}]},
    ),
    "messages": (
        {"messages": TALK},
        {},
        "user: Hi\n\nassistant: Hello.\n\nuser: 2 + 2?",
        {"messages": [*TALK[:-1], {**SAID, "content": "5"}]},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        {},
        "2 + 2?",
        {"messages": [ASKED, {**SAID, "content": "5"}]},
    ),
    "chat pair": (
        {"prompt": TALK[:-1], "completion": [SAID]},
        {},
        "user: Hi\n\nassistant: Hello.\n\nuser: 2 + 2?",
        {"prompt": TALK[:-1], "completion": [{**SAID, "content": "5"}]},
    ),
    "text": ({"text": "4"}, {}, "", {"text": "5"}),
    "mapped text": ({"body": "4"}, {"text_column": "body"}, "", {"text": "5"}),
}


@pytest.fixture
def args(tmp_path) -> SFTConfig:
    return arguments(tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_of_every_format_is_written_back_with_another_answer(name, args):
    row, columns, prompt, changed = FORMATS[name]
    rows, (example,) = examples_of(Dataset.from_list([row]), ColumnMapping(**columns), args)
    assert (example.row, example.prompt, example.answer) == (0, prompt, "4")
    assert example.with_answer("5") == changed
    assert example.with_answer("4") == example.values == rows[0]
    assert Dataset.from_list([example.with_answer("5")], features=rows.features)[0] == changed


def test_settings_of_the_template_and_further_keys_stay_as_they_are(args):
    messages = [{**ASKED, "name": "Ann"}, {**SAID, "name": None}]
    row = {"messages": messages, "tools": '[{"a": 1}]', "chat_template_kwargs": {"thinking": False}}
    rows, (example,) = examples_of(Dataset.from_list([row]), ColumnMapping(), args)
    values = example.with_answer("5")
    assert values["tools"] == rows[0]["tools"]
    assert values["chat_template_kwargs"] == {"thinking": False}
    assert values["messages"] == [messages[0], {**messages[1], "content": "5"}]
    assert Dataset.from_list([values], features=rows.features)[0] == values


def test_a_text_of_another_name(tmp_path):
    args = arguments(tmp_path, dataset_text_field="body")
    _, (example,) = examples_of(Dataset.from_list([{"body": "4"}]), ColumnMapping(), args)
    assert example.with_answer("5") == {"body": "5"}


def test_messages_are_removed_from_prompt_and_answer_alike(args):
    for name, answer in (("messages", []), ("chat pair", [SAID])):
        row, *_ = FORMATS[name]
        _, (example,) = examples_of(Dataset.from_list([row]), ColumnMapping(), args)
        assert example.messages == TALK
        assert example.question == "2 + 2?"
        column = "prompt" if answer else "messages"
        kept = example.without_messages([0, 1])
        assert kept[column] == [ASKED] if answer else [ASKED, SAID]
        assert kept.get("completion", []) == answer
        assert example.messages == TALK  # the example's own row is as it was


def test_positions_are_those_in_the_users_dataset_and_the_others_have_reasons(args):
    chats = [
        [ASKED, SAID],
        [ASKED],
        [ASKED, {"role": "assistant", "content": ""}],
        [ASKED, {"role": "strange", "content": "4"}],
        [ASKED, {"role": None, "content": "4"}],
        [ASKED, SAID],
        [ASKED, SAID],
    ]
    skipped: dict[int, str] = {}
    dataset = Dataset.from_list([{"messages": messages} for messages in chats])
    rows, examples = examples_of(dataset, ColumnMapping(), args, np.array([6, 4, 3, 2, 1, 0]), skipped)
    assert [example.row for example in examples] == [6, 0]
    assert list(rows) == [example.values for example in examples]
    assert sorted(skipped) == [1, 2, 3, 4]
    assert skipped[1] == "its last message is from 'user', not an answer"
    assert skipped[3] == "its last message is from 'strange', not an answer"
    assert "no role" in skipped[4]


def test_a_call_of_a_tool_is_no_answer(args):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    chats = [[ASKED, {**SAID, "content": None, "tool_calls": [call]}], [ASKED, {**SAID, "tool_calls": None}]]
    skipped: dict[int, str] = {}
    dataset = Dataset.from_list([{"messages": messages} for messages in chats])
    _, examples = examples_of(dataset, ColumnMapping(), args, skipped=skipped)
    assert [example.row for example in examples] == [1]
    assert skipped == {0: "its answer is a call of a tool"}


def test_rows_without_any_answer(args):
    dataset = Dataset.from_list([{"messages": [ASKED]}] * 3)
    with pytest.raises(NothingError, match=r"2 of 2 rows have no answer .*: rows 1, 2. Row 1: its last message is fro"):
        examples_of(dataset, ColumnMapping(), args, [1, 2])
    empty = Dataset.from_list([{"prompt": "a", "completion": " "}] * 3)
    with pytest.raises(NothingError, match=r"^1 of 1 rows have no answer to plant faults in. Row 2: "):
        examples_of(empty, ColumnMapping(), args, [2])


def test_tokens_are_no_text(args):
    with pytest.raises(InputError, match="The rows are tokens"):
        examples_of(Dataset.from_list([{"input_ids": [1, 2]}]), ColumnMapping(), args)


def test_images_are_refused(args):
    row = {"messages": [ASKED, SAID], "images": ["a.png"]}
    with pytest.raises(InputError, match="images"):
        examples_of(Dataset.from_list([row]), ColumnMapping(), args)


def test_something_else_than_a_dataset(args):
    with pytest.raises(InputError, match="dataset must be a Dataset, got a list"):
        examples_of([{"text": "a"}], ColumnMapping(), args)
