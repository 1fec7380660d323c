"""Signals as columns of a pass: the same numbers however it runs, and nothing else changes by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from helpers.scoring import COLUMNS, ROWS, arguments

from resofilter_trainer import (
    DataSelector,
    DiverseSelector,
    InputError,
    Recorder,
    ResonanceConfig,
    ScoreTable,
    score_dataset,
    score_stream,
)
from resofilter_trainer.model.signals import SIGNALS
from resofilter_trainer.report.what_if import what_if
from resofilter_trainer.scoring import dataset as scoring
from resofilter_trainer.scoring import passes
from resofilter_trainer.scoring import stream as streaming
from resofilter_trainer.scoring.further_signals import ALL_SIGNALS

HERE = [*SIGNALS, "ifd", "loss_alone", "jitter"]  # without a reference, or tokens for a verdict
USUAL = ["sample_id", "score", "loss", "num_tokens", "length", "prompt", "layer_1", "layer_2", "layer_3"]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset.from_list(ROWS)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(dtype=torch.float64)


@pytest.fixture(scope="module")
def whole(model, dataset, tokenizer) -> ScoreTable:
    return score_dataset(model, dataset, tokenizer, arguments(), signals="all", **COLUMNS)


def test_a_pass_has_a_column_for_every_signal_and_the_rest_as_without(whole, model, dataset, tokenizer, tmp_path):
    without = score_dataset(model, dataset, tokenizer, arguments(), output=tmp_path, **COLUMNS)
    signals = [name for name in HERE if name != "loss"]
    assert without.table.column_names == [*USUAL, "reason"]
    assert whole.table.column_names == [*USUAL, *signals, "reason"]
    assert whole.table.select(without.table.column_names).equals(without.table)
    assert "signals" not in without.provenance.config
    assert all(each.metadata is None for each in pq.read_schema(tmp_path / "scores.parquet"))
    assert whole.provenance.config["signals"] == HERE
    assert np.array_equal(whole.column("resonance"), whole.column("score"))


def plain_votes(table: ScoreTable) -> np.ndarray:
    """Counted pair by pair; NaN for a row without a score."""
    layers = np.stack([table.column(f"layer_{layer}") for layer in (1, 2, 3)], axis=1)
    found, scored = np.full(len(layers), np.nan), np.flatnonzero(table.scored)
    for row in scored:
        below = [(layers[scored, i] < layers[row, i]).sum() for i in range(3)]
        equal = [(layers[scored, i] == layers[row, i]).sum() for i in range(3)]
        found[row] = np.mean([a + (b + 1) / 2 for a, b in zip(below, equal, strict=True)]) / len(scored)
    return found


def test_the_layers_vote_among_all_rows_of_the_table(whole, tiny_llama, tokenizer):
    np.testing.assert_allclose(whole.column("layer_vote"), plain_votes(whole), rtol=1e-12)
    rows = [*ROWS[:6], {**ROWS[6], "answer": ""}, ROWS[0], *ROWS[7:9]]
    found = score_dataset(
        tiny_llama(), Dataset.from_list(rows), tokenizer, arguments(),
        signals=["layer_vote"], drop_empty=True, drop_duplicates=True, **COLUMNS,
    )  # fmt: skip
    np.testing.assert_allclose(found.column("layer_vote"), plain_votes(found), rtol=1e-12)
    assert np.isnan(found.column("layer_vote")).tolist() == [False] * 6 + [True] * 2 + [False] * 2


def test_shards_vote_together(whole):
    """In the table of all rows, a row's place is among all."""
    apart = []
    for rows in (range(3), range(3, len(whole))):
        table = whole.table.take([*rows])
        votes = np.linspace(0, 1, len(rows))  # as if each shard had been scored alone
        place = table.schema.get_field_index("layer_vote")
        apart.append(ScoreTable(table.set_column(place, table.schema.field(place), [votes]), whole.provenance))
    for tables in (apart, apart[::-1]):
        joined = ScoreTable.join(tables)
        np.testing.assert_array_equal(joined.column("layer_vote"), whole.column("layer_vote"))
        assert joined.table.schema.equals(whole.table.schema, check_metadata=True)


