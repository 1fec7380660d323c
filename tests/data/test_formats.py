"""Files are read as they are written: the same values from every format, compressed, in folders and streamed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Json, List, Value
from trl import SFTConfig, SFTTrainer

from resofilter_trainer import ColumnMapping, InputError
from resofilter_trainer.data.exact_json import as_json, encoded
from resofilter_trainer.data.files import load_rows, load_stream, only_split
from resofilter_trainer.data.loading import usable_rows
from resofilter_trainer.data.preparation import prepare
from resofilter_trainer.data.surveys import ROW_POSITION
from resofilter_trainer.io.digest import hash_rows

ODD = [
    *("007", "1.50", "1e5", "18", "-0", "123456789012345678901234567890", "true", "FALSE", "NA", "None", "null", "nan"),
    *("n/a", "2024-01-05", "1999-03-01T10:00:00Z", "12:30", 'a "quoted" one', "two\nlines", "a\r\nb", "a\ttab", "a, b"),
    *("é ü 日本 🙂", " spaces ", "a;b", "#N/A", "{}", '{"a": 1}', "[1]", "\\n", "'", '"', "\u2028", "<NA>", "0x1F"),
]


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def read(source: str, split: str = "train") -> Dataset:
    """The rows, which a stream has, too."""
    found, stream = load_rows(source, split), load_stream(source, split)
    assert list(stream) == list(found)
    assert stream.features == found.features
    return found


def separated(rows: list[dict[str, str]], **options: Any) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---- separated values


@pytest.mark.parametrize("options", [{}, {"lineterminator": "\n"}, {"quoting": csv.QUOTE_ALL}])
@pytest.mark.parametrize(
    ("name", "delimiter"),
    [
        *(("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ","), ("my.table.csv", ","), ("a.tsv.gz", "\t")),
        *(("A.CSV", ","), ("A.Tsv", "\t"), ("a[1] b*?.csv", ",")),
    ],
)
def test_every_cell_is_the_text_that_was_written(tmp_path, name, delimiter, options):
    rows = [{"question": text, "answer": other} for text, other in zip(ODD, ODD[::-1], strict=True)]
    found = read(write(tmp_path / name, separated(rows, delimiter=delimiter, **options)))
    assert list(found) == rows
    assert found.features == Features(dict.fromkeys(rows[0], Value("string")))


@pytest.mark.parametrize("text", ["q,a\r\n1,\r\n", "\ufeffq,a\n1,\n", 'q,a\n\n"1",""\n\n'])
def test_an_empty_cell_is_empty_text(tmp_path, text):
    assert list(read(write(tmp_path / "a.csv", text))) == [{"q": "1", "a": ""}]


def test_a_cell_may_be_long(tmp_path):
    assert read(write(tmp_path / "a.csv", f"a\n{'x' * 200_000}\n"))["a"][0] == "x" * 200_000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "q,a\n1,2\n1,2,3\n", r"row 1 \(line 3\) has 3 cells and the header 2.*double quotes"),
        ("a.csv", 'q,a\n"1\n",2\n1\n', r"row 1 \(line 4\) has 1 cells and the header 2"),
        ("a.csv", 'q,a\n1,"2\n', r"row 0 \(line 2\): unexpected end of data"),
        ("a.csv", 'q,a\n1,"2"3\n', r"row 0 \(line 2\): ',' expected after"),
        ("a.csv", "q,a,q\n1,2,3\n", "two columns are named 'q'"),
        ("a.csv", "q;a\n1;2\n", "separated by semicolons"),
        ("a.csv", "q\ta\n1\t2\n", "separated by tabs"),
        ("a.tsv", "q,a\n1,2\n", "separated by commas"),
        ("a.csv", "q,a\n1,é\n".encode("latin-1"), "not UTF-8 text.* Save it as UTF-8"),
        ("a.csv", "q,a\n1,é\n".encode("utf-16"), "not UTF-8 text"),
    ],
)
def test_a_broken_table_is_refused(tmp_path, name, text, message):
    source = write(tmp_path / name, text)
    for load in (load_rows, lambda source: list(load_stream(source))):
        with pytest.raises(InputError, match=message) as refused:
            load(source)
        assert str(refused.value).startswith(f"The dataset '{source}' cannot be loaded: ")


# ---- JSON


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonl.gz", "a.json.gz"])
@pytest.mark.parametrize("dump", [lines, lambda *rows: json.dumps(rows), lambda *rows: json.dumps(rows, indent=1)])
def test_text_is_text_at_any_depth(tmp_path, name, dump):
    rows = [{"date": text, "m": [{"created_at": text, "parts": [text, None]}], "n": None} for text in ODD]
    found = read(write(tmp_path / name, dump(*rows)))
    assert list(found) == rows
    assert found.features["m"] == List({"created_at": Value("string"), "parts": List(Value("string"))})


@pytest.mark.parametrize(
    ("written", "values", "kind"),
    [
        (["1", "null", "9007199254740993"], [1, None, 2**53 + 1], "int64"),
        (["1", "18446744073709551615"], [1, 2**64 - 1], "uint64"),
        (["1.0", "2.5", "null"], [1.0, 2.5, None], "float64"),
        (["true", "null"], [True, None], "bool"),
        (["null", "null"], [None, None], "null"),
        (["18", "3.50", "4", "null"], ["18", "3.50", "4", None], "string"),
        (["18", '"about 18"', "true", "1e5"], ["18", "about 18", "true", "1e5"], "string"),
        (["-1", "18446744073709551615"], ["-1", "18446744073709551615"], "string"),
        (["123456789012345678901234567890"], ["123456789012345678901234567890"], "string"),
    ],
)
def test_numbers_stay_what_they_are_or_become_text_as_written(tmp_path, written, values, kind):
    found = read(write(tmp_path / "a.jsonl", "".join(f'{{"x": {each}}}\n' for each in written)))
    assert found["x"][:] == values
    assert [type(each) for each in found["x"]] == [type(each) for each in values]
    assert found.features["x"] == Value(kind)


def test_kinds_that_only_later_rows_have_are_known_from_the_start(tmp_path):
    rows = [{"x": i, "e": []} for i in range(1500)] + [{"x": 0.5, "late": "a", "e": [{"a": 1}]}]
    found = read(write(tmp_path / "a.jsonl", lines(*rows)))
    assert found["x"][0] == "0"
    assert found[-1] == {"x": "0.5", "e": [{"a": 1}], "late": "a"}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([[0, 0.5], [1]], Json()),
        ([[{"role": "user", "content": "2024-01-05"}], [{"role": "user", "content": [{"a": 1}]}]], List(Json())),
        ([[{"role": "user"}, {"role": "assistant", "tool_calls": [{"n": 1}]}]], List(Json())),
        ([{"n": 18}, {"n": 3.5}, None], Json()),
        ([{"arguments": {"a": 1}}, {"arguments": {"b": "007"}}], {"arguments": Json()}),
        ([{"b": 1, "a": 2}, {"a": 3, "b": 4}], {"b": Value("int64"), "a": Value("int64")}),
        ([{}, {"a": 1}], Json()),
        ([[1], {"a": 1}], Json()),
        (["x", 1, 1.5, True, {"b": 1}, None, "007", "[1]", ""], Json()),
        ([["b"], "NA", "1.50"], Json()),
        ([[{"name": "f"}], "", '[{"name": "f"}]'], Json()),
    ],
)  # fmt: skip
def test_what_arrow_cannot_hold_is_json(tmp_path, values, kind):
    found = read(write(tmp_path / "a.jsonl", lines(*({"x": value} for value in values))))
    assert found["x"][:] == values
    assert found.features["x"] == kind
    again = [encoded(found.features, row) for row in found]
    assert hash_rows(found) == hash_rows(Dataset.from_list(again, features=found.features))


@pytest.mark.parametrize(
    "written",
    ["-0.7", "1.64", "19.9733", "42.72962913176735", "0.30000000000000004", "1e23", "-0.0", "5e-324", "1.7e308"],
)
def test_decimals_inside_json_keep_their_last_digit(tmp_path, written):
    """datasets reads -0.7 in JSON as -0.7000000000000001, and writes ten digits."""
    text = f'{{"x": {{"a": {written}, "b": [-{written}]}}}}\n{{"x": {{}}}}\n'.replace("--", "")
    value = read(write(tmp_path / "a.jsonl", text))["x"][0]
    assert repr(value["a"]) == repr(float(written))
    assert repr(value["b"][0]) == repr(-float(written))


def test_any_decimal_can_be_written_as_json():
    source = random.Random(0)
    for _ in range(3000):
        value = float(f"{source.uniform(-180, 180):.{source.randint(1, 17)}f}") * 10 ** source.choice([0, 0, -250, 250])
        assert Json().decode_example(as_json({"a": [value]})) == {"a": [value]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": 1, "a": 2}\n', "line 1: an object has the key 'a' twice"),
        ('{"a": 1}\n[1]\n', "line 2: a row must be an object, got list"),
        ('[{"a": 1}, 2]', "row 1 must be an object, got int"),
        ('{"a": 1}\n{"a": \n', "no JSON from line 2 on"),
        ('{"a": "\\ud800"}\n', "half a character"),
        (lines({"a": {"b": 2**70}}, {"a": {}}), "more than 64 bits: write it as text"),
        ('{"a": {"b": NaN}}\n{"a": {}}\n', "NaN and infinity are no JSON"),
        ('{\n"a": ["x"],\n"b": ["x", "y"]}', "columns have different lengths"),
        ('{"a": "é"}\n'.encode("latin-1"), "not UTF-8"),
    ],
)
def test_what_no_column_can_hold_is_refused(tmp_path, text, message):
    source = write(tmp_path / "a.jsonl", text)
    for load in (load_rows, lambda source: list(load_stream(source))):
        with pytest.raises(InputError, match=message) as refused:
            load(source)
        assert source in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('\ufeff{"a": "x"}\r\n\r\n{"a": "y"}', [{"a": "x"}, {"a": "y"}]),
        ('["x", "007"]', [{"text": "x"}, {"text": "007"}]),
        ('{\n"a": ["x", "y"],\n"b": ["1", "2"]\n}', [{"a": "x", "b": "1"}, {"a": "y", "b": "2"}]),
        ('{\n"a": "x",\n"b": ["1", "2"]\n}', [{"a": "x", "b": ["1", "2"]}]),
        ('{"a": "x\\u2028y"}\n', [{"a": "x\u2028y"}]),
    ],
)
def test_other_layouts_of_json(tmp_path, text, rows):
    assert list(read(write(tmp_path / "a.json", text))) == rows


# ---- folders and splits


def test_a_folder_of_files_has_the_values_and_columns_of_all(tmp_path):
    write(tmp_path / "c" / "train-1.csv", "a,b\n007,2\n")
    write(tmp_path / "c" / "train-2.csv.gz", "b,a\n,NA\n")
    write(tmp_path / "c" / "test.csv", "a\n1.50\n")
    assert list(read(str(tmp_path / "c"))) == [{"a": "007", "b": "2"}, {"a": "NA", "b": ""}]
    assert list(read(str(tmp_path / "c"), "test")) == [{"a": "1.50"}]
    assert list(read(str(tmp_path / "c"), "test+test")) == [{"a": "1.50"}] * 2
    write(tmp_path / "j" / "train-1.jsonl", lines({"a": 18, "d": "2024-01-05"}))
    write(tmp_path / "j" / "train-2.jsonl", lines({"a": 3.5, "late": "x"}))
    assert list(read(str(tmp_path / "j"))) == [
        {"a": "18", "d": "2024-01-05", "late": None},
        {"a": "3.5", "d": None, "late": "x"},
    ]


def test_a_folder_with_other_columns_in_a_file_is_refused(tmp_path):
    write(tmp_path / "c" / "train-1.csv", "a,b\n1,2\n")
    write(tmp_path / "c" / "train-2.csv", "a,c\n1,2\n")
    with pytest.raises(InputError, match=r"train-2\.csv' cannot be loaded: its columns are a, c, and .* a, b"):
        load_rows(str(tmp_path / "c"))


def test_the_options_of_a_folders_card_are_followed_or_refused(tmp_path):
    card = "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  sep: ';'\n{}---\n"
    write(tmp_path / "f" / "a.csv", "q;a\n007;NA\n")
    write(tmp_path / "f" / "README.md", card.format(""))
    assert list(read(str(tmp_path / "f"))) == [{"q": "007", "a": "NA"}]
    write(tmp_path / "f" / "README.md", card.format("  skiprows: 1\n"))
    with pytest.raises(InputError, match=r"sets skiprows=1 .*save_to_disk"):
        load_rows(str(tmp_path / "f"))


def parquet_folder(folder: Path, **columns: pa.Array) -> str:
    """A file for each array, which is its column "a"."""
    folder.mkdir()
    for name, values in columns.items():
        pq.write_table(pa.table({"a": values}), folder / f"{name}.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("first", "second", "values"),
    [
        (pa.array(["x"]), pa.array(["007"], pa.large_string()), ["x", "007"]),
        (pa.array(["x"]), pa.array(["007"]).dictionary_encode(), ["x", "007"]),
        (pa.array(["x"]), pa.nulls(1), ["x", None]),
        (pa.array(['{"b": 1}'], pa.json_()), pa.array(['{"c": "007"}'], pa.json_()), [{"b": 1}, {"c": "007"}]),
        (pa.array([1]), pa.array([2], pa.int8()), [1, 2]),
        (pa.array([0.1]), pa.array([0.5], pa.float32()), [0.1, 0.5]),
        (pa.array([[{"b": "x", "c": 1}]]), pa.array([[{"c": 2, "b": "y"}]]), [{"b": "x", "c": 1}, {"b": "y", "c": 2}]),
        (pa.array([1]), pa.array(["007"]), None),
        (pa.array([True]), pa.array(["1"]), None),
        (pa.array(["x"]), pa.array([1.5]), None),
        (pa.array([1.5]), pa.array([2**53 + 1]), None),
        (pa.array([0.5], pa.float32()), pa.array([0.1]), None),
        (pa.array([{"b": 1}]), pa.array([{"b": "007"}]), None),
        (pa.array([[1]]), pa.array([["007"]]), None),
        (pa.nulls(1), pa.array(["007"]), None),
    ],
)  # fmt: skip
def test_a_folder_of_parquet_changes_no_value(tmp_path, first, second, values):
    source = parquet_folder(tmp_path / "p", one=first, two=second)
    if values is not None:
        found = read(source)["a"][:]
        assert found == (values if not isinstance(found[0], list) else [[each] for each in values])
        return
    for load in (load_rows, load_stream):
        with pytest.raises(InputError, match=r"Column 'a' is .* in '.*two.parquet' and .* in '.*one.parquet'.*alike"):
            load(source)


@pytest.mark.parametrize("load", [load_rows, load_stream])
def test_parts_of_parquet_without_rows_are_read_as_none(load, tmp_path):
    none, some = pa.array([], pa.int64()), pa.array([1, 2])
    for name, parts in {"first": {"a": none, "b": some}, "last": {"a": some, "b": none}}.items():
        assert [row["a"] for row in load(parquet_folder(tmp_path / name, **parts))] == [1, 2]
    with pq.ParquetWriter(tmp_path / "groups.parquet", pa.schema({"a": pa.int64()})) as writer:
        for values in (none, some, none, some, none):
            writer.write_table(pa.table({"a": values}))
    assert [row["a"] for row in load(str(tmp_path / "groups.parquet"))] == [1, 2, 1, 2]


def test_parquet_without_any_row_is_refused(tmp_path):
    source = parquet_folder(tmp_path / "none", a=pa.array([], pa.int64()), b=pa.array([], pa.int64()))
    for each in (source, str(Path(source, "a.parquet"))):
        with pytest.raises(InputError, match=f"The dataset '{each}' has no rows."):
            load_rows(each)


def test_every_split_of_parquet_has_the_columns_of_the_first_file(tmp_path):
    source = parquet_folder(tmp_path / "p", train=pa.array([1]), test=pa.array(["007"]))
    assert load_rows(source)["a"][:] == [1]
    with pytest.raises(InputError, match=r"Column 'a' is string in '.*test.parquet' and int64 in '.*train.parquet'"):
        load_rows(source, "test")


def test_a_folder_of_several_formats_is_refused_unless_its_card_chooses(tmp_path):
    write(tmp_path / "f" / "a.csv", "a\n007\n")
    write(tmp_path / "f" / "b.jsonl.gz", lines({"a": "x"}))
    write(tmp_path / "f" / "notes.txt", "a")
    source = str(tmp_path / "f")
    for load in (load_rows, load_stream):
        with pytest.raises(InputError, match=r"several formats, such as '[ab].* beside '[ab].*: move those of one"):
            load(source)
    write(tmp_path / "f" / "README.md", "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n---\n")
    assert list(read(source)) == [{"a": "007"}]


def as_file(path: Path) -> str:
    return write(path.with_suffix(".jsonl"), lines({"a": "x"}, {"a": "y"}, {"a": "z"}))


def as_parquet(path: Path) -> str:
    load_rows(as_file(path)).to_parquet(path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet"))


def as_saved(path: Path) -> str:
    Dataset.from_dict({"a": ["x", "y", "z"]}).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("make", [as_file, as_parquet, as_saved])
def test_a_single_file_or_dataset_has_one_split(tmp_path, make: Callable[[Path], str]):
    source = make(tmp_path / "a")
    assert only_split(source) == "train"
    for load in (load_rows, load_stream):
        with pytest.raises(InputError, match=r"has no split 'validation'.* one split\. It has: 'train'\."):
            load(source, "validation")
        with pytest.raises(InputError, match="has no split 'test'"):
            load(source, "train+test")
    assert load_rows(source, "train[1:]")["a"][:] == ["y", "z"]
    assert load_rows(source, "train[:34%]+train[-1:]")["a"][:] == ["x", "z"]
    assert read(source)["a"][:] == ["x", "y", "z"]


@pytest.mark.parametrize("make", [as_file, as_parquet])
def test_a_stream_has_no_parts(tmp_path, make):
    with pytest.raises(InputError, match="pass split='train', all of it"):
        load_stream(make(tmp_path / "a"), "train[:2]")


def test_saved_splits(tmp_path):
    rows = Dataset.from_dict({"a": ["x", "y", "z"]})
    DatasetDict(train=rows, test=rows.select([2])).save_to_disk(tmp_path / "splits")
    source = str(tmp_path / "splits")
    assert only_split(source) is None
    assert load_rows(source, "test")["a"][:] == ["z"]
    assert load_rows(source, "train[:1]+test")["a"][:] == ["x", "z"]
    for load in (load_rows, load_stream):
        with pytest.raises(InputError, match=r"has no split 'validation'\. It has: 'train', 'test'"):
            load(source, "validation")
    DatasetDict.load_from_disk(source)["test"].save_to_disk(tmp_path / "own")
    one = load_rows(as_file(tmp_path / "a"))
    one.save_to_disk(tmp_path / "named")
    assert only_split(str(tmp_path / "named")) == "train"


# ---- the tokens of rows that are written and read are those of the rows in memory


def text(random: random.Random) -> str:
    words = [random.choice([*ODD, "fox", "so", "what"]) for _ in range(random.randint(1, 4))]
    return " ".join(words) if "".join(words).strip() else "fox"


def talk(random: random.Random) -> list[dict[str, str]]:
    turns = [("user", "assistant")] * random.randint(1, 2)
    return [{"role": role, "content": text(random)} for turn in turns for role in turn]


FORMATS: dict[str, tuple[Callable[[random.Random], dict[str, Any]], dict[str, Any]]] = {
    "pairs": (lambda r: {"prompt": text(r), "completion": text(r)}, {}),
    "text": (lambda r: {"text": text(r)}, {}),
    "mapped": (
        lambda r: {"question": text(r), "answer": text(r)},
        {"prompt_column": "question", "completion_column": "answer"},
    ),
    "mapped, two columns": (
        lambda r: {"instruction": text(r), "input": r.choice(["", text(r)]), "output": text(r)},
        {"prompt_column": ["instruction", "input"], "completion_column": "output", "conversational": True},
    ),
    "mapped text": (lambda r: {"body": text(r)}, {"text_column": "body"}),
    "messages": (lambda r: {"messages": talk(r)}, {}),
    "mapped messages": (lambda r: {"turns": talk(r), "id": text(r)}, {"messages_column": "turns"}),
    "conversational pairs": (
        lambda r: {
            "prompt": [{"role": "user", "content": text(r)}],
            "completion": [{"role": "assistant", "content": text(r)}],
        },
        {},
    ),
    "tokens": (
        lambda r: (lambda n: {"input_ids": [r.randint(3, 30) for _ in range(n)], "labels": [-100, *[5] * (n - 1)]})(
            r.randint(2, 9)
        ),
        {},
    ),
}
FLAT = ("pairs", "text", "mapped", "mapped, two columns", "mapped text")


def written(rows: list[dict[str, Any]], folder: Path, flat: bool) -> list[str]:
    """The rows in files of every format that can hold them."""
    found = [
        write(folder / name, text)
        for name, text in (
            *(("a.jsonl", lines(*rows)), ("a.jsonl.gz", lines(*rows))),
            *(("a.json", json.dumps(rows)), ("b.json", json.dumps(rows, indent=2, ensure_ascii=False))),
        )
    ]
    if flat:
        found.append(write(folder / "a.csv", separated(rows)))
        found.append(write(folder / "a.csv.gz", separated(rows, quoting=csv.QUOTE_ALL)))
        found.append(write(folder / "a.tsv", separated(rows, delimiter="\t")))
    Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    return [*found, str(folder / "a.parquet")]


OFTEN = ("pairs", "conversational pairs", "tokens")


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.slow] * (each not in OFTEN)) for each in FORMATS]
)
def test_tokens_of_files_are_those_that_are_trained_on(name, tmp_path, tokenizer, tiny_llama):
    make, columns = FORMATS[name]
    source, mapping = random.Random(name), ColumnMapping(**columns)
    rows = [make(source) for _ in range(30)]
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, report_to="none", use_cpu=True, max_length=None)

    def tokens(dataset: Dataset) -> tuple[list[Any], list[Any]]:
        usable, _ = usable_rows(dataset, mapping, args, False, False)
        prepared = prepare(usable, tokenizer, args)
        assert prepared.sample_ids.tolist() == list(range(30))
        return list(prepared.dataset["input_ids"]), list(prepared.dataset["labels"])

    inmemory = Dataset.from_list([by_hand(row, mapping) for row in rows])
    inmemory = inmemory.add_column(ROW_POSITION, np.arange(30))
    trained = SFTTrainer(tiny_llama(), args, train_dataset=inmemory, processing_class=tokenizer).train_dataset
    expected = list(trained["input_ids"]), list(trained["labels"])
    for path in written(rows, tmp_path / "files", name in FLAT):
        assert tokens(load_rows(path)) == expected, path
        assert tokens(Dataset.from_list(list(load_stream(path)))) == expected, path


def by_hand(row: dict[str, Any], mapping: ColumnMapping) -> dict[str, Any]:
    """A mapped row as TRL reads it."""
    if mapping.prompt_columns:
        prompt = "\n\n".join(row[name] for name in mapping.prompt_columns if row[name].strip())
        completion = row[mapping.completion_column]
        if mapping.conversational:
            return {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": completion}],
            }
        return {"prompt": prompt if prompt[-1:].isspace() else prompt + mapping.separator, "completion": completion}
    if mapping.messages_column:
        return {"messages": row[mapping.messages_column]}
    return {"text": row[mapping.text_column]} if mapping.text_column else row
