"""Packed rows: measured as unpacked ones, packed anew for fewer rows as SFTTrainer packs these, and resumed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from helpers.sft import plain_scores
from helpers.training import Outcome, arguments, assert_same_end, assert_same_weights, rows, train
from torch.utils.data import SequentialSampler
from trl import SFTTrainer, pack_dataset

from resofilter_trainer import InputError, RandomSelector, ResonanceCallback, SoftPruning, TokenCleaning
from resofilter_trainer.training.packing import PackedRows, Packing, joined
from resofilter_trainer.training.plan_log import PLAN_FILE

EPS = 1e-4
ROWS = rows(41)
STRATEGIES = ["bfd", "bfd_split"]


def packed(output: Path, tokenizer, callback: ResonanceCallback | None, dataset: Dataset = ROWS, **changes) -> Outcome:
    """A run with packed rows."""
    return train(output, tokenizer, callback, dataset=dataset, packing=True, **changes)


def still(output: Path, tokenizer, dataset: Dataset = ROWS, **changes) -> Outcome:
    """One epoch with a learning rate of zero."""
    callback = ResonanceCallback(keep=1.0, eps=EPS, dataset=dataset)
    settings = {"learning_rate": 0.0, "num_train_epochs": 1, **changes}
    with warnings.catch_warnings(action="ignore"):  # with a random model, all scores are saturated
        return train(output, tokenizer, callback, dataset=dataset, **settings)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 3, "max_grad_norm": 0.01},
        {"pad_to_multiple_of": 16},
        {"shuffle_dataset": True, "dataloader_num_workers": 1},
        {"activation_checkpointing": True},
    ],
    ids=["plain", "accumulation", "padded", "shuffled, workers", "checkpointing"],
)
def test_scores_are_those_of_the_same_rows_unpacked(strategy, changes, tmp_path, tokenizer):
    mine = still(tmp_path, tokenizer, packing=True, packing_strategy=strategy, **changes)
    assert max(map(len, mine.trainer.train_dataset["seq_lengths"])) > 2
    other = still(tmp_path, tokenizer)
    assert_same_scores(mine, other)


def assert_same_scores(mine: Outcome, other: Outcome) -> None:
    found, truth = mine.callback.scores, other.callback.scores
    rows = truth.scored
    assert np.array_equal(found.scored, rows)
    for name in ("num_tokens", "length"):
        assert np.array_equal(found.column(name)[rows], truth.column(name)[rows])
    measured, expected = found.column("measured")[rows], truth.column("measured")[rows]
    assert np.abs(measured - expected).max() < 1e-5 * np.ptp(expected)
    assert np.allclose(found.column("loss")[rows], truth.column("loss")[rows], rtol=1e-5)


def test_rows_cut_at_max_length_are_scored_as_without_packing(tmp_path, tokenizer):
    """Some have no learnt token left, and one has no token at all."""
    tokens = [tokenizer(f"the quick {'fox ' * (number * 5 % 13)}").input_ids for number in range(30)]
    labels = [[-100] * len(own[:8]) + own[8:] if number % 2 else own for number, own in enumerate(tokens)]
    dataset = Dataset.from_dict({"input_ids": [*tokens[:7], [], *tokens[7:]], "labels": [*labels[:7], [], *labels[7:]]})
    mine, other = (still(tmp_path, tokenizer, dataset, max_length=8, packing=each) for each in (True, False))
    assert not mine.callback.scores.scored.all()
    assert 7 not in np.flatnonzero(mine.callback.scores.scored)
    assert_same_scores(mine, other)
    assert mine.callback.scores.reasons[7] == "no token to learn within max_length 8"


def test_a_row_cut_in_pieces_has_the_mean_over_its_learnt_tokens(tmp_path, tokenizer):
    """By the plain formula: autograd's gradient of each piece's own loss, and of every token's loss."""
    mine = still(tmp_path, tokenizer, packing=True, packing_strategy="bfd_split", max_length=9)
    scores, model = mine.callback.scores, mine.trainer.model.eval()
    whole = train(tmp_path, tokenizer, dataset=ROWS, max_length=None, max_steps=1).trainer.train_dataset
    assert scores.scored.all()
    for row, example in enumerate(whole.with_format("torch")):
        ids, labels = example["input_ids"], example["labels"]
        pieces = [(ids[start : start + 9], labels[start : start + 9]) for start in range(0, len(ids), 9)]
        learnt = [int((own[1:] != -100).sum()) for _, own in pieces]
        batches = [{"input_ids": a[None], "labels": b[None]} for (a, b), n in zip(pieces, learnt, strict=True) if n]
        counts = np.array([number for number in learnt if number])
        losses = [float(model(**batch).loss.detach()) for batch in batches]
        found = plain_scores(model, batches, lambda model, batch: model(**batch).loss)
        assert len(pieces) > 1
        assert scores.column("num_tokens")[row] == counts.sum()
        assert scores.column("length")[row] == len(ids)
        assert np.isclose(scores.column("measured")[row], (found * counts).sum() / counts.sum(), rtol=1e-5)
        assert np.isclose(scores.column("loss")[row], (losses * counts).sum() / counts.sum(), rtol=1e-5)


