"""A selection is applied to the rows that were scored, and a training on weighted rows knows of their weights."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import tempfile
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_from_disk,
)
from helpers.tables import make_scores
from helpers.training import arguments, llama, rows
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import SFTTrainer

from resofilter_trainer import (
    ColumnMapping,
    DataSelector,
    InputError,
    ResonanceCallback,
    SampleWeights,
    ScoreTable,
    Selection,
    SoftPruning,
    map_columns,
)
from resofilter_trainer.io.digest import FIRST, columns_of, hash_rows
from resofilter_trainer.selecting.kept_dataset import DATASET, save_kept
from resofilter_trainer.selecting.selection import WEIGHT

DATASET_ROWS = Dataset.from_list([{"question": f"q {i}", "answer": str(i * 7 % 12)} for i in range(12)])


def scores_of(dataset: Dataset, content: str | None = "") -> ScoreTable:
    """Scores of a dataset, with the digest of its rows."""
    scores = make_scores([float(i * 5 % len(dataset)) for i in range(len(dataset))])
    source = {} if content is None else {"content": content or hash_rows(dataset)}
    return ScoreTable(scores.table, dataclasses.replace(scores.provenance, source=source))


def select(dataset: Dataset = DATASET_ROWS, content: str | None = "") -> Selection:
    return DataSelector(keep=0.5).select(scores_of(dataset, content))


def reread(kept: Dataset) -> Dataset:
    with tempfile.TemporaryDirectory() as temporary:
        kept.to_parquet(f"{temporary}/rows.parquet")
        return Dataset.from_parquet(f"{temporary}/rows.parquet", keep_in_memory=True, cache_dir=temporary)


# ---- the rows that were scored


def test_the_scored_rows_are_accepted_however_they_are_stored(tmp_path):
    selection = select()
    DATASET_ROWS.save_to_disk(tmp_path / "saved")
    kept = [DATASET_ROWS[int(row)] for row in selection.sample_ids]
    for same in (
        DATASET_ROWS,
        load_from_disk(tmp_path / "saved"),
        DATASET_ROWS.with_format("numpy"),
        DATASET_ROWS.with_transform(lambda batch: batch),
        DATASET_ROWS.select(range(12)),
        Dataset.from_list(DATASET_ROWS.to_list()),
    ):
        assert selection.apply(same).with_format(None).to_list() == kept
    selection.save(tmp_path)
    assert Selection.load(tmp_path).apply(DATASET_ROWS).to_list() == kept


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.shuffle(seed=1),
        lambda rows: rows.select(range(11, -1, -1)),
        lambda rows: rows.select([*range(1, 12), 0]),
        lambda rows: rows.map(lambda row: {"answer": row["answer"] + " "}),
        lambda rows: rows.select_columns(["question"]),
        lambda rows: rows.add_column("n", list(range(12))),
        lambda rows: map_columns(rows, ColumnMapping(prompt_column="question", completion_column="answer")),
    ],
)
def test_other_rows_are_refused_unless_the_user_says_that_they_are_the_same(change, tmp_path):
    selection, other = select(), change(DATASET_ROWS)
    scores = scores_of(DATASET_ROWS)
    for apply in (
        selection.apply,
        lambda rows: selection.annotate(rows, scores),
        lambda rows: selection.push_to_hub(rows, "me/rows"),
    ):
        with pytest.raises(InputError, match=r"not what was scored.* order of its rows.*check_rows=False") as refused:
            apply(other)
        assert "\n" not in str(refused.value)
    assert selection.apply(other, check_rows=False).to_list() == other.select(selection.sample_ids).to_list()
    annotated = selection.annotate(other, scores, check_rows=False)
    assert annotated["resofilter_score"][:] == [float(scores.column("score")[row]) for row in selection.sample_ids]
    with pytest.raises(InputError, match="made for 12 rows"):
        selection.apply(other.select(range(11)), check_rows=False)


def test_a_digest_of_the_first_version_is_compared_too():
    selection = select(content=hash_rows(DATASET_ROWS, FIRST))
    assert len(selection.apply(DATASET_ROWS)) == 6
    with pytest.raises(InputError, match="not what was scored"):
        selection.apply(DATASET_ROWS.shuffle(seed=1))


@pytest.mark.parametrize("provenance", ["", "{}", "[]"])
def test_without_a_digest_only_the_number_of_rows_is_known(provenance):
    assert len(select(content=None).apply(DATASET_ROWS.shuffle(seed=1))) == 6
    by_hand = Selection(np.ones(12, bool), ["kept"] * 12, {}, provenance)
    assert len(by_hand.apply(DATASET_ROWS.shuffle(seed=1))) == 12


# ---- streams and other kinds


def images() -> Dataset:
    """JPEGs, which do not survive being decoded and encoded again."""
    stored = []
    for i in range(12):
        file = io.BytesIO()
        PIL.Image.new("RGB", (9, 9), (20 * i, 7, 5 * i)).save(file, "JPEG")
        stored.append({"bytes": file.getvalue(), "path": None})
    features = Features({"image": Image(), "id": Value("int32")})
    return Dataset.from_dict({"image": stored, "id": range(12)}, features=features)


@pytest.mark.parametrize("make", [lambda: DATASET_ROWS, images])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_stream_is_the_rows_that_were_scored(make, shards):
    dataset = make()
    selection, stream = select(dataset), dataset.to_iterable_dataset(num_shards=shards)
    for same in (stream, stream.with_format("numpy"), stream.take(12)):
        assert len(list(selection.apply(same))) == 6
    name = dataset.column_names[-1]
    assert [row[name] for row in selection.apply(stream)] == dataset.select(selection.sample_ids)[name][:]
    for other, said in (
        (dataset.select([1, 0, *range(2, 12)]).to_iterable_dataset(num_shards=shards), "not what was scored"),
        (stream.shuffle(seed=1), "not what was scored"),
        (stream.remove_columns(dataset.column_names[0]), "not what was scored"),
        (stream.take(11), "made for 12 rows and the stream has 11"),
        (concatenate_datasets([stream, stream]), "made for 12 rows and the stream has more"),
    ):
        with pytest.raises(InputError, match=said):
            selection.apply(other)
    assert len(list(selection.apply(dataset.select(range(11, -1, -1)).to_iterable_dataset(), check_rows=False))) == 6


def test_a_stream_that_is_shuffled_later_keeps_the_same_rows():
    selection = select()
    stream = selection.apply(DATASET_ROWS.to_iterable_dataset(num_shards=6)).shuffle(seed=3, buffer_size=4)
    questions = [row["question"] for row in stream]
    assert sorted(questions) == sorted(selection.apply(DATASET_ROWS)["question"])
    assert questions != selection.apply(DATASET_ROWS)["question"][:]


def test_a_stream_of_several_shards_is_read_by_one_process():
    kept = select().apply(DATASET_ROWS.to_iterable_dataset(num_shards=2))
    with pytest.raises(InputError, match="pass dataloader_num_workers=0"):
        list(DataLoader(kept, batch_size=None, num_workers=2))
    assert len(list(DataLoader(kept, batch_size=None, num_workers=1))) == 6


@pytest.mark.parametrize(
    ("rows", "comparable"),
    [
        ([{"a": f"{i}", "n": i, "x": i / 2, "m": [{"role": "user", "content": "x" * i}]} for i in range(12)], True),
        ([{"a": None if i < 5 else "x", **({"b": i} if i % 2 else {})} for i in range(12)], True),
        ([{"a": i if i % 2 else str(i)} for i in range(12)], False),
        ([{"m": [{"role": "user", **({"content": "x"} if i % 2 else {"tools": [i]})}]} for i in range(12)], False),
    ],
)
def test_a_stream_without_types_is_compared_or_says_that_it_cannot_be(rows, comparable):
    dataset = Dataset.from_dict(next(columns_of(rows, 12)), on_mixed_types="use_json")  # as a stream is scored
    selection, stream = select(dataset), IterableDataset.from_generator(lambda: iter(rows))
    if comparable:
        assert len(list(selection.apply(stream))) == 6
    else:
        with pytest.raises(InputError, match=r"does not know the types.*check_rows=False"):
            selection.apply(stream)
        assert len(list(selection.apply(stream, check_rows=False))) == 6


def test_a_stream_is_compared_with_a_digest_of_the_first_version():
    selection = select(content=hash_rows(DATASET_ROWS, FIRST))
    assert len(list(selection.apply(DATASET_ROWS.to_iterable_dataset()))) == 6
    with pytest.raises(InputError, match="not what was scored"):
        selection.apply(DATASET_ROWS.select(range(11, -1, -1)).to_iterable_dataset())


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            DatasetDict({"train": DATASET_ROWS, "test": DATASET_ROWS}),
            r"a DatasetDict: pass dataset\['train'\]",
        ),
        (IterableDatasetDict({"test": DATASET_ROWS.to_iterable_dataset()}), r"pass dataset\['test'\]"),
        (DATASET_ROWS.to_list(), "this is a list"),
        (iter(DATASET_ROWS), "this is a generator"),
        (DATASET_ROWS.to_pandas(), "this is a DataFrame"),
        (None, "this is a NoneType"),
    ],
)
def test_what_is_no_dataset_is_refused(other, said):
    with pytest.raises(InputError, match=said):
        select().apply(other)


EVERY_KIND = Dataset.from_dict(
    {"text": [f"t{i // 2}" for i in range(12)], "n": [i // 2 for i in range(12)], "none": [None] * 12}
)


@pytest.mark.parametrize(
    "same",
    [
        lambda rows: rows.cast_column("n", Value("int32")),
        lambda rows: rows.cast_column("text", Value("large_string")),
        lambda rows: rows.with_format("torch"),
        lambda rows: rows.remove_columns("none"),  # a column without a value
        lambda rows: rows.shuffle(seed=1).select(np.argsort(rows.add_column("i", range(12)).shuffle(seed=1)["i"][:])),
        lambda rows: concatenate_datasets([rows.select(range(5)), rows.select(range(5, 12))]),
        lambda rows: Dataset.from_generator(lambda: iter(rows.to_list()), cache_dir=tempfile.mkdtemp()),
        lambda rows: rows.select([1, 0, *range(2, 12)]),  # rows 0 and 1 are equal
        lambda rows: rows.repeat(2).select(range(12, 24)),
        reread,
    ],
)
def test_the_same_rows_are_accepted(same):
    selection = select(EVERY_KIND)
    expected = EVERY_KIND.select(selection.sample_ids)
    for name in ("text", "n"):
        assert list(selection.apply(same(EVERY_KIND)).with_format(None)[name]) == expected[name][:]


@pytest.mark.parametrize(
    "other",
    [
        lambda rows: rows.rename_column("n", "m"),
        lambda rows: rows.cast_column("n", Value("float64")),
        lambda rows: rows.cast_column("n", Value("string")),
        lambda rows: rows.add_column("id", range(12)),
        lambda rows: rows.select([*range(11), 0]),
        lambda rows: interleave_datasets([rows.select(range(6)), rows.select(range(6, 12))]),
        lambda rows: rows.sort("text", reverse=True),
    ],
)
def test_other_rows_are_not_accepted(other):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # pyarrow's, of `sort`
        changed = other(EVERY_KIND)
    with pytest.raises(InputError, match="not what was scored"):
        select(EVERY_KIND).apply(changed)


def test_no_rows():
    empty = DATASET_ROWS.select([])
    provenance = dataclasses.replace(make_scores([1.0]).provenance, source={"content": hash_rows(empty)}, rows=0)
    none = Selection(np.zeros(0, bool), [], {}, provenance.to_json())
    assert len(none.apply(empty)) == 0
    with pytest.raises(InputError, match="made for 0 rows"):
        none.apply(DATASET_ROWS)
    nothing_kept = Selection(np.zeros(12, bool), ["x"] * 12, {}, "", np.zeros(12))
    assert nothing_kept.apply(DATASET_ROWS).to_list() == []


# ---- weights


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
    dataset = rows(16)
    selection = soft(dataset)
    kept = selection.apply(dataset).remove_columns(WEIGHT)
    with pytest.raises(InputError, match=r"no column 'resofilter_weight'.*SampleWeights\(selection\.kept_weights"):
        sft(tmp_path, tokenizer, kept.shuffle(seed=1), SampleWeights.of(selection)).train()
    sft(tmp_path, tokenizer, kept, SampleWeights(selection.kept_weights())).train()


def test_weights_by_position_must_be_those_of_the_column(tmp_path, tokenizer):
    dataset = rows(16)
    selection = soft(dataset)
    kept = selection.apply(dataset).select([1, 0, *range(2, 12)])
    with pytest.raises(InputError, match=r"Row 0 has the weight 1 in its column.*and 2 in SampleWeights"):
        sft(tmp_path, tokenizer, kept, SampleWeights(selection.kept_weights())).train()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([None, 1.0], "6 rows, the first of them row 0, have no weight"),
        ([1.0, -1.0], "row 1, have no weight"),
        ([1.0, float("nan")], "row 1, have no weight"),
        (["2", "much"], "holds string, not the weights"),
    ],
)
def test_a_column_without_a_weight_for_every_row_is_refused(values, said, tmp_path, tokenizer):
    selection = soft(rows(12))
    own = rows(12).add_column(WEIGHT, values * 6)
    with pytest.raises(InputError, match=said):
        sft(tmp_path, tokenizer, own, SampleWeights.of(selection), shuffle_dataset=False).train()
    with pytest.raises(InputError, match=said):
        soft(own).apply(own)


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


def test_rows_that_count_alike_need_no_weights(tmp_path, tokenizer):
    dataset = rows(16)
    alike = dataclasses.replace(soft(dataset), weight=np.where(soft(dataset).keep, 2.0, 0.0))
    for selection in (alike, select(dataset)):
        assert type(selection.apply(dataset)) is Dataset
        sft(tmp_path, tokenizer, selection.apply(dataset)).train()
        assert WEIGHT not in selection.apply(dataset).column_names
        assert "SampleWeights" not in str(selection.card())


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
