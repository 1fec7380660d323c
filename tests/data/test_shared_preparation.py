"""Rows that processes prepare together and keep are those that one process prepares alone."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets, load_from_disk
from helpers.tokenizers import CHAT_TEMPLATE, make_tokenizer
from trl import SFTConfig

from resofilter_trainer import InputError
from resofilter_trainer.config import ColumnMapping
from resofilter_trainer.data import shared_rows, sharing, surveys, token_shares
from resofilter_trainer.data.preparation import PreparedRows, prepare
from resofilter_trainer.data.sharing import Sharing, sharing_of
from resofilter_trainer.data.usable import usable_rows
from resofilter_trainer.io import digest
from resofilter_trainer.io.digest import hash_rows

PAIRS = [{"prompt": f"what is {i % 7} + 1 ? ", "completion": "x " * (i % 4) + str(i)} for i in range(23)]
PAIRS[3]["prompt"] = "what " * 60  # longer than max_length
PAIRS[8]["completion"] = PAIRS[22]["completion"] = " \u00a0\x1c"  # blank, by Python's rules
PAIRS[9]["completion"] = "\u00e9"  # no ASCII, and not blank
MAPPING = {"prompt_column": "prompt", "completion_column": "completion"}


def chat(*contents: str, **last: Any) -> list[dict[str, Any]]:
    said = [{"role": ("user", "assistant")[turn % 2], "content": content} for turn, content in enumerate(contents)]
    return [*said[:-1], {**said[-1], **last}]


def messages() -> list[dict[str, Any]]:
    made = [{"messages": chat(row["prompt"], row["completion"]), "meta": {"n": [i]}} for i, row in enumerate(PAIRS)]
    made[6]["messages"] += [{"role": "odd", "content": "z"}]  # which the template leaves out
    made[7]["messages"] = chat("q", "a", content=None)
    made[20]["messages"] = []
    return made


def tokens() -> list[dict[str, Any]]:
    made = [{"input_ids": [5, 6, 7, 8][: i % 4 + 1], "labels": [-100, 6, 7, 8][: i % 4 + 1]} for i in range(23)]
    return [*made, {"input_ids": [5, 6], "labels": [5]}, {"input_ids": [5, -6], "labels": [5, 6]}, made[2]]


def sometimes_null() -> list[dict[str, Any]]:
    return [{**row, "prompt": None if i in (2, 17) else row["prompt"]} for i, row in enumerate(PAIRS)]


def histories() -> list[dict[str, Any]]:
    """A system's message in one block of rows only, so that rows are rewritten in all."""
    made = [{"prompt": chat(row["prompt"]), "completion": chat("", row["completion"])[1:]} for row in PAIRS]
    return [{**row, "system": "be" if i == 12 else None} for i, row in enumerate(made)]


TEMPLATE = "{% for m in messages if m.role != 'odd' %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "pairs": (PAIRS, {}),
    "mapped": (PAIRS, MAPPING),
    "messages": (messages(), {}),
    "tokens": (tokens(), {}),
    "nulls": (sometimes_null(), {}),
    "histories": (histories(), {}),
    "text": ([{"text": row["prompt"] + row["completion"]} for row in PAIRS], {}),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for module in (digest, surveys, shared_rows):
        monkeypatch.setattr(module, "BLOCK", 5)
    monkeypatch.setattr(sharing, "LEAST", 5)
    monkeypatch.setattr(shared_rows, "SORTED", 7)


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
    for name in ("hashes", "lengths", "values", "beginning"):
        assert getattr(found.prompts, name).tolist() == getattr(expected.prompts, name).tolist(), name


def check(dataset: Dataset, mapping: dict, place: Path, **options: Any) -> None:
    expected, skipped, notes = alone(dataset, mapping, **options)
    for _ in range(2):  # made, and read
        found, *told, content = shared(dataset, mapping, place, **options)
        assert_same(found, expected)
        assert told == [skipped, notes]
        assert content == hash_rows(dataset)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_rows_are_those_of_one_process(kind, repeated, tmp_path):
    made, mapping = KINDS[kind]
    check(Dataset.from_list(made), mapping, tmp_path, repeated=repeated)


