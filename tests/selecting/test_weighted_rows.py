"""Kept rows have their weights as a column, and a training on them knows of it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings

import numpy as np
import pytest
import torch
from datasets import (
    Dataset,
    concatenate_datasets,
    interleave_datasets,
    load_from_disk,
)
from helpers.applied import DATASET_ROWS, reread, scores_of, select
from helpers.scoring import arguments as scoring_arguments
from helpers.training import arguments, llama, rows
from helpers.versions import skip_without
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import SFTTrainer

from resofilter_trainer import (
    InputError,
    ResonanceCallback,
    SampleWeights,
    Selection,
    SoftPruning,
    score_dataset,
)
from resofilter_trainer.selecting.kept_dataset import DATASET, save_kept
from resofilter_trainer.selecting.selection import WEIGHT


def soft(dataset: Dataset) -> Selection:
    """Six of the rows count twice."""
    keep = np.arange(len(dataset)) % 4 > 0
    weight = np.where(keep, 1.0 + (np.arange(len(dataset)) % 2), 0.0)
    provenance = scores_of(dataset).provenance.to_json()
    return Selection(keep, ["kept" if each else "drawn" for each in keep], {}, provenance, weight)


def sft(tmp_path, tokenizer, dataset, *callbacks, **changes) -> SFTTrainer:
    args = arguments(tmp_path, num_train_epochs=1, max_steps=2, **changes)
    model = llama(len(tokenizer))
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, callbacks=[*callbacks])


NEEDS = r"without their weights is biased.*SampleWeights\.of\(selection\)"


@pytest.mark.parametrize(
    "derive",
    [
        lambda rows: rows,
        lambda rows: rows.shuffle(seed=1),
        lambda rows: rows.map(lambda row: {"completion": row["completion"] + " so"}),
        lambda rows: rows.train_test_split(0.2, seed=1)["train"],
        lambda rows: rows.add_column("id", list(range(len(rows)))).remove_columns("id").with_format("python"),
        copy.copy,
        lambda rows: pickle.loads(pickle.dumps(rows)),
    ],
)
def test_a_training_without_the_weights_warns_once(derive, tmp_path, tokenizer):
    kept = derive(soft(rows(16)).apply(rows(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = sft(tmp_path, tokenizer, kept)
    with pytest.warns(UserWarning, match=NEEDS) as told:
        trainer.train()
    assert len([each for each in told if "SampleWeights" in str(each.message)]) == 1


def test_a_plain_trainer_warns_too(tmp_path, tokenizer):
    dataset = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]} for _ in range(16)])
    trainer = Trainer(llama(len(tokenizer)), arguments_of_trainer(tmp_path), train_dataset=soft(dataset).apply(dataset))
    with pytest.warns(UserWarning, match=NEEDS):
        trainer.train()


def arguments_of_trainer(tmp_path):
    from transformers import TrainingArguments

    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1, dataloader_pin_memory=False)


@pytest.mark.parametrize("order", ["as in the readme", "before", "added later", "by hand"])
def test_a_training_with_the_weights_does_not_warn(order, tmp_path, tokenizer):
    dataset = rows(16)
    selection = soft(dataset)
    if order == "as in the readme":
        trainer = sft(tmp_path, tokenizer, selection.apply(dataset), SampleWeights.of(selection))
    elif order == "before":
        weights = SampleWeights.of(selection)
        trainer = sft(tmp_path, tokenizer, selection.apply(dataset), weights)
    elif order == "added later":
        kept = selection.apply(dataset)
        assert kept[0] == {**dataset[1], WEIGHT: 2.0}
        assert kept.to_list() == list(kept)
        trainer = sft(tmp_path, tokenizer, kept)
        trainer.add_callback(SampleWeights.of(selection))
    else:
        trainer = sft(tmp_path, tokenizer, selection.apply(dataset), SampleWeights(selection.kept_weights()))
    trainer.train()  # a warning is an error


def test_weights_taken_for_one_training_are_not_taken_for_another(tmp_path, tokenizer):
    dataset = rows(16)
    selection = soft(dataset)
    kept = selection.apply(dataset)
    sft(tmp_path, tokenizer, kept, SampleWeights.of(selection)).train()
    with pytest.warns(UserWarning, match=NEEDS):
        sft(tmp_path, tokenizer, kept).train()


def half(dataset: Dataset) -> Dataset:
    return soft(dataset).apply(dataset)


@pytest.mark.parametrize(
    ("derive", "changes"),
    [
        (lambda kept: kept, {}),
        (lambda kept: kept.shuffle(seed=1), {}),
        (lambda kept: kept.select(np.argsort(kept["completion"][:])), {}),
        (lambda kept: kept.filter(lambda row: "1" in row["prompt"]), {}),
        (lambda kept: kept.train_test_split(0.3, seed=1)["train"], {}),
        (lambda kept: concatenate_datasets([half(rows(24).select(range(16, 24))), kept]), {}),
        (lambda kept: interleave_datasets([kept, half(rows(24).select(range(12, 24)))]), {}),
        (lambda kept: kept.select([5, 5, 0, 3]), {}),
        (lambda kept: kept.rename_column("completion", "c").map(lambda row: {"completion": row["c"]}), {}),
        (reread, {}),
        (lambda kept: kept.shuffle(seed=1), {"shuffle_dataset": True}),
        (lambda kept: kept.select(np.argsort(kept["completion"][:])), {"max_length": 18}),
        (lambda kept: kept.shuffle(seed=1), {"remove_unused_columns": False}),
    ],
)
def test_each_row_has_its_own_weight_wherever_it_goes(derive, changes, tmp_path, tokenizer):
    dataset = rows(16)
    selection = soft(dataset)
    of = {row["prompt"]: row[WEIGHT] for start in (16, 12) for row in half(rows(24).select(range(start, 24)))}
    of |= {row["prompt"]: row[WEIGHT] for row in half(dataset)}
    derived = derive(selection.apply(dataset))
    plain = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in derived])
    by_hand = SampleWeights([of[prompt] for prompt in plain["prompt"]])
    found, expected = (
        sft(tmp_path, tokenizer, each, weights, **changes)
        for each, weights in ((derived, SampleWeights.of(selection)), (plain, by_hand))
    )
    for trainer in (found, expected):
        trainer.train()
    for one, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_weights_without_the_column_that_says_whose_they_are_are_refused(tmp_path, tokenizer):
    skip_without("log_probs")
    dataset = rows(16)
    selection = soft(dataset)
    kept = selection.apply(dataset).remove_columns(WEIGHT)
    with pytest.raises(InputError, match=r"no column 'resofilter_weight'.*SampleWeights\(selection\.kept_weights"):
        sft(tmp_path, tokenizer, kept.shuffle(seed=1), SampleWeights.of(selection)).train()
    sft(tmp_path, tokenizer, kept, SampleWeights(selection.kept_weights())).train()


def test_weights_by_position_must_be_those_of_the_column(tmp_path, tokenizer):
    skip_without("log_probs")
    dataset = rows(16)
    selection = soft(dataset)
    kept = selection.apply(dataset).select([1, 0, *range(2, 12)])
    with pytest.raises(InputError, match=r"Row 0 has the weight 1 in its column.*and 2 in SampleWeights"):
        sft(tmp_path, tokenizer, kept, SampleWeights(selection.kept_weights())).train()


NO_WEIGHTS = [
    ([None, 1.0], "6 rows, the first of them row 0, have no weight"),
    ([1.0, -1.0], "row 1, have no weight"),
    ([1.0, float("nan")], "row 1, have no weight"),
    (["2", "much"], "holds string, not the weights"),
]


@pytest.mark.parametrize(("values", "said"), NO_WEIGHTS)
def test_a_column_without_a_weight_for_every_row_is_refused(values, said):
    own = rows(12).add_column(WEIGHT, values * 6)
    with pytest.raises(InputError, match=said):
        soft(own).apply(own)


@pytest.mark.parametrize(("values", "said"), NO_WEIGHTS)
def test_a_training_refuses_a_column_without_a_weight_for_every_row(values, said, tmp_path, tokenizer):
    skip_without("log_probs")
    own = rows(12).add_column(WEIGHT, values * 6)
    with pytest.raises(InputError, match=said):
        sft(tmp_path, tokenizer, own, SampleWeights.of(soft(rows(12))), shuffle_dataset=False).train()


def test_a_second_selection_multiplies_the_weights(tmp_path, tokenizer):
    dataset = rows(16)
    once = soft(dataset).apply(dataset)
    twice = soft(once)
    kept = twice.apply(once)
    assert kept.column_names.count(WEIGHT) == 1
    expected = (np.array([2.0, 1, 2] * 4) * twice.weight)[twice.keep]
    assert kept[WEIGHT][:] == expected.tolist()
    hard = select(once)
    assert hard.apply(once)[WEIGHT][:] == np.array([2.0, 1, 2] * 4)[hard.keep].tolist()
    saved = reread(hard.apply(once))
    with pytest.warns(UserWarning, match=NEEDS):
        sft(tmp_path, tokenizer, select(saved).apply(saved)).train()
    sft(tmp_path, tokenizer, select(saved).apply(saved), SampleWeights.of(select(saved))).train()


def test_rows_that_are_listed_in_another_order_or_twice_have_their_weights():
    for listed in (rows(16).shuffle(seed=1), rows(16).select([3, 3, 1, 1, *range(12), 5])):
        selection = soft(listed)
        kept = selection.apply(listed)
        assert kept[WEIGHT][:] == selection.kept_weights().tolist()
        assert kept.remove_columns(WEIGHT).to_list() == listed.select(selection.sample_ids).to_list()


@pytest.mark.parametrize("change", [lambda rows: rows, lambda rows: rows.shuffle(seed=1)])
def test_a_transform_stays_and_is_not_stored(change):
    dataset = rows(16)
    changed = change(dataset.with_transform(lambda batch: {"shown": [text.upper() for text in batch["prompt"]]}))
    selection, plain = soft(changed), change(dataset)
    kept = selection.apply(changed)
    assert kept[0] == {"shown": plain[1]["prompt"].upper()}
    assert kept.with_format(None).remove_columns(WEIGHT).to_list() == plain.select(selection.sample_ids).to_list()
    annotated = selection.annotate(changed, scores_of(changed))
    assert annotated[0] == kept[0]
    assert annotated.with_format(None)[0]["prompt"] == plain[1]["prompt"]
    assert half(plain.with_format("numpy"))[WEIGHT][:].tolist() == [2.0, 1.0, 2.0] * 4


def test_a_column_of_scores_that_is_there_already_is_refused():
    selection, scores = select(), scores_of(DATASET_ROWS)
    annotated = selection.annotate(DATASET_ROWS, scores)
    second = Selection(np.ones(6, bool), ["kept"] * 6, {}, "")
    with pytest.raises(InputError, match=r"has a column 'resofilter_.*' already: remove or rename it"):
        second.annotate(annotated, scores_of(annotated))


def test_the_callback_refuses_rows_that_have_weights(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"rows that have weights.*Train on them with SampleWeights, or remove"):
        sft(tmp_path, tokenizer, half(rows(16)), ResonanceCallback()).train()


def test_weighted_rows_are_scored_again_without_a_warning(tokenizer):
    dataset = rows(16)
    kept = half(dataset)
    plain = dataset.select(soft(dataset).sample_ids)
    found, expected = (
        score_dataset(llama(len(tokenizer)), each, tokenizer, scoring_arguments()) for each in (kept, plain)
    )
    assert np.array_equal(found.column("score"), expected.column("score"))


def test_rows_that_count_alike_need_no_weights(tmp_path, tokenizer):
    dataset = rows(16)
    alike = dataclasses.replace(soft(dataset), weight=np.where(soft(dataset).keep, 1.0, 0.0))
    for selection in (alike, select(dataset)):
        assert type(selection.apply(dataset)) is Dataset
        sft(tmp_path, tokenizer, selection.apply(dataset)).train()
        assert WEIGHT not in selection.apply(dataset).column_names
        assert "SampleWeights" not in str(selection.card())


def test_rows_that_all_count_twice_say_so(tmp_path):
    twice = dataclasses.replace(soft(rows(24)), weight=np.where(soft(rows(24)).keep, 2.0, 0.0))
    assert set(twice.apply(rows(24))[WEIGHT]) == {2.0}


def test_without_weights_some_of_the_kept_rows_count_once(tmp_path, tokenizer):
    selection = select(rows(24))
    some = selection.apply(rows(24)).train_test_split(0.25, seed=0)["train"]
    sft(tmp_path, tokenizer, some, SampleWeights.of(selection)).train()


def test_a_stream_cannot_be_weighed():
    with pytest.warns(UserWarning, match="Of a stream"):
        assert len(list(soft(rows(16)).apply(rows(16).to_iterable_dataset()))) == 12
    with pytest.warns(UserWarning, match="Of a stream"):
        assert len(list(half(rows(16)).to_iterable_dataset())) == 12


def test_a_loader_reads_the_rows_that_it_would_read_without_the_reminder():
    dataset = rows(16)
    selection = soft(dataset)
    kept, plain = selection.apply(dataset).remove_columns(WEIGHT), dataset.select(selection.sample_ids)
    selection.kept_weights()
    assert list(DataLoader(kept, batch_size=4)) == list(DataLoader(plain, batch_size=4))
    assert isinstance(kept, Dataset)


def test_saved_rows_have_their_weights(tmp_path):
    dataset = rows(16)
    selection = soft(dataset)
    expected = selection.kept_weights().tolist()
    assert expected == [2.0, 1.0, 2.0] * 4
    annotated = selection.annotate(dataset, scores_of(dataset))
    assert annotated[WEIGHT][:] == expected
    save_kept(selection.apply(dataset), selection, tmp_path)
    assert load_from_disk(tmp_path / DATASET)[WEIGHT][:] == expected
    card = (tmp_path / DATASET / "README.md").read_text()
    assert "do not count alike" in card
    assert f"SampleWeights(dataset['{WEIGHT}'])" in card


def test_soft_pruning_has_weights():
    assert np.ptp(SoftPruning(keep=0.5).select(scores_of(rows(16))).kept_weights()) > 0
