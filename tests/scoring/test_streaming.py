"""A stream gets the scores of its rows, piece by piece; packed rows get those of the samples in them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers.samples import collate, make_samples
from helpers.scoring import arguments
from helpers.training import llama, rows
from trl import SFTTrainer

from resofilter_trainer import (
    DataSelector,
    InputError,
    Recorder,
    ResonanceConfig,
    ScoreTable,
    score_dataset,
    score_stream,
    unpack,
)
from resofilter_trainer.cli.entry import main
from resofilter_trainer.data import fingerprints
from resofilter_trainer.data.files import load_rows, load_stream
from resofilter_trainer.io.digest import hash_rows
from resofilter_trainer.scores.score_table import SCORES_FILE
from resofilter_trainer.scoring import stream as streaming

ROWS = 60


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of 25 rows, as a thousand take long."""
    real = streaming._pieces
    monkeypatch.setattr(streaming, "_pieces", lambda stream, size: real(stream, size * 25 // 1000))


@pytest.fixture(scope="module")
def model(tokenizer):
    return llama(len(tokenizer))


def score(model, tokenizer, stream, output, **options) -> ScoreTable:
    options = {"rows_per_piece": 1000, "args": arguments(), **options}
    return score_stream(model, stream, output, tokenizer, **options)


def test_a_stream_scores_as_its_rows(model, tokenizer, tmp_path):
    dataset = rows(ROWS)
    found = score(model, tokenizer, dataset.to_iterable_dataset(num_shards=2), tmp_path)
    whole = score_dataset(model, dataset, tokenizer, arguments())
    for name in ("sample_id", "num_tokens", "length"):
        assert np.array_equal(found.column(name), whole.column(name))
    np.testing.assert_allclose(found.column("score"), whole.column("score"), rtol=5e-6)  # float32, in other batches
    assert found.provenance.rows == ROWS
    assert [path.name for path in tmp_path.iterdir()] == [SCORES_FILE]
    assert ScoreTable.load(tmp_path).table.equals(found.table)


def test_weights_are_hashed_once(model, tokenizer, tmp_path, monkeypatch):
    real, hashed = streaming.hash_weights, list[object]()
    monkeypatch.setattr(streaming, "hash_weights", lambda model: hashed.append(model) or real(model))
    monkeypatch.setattr(fingerprints, "hash_weights", streaming.hash_weights)
    found = score(model, tokenizer, rows(ROWS).to_iterable_dataset(), tmp_path)
    assert hashed == [model]
    assert found.provenance.weights == real(model)


def test_a_selection_filters_the_stream(model, tokenizer, tmp_path):
    dataset = rows(ROWS)
    scores = score(model, tokenizer, dataset.to_iterable_dataset(num_shards=3), tmp_path)
    assert ScoreTable.concatenate([scores], dataset=dataset).provenance.source["content"] == hash_rows(dataset)
    selection = DataSelector(keep=0.4).select(scores)
    assert list(selection.apply(dataset.to_iterable_dataset())) == list(selection.apply(dataset))
    with pytest.raises(InputError, match="the stream has more"):
        list(selection.apply(rows(ROWS + 1).to_iterable_dataset()))


@pytest.mark.parametrize("after", [1, *(pytest.param(each, marks=pytest.mark.slow) for each in (0, 2))])
def test_an_interrupted_pass_resumes(after, model, tokenizer, tmp_path, monkeypatch):
    whole = score(model, tokenizer, rows(ROWS).to_iterable_dataset(), tmp_path / "whole")
    real, scored = streaming.score_dataset, []

    def stops(*args, **kwargs):
        if len(scored) == after:
            raise KeyboardInterrupt
        scored.append(args[1])
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "score_dataset", stops)
        with pytest.raises(KeyboardInterrupt):
            score(model, tokenizer, rows(ROWS).to_iterable_dataset(), tmp_path / "cut")
    found = score(model, tokenizer, rows(ROWS).to_iterable_dataset(), tmp_path / "cut")
    assert found.table.equals(whole.table)
    assert (tmp_path / "cut" / SCORES_FILE).read_bytes() == (tmp_path / "whole" / SCORES_FILE).read_bytes()


@pytest.mark.parametrize(
    ("kind", "read"), [pytest.param("files", [0, 2], marks=pytest.mark.slow), ("memory", [0, 1, 2])]
)
def test_a_finished_shard_is_not_read_again(kind, read, model, tokenizer, tmp_path, monkeypatch, capsys):
    """Two of three shards are finished; without files that stay the same, their rows are read again and compared."""
    dataset = rows(60)
    for shard in range(3):
        dataset.shard(3, shard).to_parquet(tmp_path / "files" / f"{shard}.parquet")

    def stream(dataset=dataset):
        parts = str(tmp_path / "files")
        return dataset.to_iterable_dataset(num_shards=3) if kind == "memory" else load_stream(parts)

    real, pieces, scored, found = streaming.score_dataset, streaming._pieces, [], []

    def stops(*args, **kwargs):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(args[1][0]["prompt"])
        return real(*args, **kwargs)

    def noted(stream, size):
        for piece in pieces(stream, size):
            found.append(dataset["prompt"].index(piece[0]["prompt"]) // 20)
            yield piece

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "score_dataset", stops)
        with pytest.raises(KeyboardInterrupt):
            score(model, tokenizer, stream(), tmp_path / "cut")
        scored.clear()
        patch.setattr(streaming, "_pieces", noted)
        patch.setattr(streaming, "score_dataset", lambda *args, **kwargs: scored.append(0) or real(*args, **kwargs))
        shutil.copytree(tmp_path / "cut", tmp_path / "changed")
        shutil.copytree(tmp_path / "cut", tmp_path / "damaged")
        capsys.readouterr()
        score(model, tokenizer, stream(), tmp_path / "cut")
    assert found == read
    assert len(scored) == 2  # the first piece, by which model and settings are compared, and what was missing
    assert "Of 3 shards of the stream, 2 are finished." in capsys.readouterr().out
    score(model, tokenizer, stream(), tmp_path / "whole")
    assert (tmp_path / "cut" / SCORES_FILE).read_bytes() == (tmp_path / "whole" / SCORES_FILE).read_bytes()
    assert ScoreTable.load(tmp_path / "cut").provenance.source["content"].startswith("shards:20=")
    table = tmp_path / "damaged" / "pieces" / "000001" / "000000" / SCORES_FILE
    if kind == "files":
        table.write_bytes(table.read_bytes()[:-9])
        with pytest.raises(InputError, match=r"truncated.* Remove '.*000001': its rows are measured again"):
            score(model, tokenizer, stream(), tmp_path / "damaged")
    table.unlink()
    score(model, tokenizer, stream(), tmp_path / "damaged")
    assert (tmp_path / "damaged" / SCORES_FILE).read_bytes() == (tmp_path / "whole" / SCORES_FILE).read_bytes()
    other = Dataset.from_list(
        [*dataset.to_list()[:30], {"prompt": "new ", "completion": "row"}, *dataset.to_list()[31:]]
    )
    other.shard(3, 1).to_parquet(tmp_path / "files" / "1.parquet")
    with pytest.raises(InputError, match=r"^Rows 0 to 19 of shard 1 of the stream's 3 .*something else.* dataset"):
        score(model, tokenizer, stream(other), tmp_path / "changed")


def test_pieces_of_an_earlier_version_are_refused(model, tokenizer, tmp_path):
    earlier = tmp_path / "pieces" / "000000"
    score_dataset(model, rows(25), tokenizer, arguments(), None, earlier)
    with pytest.raises(InputError, match=r"holds pieces of an earlier version.*remove that folder"):
        score(model, tokenizer, rows(ROWS).to_iterable_dataset(), tmp_path)


def test_a_stream_that_changed_is_refused(model, tokenizer, tmp_path, monkeypatch):
    changed = [*rows(30).to_list(), {"prompt": "new ", "completion": "row"}, *rows(60).to_list()[31:]]
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "together", lambda *args: 1 / 0)  # all pieces are finished, the table is not
        with pytest.raises(ZeroDivisionError):
            score(model, tokenizer, rows(ROWS).to_iterable_dataset(), tmp_path)
    with pytest.raises(InputError, match=r"Rows 25 to 49 of the stream .* something else.* dataset"):
        score(model, tokenizer, Dataset.from_list(changed).to_iterable_dataset(), tmp_path)
    score(model, tokenizer, rows(ROWS).to_iterable_dataset(), tmp_path)
    with pytest.raises(InputError, match="holds scores of other rows"):
        score(model, tokenizer, Dataset.from_list(changed).to_iterable_dataset(), tmp_path)
    with pytest.raises(InputError, match=r"something else.* model weights"):
        score(llama(len(tokenizer), seed=3), tokenizer, rows(ROWS).to_iterable_dataset(), tmp_path)
    with pytest.raises(InputError, match=r"something else.* n_layers \(3 / 2\)"):
        score(model, tokenizer, rows(ROWS).to_iterable_dataset(), tmp_path, config=ResonanceConfig(n_layers=2))