def test_files_indices_slices_and_formats_make_no_difference(tmp_path):
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "rows", num_shards=3)
    dataset = load_from_disk(tmp_path / "rows")
    few = dataset.filter(lambda row: len(row["prompt"]) < 99)
    others = [dataset.shuffle(seed=1), dataset.select(range(4, 19)), few]
    others.append(concatenate_datasets([dataset, dataset.select([3, 1])]).with_format("numpy"))
    for number, each in enumerate(others):
        check(each, {}, tmp_path / str(number))


def test_a_fingerprint_of_many_rows_is_that_of_their_blocks(tmp_path, monkeypatch):
    dataset = Dataset.from_list(PAIRS)
    few, *_ = alone(dataset, {})
    monkeypatch.setattr(surveys, "MANY", 10)
    many, *_ = shared(dataset, {}, tmp_path)
    assert many.fingerprint == alone(dataset, {})[0].fingerprint != few.fingerprint
    assert many.fingerprint_like(few.fingerprint) == few.fingerprint  # of an earlier version
    assert many.fingerprint_like("blocks:other") == many.fingerprint
    assert alone(dataset.select([1, 0, *range(2, 23)]), {})[0].fingerprint != many.fingerprint


@pytest.mark.parametrize(
    ("made", "mapping", "settings"),
    [
        (PAIRS, {}, {}),
        (PAIRS, MAPPING, {}),
        (messages()[:20], {}, {}),
        ([{"messages": chat("q", str(i), role="odd" if i == 7 else "assistant")} for i in range(12)], {}, {}),
        (sometimes_null(), {}, {}),
        (tokens(), {}, {}),
        ([{"prompt": "q ", "completion": " "}] * 12, {}, {"drop": True}),
        ([{"prompt": "what " * 30, "completion": "4"}] * 12, {}, {"drop": True}),
        ([{"messages": chat("q", "a", role="odd")}] * 12, {}, {"drop": True}),
        (messages(), {}, {"drop": True, "assistant_only_loss": True}),
        ([{"prompt": f"q{i}", "completion": "a", "system": "be" if i == 7 else ""} for i in range(12)], {}, {}),
    ],
)
def test_refusals_are_those_of_one_process(made, mapping, settings, tmp_path):
    settings, dataset = {"drop": False, **settings}, Dataset.from_list(made)
    with pytest.raises(InputError) as expected:
        alone(dataset, mapping, **settings)
    for _ in range(2):
        with pytest.raises(InputError) as found:
            shared(dataset, mapping, tmp_path, **settings)
        assert str(found.value) == str(expected.value)
        assert type(found.value) is type(expected.value)
        assert getattr(found.value, "reasons", None) == getattr(expected.value, "reasons", None)


def test_rows_that_trl_cannot_prepare_are_skipped(tmp_path):
    refuse = "{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    strict = f"{{% for m in messages %}}{refuse}{{{{ m.content }}}}{{% endfor %}}"
    contents = ["bad" if i in (1, *range(5, 10)) else f"a{i}" for i in range(12)]  # a whole block, too
    dataset = Dataset.from_list([{"messages": chat("q ", each)} for each in contents])
    args, tokenizer = arguments(), tokenizer_of(strict)
    rows, _ = usable_rows(dataset, ColumnMapping(), args, False, True)
    how = Sharing(dataset, ColumnMapping(), args, False, True, tmp_path)
    found = how.prepared(how.rows(), tokenizer)
    assert_same(found, prepare(rows, tokenizer, args, True))
    assert [*found.reasons] == [1, *range(5, 10)]


