"""The ledger of a run: its losses are those that are logged, and its lines the rows that were trained."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from helpers.run_ledgers import Unrounded, lines, losses, parts_of
from helpers.training import arguments, assert_same_weights, llama, rows, train
from helpers.versions import skip_without
from trl import SFTTrainer

from resofilter_trainer import InputError, ResonanceCallback, SoftPruning
from resofilter_trainer.io.files import load_parquet
from resofilter_trainer.ledger import writing
from resofilter_trainer.ledger.schema import KEY, LEDGER, part_name, steps_of
from resofilter_trainer.ledger.writing import write_part

ROWS = rows(21)
WEIGHTS = {"selector": SoftPruning(keep=0.5), "readmit": True}
LOSSES = {  # the callback's settings, the trainer's
    "plain": ({}, {}),
    "accumulation": ({}, {"gradient_accumulation_steps": 4}),
    "accumulation, few rows": ({"keep": 0.6}, {"gradient_accumulation_steps": 3}),
    "packing": ({"dataset": ROWS}, {"packing": True, "gradient_accumulation_steps": 2}),
    "padding-free": ({}, {"padding_free": True, "max_length": None, "gradient_accumulation_steps": 2}),
    "label smoothing": ({}, {"label_smoothing_factor": 0.1, "loss_type": "nll"}),
    "label smoothing, accumulation": (
        {},
        {"label_smoothing_factor": 0.1, "loss_type": "nll", "gradient_accumulation_steps": 4},
    ),
    "NEFTune": ({}, {"neftune_noise_alpha": 5.0, "gradient_accumulation_steps": 2}),
    "row weights": (WEIGHTS, {"gradient_accumulation_steps": 2}),
    "dft": ({}, {"loss_type": "dft"}),
    "no clipping": ({}, {"max_grad_norm": 0.0}),
    "optimizer": ({"update": "optimizer"}, {"per_device_train_batch_size": 1}),
}


def logged(output: Path, tokenizer, callback: ResonanceCallback, **changes) -> Unrounded:
    """What is logged of each step of a run over two epochs."""
    args = arguments(output, **{"num_train_epochs": 2, **changes})
    with warnings.catch_warnings(action="ignore"):  # of label smoothing, which TRL deprecates
        trainer = SFTTrainer(llama(len(tokenizer)), args, None, ROWS, processing_class=tokenizer, callbacks=[callback])
        found = Unrounded(trainer)
        trainer.train()
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_the_lines_of_a_step_add_up_to_the_loss_that_is_logged(name, tmp_path, tokenizer):
    settings, changes = LOSSES[name]
    if name in ("dft", "row weights"):
        skip_without("log_probs")
    callback = ResonanceCallback(**{"keep": 1.0} if not {"keep", "selector"} & {*settings} else {}, **settings)
    truth = logged(tmp_path, tokenizer, callback, **changes)
    found = lines(tmp_path)
    np.testing.assert_allclose(losses(found), truth.column("loss"), rtol=1e-6)
    of_step = found.groupby("step").first()
    assert of_step.index.tolist() == list(range(1, len(truth.steps) + 1))
    for column in ("grad_norm", "learning_rate"):
        np.testing.assert_allclose(of_step[column], truth.column(column), rtol=1e-6)
    if name != "no clipping":
        assert np.isfinite(of_step["grad_norm"]).all()
    layers = [column for column in found if column.startswith("layer_")]
    assert len(layers) == 3
    assert np.isfinite(found[layers]).all(axis=None)


def test_a_line_is_a_row_that_was_trained(tmp_path, tokenizer):
    """Every row once in each epoch that keeps it, with what the scores say of it; no filler, no completed step."""
    outcome = train(tmp_path, tokenizer, ResonanceCallback(keep=[1.0, 0.5]), gradient_accumulation_steps=3)
    found, callback = lines(tmp_path), outcome.callback
    for epoch, selection in enumerate(callback.selections):
        own = found[found["epoch"] == epoch]
        assert sorted(own["sample_id"]) == np.flatnonzero(selection.keep).tolist()
    assert found["micro_batch"].max() == 2
    assert (found.groupby("step")["micro_batch"].min() == 0).all()
    assert found["step"].max() == outcome.trainer.state.global_step
    last = found.drop_duplicates("sample_id", keep="last").set_index("sample_id").sort_index()
    scores = callback.scores.table.to_pandas()
    for name in ("loss", "step", "num_tokens", *(column for column in found if column.startswith("layer_"))):
        np.testing.assert_allclose(last[name], scores[name], rtol=1e-6)
    np.testing.assert_allclose(
        last["weight"], last["num_tokens"] / found.groupby("step")["num_tokens"].sum()[last["step"]].to_numpy()
    )


def test_a_row_without_a_learnt_token_has_a_line_without_a_loss(tmp_path, tokenizer):
    ids = [tokenizer(row["prompt"] + row["completion"]).input_ids for row in ROWS]
    learnt = [[-100] * len(each) if number == 5 else each for number, each in enumerate(ids)]
    dataset = Dataset.from_dict({"input_ids": ids, "labels": learnt})
    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    train(tmp_path, tokenizer, ResonanceCallback(keep=1.0), dataset=dataset, **prepared)
    found = lines(tmp_path)
    empty = found["sample_id"] == 5
    assert empty.sum() == 3
    assert found[empty][["loss", "layer_1", "layer_2", "layer_3"]].isna().all(axis=None)
    assert (found[empty][["num_tokens", "weight"]] == 0).all(axis=None)
    assert found[~empty].notna().all(axis=None)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_with_packing_a_line_is_a_piece(strategy, tmp_path, tokenizer):
    callback = ResonanceCallback(keep=1.0, dataset=ROWS)
    changes = {"packing": True, "packing_strategy": strategy, "max_length": 20, "num_train_epochs": 1}
    with warnings.catch_warnings(action="ignore"):
        outcome = train(tmp_path, tokenizer, callback, dataset=ROWS, **changes)
    pieces = np.concatenate(outcome.trainer.train_dataset["seq_lengths"]).size
    found = lines(tmp_path)
    assert len(found) == pieces
    assert (pieces > len(ROWS)) == (strategy == "bfd_split")
    assert sorted(set(found["sample_id"])) == list(range(len(ROWS)))
    learnt = found.groupby("sample_id")["num_tokens"].sum()
    assert learnt.tolist() == callback.scores.column("num_tokens").tolist()


STREAMS = {"plain": {}, "a rest at the end of a pass": {"gradient_accumulation_steps": 3, "max_steps": 9}}


@pytest.mark.parametrize("name", STREAMS)
def test_the_lines_of_a_stream(name, tmp_path, tokenizer):
    """Rows at the end of a pass that fill no step are in the next one, with whose gradient theirs is added."""
    changes = {"max_steps": 25, **STREAMS[name]}
    stream = ROWS.to_iterable_dataset()
    callback = ResonanceCallback(keep=1.0, on_spike=lambda step: None)
    args = arguments(tmp_path, **changes)
    trainer = SFTTrainer(llama(len(tokenizer)), args, None, stream, processing_class=tokenizer, callbacks=[callback])
    truth = Unrounded(trainer)
    trainer.train()
    found = lines(tmp_path)
    np.testing.assert_allclose(losses(found), truth.column("loss"), rtol=1e-6)
    looked_at = trainer.state.stateful_callbacks["resofilter"]["spikes"]["losses"]
    np.testing.assert_allclose(looked_at, truth.column("loss"), rtol=1e-6)
    for epoch in range(2):
        assert sorted(found[found["epoch"] == epoch]["sample_id"]) == list(range(21))
    assert (found[found["epoch"] == 1]["sample_id"].to_numpy() == np.arange(21)).all()
    if name != "plain":
        of_both = found[found["step"] == 4]
        assert of_both["epoch"].unique().tolist() == [0, 1]
        assert of_both["micro_batch"].unique().tolist() == list(range(5))


RESUMED = {
    "plain": (lambda: ROWS, {"keep": 0.5}, {}),
    "accumulation": (lambda: ROWS, {"keep": [1.0, 0.7, 0.4]}, {"gradient_accumulation_steps": 3}),
    "packing": (lambda: ROWS, {"keep": 0.5, "dataset": ROWS}, {"packing": True}),
    "stream": (ROWS.to_iterable_dataset, {}, {"max_steps": 9, "gradient_accumulation_steps": 3}),
}


FAST = ("accumulation", "packing")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RESUMED]
)
def test_the_ledger_is_the_same_from_every_checkpoint(name, tmp_path, tokenizer):
    """Parts that reach beyond the checkpoint, as those of a longer undisturbed run, are cut there."""
    dataset, settings, changes = RESUMED[name]
    whole, saved = tmp_path / "whole", {"save_strategy": "steps", "save_steps": 2, **changes}

    def run(output: Path, resume: str | None = None, **more) -> None:
        with warnings.catch_warnings(action="ignore"):
            callback = ResonanceCallback(**settings)
            train(output, tokenizer, callback, dataset=dataset(), resume=resume, **{**saved, **more})

    run(whole)
    found, files = lines(whole), {path.name: path.read_bytes() for path in parts_of(whole)}
    checkpoints = sorted(whole.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) > 2
    for checkpoint in checkpoints:
        copy = tmp_path / f"from {checkpoint.name}"
        shutil.copytree(whole, copy)
        run(copy, str(copy / checkpoint.name))
        assert {path.name: path.read_bytes() for path in parts_of(copy)} == files
    single = tmp_path / "one part"
    shutil.copytree(whole, single)
    joined_part(single)
    run(single, str(single / checkpoints[1].name))
    assert lines(single).equals(found)
    later = [name for name in files if steps_of(Path(name))[0] > int(checkpoints[1].name.split("-")[1])]
    assert len(parts_of(single)) == len(later) + 1  # those up to the checkpoint are one now


def joined_part(output: Path) -> None:
    """Make one part of all."""
    paths = parts_of(output)
    tables = [load_parquet(path, KEY, "part of a ledger") for path in paths]
    (first, _), (_, last) = steps_of(paths[0]), steps_of(paths[-1])
    about = json.loads(tables[0][1])
    for path in paths:
        path.unlink()
    whole = pa.concat_tables([table for table, _ in tables]).replace_schema_metadata(None)
    write_part(whole, paths[0].with_name(part_name(first, last)), about)


def test_a_run_that_starts_anew_has_only_its_own_lines(tmp_path, tokenizer):
    changes = {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, tokenizer, ResonanceCallback(keep=1.0), **changes)
    (tmp_path / "resofilter" / LEDGER / "process-1").mkdir()  # of a run in two processes
    shutil.copy(parts_of(tmp_path)[0], tmp_path / "resofilter" / LEDGER / "process-1")
    train(tmp_path, tokenizer, ResonanceCallback(keep=1.0), num_train_epochs=1)
    assert lines(tmp_path)["step"].max() == 11
    assert [path.name for path in (tmp_path / "resofilter" / LEDGER).iterdir()] == ["process-0"]
    train(tmp_path, tokenizer, ResonanceCallback(keep=1.0, ledger=False), num_train_epochs=1)
    assert not (tmp_path / "resofilter" / LEDGER).exists()


def test_a_run_without_a_ledger_that_resumes_leaves_no_half_of_one(tmp_path, tokenizer):
    train(tmp_path, tokenizer, ResonanceCallback(keep=1.0), save_strategy="steps", save_steps=3)
    checkpoint = str(tmp_path / "checkpoint-6")
    train(tmp_path, tokenizer, ResonanceCallback(keep=1.0, ledger=False), resume=checkpoint)
    assert not (tmp_path / "resofilter" / LEDGER).exists()


@pytest.mark.slow
def test_parts_of_runs_with_another_learning_rate_are_told_apart(tmp_path, tokenizer):
    """The run of `b` resumes into the folder of `a`, whose lines are none of its own."""
    changes = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}
    train(tmp_path / "a", tokenizer, ResonanceCallback(keep=1.0), learning_rate=1e-2, **changes)
    train(tmp_path / "b", tokenizer, ResonanceCallback(keep=1.0), learning_rate=1e-4, **changes)
    runs = {json.loads(load_parquet(parts_of(tmp_path / each)[0], KEY, "part")[1])["run"] for each in "ab"}
    assert len(runs) == 2
    resume = str(tmp_path / "b" / "checkpoint-6")
    train(tmp_path / "a", tokenizer, ResonanceCallback(keep=1.0), learning_rate=1e-4, resume=resume, **changes)
    found = lines(tmp_path / "a")
    assert found["step"].min() == 7
    assert found["learning_rate"].max() <= 1e-4


def test_a_run_with_a_ledger_trains_as_one_without(tmp_path, tokenizer):
    changes = {"gradient_accumulation_steps": 2, "num_train_epochs": 2}
    runs = [
        train(tmp_path / str(number), tokenizer, callback, **changes)
        for number, callback in enumerate(
            [None, ResonanceCallback(keep=1.0), ResonanceCallback(keep=1.0, ledger=False)]
        )
    ]
    assert_same_weights(runs[1], runs[0])
    assert_same_weights(runs[2], runs[0])
    assert runs[1].logs == runs[0].logs
    assert "clip_grad_norm_" not in vars(runs[1].trainer.accelerator)


def test_a_run_that_is_measured_before_it_has_no_ledger(tmp_path, tokenizer):
    train(tmp_path, tokenizer, ResonanceCallback(keep=0.5, when="before"), num_train_epochs=1)
    assert (tmp_path / "resofilter" / "scores.parquet").is_file()
    assert not (tmp_path / "resofilter" / LEDGER).exists()
    with pytest.raises(InputError, match="leave out ledger=True or when='before'"):
        ResonanceCallback(when="before", ledger=True)


def test_memory_stays_flat(tmp_path, tokenizer, monkeypatch):
    """A part is written whenever there are many lines, or many steps."""
    monkeypatch.setattr(writing, "MOST_STEPS", 4)
    train(tmp_path, tokenizer, ResonanceCallback(keep=1.0), num_train_epochs=1)
    assert [steps_of(path) for path in parts_of(tmp_path)] == [(1, 4), (5, 8), (9, 11)]
