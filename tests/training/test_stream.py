"""The callback on a stream: it changes nothing, measures what it would of a Dataset, and trains on the kept rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset, IterableDataset
from helpers.training import Outcome, assert_same_end, assert_same_weights, llama, rows, train
from transformers import Trainer, TrainerCallback, TrainingArguments

from resofilter_trainer import InputError, ResonanceCallback, ScoreTable, Selection, SoftPruning, TokenCleaning
from resofilter_trainer.training.filtering import FilterConfig
from resofilter_trainer.training.run import STATE
from resofilter_trainer.training.stream_check import check_stream

PASS = 11  # steps of 21 rows in batches of 2


def of(dataset: Dataset) -> IterableDataset:
    return dataset.to_iterable_dataset()


def untyped() -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows(21).to_list()))


def with_ids(shuffled: bool = True, text: bool = False) -> IterableDataset:
    names = [f"row {number * 7}" if text else number * 7 for number in range(21)]
    stream = of(rows(21).add_column("name", names))
    return stream.shuffle(seed=3, buffer_size=8) if shuffled else stream


def with_empty() -> Dataset:
    """Rows of which some have no learnt token: their prompts fill `max_length`."""
    return Dataset.from_list(
        [{**row, "prompt": row["prompt"] * (9 if number % 4 == 1 else 1)} for number, row in enumerate(rows(21))]
    )


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation with a rest": ({}, {"gradient_accumulation_steps": 3, "max_steps": 7}),
    "untyped": ({}, {"dataset": untyped}),
    "worker": ({}, {"dataloader_num_workers": 1}),
    "dropout": ({}, {"dropout": 0.1}),
    "without a learnt token": ({}, {"dataset": lambda: of(with_empty()), "max_length": 24}),
    "shuffled": ({"id_column": "name"}, {"dataset": with_ids}),
    "saved by epoch": ({}, {"gradient_accumulation_steps": 3, "max_steps": 7, "save_strategy": "epoch"}),
    "padding-free": ({}, {"padding_free": True, "max_length": None}),
    "split": ({}, {"accelerator_config": {"split_batches": True}}),
}
SHORT = {"per_device_train_batch_size": 4, "max_steps": 6 + 3 + 2}  # with the third pass begun


def run(output: Path, tokenizer: Any, callback: ResonanceCallback | None, **changes: Any) -> Outcome:
    settings = {"max_steps": 2 * PASS + 3, "dataset": lambda: of(rows(21)), **changes}
    settings["dataset"] = settings["dataset"]()
    if "dropout" in settings:
        settings["model"] = llama(len(tokenizer), attention_dropout=settings.pop("dropout"))
    return train(output, tokenizer, callback, **settings)


def cases(fast: Sequence[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in CASES]


@pytest.mark.parametrize("name", cases(("plain", "accumulation with a rest", "shuffled")))
def test_where_everything_stays_nothing_changes(name, tmp_path, tokenizer):
    settings, changes = CASES[name]
    changes = {"save_strategy": "steps", "save_steps": 4, **changes}
    without = run(tmp_path / "without", tokenizer, None, **changes)
    own = run(tmp_path / "with", tokenizer, ResonanceCallback(keep=1.0, **settings), **changes)
    assert_same_weights(own, without)
    assert own.logs == without.logs
    assert list(own.seen) == list(without.seen)
    states = [
        json.loads((next(iter(sorted(tmp_path.glob(f"{each}/checkpoint-*")))) / "trainer_state.json").read_text())
        for each in ("with", "without")
    ]
    assert states[0]["epoch"] == states[1]["epoch"]


@pytest.mark.parametrize("kind", ["plain", "without a learnt token"])
def test_the_first_pass_measures_what_it_would_of_a_dataset_in_order(kind, tmp_path, tokenizer):
    dataset = rows(21) if kind == "plain" else with_empty()
    length = {} if kind == "plain" else {"max_length": 24}
    own, usual = ResonanceCallback(keep=1.0, eps=1e-4), ResonanceCallback(keep=1.0, eps=1e-4)
    changes = {"train_sampling_strategy": "sequential", "num_train_epochs": 1, **length}
    steps = train(tmp_path / "usual", tokenizer, usual, dataset=dataset, **changes).trainer.state.global_step
    run(tmp_path / "stream", tokenizer, own, dataset=lambda: of(dataset), max_steps=steps, **length)
    assert own.scores.table.equals(usual.scores.table)
    assert own.scores.scored.sum() == (21 if kind == "plain" else 16)


def test_from_the_second_pass_on_exactly_the_kept_rows_are_trained(tmp_path, tokenizer):
    """The run is that of SFTTrainer on a stream of all rows, then the kept ones, and again."""
    callback = ResonanceCallback(keep=[1.0, 0.5, 0.2])
    own = run(tmp_path / "own", tokenizer, callback, dataset=lambda: of(rows(20)), max_steps=10 + 5 + 2 + 2)
    second, third = (callback.selections[number].sample_ids.tolist() for number in (1, 2))
    assert [len(second), len(third)] == [10, 4]
    order = [*range(20), *second, *third, *third]
    plain = run(tmp_path / "plain", tokenizer, None, dataset=lambda: of(rows(20).select(order)), max_steps=19)
    assert_same_weights(own, plain)
    assert list(own.seen) == list(plain.seen)
    plan = json.loads((tmp_path / "own" / STATE / "plan.json").read_text())
    assert [(each["rows"], each["of_rows"], each["steps"]) for each in plan] == [
        (20, 20, 10),
        (10, 20, 5),
        (4, 20, 2),
        (4, 20, 2),
    ]


@pytest.mark.parametrize("name", cases(("accumulation with a rest",)))
def test_the_end_is_the_same_from_every_checkpoint(name, tmp_path, tokenizer):
    settings, changes = CASES[name]
    saved = {} if "save_strategy" in changes else {"save_strategy": "steps", "save_steps": 1}
    changes = {**SHORT, **changes}
    whole = run(tmp_path, tokenizer, ResonanceCallback(keep=0.5, **settings), **{**changes, **saved})
    assert not whole.callback.selections[1].keep.all()
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) >= (whole.trainer.state.global_step if saved else 2)
    for checkpoint in checkpoints:
        again = ResonanceCallback(keep=0.5, **settings)
        resumed = run(tmp_path / "resumed", tokenizer, again, **{**changes, "resume": str(checkpoint)})
        assert_same_end(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dropout", "accumulation with a rest"])
def test_the_end_is_the_same_where_the_trainer_skips_nothing(name, tmp_path, tokenizer):
    changes = {**SHORT, **CASES[name][1], "ignore_data_skip": True}
    whole = run(tmp_path, tokenizer, ResonanceCallback(keep=0.5), save_strategy="steps", save_steps=1, **changes)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        resumed = run(tmp_path / "resumed", tokenizer, ResonanceCallback(keep=0.5), resume=str(checkpoint), **changes)
        assert_same_end(resumed, whole)


@pytest.mark.parametrize("text", [False, True])
def test_rows_with_ids_are_known_in_any_order(text, tmp_path, tokenizer):
    def shuffled():
        return with_ids(text=text)

    callback = ResonanceCallback(keep=0.5, id_column="name")
    own = run(tmp_path, tokenizer, callback, dataset=shuffled, max_steps=PASS + 6)
    first, second = shuffled(), shuffled()
    second.set_epoch(1)
    names = [row["name"] for row in first]
    assert names != [row["name"] for row in second]
    table = pq.read_table(tmp_path / STATE / "rows.parquet")
    assert table["id"].to_pylist() == names
    kept = {names[row] for row in callback.selections[1].sample_ids}
    assert len(kept) == 11
    order = [*first, *(row for row in second if row["name"] in kept)]
    prepared = [{name: row[name] for name in ("prompt", "completion")} for row in order]
    plain = run(tmp_path / "plain", tokenizer, None, dataset=lambda: of(Dataset.from_list(prepared[:20])), max_steps=10)
    assert list(own.seen)[:10] == [(*each[:-1], mine[-1]) for each, mine in zip(plain.seen, own.seen, strict=False)]
    rest = of(Dataset.from_list(prepared[21:]))
    again = run(tmp_path / "rest", tokenizer, None, dataset=lambda: rest, max_steps=6)
    assert [each[:-1] for each in own.seen[PASS:]] == [each[:-1] for each in again.seen]


def test_a_selection_of_the_run_applies_to_the_stream(tmp_path, tokenizer):
    """Also where SFTTrainer has left rows out."""
    callback = ResonanceCallback(keep=0.5)
    run(tmp_path, tokenizer, callback, dataset=lambda: of(with_empty()), max_length=24, max_steps=12)
    scores, selection = (
        ScoreTable.load(tmp_path / STATE),
        Selection.load(tmp_path / STATE / "selection-epoch-2.parquet"),
    )
    empty = [number for number in range(21) if number % 4 == 1]
    assert np.flatnonzero(~scores.scored).tolist() == empty
    kept = list(selection.apply(of(with_empty())))
    assert kept == [with_empty()[int(row)] for row in selection.sample_ids]
    assert len(kept) == 8


def test_rows_are_weighted_on_a_stream(tmp_path, tokenizer):
    callback = ResonanceCallback(selector=SoftPruning(), readmit=True)
    run(tmp_path, tokenizer, callback)
    weight = callback.selections[1].weight
    assert len(set(weight[weight > 0])) == 2


def test_a_run_that_ends_in_its_first_pass_only_scores(tmp_path, tokenizer):
    callback = ResonanceCallback(keep=0.5)
    with pytest.warns(UserWarning, match="max_steps=4 ended in pass 1 .* begin with pass 2: no row was dropped"):
        run(tmp_path, tokenizer, callback, max_steps=4)
    assert callback.scores.scored.tolist() == [True] * 8
    assert [selection.keep.all() for selection in callback.selections] == [True]


class Plain:
    """A collator of a plain Trainer."""

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        import torch

        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "labels": ids.clone()}


def test_a_plain_trainer_whose_batches_accelerate_dispatches(tmp_path):
    numbers = np.random.default_rng(0).integers(2, 30, (12, 6)).tolist()
    dataset = Dataset.from_dict({"input_ids": numbers, "name": list("abcdefghijkl")})
    args = {"per_device_train_batch_size": 3, "max_steps": 9, "use_cpu": True, "report_to": "none", "save_steps": 2}
    models = []
    for callbacks in ([], [ResonanceCallback(keep=1.0, id_column="name")], [ResonanceCallback(keep=0.5)]):
        arguments = TrainingArguments(str(tmp_path), disable_tqdm=True, dataloader_pin_memory=False, **args)
        model = llama(30)
        trainer = Trainer(model, arguments, data_collator=Plain(), train_dataset=of(dataset), callbacks=callbacks)
        trainer.train()
        assert type(trainer.callback_handler.train_dataloader).__name__ == "DataLoaderDispatcher"
        models.append(model.state_dict())
    assert all((models[0][name] == models[1][name]).all() for name in models[0])
    assert callbacks[0].selections[1].keep.sum() == 6


REFUSED = {
    "before": ({"when": "before"}, {}, "when='before', which needs all rows first. Score it first with score_stream"),
    "tokens": ({"token_cleaning": TokenCleaning(0.5)}, {}, "token_cleaning needs all rows before training"),
    "shuffled": ({}, {"dataset": with_ids}, "known by their order. Give each row an id"),
    "shuffled and mapped": ({}, {"dataset": lambda: with_ids().map(dict)}, "known by their order. Give each row an id"),
    "shuffle_dataset": ({}, {"shuffle_dataset": True}, "shuffle_dataset=True, after which"),
    "workers": (
        {},
        {"dataloader_num_workers": 2},
        "above 1, as each worker reads rows of its own. Set it to 1 or 0",
    ),
    "persistent": (
        {},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        "dataloader_persistent_workers=True, which",
    ),
    "no such column": ({"id_column": "uid"}, {"dataset": with_ids}, "no column 'uid', which id_column names. It has:"),
    "the same id twice": ({"id_column": "name"}, {"dataset": lambda: of(doubled())}, "the id 3, which an earlier row"),
    "an id that is none": ({"id_column": "name"}, {"dataset": lambda: of(lists())}, "give each row a number or a text"),
    "a Dataset with ids": ({"id_column": "name"}, {"dataset": lambda: rows(4)}, "id_column is for a stream"),
    "no rows": ({}, {"max_length": 1}, "The stream has no rows to train on|would have no batch"),  # TRL before 1.9
    "no step": (
        {},
        {"gradient_accumulation_steps": 7, "max_steps": 4},
        "11 rows, which fill no step of 7",
    ),
    "packing": ({}, {"packing": True}, "packed rows, of which several are one row of a batch. Set packing=False"),
}


def doubled() -> Dataset:
    return rows(8).add_column("name", [0, 1, 2, 3, 3, 4, 5, 6])


def lists() -> Dataset:
    return rows(8).add_column("name", [[number] for number in range(8)])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(name, tmp_path, tokenizer):
    settings, changes, said = REFUSED[name]
    with pytest.raises(InputError, match=said) as refused:
        run(tmp_path, tokenizer, ResonanceCallback(**settings), **changes)
    assert "\n" not in str(refused.value)


def test_processes_that_read_other_shards_are_refused():
    stream = of(rows(8))
    config = SimpleNamespace(world_size=2, dataloader_num_workers=0)
    trainer, loader = SimpleNamespace(args=config, train_dataset=stream), SimpleNamespace(dataset=stream)
    with pytest.raises(InputError, match="several processes that each read other shards of it"):
        check_stream(trainer, loader, FilterConfig(), None)
    check_stream(trainer, SimpleNamespace(dataset=IterableDatasetShard(stream)), FilterConfig(), None)


def test_scores_of_other_streams_have_another_provenance(tmp_path, tokenizer):
    found = []
    for number, dataset in enumerate((rows(8), rows(8), rows(8).select([1, 0, *range(2, 8)]))):
        callback = ResonanceCallback(keep=1.0)
        run(tmp_path / str(number), tokenizer, callback, dataset=lambda kept=dataset: of(kept), max_steps=4)
        found.append(callback.scores.provenance.dataset)
    assert found[0] == found[1] != found[2]


class Changing(TrainerCallback):
    """Rows that come otherwise from the second pass on."""

    late = False

    def __init__(self, change: str) -> None:
        self.change = change

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Changing.late = state.global_step > 0

    def __call__(self):
        known = rows(21).add_column("name", [*range(21)]).to_list()
        if Changing.late:
            known = {"order": known[::-1], "fewer": known[:-1], "more": [*known, {**known[0], "name": 30}]}[self.change]
        yield from known


@pytest.mark.parametrize(
    ("change", "ids", "said"),
    [
        ("order", False, "Row 0 of the stream is another in pass 2 than when it came first.*Give each row an id"),
        ("fewer", False, "The stream gave 20 rows in pass 2 and 21 in its first"),
        ("fewer", True, "The stream gave 20 rows in pass 2 and 21 in its first"),
        ("more", False, "Row 21 of the stream in pass 2 was not among the 21 rows of its first pass"),
        ("more", True, "Row 21 of the stream in pass 2 was not among the 21 rows of its first pass"),
    ],
)
def test_a_stream_that_changes_is_refused(change, ids, said, tmp_path, tokenizer):
    changing = Changing(change)
    stream = IterableDataset.from_generator(changing)
    callback = ResonanceCallback(keep=0.5, id_column="name" if ids else None)
    with pytest.raises(InputError, match=said):
        run(tmp_path, tokenizer, callback, dataset=lambda: stream, callbacks=[changing], per_device_train_batch_size=6)


class StopsEpoch(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = state.global_step == 3


def test_a_pass_that_another_callback_ends_is_refused(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"Another callback ended pass 1 over the stream early \(should_epoch_stop\)"):
        run(tmp_path, tokenizer, ResonanceCallback(), callbacks=[StopsEpoch()])


def test_the_trainer_is_left_as_it_was_found(tmp_path, tokenizer):
    own = run(tmp_path, tokenizer, ResonanceCallback(keep=0.5))
    loader = own.trainer.callback_handler.train_dataloader.base_dataloader
    assert isinstance(loader.dataset, IterableDataset)
    assert type(loader.collate_fn).__module__.startswith(("transformers", "trl"))
    assert "get_batch_samples" not in vars(own.trainer)


def test_the_ids_of_an_earlier_run_do_not_stay(tmp_path, tokenizer):
    run(tmp_path, tokenizer, ResonanceCallback(keep=0.5, id_column="name"), dataset=with_ids, **SHORT)
    assert (tmp_path / STATE / "rows.parquet").exists()
    run(tmp_path, tokenizer, ResonanceCallback(keep=0.5), **SHORT)
    assert not (tmp_path / STATE / "rows.parquet").exists()
    assert (tmp_path / STATE / "scores.parquet").exists()
