"""Rows as files for other trainers: each value as it is, each conversation as those trainers read it, or a refusal."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Json, List, Value
from helpers.zen import THE_TOOL, say, turns

from resofilter_trainer import ColumnMapping, InputError, export_rows
from resofilter_trainer.data.exporting import FILES

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": "1", "b": 2}}}
CALLING = [say("user", "1 + 2?"), say("assistant", None, tool_calls=[CALL]), say("tool", "3", tool_call_id="c1")]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def as_json(rows: list[dict[str, Any]], *names: str) -> Dataset:
    """Rows whose named columns keep each value as it is, as files of JSON are read."""
    features = Features({name: Json() if name in names else Value("string") for name in rows[0]})
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]}, features=features)


# ---- rows as they are


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_rows_stay_as_they_are_with_their_positions(format, tmp_path):
    rows = [{"a": "007", "b": 1.5, "c": None, "d": [1, 2], "e": {"x": True}, "f": "é\n\u2028\"'"} for _ in range(3)]
    file = export_rows(Dataset.from_list(rows), tmp_path, format, sample_ids=[4, 5, 9])
    read = lines(file) if format == "jsonl" else pq.read_table(file).to_pylist()
    assert read == [row | {"sample_id": place} for row, place in zip(rows, [4, 5, 9], strict=True)]
    assert [each.name for each in tmp_path.iterdir()] == [FILES[format]]


def test_keys_that_a_message_lacks_are_absent_again(tmp_path):
    answered = [*CALLING, say("assistant", "3")]
    rows = [{"messages": turns("Hi?", "Hello.")}, {"messages": answered}]
    for dataset in (Dataset.from_list(rows), as_json(rows, "messages")):
        assert [row["messages"] for row in lines(export_rows(dataset, tmp_path, "jsonl"))] == [
            row["messages"] for row in rows
        ]


def test_json_becomes_arrows_own_types_where_these_hold_it(tmp_path):
    rows = [{"id": "a", "messages": turns("Hi?", "Hello.")}, {"id": "b", "messages": [*CALLING, say("assistant", "3")]}]
    table = pq.read_table(export_rows(as_json(rows, "messages"), tmp_path, "parquet"))
    assert table.schema.metadata is None  # in which older versions of datasets find types that they do not know
    assert table.column_names == ["id", "messages"]
    first, second = table["messages"].to_pylist()
    assert [(each["role"], each["content"]) for each in first] == [("user", "Hi?"), ("assistant", "Hello.")]
    assert second[1]["tool_calls"] == [CALL]


@pytest.mark.parametrize(
    "values",
    [
        [{"a": 1}, {"a": "1"}],  # a number and text
        [{"a": 1}, {"a": 2.5}],  # 1 would become 1.0
        [{"a": {}}, {"a": {}}],  # a struct without a key
        [[1, "2"]],
    ],
)
def test_json_that_arrows_types_would_change_is_refused(values, tmp_path):
    dataset = as_json([{"x": value} for value in values], "x")
    with pytest.raises(InputError, match=r"Parquet cannot hold .* The format jsonl holds every row as it is"):
        export_rows(dataset, tmp_path, "parquet")
    assert list(tmp_path.iterdir()) == []
    assert [row["x"] for row in lines(export_rows(dataset, tmp_path, "jsonl"))] == values


def test_dates_are_written_as_text_and_what_is_no_json_is_refused(tmp_path):
    day = datetime.date(2026, 2, 3)
    dataset = Dataset.from_dict({"day": [day, None]})
    assert [row["day"] for row in lines(export_rows(dataset, tmp_path, "jsonl"))] == ["2026-02-03", None]
    for column, named in (({"x": [1.0, float("nan")]}, "Row 1, column 'x': nan"), ({"x": [b"1"]}, "bytes")):
        with pytest.raises(InputError, match=rf"{named} is no value of JSON. Use the format parquet"):
            export_rows(Dataset.from_dict(column), tmp_path, "jsonl")
    assert [each.name for each in tmp_path.iterdir()] == ["rows.jsonl"]  # as it was before
    assert len(lines(tmp_path / "rows.jsonl")) == 2


def test_images_are_kept_in_parquet(tmp_path):
    image = pytest.importorskip("PIL.Image").new("RGB", (2, 2), (255, 0, 0))
    dataset = Dataset.from_dict(
        {"text": ["a"], "image": [image]}, features=Features(text=Value("string"), image=Image())
    )
    assert pq.read_table(export_rows(dataset, tmp_path, "parquet"))["image"][0].as_py()["bytes"][:4] == b"\x89PNG"


def test_positions_never_replace_a_column_of_the_dataset(tmp_path):
    dataset = Dataset.from_dict({"sample_id": [7, 8], "text": ["a", "b"]})
    with pytest.raises(InputError, match="a column 'sample_id' of its own"):
        export_rows(dataset, tmp_path, "jsonl", sample_ids=[0, 1])
    export_rows(dataset, tmp_path, "jsonl", sample_ids=[7, 8])
    assert [row["sample_id"] for row in lines(export_rows(dataset, tmp_path, "jsonl"))] == [7, 8]


def test_an_unknown_format_names_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=r"format must be one of 'jsonl', 'parquet', 'sharegpt', 'alpaca', got 'csv'"):
        export_rows(Dataset.from_dict({"text": ["a"]}), tmp_path, "csv")


# ---- conversations

PAIR = {"question": ["1 + 1?", "2 + 2?"], "hint": ["", "count"], "answer": ["2", "4"], "source": ["x", "y"]}
BY_NAME = ColumnMapping(prompt_column=["question", "hint"], completion_column="answer")


def test_alpaca_of_mapped_columns(tmp_path):
    file = export_rows(Dataset.from_dict(PAIR), tmp_path, "alpaca", BY_NAME, sample_ids=[3, 8])
    rest = {"input": "", "system": "", "history": []}
    asked = ["1 + 1?", "2 + 2?\n\ncount"]  # as it is scored
    assert lines(file) == [
        {"instruction": text, "output": said, "source": source, "sample_id": place, **rest}
        for text, said, source, place in zip(asked, PAIR["answer"], PAIR["source"], [3, 8], strict=True)
    ]
    described = json.loads((tmp_path / "dataset_info.json").read_text())["kept_alpaca"]
    assert described["file_name"] == "alpaca.jsonl"
    assert set(described["columns"].values()) == {*rest, "instruction", "output"}


def test_alpaca_of_several_turns(tmp_path):
    messages = [say("system", "Be short."), *turns("a?", "b"), *turns("c?", "d")]
    (made,) = lines(export_rows(Dataset.from_dict({"messages": [messages]}), tmp_path, "alpaca"))
    assert made == {"instruction": "c?", "input": "", "output": "d", "system": "Be short.", "history": [["a?", "b"]]}


@pytest.mark.parametrize("arguments", [{"a": "1", "b": 2}, '{"a": "1", "b": 2}'])
def test_sharegpt_with_tools(arguments, tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [
        say("system", "Add."),
        say("user", "1 + 2?"),
        say("assistant", None, tool_calls=[call]),
        say("tool", "3"),
        say("assistant", "It is 3."),
    ]
    dataset = as_json([{"messages": messages, "tools": [THE_TOOL], "id": "r"}], "messages", "tools")
    (made,) = lines(export_rows(dataset, tmp_path, "sharegpt"))
    asked, called, observed, answered = made["conversations"]
    assert (asked, answered) == ({"from": "human", "value": "1 + 2?"}, {"from": "gpt", "value": "It is 3."})
    assert called["from"] == "function_call"
    assert json.loads(called["value"]) == {"name": "add", "arguments": {"a": "1", "b": 2}}
    assert observed == {"from": "observation", "value": "3"}
    assert (made["system"], json.loads(made["tools"]), made["id"]) == ("Add.", [THE_TOOL], "r")
    export_rows(Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}), tmp_path, "alpaca")
    assert sorted(json.loads((tmp_path / "dataset_info.json").read_text())) == ["kept_alpaca", "kept_sharegpt"]


@pytest.mark.parametrize(
    ("format", "messages", "why"),
    [
        ("sharegpt", [say("user", "a"), say("user", "b"), say("assistant", "c")], "do not take turns"),
        ("sharegpt", [say("user", "a"), say("assistant", "so", tool_calls=[CALL])], "text beside the call of a tool"),
        (
            "sharegpt",
            [say("user", "a"), say("assistant", "b", reasoning_content="c")],
            "message 1 has 'reasoning_content'",
        ),
        ("sharegpt", [say("user", "a"), say("assistant", None, tool_calls=[{"function": "add"}])], "without a name"),
        ("sharegpt", [say("user", "a")], "its last message is not the assistant's"),
        ("sharegpt", [say("developer", "a"), *turns("b", "c")], "the role 'developer'"),
        ("alpaca", [say("user", "a"), say("assistant", "b", weight=0), *turns("c", "d")], "flags"),
        ("alpaca", [*CALLING, say("assistant", "3")], "it has tools"),
        ("alpaca", [say("assistant", "a"), *turns("b", "c")], "not pairs of user and assistant"),
    ],
)
def test_a_row_that_a_format_cannot_hold_is_refused_by_its_number(format, messages, why, tmp_path):
    dataset = as_json([{"messages": turns("a", "b")}, {"messages": messages}], "messages")
    with pytest.raises(InputError, match=rf"Row 6: .*{why}.*The format jsonl holds every row"):
        export_rows(dataset, tmp_path, format, sample_ids=[2, 6])
    assert list(tmp_path.iterdir()) == []


def test_text_and_clashing_columns_are_refused(tmp_path):
    with pytest.raises(InputError, match="needs questions and answers, and the columns are text"):
        export_rows(Dataset.from_dict({"text": ["a"]}), tmp_path, "sharegpt")
    dataset = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "input": ["c"]})
    with pytest.raises(InputError, match="column 'input' has the name of one of the format alpaca: rename it"):
        export_rows(dataset, tmp_path, "alpaca")
    assert list(tmp_path.iterdir()) == []


def test_the_features_of_lists_of_structs_are_followed(tmp_path):
    features = Features(
        {"prompt": List({"role": Value("string"), "content": Value("string"), "name": Value("string")})}
    )
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": None, "name": None}]]}, features=features)
    assert lines(export_rows(dataset, tmp_path, "jsonl")) == [{"prompt": [{"role": "user", "content": None}]}]


@pytest.mark.parametrize("content", ["{,}", "[]"])
def test_a_description_that_cannot_be_read_is_refused_before_anything_is_written(content, tmp_path):
    (tmp_path / "dataset_info.json").write_text(content)
    with pytest.raises(InputError, match=r"dataset_info.json.*Correct or remove it"):
        export_rows(Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}), tmp_path, "alpaca")
    assert [each.name for each in tmp_path.iterdir()] == ["dataset_info.json"]


def test_positions_are_compared_whatever_the_format(tmp_path):
    dataset = Dataset.from_dict({"sample_id": [7, 8], "text": ["a", "b"]}).with_format("numpy")
    assert len(lines(export_rows(dataset, tmp_path, "jsonl", sample_ids=[7, 8]))) == 2


def test_rows_with_weights_warn_as_no_other_trainer_reads_them(tmp_path):
    dataset = Dataset.from_dict({"text": ["a", "b"], "resofilter_weight": [1.0, 2.0]})
    with pytest.warns(UserWarning, match="no other trainer reads their weights.*a training on the file is biased"):
        file = export_rows(dataset, tmp_path, "jsonl")
    assert [row["resofilter_weight"] for row in lines(file)] == [1.0, 2.0]
