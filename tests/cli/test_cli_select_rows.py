"""`resofilter select` knows the rows that were scored again: beside images, from CSV, of version 0.1.0."""

from __future__ import annotations

import dataclasses

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image, Value, load_from_disk

from resofilter_trainer import ScoreTable, load_rows
from resofilter_trainer.cli.entry import main
from resofilter_trainer.io.digest import FIRST, hash_rows


def with_images(path) -> str:
    features = Features({"question": Value("string"), "answer": Value("string"), "image": Image()})
    columns = {
        "question": [f"q{i}" for i in range(8)],
        "answer": ["fox so what " * (i + 1) for i in range(8)],
        "image": [PIL.Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(8)],
    }
    Dataset.from_dict(columns, features=features).save_to_disk(path)
    return str(path)


def as_csv(path) -> str:
    path.with_suffix(".csv").write_text("question,answer\n" + "".join(f"{i},00{i} fox\n" for i in range(8)))
    return str(path.with_suffix(".csv"))


def score(source: str, folder, model, *options: str) -> None:
    mapped = ["--prompt_column", "question", "--completion_column", "answer"]
    main(["score", "--model", str(model), "--dataset", source, *mapped, "--output", str(folder), *options])


@pytest.mark.parametrize("make", [with_images, as_csv])
def test_the_same_rows_are_selected_from(make, tmp_path, tiny_model_dir):
    source = make(tmp_path / "rows")
    score(source, tmp_path / "scores", tiny_model_dir)
    main(["select", str(tmp_path / "scores"), "--output", str(tmp_path / "kept")])
    kept = load_from_disk(tmp_path / "kept" / "dataset")
    assert len(kept) == 4
    assert set(kept["answer"]) <= set(load_rows(source)["answer"])


def test_rows_scored_as_a_stream_are_known_from_the_file(tmp_path, tiny_model_dir):
    source = as_csv(tmp_path / "rows")
    score(source, tmp_path / "scores", tiny_model_dir, "--streaming")
    main(["select", str(tmp_path / "scores"), "--output", str(tmp_path / "kept")])
    assert len(load_from_disk(tmp_path / "kept" / "dataset")) == 4


def test_scores_of_the_first_version_are_selected_from_under_any_split(tmp_path, tiny_model_dir, capsys):
    source = as_csv(tmp_path / "rows")
    score(source, tmp_path / "scores", tiny_model_dir)
    scores = ScoreTable.load(tmp_path / "scores")
    first = {"dataset": source, "split": "validation", "content": hash_rows(load_rows(source), FIRST)}
    ScoreTable(scores.table, dataclasses.replace(scores.provenance, source=first)).save(tmp_path / "scores")
    main(["select", str(tmp_path / "scores"), "--output", str(tmp_path / "kept")])
    assert len(load_from_disk(tmp_path / "kept" / "dataset")) == 4
    as_csv(tmp_path / "rows")
    order = np.random.default_rng(0).permutation(8)
    load_rows(source).select(order).to_csv(source)
    with pytest.raises(SystemExit):
        main(["select", str(tmp_path / "scores"), "--output", str(tmp_path / "kept")])
    assert "not what was scored" in capsys.readouterr().err


def test_a_split_that_is_not_there(tmp_path, tiny_model_dir, capsys):
    with pytest.raises(SystemExit):
        score(as_csv(tmp_path / "rows"), tmp_path / "scores", tiny_model_dir, "--split", "validation")
    assert "has no split 'validation'" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--streaming"]])
def test_lines_that_train_run_the_code_of_the_model_as_scoring_did(more, tmp_path, tiny_model_dir, capsys):
    score(as_csv(tmp_path / "rows"), tmp_path / "scores", tiny_model_dir, "--trust_remote_code", *more)
    assert ScoreTable.load(tmp_path / "scores").provenance.source["trust_remote_code"] is True
    main(["select", str(tmp_path / "scores"), "--output", str(tmp_path / "kept")])
    assert "trust_remote_code=True)" in capsys.readouterr().out