def test_what_was_made_before_a_kill_is_read(tmp_path, monkeypatch):
    dataset, real, blocks = Dataset.from_list(PAIRS), token_shares.by_trl, list[int]()

    def stops(rows: Dataset, *others: Any) -> Any:
        blocks.append(rows[0][surveys.ROW_POSITION])
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return real(rows, *others)

    monkeypatch.setattr(token_shares, "by_trl", stops)
    with pytest.raises(KeyboardInterrupt):
        shared(dataset, {}, tmp_path)
    found, *_ = shared(dataset, {}, tmp_path)
    assert blocks == [0, 5, 10, 10, 15, 20]
    assert_same(found, alone(dataset, {})[0])
    shared(dataset, {}, tmp_path)
    assert len(blocks) == 6


def test_a_damaged_file_is_named(tmp_path):
    dataset = Dataset.from_list(PAIRS)
    shared(dataset, {}, tmp_path)
    one = next(tmp_path.glob("*/tokens-0001.arrow"))
    one.write_bytes(one.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"tokens-0001.arrow' is missing or damaged. Remove '.*': the rows are prep"):
        shared(dataset, {}, tmp_path)


def test_prepared_rows_lie_beside_the_dataset_and_are_of_these_rows_and_settings(tmp_path):
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "rows")

    def place(output: Path | None = None, **settings: Any) -> Path:
        dataset = load_from_disk(tmp_path / "rows")
        found = sharing_of(dataset, ColumnMapping(), arguments(**settings), False, True, output)
        assert found is not None
        return found.place

    first = place()
    assert first.parent == tmp_path / "rows"
    assert first == place(tmp_path / "out")
    assert first != place(max_length=23)
    file = next((tmp_path / "rows").glob("*.arrow"))
    os.utime(file, ns=(0, 0))  # as after a change
    assert first != place()
    assert not list(first.glob("seen-*"))


def test_rows_in_memory_are_kept_with_the_scores_and_few_rows_not_at_all(tmp_path):
    dataset, options = Dataset.from_list(PAIRS), (ColumnMapping(), arguments(), False, True)
    found = sharing_of(dataset, *options, tmp_path)
    assert found is not None
    assert found.place.parent == tmp_path / "prepared"
    assert sharing_of(dataset, *options, None) is None
    assert sharing_of(dataset.select(range(4)), *options, tmp_path) is None


def test_a_tokenizer_or_a_template_makes_other_tokens(tmp_path):
    args = arguments()
    names = {sharing._name_of_tokens(tokenizer_of(each), args) for each in (TEMPLATE, TEMPLATE, CHAT_TEMPLATE)}
    assert len(names) == 2
    (tmp_path / "template.jinja").write_text("a")
    by_file = dataclasses.replace(args, chat_template_path=str(tmp_path / "template.jinja"))
    one = sharing._name_of_tokens(tokenizer_of(), by_file)
    (tmp_path / "template.jinja").write_text("b")
    assert len({one, sharing._name_of_tokens(tokenizer_of(), by_file), *names}) == 4


def test_shares_do_not_depend_on_processes_and_are_few():
    for rows in (1, 5, 23, 5 * 1024, 5 * 1024 + 1, 123_456):
        shares = shared_rows.shares_of(rows)
        assert len(shares) <= 1024
        assert [each.start for each in shares] == [0, *(each.stop for each in shares[:-1])]
        assert shares[-1].stop == rows
        assert all(each.start % 5 == 0 for each in shares)
        assert [bounds for each in shares for bounds in each.blocks][-1][1] == rows


def test_what_is_kept_says_what_it_is(tmp_path):
    shared(Dataset.from_list(PAIRS), {}, tmp_path)
    summary = json.loads(next(tmp_path.glob("*/summary.json")).read_text())
    assert summary["largest"] == alone(Dataset.from_list(PAIRS), {})[0].largest_token
    assert np.load(next(tmp_path.glob("*/numbers-length.npy"))).dtype == np.int64
