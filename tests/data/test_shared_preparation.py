"""Rows that processes prepare together and keep are those that one process prepares alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets, load_from_disk
from helpers.shared_preparation import (
    MAPPING,
    PAIRS,
    alone,
    arguments,
    assert_same,
    chat,
    in_small_blocks,
    shared,
    sometimes_null,
    tokenizer_of,
)

from resofilter_trainer import InputError
from resofilter_trainer.config import ColumnMapping
from resofilter_trainer.data import shared_rows, surveys, token_shares
from resofilter_trainer.data.fingerprints import hash_tokenizer
from resofilter_trainer.data.preparation import prepare
from resofilter_trainer.data.sharing import Sharing
from resofilter_trainer.data.usable import usable_rows
from resofilter_trainer.io.digest import hash_rows


def messages() -> list[dict[str, Any]]:
    made = [{"messages": chat(row["prompt"], row["completion"]), "meta": {"n": [i]}} for i, row in enumerate(PAIRS)]
    made[6]["messages"] += [{"role": "odd", "content": "z"}]  # which the template leaves out
    made[7]["messages"] = chat("q", "a", content=None)
    made[20]["messages"] = []
    return made


def tokens() -> list[dict[str, Any]]:
    made = [{"input_ids": [5, 6, 7, 8][: i % 4 + 1], "labels": [-100, 6, 7, 8][: i % 4 + 1]} for i in range(23)]
    return [*made, {"input_ids": [5, 6], "labels": [5]}, {"input_ids": [5, -6], "labels": [5, 6]}, made[2]]


def histories() -> list[dict[str, Any]]:
    """A system's message in one block of rows only, so that rows are rewritten in all."""
    made = [{"prompt": chat(row["prompt"]), "completion": chat("", row["completion"])[1:]} for row in PAIRS]
    return [{**row, "system": "be" if i == 12 else None} for i, row in enumerate(made)]


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
    in_small_blocks(monkeypatch)


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


@pytest.mark.parametrize("mapped", [1, 2**28])
def test_files_indices_slices_and_formats_make_no_difference(mapped, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_rows, "MAPPED", mapped)
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "rows", num_shards=3)
    dataset = load_from_disk(tmp_path / "rows")
    few = dataset.filter(lambda row: len(row["prompt"]) < 99)
    others = [dataset.shuffle(seed=1), dataset.select(range(4, 19)), few]
    others.append(concatenate_datasets([dataset, dataset.select([3, 1])]).with_format("numpy"))
    for number, each in enumerate(others):
        check(each, {}, tmp_path / str(number))


def test_a_stretch_maps_its_own_files(tmp_path, monkeypatch):
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "rows", num_shards=4)  # of 6, 6, 6 and 5 rows
    dataset = load_from_disk(tmp_path / "rows")
    monkeypatch.setattr(shared_rows, "MAPPED", 1)
    remapped = shared_rows.Remapped(dataset)
    for start, files in ((10, 2), (0, 1), (20, 1), (5, 2)):
        assert remapped.rows(start, min(start + 5, 23)).to_list() == PAIRS[start : start + 5]
        assert len(remapped._now.cache_files) == files


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


@pytest.mark.parametrize("name", ["tokens-0001.arrow", "numbers-prompt.npy"])
def test_a_damaged_file_is_named(name, tmp_path):
    dataset = Dataset.from_list(PAIRS)
    shared(dataset, {}, tmp_path)
    one = next(tmp_path.glob(f"*/{name}"))
    one.write_bytes(one.read_bytes()[:-9])
    for _ in range(2):
        with pytest.raises(InputError, match=rf"{name}' is missing or damaged. Remove '.*': the rows are prep"):
            shared(dataset, {}, tmp_path)
        one.unlink(missing_ok=True)


def test_the_tokenizer_stays_as_it_was(tmp_path):
    tokenizer = tokenizer_of()
    tokenizer.pad_token = None  # which TRL sets
    before = hash_tokenizer(tokenizer)
    how = Sharing(Dataset.from_list(PAIRS), ColumnMapping(), arguments(eos_token="<|end|>"), False, True, tmp_path)
    for _ in range(2):  # made, and read
        how.prepared(how.rows(), tokenizer)
        assert hash_tokenizer(tokenizer) == before
        assert tokenizer.pad_token is None
    assert len(list(tmp_path.glob("*/summary.json"))) == 1


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