def test_a_warmed_up_copy_scores_rows_as_without_packing(tmp_path, tokenizer):
    callbacks = [ResonanceCallback(keep=0.5, when="before", warmup=16, eps=EPS, dataset=ROWS) for _ in range(2)]
    for callback, packing in zip(callbacks, (True, False), strict=True):
        train(tmp_path, tokenizer, callback, dataset=ROWS, packing=packing, num_train_epochs=1)
    mine, other = (callback.scores.column("score") for callback in callbacks)
    assert np.abs(mine - other).max() < 1e-5 * np.ptp(other)
    assert np.array_equal(*(callback.selections[0].keep for callback in callbacks))


EVERYTHING_STAYS = {
    "plain": {},
    "split": {"packing_strategy": "bfd_split", "max_length": 9},
    "ragged accumulation, cosine": {"gradient_accumulation_steps": 4, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "persistent workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "shuffled": {"shuffle_dataset": True, "num_train_epochs": 1.7},
    "max_steps": {"max_steps": 17},
    "drop_last": {"dataloader_drop_last": True},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "split")) for name in EVERYTHING_STAYS]
)
def test_where_everything_stays_nothing_changes(name, tmp_path, tokenizer):
    callback = ResonanceCallback(keep=1.0, dataset=ROWS)
    mine, other = (packed(tmp_path, tokenizer, each, **EVERYTHING_STAYS[name]) for each in (callback, None))
    assert_same_weights(mine, other)
    assert mine.logs == other.logs
    assert list(mine.seen) == list(other.seen)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_epochs_on_fewer_rows_are_sfttrainers_on_these_rows_alone(
    strategy, accumulation, tmp_path, tokenizer, monkeypatch
):
    """Packs, steps, learning rates and weights; in the order of the packs, as a random one depends on their number."""
    monkeypatch.setattr(SFTTrainer, "_get_train_sampler", lambda self, *_: SequentialSampler(self.train_dataset))
    changes = {
        "packing_strategy": strategy,
        "max_length": 40 if strategy == "bfd" else 14,
        "shuffle_dataset": True,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "cosine",
    }
    callback = ResonanceCallback(keep=0.6, when="before", dataset=ROWS)
    mine = packed(tmp_path, tokenizer, callback, **changes)
    kept = np.flatnonzero(callback.selections[0].keep)
    assert len(kept) == 25
    other = packed(tmp_path, tokenizer, None, ROWS.select(kept), **changes)
    assert mine.trainer.state.global_step == other.trainer.state.global_step
    assert list(mine.seen) == list(other.seen)
    assert_same_weights(mine, other)