def test_a_stream_of_chat_rows_says_once_how_it_reads_them_and_keeps_every_reason(model, tokenizer, tmp_path, capsys):
    talk = [{"from": "human", "value": "what is 1 ?"}, {"from": "gpt", "value": "one"}]
    listed = [{"conversations": [*talk[:1], {**talk[1], "value": f"it is {i}"}], "tools": ""} for i in range(60)]
    listed[3]["tools"] = "[{"
    for row in listed[50:]:  # the whole last piece
        row["conversations"] = [None]
    stream = Dataset.from_list(listed).to_iterable_dataset()
    with pytest.raises(InputError, match=r"^Rows 0 to 24 of the stream .*1 of 25 rows .*Row 3: column 'tools'"):
        score(model, tokenizer, stream, tmp_path / "refused")
    capsys.readouterr()
    found = score(model, tokenizer, stream, tmp_path / "kept", drop_empty=True)
    assert capsys.readouterr().out.count("role human was read as user") == 1
    assert found.reasons[50:] == ["message 0 is null"] * 10
    assert "'tools' is no JSON" in found.reasons[3]
    assert found.scored.sum() == 49
    whole = score_dataset(model, Dataset.from_list(listed), tokenizer, arguments(), drop_empty=True)
    np.testing.assert_allclose(found.column("score"), whole.column("score"), rtol=5e-6)  # float32, in other batches