def test_signals_that_cannot_be_measured_are_said_or_refused(tiny_llama, dataset, tokenizer, capsys):
    config, reason = ResonanceConfig(n_layers=1), "only one layer is measured (n_layers=1)"

    def score(signals) -> ScoreTable:
        return score_dataset(tiny_llama(), dataset, tokenizer, arguments(), config, signals=signals, **COLUMNS)

    found = score("all")
    assert f"Signals left out: layer_vote, because {reason}.\n" in capsys.readouterr().out
    assert "layer_vote" not in found.table.column_names
    assert {*SIGNALS} - {*found.table.column_names} == {"layer_vote"}
    with pytest.raises(InputError, match=r"The signal 'layer_vote' cannot be measured: only one layer is measured \("):
        score(["rank", "layer_vote"])
    score("rank")
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("tokens", [70, pytest.param(1, marks=pytest.mark.slow)])
def test_the_batch_size_changes_no_signal(tokens, whole, model, dataset, tokenizer):
    options = {"signals": HERE, "tokens_per_batch": tokens, **COLUMNS}
    found = score_dataset(model, dataset, tokenizer, arguments(), **options)
    for name in HERE:
        np.testing.assert_allclose(found.column(name), whole.column(name), rtol=1e-9, err_msg=name)


def test_the_table_has_what_the_recorder_measures(whole, model, tokenizer):
    row = ROWS[7]
    prompt = tokenizer(row["question"] + "\n")["input_ids"]
    ids = tokenizer(row["question"] + "\n" + row["answer"] + "<eos>")["input_ids"]
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    batch = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids)),
        "labels": torch.tensor([labels]),
    }
    with Recorder(model, ResonanceConfig(), "all") as record:
        for name, value in record(batch).signals.items():
            np.testing.assert_allclose(whole.column(name)[7], value[0], rtol=1e-9, err_msg=name)


def test_every_column_says_what_it_is_in_the_file_too(whole, tmp_path):
    whole.save(tmp_path)
    loaded = ScoreTable.load(tmp_path)
    for table in (whole, loaded, ScoreTable.join([loaded])):
        for name in HERE:
            signal, found = ALL_SIGNALS[name], table.table.schema.field(name).metadata
            assert {key.decode(): value.decode() for key, value in found.items()} == signal.metadata
            assert table.direction(name) == signal.drop
        assert table.direction("score") is table.direction("length") is table.direction("nothing") is None
    assert loaded.table.equals(whole.table)


def test_rows_without_a_score_have_no_signal(tiny_llama, tokenizer):
    rows = [*ROWS[:4], {**ROWS[4], "answer": ""}, ROWS[0]]
    found = score_dataset(
        tiny_llama(), Dataset.from_list(rows), tokenizer, arguments(),
        signals=["rank", "resonance_l2"], drop_empty=True, drop_duplicates=True, **COLUMNS,
    )  # fmt: skip
    assert found.reasons[4:] == ["empty completion", "same prompt as row 0"]
    for name in ("rank", "resonance_l2"):
        assert found.table[name].is_null().to_pylist() == [False] * 4 + [True] * 2


def test_scores_belong_to_their_signals(tiny_llama, dataset, tokenizer, tmp_path):
    def score(signals, folder=tmp_path / "out") -> ScoreTable:
        options = {"output": folder, "signals": signals, **COLUMNS}
        return score_dataset(tiny_llama(), dataset.select(range(6)), tokenizer, arguments(), **options)

    first = score(["rank", "entropy"])
    again = score(["entropy", "rank", "entropy"])
    assert again.table.equals(first.table)
    assert again.direction("rank") == "largest"
    for other in (None, "rank", "all"):
        with pytest.raises(InputError, match=r"made from something else: they differ in signals \("):
            score(other)
    plain = tmp_path / "plain"
    bytes_without = score(None, plain).save(tmp_path / "copy.parquet").read_bytes()
    assert score([], plain).table.equals(score((), plain).table)
    assert (plain / "scores.parquet").read_bytes() == bytes_without
    with pytest.raises(InputError, match="signals"):
        score("rank", plain)


def test_an_unknown_signal_is_refused_before_anything_is_loaded(dataset, tmp_path):
    with pytest.raises(InputError, match=r"got 'entrop'. Did you mean 'entropy'"):
        score_dataset("/nowhere/model", dataset, args=arguments(), signals=["rank", "entrop"], output=tmp_path / "out")
    with pytest.raises(InputError, match=r"There is no argument signal=. Did you mean signals=?"):
        score_dataset("/nowhere/model", dataset, signal="rank")
    with pytest.raises(InputError, match=r"got 'entrop'. Did you mean 'entropy'"):
        score_stream("/nowhere/model", dataset.to_iterable_dataset(), tmp_path / "out", signals="entrop")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_pass_resumes_with_its_signals(tiny_llama, dataset, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "LEAST_LOST", 0.0)
    monkeypatch.setattr(passes, "LOST_SHARE", 0.0)

    def score(folder: Path, signals="all") -> bytes:
        options = {"output": folder, "signals": signals, "tokens_per_batch": 100, **COLUMNS}
        score_dataset(tiny_llama(), dataset, tokenizer, arguments(disable_tqdm=True), **options)
        return (folder / "scores.parquet").read_bytes()

    undisturbed, real, calls = score(tmp_path / "whole"), scoring.collate, []

    def stops(*args):
        calls.append(args)
        if len(calls) == 22:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "collate", stops)
        with pytest.raises(KeyboardInterrupt):
            score(tmp_path / "cut")
    assert list((tmp_path / "cut" / "parts").rglob("part-*"))
    with pytest.raises(InputError, match=r"made from something else: they differ in signals"):
        score(tmp_path / "cut", None)
    assert score(tmp_path / "cut") == undisturbed


