"""Where prepared rows are kept, by which name they are found again, and what stays apart and as it was."""

from __future__ import annotations

import dataclasses
import os
import random
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers.shared_preparation import (
    PAIRS,
    TEMPLATE,
    alone,
    arguments,
    assert_same,
    in_small_blocks,
    shared,
    sometimes_null,
    tokenizer_of,
)
from helpers.tokenizers import CHAT_TEMPLATE
from transformers import AutoTokenizer

from resofilter_trainer import InputError
from resofilter_trainer.config import ColumnMapping
from resofilter_trainer.data import shared_rows, sharing, together
from resofilter_trainer.data.sharing import sharing_of
from resofilter_trainer.io.files import replacing


class Stateless:
    """Its text has its place in memory."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    in_small_blocks(monkeypatch)


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
    assert found.place.parent == tmp_path / sharing.PREPARED
    assert sharing_of(dataset, *options, None) is None
    assert sharing_of(dataset.select(range(4)), *options, tmp_path) is None


@pytest.mark.parametrize("in_files", [False, True])
def test_rows_in_memory_with_the_fingerprint_of_others_are_read_again(in_files, tmp_path):
    """As `map` makes them with a function that reads something which has changed."""

    prompts = Dataset.from_list(PAIRS).remove_columns("completion")
    if in_files:
        prompts.save_to_disk(tmp_path / "prompts")
        prompts = load_from_disk(tmp_path / "prompts")
    for answer in ("4", "5", "5"):
        answers = [answer] * len(PAIRS)
        found, *_ = shared(prompts.add_column("completion", answers, new_fingerprint="same"), {}, tmp_path / "place")
        expected = Dataset.from_dict({"prompt": prompts["prompt"][:], "completion": answers})
        assert_same(found, alone(expected, {})[0])


def test_two_runs_over_rows_with_the_same_fingerprint_have_their_own_tokens(tmp_path):
    """In memory, so that neither run's rows are in a file that tells them apart."""
    runs = []
    for answer in ("4", "5"):
        rows = Dataset.from_dict({"prompt": ["what ? "] * 12, "completion": [answer] * 12})
        dataset = Dataset(rows.data, info=rows.info, fingerprint="same")
        how = sharing.Sharing(dataset, ColumnMapping(), arguments(), False, True, tmp_path)
        runs.append((how, how.rows(), alone(rows, {})[0]))
    for how, rows, expected in runs:  # both have read their rows before either makes tokens
        assert_same(how.prepared(rows, tokenizer_of()), expected)


def test_another_order_of_rows_has_another_name(tmp_path):
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "rows")
    dataset, options = load_from_disk(tmp_path / "rows"), (ColumnMapping(), arguments(), False, True)
    orders = [dataset.select(rows, new_fingerprint="same") for rows in ([*range(12), 7], [*range(12), 8])]
    assert len({sharing._name_of_rows(each, *options) for each in [*orders, orders[0]]}) == 2


def test_random_numbers_begin_with_the_seed_as_they_do_alone(tmp_path):
    dataset, found = Dataset.from_list(PAIRS), []
    for prepare_rows in (partial(alone, dataset, {}), *[partial(shared, dataset, {}, tmp_path)] * 2):
        torch.rand(3), random.random(), np.random.rand()
        prepare_rows(seed=5)
        found.append([torch.rand(1).item(), random.random(), float(np.random.rand())])
    assert found[0] == found[1] == found[2]


def test_two_runs_over_the_same_rows_do_not_meet(tmp_path, monkeypatch):
    dataset, real, runs = Dataset.from_list(PAIRS), shared_rows._repeated, list[int]()
    for name in ("queries-killed-0000.npy", "queries-new-0000.npy"):
        (tmp_path / name).touch()
    os.utime(tmp_path / "queries-killed-0000.npy", (0, 0))

    def meanwhile(*args: Any) -> Any:
        runs.append(len(runs))
        if len(runs) == 1:
            shared(dataset, {}, tmp_path, repeated=True)
        return real(*args)

    monkeypatch.setattr(shared_rows, "_repeated", meanwhile)
    found, *_ = shared(dataset, {}, tmp_path, repeated=True)
    assert_same(found, alone(dataset, {}, repeated=True)[0])
    assert [path.name for path in tmp_path.glob("queries-*")] == ["queries-new-0000.npy"]
    refused = Dataset.from_list(sometimes_null())
    with pytest.raises(InputError):
        shared(refused, {}, tmp_path / "other", repeated=True, drop=False)
    assert not list(tmp_path.glob("other/queries-*"))


def test_what_a_killed_process_left_of_a_share_is_removed(tmp_path):
    dataset = Dataset.from_list(PAIRS)
    shared(dataset, {}, tmp_path)
    folder = next(tmp_path.glob("*/summary.json")).parent
    for name in ("summary.json", "known-0001.parquet"):
        (folder / name).unlink()
    old, new = (folder / f".tokens-0001.arrow.{number}.ab.part" for number in (12, 13))
    old.touch(), new.touch()
    os.utime(old, (0, 0))
    shared(dataset, {}, tmp_path)
    assert [*folder.glob(".*.part")] == [new]  # which another run may be writing