def test_rows_that_cannot_be_scored_keep_their_positions(model, tokenizer, tmp_path):
    listed = rows(55).to_list()
    listed[30] = listed[27]
    listed[50:] = [{"prompt": f"nothing {i} ", "completion": ""} for i in range(5)]  # the whole last piece
    stream = Dataset.from_list(listed).to_iterable_dataset()
    found = score(model, tokenizer, stream, tmp_path, drop_duplicates=True, drop_empty=True)
    assert found.reasons[30] == "same prompt as row 27"
    assert found.reasons[50:] == ["empty completion"] * 5
    assert found.column("sample_id").tolist() == list(range(55))
    assert found.scored.sum() == 49
    assert found.provenance.trust.saturation == pytest.approx(np.ptp(found.column("score")[found.scored]) / 1e-5)


def test_a_stream_without_a_row_that_can_be_scored_is_refused(model, tokenizer, tmp_path):
    stream = Dataset.from_list([{"prompt": "a", "completion": ""}] * 3).to_iterable_dataset()
    with pytest.raises(InputError, match="no rows that can be scored"):
        score(model, tokenizer, stream, tmp_path, drop_empty=True)


def test_another_run_is_refused(model, tokenizer, tmp_path, monkeypatch):
    real = streaming.score_dataset

    def meanwhile(*args, **kwargs):
        command = "import sys; from pathlib import Path; from resofilter_trainer.io.files import folder_lock\n"
        command += "with folder_lock(Path(sys.argv[1])): pass"
        done = subprocess.run([sys.executable, "-c", command, tmp_path], capture_output=True, text=True)
        assert "Another run writes to" in done.stderr
        return real(*args, **kwargs)

    monkeypatch.setattr(streaming, "score_dataset", meanwhile)
    score(model, tokenizer, rows(3).to_iterable_dataset(), tmp_path)