def test_a_batch_measured_in_halves_has_the_signals_of_the_whole(tiny_llama, dataset, tokenizer, monkeypatch, whole):
    real = Recorder.__call__

    def too_large(self, batch, shared=None):
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError
        return real(self, batch, shared)

    monkeypatch.setattr(Recorder, "__call__", too_large)
    model = tiny_llama(dtype=torch.float64)
    found = score_dataset(model, dataset, tokenizer, arguments(), signals="all", **COLUMNS)
    for name in SIGNALS:
        np.testing.assert_allclose(found.column(name), whole.column(name), rtol=1e-9, err_msg=name)


@pytest.mark.filterwarnings("ignore::resofilter_trainer.config.ScoreWarning")
def test_bfloat16_weights_are_measured_again_in_float32_with_signals(tiny_llama, dataset, tokenizer):
    model = tiny_llama(dtype=torch.bfloat16)
    found = score_dataset(model, dataset, tokenizer, arguments(), signals="all", **COLUMNS)
    assert found.provenance.trust.in_float32
    assert all(np.isfinite(found.column(name)).all() for name in SIGNALS)


def test_a_stream_has_the_signals_of_its_rows(tiny_llama, tokenizer, tmp_path, monkeypatch):
    real = streaming._pieces
    monkeypatch.setattr(streaming, "_pieces", lambda stream, size: real(stream, size // 100))
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in ROWS]
    rows[:10] = [{"prompt": row["prompt"], "completion": ""} for row in rows[:10]]  # the whole first piece
    dataset, model = Dataset.from_list(rows), tiny_llama(dtype=torch.float64)

    def score(signals) -> ScoreTable:
        options = {"rows_per_piece": 1000, "drop_empty": True, "signals": signals, "args": arguments()}
        return score_stream(model, dataset.to_iterable_dataset(), tmp_path / "out", tokenizer, **options)

    names = ["rank", "el2n", "grand_head", "embedding_chain", "layer_vote"]
    found = score(names)
    together = score_dataset(model, dataset, tokenizer, arguments(), signals=names[::-1], drop_empty=True)
    for table in (found, score(",".join(names))):
        assert table.provenance.config["signals"] == names
        assert table.direction("el2n") == "smallest"
        for name in names:
            np.testing.assert_allclose(table.column(name), together.column(name), rtol=1e-9)
    with pytest.raises(InputError, match=r"made from something else: they differ in signals"):
        score("rank")


@pytest.mark.parametrize(("by", "dropped"), [("entropy", "largest"), ("el2n", "smallest"), ("rsr", "largest"),
                                             ("-entropy", "smallest"), ("-el2n", "largest"), ("resonance", "largest"),
                                             (("el2n",), "smallest"), ("loss", "largest")])  # fmt: skip
def test_a_selection_by_a_signal_drops_its_own_end(by, dropped, whole):
    name = "".join(by).removeprefix("-")
    order = np.argsort(whole.column(name), kind="stable")
    kept = order[:15] if dropped == "largest" else order[15:]
    for policy in (DataSelector(by=by), DiverseSelector(np.eye(len(whole)), by=by)):
        assert np.flatnonzero(policy.select(whole).keep).tolist() == sorted(kept)
    assert what_if(DataSelector(by=by), whole, None).drop == DataSelector(by=by).select(whole).policy["drop"]


def test_an_end_that_is_asked_for_holds_and_several_columns_have_none(whole):
    order = np.argsort(whole.column("el2n"), kind="stable")
    keep = DataSelector(by="el2n", drop="largest").select(whole).keep
    assert np.flatnonzero(keep).tolist() == sorted(order[:15])
    assert DataSelector(by=("el2n", "loss")).end(whole) == "largest"
    assert DataSelector(by="el2n").end() == "largest"
    assert "el2n" in DataSelector(by="el2n").select(whole).reason[int(order[0])]


def test_a_row_whose_signal_is_infinite_is_dropped_with_its_reason(whole):
    place = whole.table.column_names.index("rsr")
    values = whole.column("rsr").copy()
    values[3] = np.inf
    table = whole.table.set_column(place, whole.table.schema.field("rsr"), [values])
    assert DataSelector(by="rsr").select(ScoreTable(table, whole.provenance)).reason[3] == "rsr is inf"
