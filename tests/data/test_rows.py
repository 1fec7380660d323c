"""Rows are loaded from every source, under TRL's column names; what cannot work is an error of one line."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from trl import SFTConfig

from resofilter_trainer.config import ColumnMapping, InputError
from resofilter_trainer.data.files import load_rows
from resofilter_trainer.data.rows import duplicate_rows, empty_rows, map_columns

ROWS = [{"question": "what is 1 + 2 ?", "answer": "3"}, {"question": "and 2, 2 ?", "answer": "it is\n4"}]


def as_jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_json(path: Path) -> str:
    path.write_text(json.dumps(ROWS))
    return str(path)


def as_csv(path: Path) -> str:
    Dataset.from_list(ROWS).to_csv(path)
    return str(path)


def as_parquet(path: Path) -> str:
    Dataset.from_list(ROWS).to_parquet(path)
    return str(path)


def as_saved_dataset(path: Path) -> str:
    Dataset.from_list(ROWS).save_to_disk(path)
    return str(path)


def as_saved_splits(path: Path) -> str:
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(path)
    return str(path)


def as_folder_of_files(path: Path) -> str:
    path.mkdir()
    as_jsonl(path / "train.jsonl")
    as_jsonl(path / "test.jsonl", ROWS[:1])
    return str(path)


# ---- where rows come from


def as_three_files(path: Path, kind: str) -> str:
    path.mkdir()
    for number in range(3):
        rows = Dataset.from_list([{"question": f"what is {number} + {i} ?", "answer": str(i)} for i in range(4)])
        getattr(rows, f"to_{kind}")(path / f"rows-{number}.{kind}")
    return str(path)


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_launched_processes_convert_files_together(kind, tmp_path, monkeypatch):
    alone = load_rows(as_three_files(tmp_path / "alone", kind))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    together = load_rows(as_three_files(tmp_path / "together", kind))
    assert len(together) == 12
    assert (len(alone.cache_files), len(together.cache_files)) == (1, 2)
    assert list(together) == list(alone)
    assert together.features == alone.features


def test_a_split_of_one_file_beside_one_of_many_is_converted_alone(tmp_path, monkeypatch):
    source = Path(as_three_files(tmp_path / "rows", "parquet"))
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(source / f"train-{number:05d}-of-00003.parquet")
    Dataset.from_list([{"question": "?", "answer": "0"}]).to_parquet(source / "test-00000-of-00001.parquet")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [len(load_rows(str(source), split).cache_files) for split in ("train", "test")] == [2, 1]
    assert len(load_rows(str(source))) == 12


@pytest.mark.parametrize("launched", ["", "many", "0"])
def test_one_process_converts_files_where_no_number_was_launched(launched, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", launched)
    assert len(load_rows(as_three_files(tmp_path / "rows", "json")).cache_files) == 1


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_what_processes_cannot_convert_together_is_told_as_by_one(kind, tmp_path, monkeypatch):
    source = as_three_files(tmp_path / "rows", kind)
    last = tmp_path / "rows" / f"rows-2.{kind}"
    if kind == "parquet":
        last.write_bytes(b"PAR1" + b"\xff" * 40 + last.read_bytes()[44:])
    else:
        last.write_text(last.read_text() + '"what')
    with pytest.raises(InputError) as alone:
        load_rows(source)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError) as together:
        load_rows(source)
    assert one_line(together.value) == one_line(alone.value)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", as_jsonl),
        ("lines.json", as_jsonl),
        ("list.json", as_json),
        ("rows.csv", as_csv),
        ("rows.parquet", as_parquet),
        ("saved", as_saved_dataset),
        ("splits", as_saved_splits),
        ("files", as_folder_of_files),
    ],
)
def test_rows_are_the_same_from_everywhere(tmp_path, name, write):
    assert list(load_rows(write(tmp_path / name))) == ROWS


@pytest.mark.parametrize("write", [as_saved_splits, as_folder_of_files])
def test_split_is_the_one_that_was_asked_for(tmp_path, write):
    assert list(load_rows(write(tmp_path / "data"), split="test")) == ROWS[:1]


@pytest.mark.parametrize("write", [as_saved_splits, as_folder_of_files])
def test_unknown_split_lists_those_there_are(tmp_path, write):
    with pytest.raises(InputError) as refused:
        load_rows(write(tmp_path / "data"), split="validation")
    assert all(split in one_line(refused.value) for split in ("validation", "train", "test"))


@pytest.mark.parametrize("source", ["{}/rows.jsonl", "{}/folder", "./rows", "rows.csv", "~/rows.parquet"])
def test_missing_path_is_named_without_asking_the_hub(tmp_path, source):
    source = source.format(tmp_path)
    with pytest.raises(InputError, match="There is no dataset at") as refused:
        load_rows(source)
    assert source in one_line(refused.value)


def test_hub_without_network_is_one_line_and_quick():
    before = time.monotonic()
    with pytest.raises(InputError, match="nobody/nothing") as refused:
        load_rows("nobody/nothing")
    assert "HF_HUB_OFFLINE" in one_line(refused.value)
    assert time.monotonic() - before < 5


def test_unknown_kind_of_file_lists_those_that_are_known(tmp_path):
    (tmp_path / "rows.txt").write_text("what is 1 + 2 ? 3")
    with pytest.raises(InputError, match=r"rows\.txt.* Known: \.json, \.jsonl, \.csv, \.parquet"):
        load_rows(str(tmp_path / "rows.txt"))


def write_text(text: str) -> Callable[[Path], str]:
    def write(path: Path) -> str:
        path.write_text(text)
        return str(path)

    return write


def as_empty_parquet(path: Path) -> str:
    Dataset.from_list(ROWS).select([]).to_parquet(path)
    return str(path)


def as_empty_saved_dataset(path: Path) -> str:
    Dataset.from_list(ROWS).select([]).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", write_text("")),
        ("rows.json", write_text("[]")),
        ("rows.csv", write_text("question,answer\n")),
        ("rows.parquet", as_empty_parquet),
        ("saved", as_empty_saved_dataset),
    ],
)
def test_empty_dataset_is_called_empty(tmp_path, name, write):
    with pytest.raises(InputError, match="has no rows") as refused:
        load_rows(write(tmp_path / name))
    assert name in one_line(refused.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("rows.jsonl", '{"question": "a", "ans'), ("rows.parquet", "no Parquet"), ("rows.csv", 'a,b\n1,2\n3,4,"5')],
)
def test_broken_file_says_what_is_wrong(tmp_path, name, text):
    path = write_text(text)(tmp_path / name)
    with pytest.raises(InputError, match="cannot be loaded") as refused:
        load_rows(path)
    assert path in one_line(refused.value)
    assert "while generating the dataset" not in one_line(refused.value)  # the library's wrapper, not the cause


def one_line(error: InputError) -> str:
    assert "\n" not in str(error)
    return str(error)


# ---- which column is which


@pytest.fixture
def rows() -> Dataset:
    return Dataset.from_list(
        [
            {"instruction": "Add.", "input": "1 + 2", "output": "3", "source": "a"},
            {"instruction": "Sing.", "input": "", "output": "la", "source": "b"},
            {"instruction": "Wait.\n", "input": None, "output": None, "source": "c"},
        ]
    )


def test_prompt_and_completion_are_joined_by_the_separator(rows):
    mapped = map_columns(rows, ColumnMapping(prompt_column="instruction", completion_column="output"))
    assert list(mapped) == [
        {"prompt": "Add.\n", "completion": "3", "input": "1 + 2", "source": "a"},
        {"prompt": "Sing.\n", "completion": "la", "input": "", "source": "b"},
        {"prompt": "Wait.\n", "completion": "", "input": None, "source": "c"},  # it ends in white space already
    ]


def test_prompt_of_several_columns_leaves_empty_ones_out(rows):
    mapping = ColumnMapping(prompt_column=["instruction", "input"], completion_column="output")
    assert list(map_columns(rows, mapping)["prompt"]) == ["Add.\n\n1 + 2\n", "Sing.\n", "Wait.\n"]


def test_columns_are_joined_in_the_order_given(rows):
    mapping = ColumnMapping(prompt_column=["input", "instruction"], completion_column="output")
    assert map_columns(rows, mapping)["prompt"][0] == "1 + 2\n\nAdd.\n"


@pytest.mark.parametrize(
    ("separator", "prompt"), [("", "Add."), (" ", "Add. "), ("\n\n### Answer:", "Add.\n\n### Answer:")]
)
def test_separator_can_be_chosen(rows, separator, prompt):
    mapping = ColumnMapping(prompt_column="instruction", completion_column="output", separator=separator)
    assert map_columns(rows, mapping)["prompt"][0] == prompt


def test_conversational_makes_messages(rows):
    mapping = ColumnMapping(
        prompt_column=["instruction", "input"], completion_column="output", conversational=True, separator="never"
    )
    assert map_columns(rows, mapping)[0] == {
        "prompt": [{"role": "user", "content": "Add.\n\n1 + 2"}],
        "completion": [{"role": "assistant", "content": "3"}],
        "source": "a",
    }


def test_columns_may_have_trls_names_already():
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    mapped = map_columns(rows, ColumnMapping(prompt_column="prompt", completion_column="completion"))
    assert list(mapped) == [{"prompt": "a\n", "completion": "b"}]


def test_whole_numbers_become_their_digits():
    rows = Dataset.from_list([{"a": 1, "b": -20}, {"a": 18, "b": None}, {"a": None, "b": 10**17 + 1}])
    mapped = map_columns(rows, ColumnMapping(prompt_column="a", completion_column="b"))
    assert list(mapped["prompt"]) == ["1\n", "18\n", "\n"]
    assert list(mapped["completion"]) == ["-20", "", "100000000000000001"]
    assert list(map_columns(rows, ColumnMapping(text_column="a"))["text"]) == ["1", "18", None]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (2.5, "float64"),
        (True, "bool"),
        (datetime.datetime(2026, 1, 2), "timestamp"),
        (datetime.date(2026, 1, 2), "date32"),
        (b"a", "binary"),
        (["a"], "list"),
        ({"a": 1}, "dict"),
    ],
)
@pytest.mark.parametrize("mapping", [{"prompt_column": "p", "completion_column": "x"}, {"text_column": "x"}])
def test_a_mapped_column_of_another_type_is_named_with_its_type(value, kind, mapping):
    with pytest.raises(InputError, match=f"Column 'x' holds {kind}.*not text.*dataset.map") as refused:
        map_columns(Dataset.from_list([{"p": "a", "x": value}]), ColumnMapping(**mapping))
    one_line(refused.value)


def test_the_remedy_for_another_type_works():
    rows = Dataset.from_dict(
        {"x": [0, 1], "d": [1.5, 2.0]}, Features({"x": ClassLabel(names=["no", "yes"]), "d": Value("float64")})
    )
    for column, read in (("x", ["no", "yes"]), ("d", ["1.5", "2.0"])):
        with pytest.raises(InputError, match="Column") as refused:
            map_columns(rows, ColumnMapping(text_column=column))
        remedy = str(refused.value).split("for example with ")[1].split(", and name column ")[0]
        assert map_columns(eval(remedy, {"dataset": rows}), ColumnMapping(text_column=f"{column}_text"))["text"] == read


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
def test_text_of_every_type_is_text(kind):
    rows = Dataset.from_dict({"q": ["a"], "r": ["007"]}, Features({"q": Value(kind), "r": Value(kind)}))
    mapped = map_columns(rows, ColumnMapping(prompt_column="q", completion_column="r"))
    assert list(mapped) == [{"prompt": "a\n", "completion": "007"}]
    assert list(map_columns(rows, ColumnMapping(text_column="r"))) == [{"q": "a", "text": "007"}]


def test_the_text_field_is_that_of_the_trainers_arguments():
    rows = Dataset.from_dict({"q": ["a"], "r": ["b"], "body": ["c"]})
    args = SFTConfig(output_dir="unused", bf16=False, use_cpu=True, dataset_text_field="body")
    mapped = map_columns(rows, ColumnMapping(prompt_column="q", completion_column="r"), args=args)
    assert mapped.column_names == ["prompt", "completion"]  # beside "body", TRL would not end the completion


@pytest.mark.parametrize("column", ["messages", "dialogue"])
def test_messages_column(column):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    mapped = map_columns(Dataset.from_list([{column: talk, "id": 1}]), ColumnMapping(messages_column=column))
    assert list(mapped) == [{"messages": talk, "id": 1}]


@pytest.mark.parametrize(("column", "text_field"), [("text", "text"), ("body", "text"), ("body", "content")])
def test_text_column_goes_where_trl_looks_for_it(column, text_field):
    rows = Dataset.from_list([{column: "hello", "id": 1}])
    mapped = map_columns(rows, ColumnMapping(text_column=column), text_field)
    assert list(mapped) == [{text_field: "hello", "id": 1}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b", "extra": 1},
        {"messages": [{"role": "user", "content": "a"}]},
        {"text": "a"},
        {"input_ids": [1, 2]},
    ],
)
def test_trls_names_need_no_mapping(row):
    rows = Dataset.from_list([row])
    assert list(map_columns(rows, ColumnMapping())) == list(rows)


@pytest.mark.parametrize(
    "mapping",
    [
        {"prompt_column": "question", "completion_column": "output"},
        {"prompt_column": ["instruction", "question"], "completion_column": "output"},
        {"prompt_column": "instruction", "completion_column": "question"},
        {"messages_column": "question"},
        {"text_column": "question"},
    ],
)
def test_missing_column_lists_those_there_are(rows, mapping):
    with pytest.raises(InputError, match=r"no column 'question'\. It has: instruction, input, output, source"):
        map_columns(rows, ColumnMapping(**mapping))


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (["id", "question", "answer"], 'prompt_column="question", completion_column="answer"'),
        (["query", "response"], 'prompt_column="query", completion_column="response"'),
        (["instruction", "input", "output"], 'prompt_column=["instruction", "input"], completion_column="output"'),
        (["prompt", "label"], 'prompt_column="X", completion_column="Y"'),
    ],
)
def test_unusable_columns_are_listed_with_what_to_pass(columns, hint):
    rows = Dataset.from_list([dict.fromkeys(columns, "a")])
    with pytest.raises(InputError, match=f"It has: {', '.join(columns)}") as refused:
        map_columns(rows, ColumnMapping())
    assert hint in str(refused.value)


def test_text_field_of_another_name_is_usable():
    rows = Dataset.from_list([{"content": "a"}])
    assert map_columns(rows, ColumnMapping(), "content") is rows
    with pytest.raises(InputError, match="No column"):
        map_columns(rows, ColumnMapping())


def test_no_rows_is_an_error():
    with pytest.raises(InputError, match="no rows"):
        map_columns(Dataset.from_dict({"text": []}), ColumnMapping())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"prompt_column": "a"}, "go together"),
        ({"completion_column": "a"}, "go together"),
        ({"prompt_column": "a", "completion_column": "b", "text_column": "c"}, "Pass one of"),
        ({"messages_column": "a", "text_column": "b"}, "Pass one of"),
    ],
)
def test_mapping_is_one_way_and_whole(settings, told):
    with pytest.raises(InputError, match=told):
        ColumnMapping(**settings)


# ---- empty and repeated rows


def talk(*contents: str | None) -> list[dict[str, str | None]]:
    return [{"role": ("user", "assistant")[turn % 2], "content": content} for turn, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("column", "blank", "full"),
    [
        ("text", ["", " \n\t", None], ["a", " a "]),
        ("completion", ["", "  ", None], ["0"]),
        ("messages", [talk("hi", ""), talk("hi", None), []], [talk("hi", "ho"), talk("", "ho")]),
        ("completion", [talk("")], [talk("ho")]),
        ("input_ids", [[]], [[1]]),
    ],
)
def test_empty_rows_are_those_with_nothing_to_learn(column, blank, full):
    rows = Dataset.from_dict({column: [*full, *blank, *full], "prompt": ["p"] * (2 * len(full) + len(blank))})
    assert empty_rows(rows) == list(range(len(full), len(full) + len(blank)))


def test_an_empty_prompt_is_no_empty_row():
    assert empty_rows(Dataset.from_list([{"prompt": "", "completion": "a"}])) == []


def test_text_is_looked_for_under_its_name():
    assert empty_rows(Dataset.from_dict({"body": ["a", ""]}), "body") == [1]


def test_repeated_prompts_point_to_the_first():
    prompts = ["a", "b", "a", "A", "a ", "b", "a"]
    rows = Dataset.from_dict({"prompt": prompts, "completion": list("1234567")})
    assert duplicate_rows(rows) == {2: 0, 5: 1, 6: 0}  # exactly equal: neither case nor space is forgiven


def test_of_messages_everything_before_the_answer_is_the_prompt():
    talks = [talk("a", "1"), talk("a", "2"), talk("b", "1"), talk("a", "1", "a", "2"), talk("a", "1", "a", "3")]
    assert duplicate_rows(Dataset.from_dict({"messages": talks})) == {1: 0, 4: 3}


def test_text_is_compared_whole():
    assert duplicate_rows(Dataset.from_dict({"body": ["a b", "a c", "a b"]}), "body") == {2: 0}


def test_token_ids_are_compared_whole():
    assert duplicate_rows(Dataset.from_dict({"input_ids": [[1, 2], [1], [1, 2]]})) == {2: 0}


@pytest.mark.parametrize(
    "given",
    [
        DatasetDict(train=Dataset.from_list([{"text": "a"}])),
        Dataset.from_list([{"text": "a"}]).to_iterable_dataset(),
        [{"text": "a"}],
    ],
    ids=["splits", "stream", "list"],
)
def test_what_is_no_dataset_is_refused(given):
    with pytest.raises(InputError, match="A dataset is needed, got "):
        map_columns(given, ColumnMapping())