def test_steps_and_learning_rate_follow_the_number_of_packs(tmp_path, tokenizer):
    callback = ResonanceCallback(keep=[1.0, 0.5, 0.2], dataset=ROWS)
    outcome = packed(tmp_path, tokenizer, callback)
    kept = [ROWS.select(selection.sample_ids) for selection in callback.selections]
    packs = [len(packed(tmp_path / "alone", tokenizer, None, own, max_steps=1).trainer.train_dataset) for own in kept]
    assert packs[0] > packs[1] > packs[2]
    plan = json.loads((tmp_path / "resofilter" / PLAN_FILE).read_text())
    assert [entry["packs"] for entry in plan] == packs
    assert {entry["of_packs"] for entry in plan} == {packs[0]}
    steps = [-(-number // 2) for number in packs]
    assert [entry["steps"] for entry in plan] == steps
    assert outcome.trainer.state.global_step == outcome.trainer.state.max_steps == sum(steps)
    rates = [step[-1] for step in outcome.seen]
    assert rates[-1] == 0
    assert sorted(rates, reverse=True) == rates
    assert outcome.trainer.state.epoch == 3


RESUMED = {
    "bfd": ({"keep": 0.5}, {"per_device_train_batch_size": 4}),
    "split, accumulation": (
        {"keep": [1.0, 0.7, 0.3]},
        {"packing_strategy": "bfd_split", "max_length": 18, "gradient_accumulation_steps": 5},
    ),
    "readmitted, shuffled": (
        {"keep": [1.0, 0.3, 0.8], "readmit": True},
        {"shuffle_dataset": True, "gradient_accumulation_steps": 2},
    ),
    "policy": ({"selector": RandomSelector(0.6)}, {"max_length": 40, "lr_scheduler_type": "cosine"}),
    "max_steps": ({"keep": 0.5}, {"max_steps": 13, "dataloader_drop_last": True}),
    "weights": (
        {"selector": SoftPruning(), "readmit": True},
        {"packing_strategy": "bfd_split", "max_length": 20, "gradient_accumulation_steps": 2},
    ),
    "before": ({"keep": 0.5, "when": "before"}, {"packing_strategy": "bfd_split", "max_length": 20}),
    "two epochs and a part": ({"keep": 0.5}, {"num_train_epochs": 2.4, "dataloader_num_workers": 1}),
}
FAST = ("bfd",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RESUMED]
)
def test_the_end_is_the_same_from_every_checkpoint(name, tmp_path, tokenizer):
    settings, changes = RESUMED[name]

    def run(output: Path, **more) -> Outcome:
        callback = ResonanceCallback(**settings, dataset=ROWS)
        return packed(output, tokenizer, callback, **{**changes, **more})

    whole = run(tmp_path, save_strategy="steps", save_steps=1)
    assert not all(selection.keep.all() for selection in whole.callback.selections)
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == whole.trainer.state.global_step
    for checkpoint in checkpoints:
        assert_same_end(run(tmp_path / "resumed", resume=str(checkpoint)), whole)


@pytest.mark.parametrize(
    ("changes", "settings", "said"),
    [
        ({}, {}, r"callbacks=\[ResonanceCallback\(dataset=dataset\)\]"),
        ({}, {"dataset": ROWS.select(range(40))}, "Pass the dataset that SFTTrainer gets as its train_dataset"),
        ({}, {"dataset": ROWS.select(range(40, -1, -1))}, "not those of"),
        ({}, {"dataset": Dataset.from_list([{"other": 1}])}, "cannot prepare the callback's dataset"),
        ({"packing_strategy": "wrapped"}, {"dataset": ROWS}, "Use packing_strategy='bfd' or 'bfd_split'"),
        ({"train_sampling_strategy": "group_by_length"}, {"dataset": ROWS}, "group_by_length.*Leave the strategy out"),
        ({}, {"dataset": ROWS, "token_cleaning": TokenCleaning(0.5, parts=2)}, "token_cleaning.*Set packing=False"),
        ({}, {"dataset": ROWS, "update": "optimizer"}, "update='optimizer' sees one change for a whole step"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(changes, settings, said, tmp_path, tokenizer):
    callback = ResonanceCallback(**settings)
    with pytest.raises(InputError, match=said) as refused:
        packed(tmp_path, tokenizer, callback, per_device_train_batch_size=1, **changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("given", ["gsm8k", [{"text": "a"}], ROWS.to_iterable_dataset()])
def test_the_callbacks_dataset_is_checked_when_it_is_made(given):
    with pytest.raises(InputError, match=r"dataset must be a Dataset, the trainer's train_dataset, got"):
        ResonanceCallback(dataset=given)


def test_rows_packed_beforehand_are_refused(tmp_path, tokenizer):
    tokens = train(tmp_path, tokenizer, dataset=ROWS, max_steps=1).trainer.train_dataset
    dataset = pack_dataset(tokens.select_columns(["input_ids", "labels"]), 64)
    for extra in ({}, {"dataset": dataset}):
        with pytest.raises(InputError, match=r"packed already.*unpack.*packing=True and .*dataset=dataset"):
            train(tmp_path, tokenizer, ResonanceCallback(**extra), dataset=dataset)
    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(InputError, match=r"skip_prepare_dataset, which packs nothing\. Leave one of them out"):
        packed(tmp_path, tokenizer, ResonanceCallback(dataset=dataset), dataset, **prepared)


def test_packs_that_another_has_changed_are_refused(tmp_path, tokenizer):
    callback = ResonanceCallback(dataset=ROWS)
    trainer = packed(tmp_path, tokenizer, None, max_steps=1).trainer
    trainer.train_dataset = trainer.train_dataset.select(range(1, len(trainer.train_dataset)))
    trainer.add_callback(callback)
    with pytest.raises(InputError, match=r"leave trainer.train_dataset as it is"):
        trainer.train()


def test_unsloths_own_packing_is_refused(tmp_path, tokenizer):
    trainer = packed(tmp_path, tokenizer, None, max_steps=1).trainer
    trainer.__class__ = type("UnslothSFTTrainer", (type("_UnslothSFTTrainer", (SFTTrainer,), {}),), {})
    trainer.add_callback(ResonanceCallback(dataset=ROWS))
    with pytest.raises(InputError, match=r"packing=True with unsloth, .*Set packing=False"):
        trainer.train()


def test_a_model_in_which_rows_of_a_pack_see_each_other_is_refused(tmp_path, tokenizer):
    from helpers.families import tiny

    with pytest.raises(
        InputError, match=r"With packing=True, .*see each other.*Set packing=False.*attn_implementation"
    ):
        packed(tmp_path, tokenizer, ResonanceCallback(dataset=ROWS), model=tiny("opt", vocab_size=len(tokenizer)))


def test_a_checkpoint_of_other_packs_is_refused(tmp_path, tokenizer, monkeypatch):
    packed(tmp_path, tokenizer, ResonanceCallback(dataset=ROWS), save_strategy="epoch", num_train_epochs=2)
    checkpoint = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[0]
    monkeypatch.setattr(Packing, "repack", lambda self, kept: setattr(self, "packs", self.packs[::-1]))
    with pytest.raises(InputError, match="packed in another way than when the checkpoint was made"):
        packed(tmp_path, tokenizer, ResonanceCallback(dataset=ROWS), num_train_epochs=2, resume=str(checkpoint))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_thousands_of_rows_are_packed_as_trl_packs_them(strategy, shuffled, tmp_path):
    """Which packs a thousand rows at a time, so a row without tokens counts, too."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(0, 99, number).tolist() for number in draw.integers(0, 14, 2300)]
    whole = Dataset.from_dict({"input_ids": ids, "labels": ids})
    args = arguments(tmp_path, packing=True, packing_strategy=strategy, max_length=10, shuffle_dataset=shuffled)
    found, kept = Packing(whole, args), draw.random(sum(map(bool, ids))) < 0.6

    def expected(rows: Dataset) -> Dataset:
        made = pack_dataset(rows.shuffle(seed=args.seed) if shuffled else rows, 10, strategy)
        return made.shuffle(seed=args.seed) if shuffled else made

    found.check(expected(whole))
    found.repack(kept)
    theirs = expected(whole.select(found.rows[kept]))
    examples = PackedRows(found.pieces, found.total).__getitems__(found.packs)
    assert [joined(pack) for pack in examples] == theirs.to_list()
    assert all(kept[found.row_of[piece]] for pack in found.packs for piece in pack)


def test_there_are_never_more_packs_than_of_all_rows(tmp_path, monkeypatch):
    """Best-fit packing of fewer rows may need more: then the packs stay, without the other rows."""
    samples = Dataset.from_dict({"input_ids": [[1, 2], [3], [4], [5, 6, 7]], "labels": [[1, 2], [3], [4], [5, 6, 7]]})
    found = Packing(samples, arguments(tmp_path, packing=True, max_length=4))
    assert sorted(map(sorted, found.packs)) == [[0, 1], [2, 3]] or sorted(map(sorted, found.packs)) == [[0, 2], [1, 3]]
    first = found.packs
    monkeypatch.setattr(Packing, "_packed", lambda self, rows: [(int(row),) for row in rows])
    found.repack(np.array([True, True, True, False]))
    assert found.packs == [tuple(row for row in pack if row != 3) for pack in first]
    found.repack(np.array([True, False, False, False]))
    assert found.packs == [(0,)]


@pytest.mark.slow
def test_the_report_shows_the_rows(tmp_path, tokenizer):
    packed(tmp_path, tokenizer, ResonanceCallback(dataset=ROWS, report=True))
    assert "question: what is" in (tmp_path / "resofilter" / "report.html").read_text()
