"""Which row each sample of a batch is, whatever the collator does with its rows."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.training import arguments, llama
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from trl import SFTTrainer

from resofilter_trainer import InputError, ResonanceCallback
from resofilter_trainer.model.gradients import segments_of
from resofilter_trainer.training.matching import Matcher, match
from resofilter_trainer.training.sampler import FILLER, ROW, RowCollator
from resofilter_trainer.training.weighting import SampleWeights

LENGTHS = [5, 9, 3, 7, 12, 4, 8, 6, 11, 10, 13, 14]


def examples(lengths=LENGTHS, seed=0) -> list[dict]:
    drawn = random.Random(seed)
    ids = [[drawn.randint(3, 60) for _ in range(length)] for length in lengths]
    return [{"input_ids": own, "labels": [-100, *own[1:]]} for own in ids]


def pad(rows, side="right"):
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(values, fill):
        extra = [fill] * (longest - len(values))
        return [*values, *extra] if side == "right" else [*extra, *values]

    return {
        "input_ids": torch.tensor([filled(list(row["input_ids"]), 0) for row in rows]),
        "labels": torch.tensor([filled(list(row["labels"]), -100) for row in rows]),
        "attention_mask": torch.tensor([filled([1] * len(row["input_ids"]), 0) for row in rows]),
    }


def flat(rows):
    return DataCollatorWithFlattening()([dict(row) for row in rows])


def cut(row, part):
    return {name: values[part] for name, values in row.items()}


def shuffled(rows):
    return random.Random(len(rows)).sample(rows, len(rows))


FOLLOWED = {
    "as they are": pad,
    "left": lambda rows: pad(rows, "left"),
    "sorted": lambda rows: pad(sorted(rows, key=lambda row: -len(row["input_ids"]))),
    "shuffled": lambda rows: pad(shuffled(rows)),
    "reversed and left": lambda rows: pad(rows[::-1], "left"),
    "truncated": lambda rows: pad([cut(row, slice(6)) for row in rows]),
    "truncated from the left": lambda rows: pad([cut(row, slice(-6, None)) for row in rows]),
    "sorted and truncated": lambda rows: pad([cut(row, slice(6)) for row in sorted(rows, key=lambda r: r["labels"])]),
    "with an end": lambda rows: pad([{name: [*v, 1] for name, v in row.items()} for row in shuffled(rows)]),
    "flat": flat,
    "flat and shuffled": lambda rows: flat(shuffled(rows)),
    "without a mask": lambda rows: {k: v for k, v in pad(shuffled(rows)).items() if k != "attention_mask"},
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_every_sample_is_found(name):
    rows = examples()
    batch = RowCollator(FOLLOWED[name])([{**row, ROW: index} for index, row in enumerate(rows)])
    assert sorted(batch[ROW].tolist()) == list(range(len(rows)))
    for row, where in zip(batch[ROW].tolist(), segments_of(batch), strict=True):
        found = batch["input_ids"][where.row, where.tokens].tolist()
        own = rows[row]["input_ids"]
        assert found[:3] == own[:3] or found[-3:] == own[-3:]


def test_a_filler_is_masked_where_it_is():
    rows = examples()
    given = [{**row, ROW: FILLER if index == 4 else index} for index, row in enumerate(rows)]
    batch = RowCollator(FOLLOWED["sorted"])(given)
    place = batch[ROW].tolist().index(FILLER)
    assert batch["input_ids"][place, :12].tolist() == rows[4]["input_ids"]
    assert (batch["labels"] != -100).any(1).tolist() == [row != FILLER for row in batch[ROW].tolist()]


def test_rows_of_the_same_tokens_are_told_apart_by_their_labels():
    twins = [{"input_ids": [5, 6, 7, 8], "labels": [-100] * count + [5, 6, 7, 8][count:]} for count in (1, 2, 3)]
    batch = RowCollator(lambda rows: pad(rows[::-1]))([{**row, ROW: index} for index, row in enumerate(twins)])
    assert batch[ROW].tolist() == [2, 1, 0]


def test_a_match_is_unique_or_none():
    ids = [np.array(each) for each in ([5, 6, 7], [5, 6, 8], [9, 9, 9])]
    nothing = [None] * 3
    assert match(ids[::-1], ids, nothing, nothing) == [2, 1, 0]
    assert match([ids[2][:2], ids[0], ids[1]], ids, nothing, nothing) == [2, 0, 1]
    assert match([ids[2], ids[0][:2], ids[1][:2]], ids, nothing, nothing) == [2, 0, 1]  # truncated, they are the same
    assert match([ids[2], ids[0][:1], ids[1][:2]], ids, nothing, nothing) is None  # two rows begin like this
    assert match([ids[0], ids[0], ids[1]], ids, nothing, nothing) is None


REFUSED = {
    "dropped": (lambda rows: pad([row for row in rows if len(row["input_ids"]) < 9]), "6 samples for 12 rows"),
    "merged": (
        lambda rows: pad(
            [{name: one[name] + two[name] for name in one} for one, two in zip(rows[::2], rows[1::2], strict=True)]
        ),
        "6 samples for 12 rows",
    ),
    "repeated": (lambda rows: pad(rows + rows), "24 samples for 12 rows"),
    "twice and never": (lambda rows: pad([*rows[1:], rows[1]]), "none of its rows, or several alike"),
    "replaced": (lambda rows: pad(examples(seed=1)), "none of its rows"),
    "flat without positions": (
        DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True),
        "return_position_ids=True",
    ),
    "flat with a mask": (
        lambda rows: {**flat(rows), "attention_mask": torch.ones(1, sum(LENGTHS), dtype=torch.long)},
        "no attention_mask",
    ),
    "flat, learnt across": (lambda rows: {**(batch := flat(rows)), "labels": batch["input_ids"].clone()}, "-100"),
    "without tokens": (lambda rows: {"labels": pad(rows)["labels"]}, "no input_ids"),
    "a mask of pairs": (
        lambda rows: {**pad(rows), "attention_mask": torch.ones(12, 1, 14, 14)},
        r"attention_mask must be \(B, T\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused(name):
    collate, said = REFUSED[name]
    with pytest.raises(InputError, match=said) as error:
        RowCollator(collate)([{**row, ROW: index} for index, row in enumerate(examples())])
    assert "\n" not in str(error.value)


def test_the_error_names_the_collator():
    class Dropping:
        def __call__(self, rows):
            return pad(rows[1:])

    with pytest.raises(InputError, match="Dropping returns 11 samples"):
        Matcher(Dropping()).collate(examples())


# ---- examples without tokens


def from_text(rows):
    made = [{"input_ids": [ord(letter) for letter in row["text"]]} for row in rows]
    return pad([{**row, "labels": row["input_ids"]} for row in made])


TEXTS = [{"text": "abcdefgh"[index:] + "xyz"[: index % 3]} for index in range(8)]


@pytest.mark.parametrize("order", [lambda rows: rows, lambda rows: sorted(rows, key=lambda row: len(row["text"]))])
def test_examples_of_text_are_found_too(order):
    batch = RowCollator(lambda rows: from_text(order(rows)))([{**row, ROW: i} for i, row in enumerate(TEXTS)])
    for row, own in zip(batch[ROW].tolist(), batch["input_ids"], strict=True):
        assert "".join(map(chr, own[own > 0])) == TEXTS[row]["text"]


def test_every_later_batch_is_compared_once_rows_have_moved():
    collate, calls = RowCollator(lambda rows: from_text(rows[::-1])), []
    for _ in range(70):
        batch = collate([{**row, ROW: i} for i, row in enumerate(TEXTS[:3])])
        calls.append(batch[ROW].tolist())
    assert calls == [[2, 1, 0]] * 70


def test_comparing_draws_no_random_number_and_changes_no_example():
    class Popping:
        def __call__(self, rows):
            random.random(), np.random.rand(), torch.rand(1)
            return from_text([{"text": row.pop("text")} for row in rows])

    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    RowCollator(Popping())([{**row, ROW: i} for i, row in enumerate(TEXTS)])
    mine = random.random(), np.random.rand(), float(torch.rand(1))
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    Popping()([dict(row) for row in TEXTS])
    assert mine == (random.random(), np.random.rand(), float(torch.rand(1)))


def test_random_tokens_are_taken_in_order_and_it_is_said_once():
    def noisy(rows):
        batch = from_text(rows)
        return {**batch, "input_ids": torch.randint(3, 90, batch["input_ids"].shape)}

    collate = RowCollator(noisy)
    with pytest.warns(UserWarning, match="at random"):
        batch = collate([{**row, ROW: i} for i, row in enumerate(TEXTS)])
    assert batch[ROW].tolist() == list(range(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collate([{**row, ROW: i} for i, row in enumerate(TEXTS)])


# ---- in a run


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_run_scores_are_of_their_rows(workers, tmp_path):
    rows = examples()
    right, found = (
        run(tmp_path / str(index), rows, collate, workers) for index, collate in enumerate((pad, Sorting()))
    )
    for name in ("num_tokens", "length"):
        np.testing.assert_array_equal(found.column(name), right.column(name))
    np.testing.assert_allclose(found.column("measured"), right.column("measured"), rtol=1e-5)


class Sorting:
    def __call__(self, rows):
        return FOLLOWED["sorted"](rows)


def run(output, rows, collate, workers=0):
    args = TrainingArguments(
        output_dir=str(output), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=4, num_train_epochs=1, learning_rate=0.0, dataloader_num_workers=workers,
    )  # fmt: skip
    callback = ResonanceCallback(keep=1.0, update="sgd")
    Trainer(llama(64), args, collate, Dataset.from_list(rows), callbacks=[callback]).train()
    return callback.scores


def test_weights_of_rows_follow_them_too(tmp_path, tokenizer):
    """`SampleWeights` beside a collator that sorts: the same training as beside one that does not."""
    weights, trained = np.linspace(0.5, 3, 12), []
    for collate in (pad, Sorting()):
        trainer = SFTTrainer(
            llama(len(tokenizer)),
            arguments(tmp_path, num_train_epochs=1, per_device_train_batch_size=4),
            train_dataset=Dataset.from_list(examples()),
            processing_class=tokenizer,
            data_collator=collate,
            callbacks=[SampleWeights(weights)],
        )
        trainer.train()
        trained.append(trainer.model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-3, atol=1e-5)