def test_scores_in_the_folder_are_returned(model, tokenizer, tmp_path, monkeypatch):
    first = score(model, tokenizer, rows(ROWS).to_iterable_dataset(), tmp_path)
    monkeypatch.setattr(streaming, "score_dataset", None)  # is not called again
    assert score(model, tokenizer, rows(ROWS).to_iterable_dataset(), tmp_path).table.equals(first.table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_per_piece": 1}, "multiple of 1000"),
        ({"stream": rows(3)}, "A stream is needed, got Dataset"),
        ({"sharded": True}, "leave sharded out"),
    ],
)
def test_what_cannot_work_is_refused(change, message, model, tokenizer, tmp_path):
    settings = {"stream": rows(3).to_iterable_dataset(), **change}
    with pytest.raises(InputError, match=message):
        score(model, tokenizer, output=tmp_path, **settings)


def test_the_pieces_of_a_stream_have_its_values(tmp_path):
    values = ["007", "[1]", {"a": -0.7}, {"b": [42.72962913176735, "1.50"]}, 18, None] * 10
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"x": value, "y": {"z": [value]}}) + "\n" for value in values))
    pieces = list(streaming._pieces(load_stream(str(path)), 1000))
    assert len(pieces) > 1
    assert [row for piece in pieces for row in piece] == [{"x": value, "y": {"z": [value]}} for value in values]
    assert hash_rows(pieces[0]) == hash_rows(load_rows(str(path)).select(range(len(pieces[0]))))


def test_an_empty_stream_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="no rows"):
        score(model, tokenizer, rows(3).to_iterable_dataset().take(0), tmp_path)


def test_from_the_shell(tmp_path, tiny_model_dir, capsys):
    rows(ROWS).to_json(tmp_path / "rows.jsonl")
    command = ["score", "--model", str(tiny_model_dir), "--dataset", str(tmp_path / "rows.jsonl"), "--streaming"]
    main([*command, "--output", str(tmp_path / "scores")])
    assert f"{ROWS} rows, {ROWS} scored" in capsys.readouterr().out
    main(["select", str(tmp_path / "scores"), "--output", str(tmp_path / "kept")])  # knows the rows by their hash
    assert len(load_from_disk(tmp_path / "kept" / "dataset")) == ROWS // 2


def test_the_hash_of_a_stream_is_that_of_its_rows(monkeypatch, model, tokenizer, tmp_path):
    monkeypatch.undo()
    dataset = rows(1100)
    digest = streaming.RowsDigest()
    for piece in streaming._pieces(dataset.to_iterable_dataset(), 1000):
        digest.add(piece)
    assert digest.hexdigest() == hash_rows(dataset)


# ---- packed rows


def test_packed_rows_are_unpacked_to_the_samples_that_they_are_made_of(model, tokenizer):
    dataset = rows(20)
    args = arguments(packing=True, max_length=96, padding_free=True)
    packed = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer).train_dataset
    assert "seq_lengths" in packed.column_names
    with pytest.raises(InputError, match=r"resofilter_trainer\.unpack"):
        score_dataset(model, packed, tokenizer, arguments())
    samples = unpack(packed)
    assert len(samples) == 20
    found = score_dataset(model, samples, tokenizer, arguments())
    whole = score_dataset(model, dataset, tokenizer, arguments())
    np.testing.assert_allclose(np.sort(found.column("loss")), np.sort(whole.column("loss")), rtol=1e-6)
    np.testing.assert_allclose(np.sort(found.column("score")), np.sort(whole.column("score")), rtol=1e-6)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, "not packed"),
        ({"input_ids": [[1, 2]], "seq_lengths": [[1]]}, "A packed row has 2 input_ids and seq_lengths of 1"),
    ],
)
def test_rows_that_are_not_packed_are_refused(columns, message):
    with pytest.raises(InputError, match=message):
        unpack(Dataset.from_dict(columns))


def test_a_padding_free_batch_is_measured_sample_by_sample(model):
    samples = make_samples(5)
    free = {name: torch.cat([sample[name] for sample in samples])[None] for name in ("input_ids", "labels")}
    free["position_ids"] = torch.cat([torch.arange(len(sample["input_ids"])) for sample in samples])[None]
    with Recorder(model, ResonanceConfig()) as record:
        found, truth = record(free), record(collate(samples))
    assert np.array_equal(found.num_tokens, truth.num_tokens)
    np.testing.assert_allclose(found.loss, truth.loss, rtol=1e-6)
    np.testing.assert_allclose(found.score, truth.score, rtol=1e-6)