def test_processes_hear_of_every_error_of_the_main_one(monkeypatch):
    """The others wait for what it sends."""
    state, sent = SimpleNamespace(is_main_process=True, num_processes=2), list[Any]()

    def broadcast(values: list[Any]) -> list[Any]:
        sent.extend(values)
        return values

    monkeypatch.setattr(together, "PartialState", lambda: state)
    monkeypatch.setattr(together, "broadcast_object_list", broadcast)
    with pytest.raises(InputError, match="KeyError: 'x'") as raised:
        together.from_main(lambda: {}["x"])
    assert isinstance(raised.value.__cause__, KeyError)
    assert sent == [None, "KeyError: 'x'"]
    state.num_processes = 1
    with pytest.raises(KeyError):
        together.from_main(lambda: {}["x"])


def test_equal_numbers_of_processes_on_two_machines_write_apart(tmp_path):
    with replacing(tmp_path / "a") as one:
        one.write_text("one")
        with replacing(tmp_path / "a") as two:
            two.write_text("two")
    assert one != two
    assert (tmp_path / "a").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_is_removed_from_an_output_folder_is_our_own(tmp_path):
    others = [tmp_path / "prepared" / "rows.txt", tmp_path / sharing.PREPARED / "mine.txt"]
    for own in others:
        own.parent.mkdir()
        own.touch()
    sharing_of(Dataset.from_list(PAIRS), ColumnMapping(), arguments(), False, True, tmp_path)
    assert len(list((tmp_path / sharing.PREPARED).iterdir())) == 2
    sharing.remove_prepared(tmp_path)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == sorted(others)
    assert [*(tmp_path / sharing.PREPARED).iterdir()] == [others[1]]
    others[1].unlink()
    sharing.remove_prepared(tmp_path)
    assert not (tmp_path / sharing.PREPARED).exists()


def test_a_tokenizer_or_a_template_makes_other_tokens(tmp_path):
    args = arguments()
    names = {sharing._name_of_tokens(tokenizer_of(each), args) for each in (TEMPLATE, TEMPLATE, CHAT_TEMPLATE)}
    assert len(names) == 2
    (tmp_path / "template.jinja").write_text("a")
    by_file = dataclasses.replace(args, chat_template_path=str(tmp_path / "template.jinja"))
    one = sharing._name_of_tokens(tokenizer_of(), by_file)
    (tmp_path / "template.jinja").write_text("b")
    assert len({one, sharing._name_of_tokens(tokenizer_of(), by_file), *names}) == 4


def test_the_template_of_another_tokenizer_is_looked_at_wherever_it_is(tmp_path, monkeypatch):
    def names(path: str) -> set[str]:
        args = dataclasses.replace(arguments(), chat_template_path=path)
        found = set()
        for template in (TEMPLATE, CHAT_TEMPLATE, CHAT_TEMPLATE):
            tokenizer_of(template).save_pretrained(tmp_path / "other")
            found.add(sharing._name_of_tokens(tokenizer_of(), args))
        return found

    assert len(names(str(tmp_path / "other"))) == 2
    (tmp_path / "other" / "model.safetensors").write_text("weights, which are not read")
    assert len(names(str(tmp_path / "other"))) == 2
    real = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        sharing.AutoTokenizer, "from_pretrained", lambda name: real({"me/other": tmp_path / "other"}[name])
    )
    assert len(names("me/other")) == 2
    assert len(names("me/missing")) == 1  # which the preparation refuses


def test_settings_that_no_token_depends_on_are_not_in_the_name(tmp_path):
    dataset = Dataset.from_list(PAIRS)
    other = {
        "activation_offloading": True, "dataset_num_proc": 2, "model_init_kwargs": {"dtype": object()}, "packing": True,
        "packing_strategy": "wrapped", "pad_to_multiple_of": 8, "padding_free": True, "router_aux_loss_coef": 0.5,
        "shuffle_dataset": True,
    }  # fmt: skip
    assert {*other} == sharing.IGNORED

    def name(**settings: Any) -> str:
        return sharing._name_of_rows(dataset, ColumnMapping(), arguments(**settings), False, True)

    assert {name(**{setting: value}) for setting, value in other.items()} == {name()}
    assert name(max_length=23) != name()
    own = [name(dataset_kwargs={"a": Fraction(1, part)}) for part in (2, 2, 3)]
    assert own[0] == own[1] != own[2]
    assert name(dataset_kwargs={"a": Stateless()}) == name(dataset_kwargs={"a": Stateless()})
    prepared, *_ = shared(dataset, {}, tmp_path, **{**other, "dataset_num_proc": None})
    assert_same(prepared, alone(dataset, {})[0])
