"""The card of a filtered dataset says how it was made, and its commands reproduce it."""

from __future__ import annotations

import dataclasses
import json
import shlex

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from helpers.tables import make_provenance, make_scores
from huggingface_hub import DatasetCard

from resofilter_trainer import DataSelector, RandomSelector, ScoreTable, Selection, SoftPruning
from resofilter_trainer.cli.entry import main
from resofilter_trainer.scores.cards import licence_of

PLACES = (5, 1)


def commands(card: DatasetCard) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in card.text.splitlines() if line.startswith("    resofilter ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model_dir):
    """Rows with an instruction and an input, one repeated, one empty, scored and selected by the commands."""
    folder = tmp_path_factory.mktemp("card's place")
    rows = [{"instruction": f"add {i}", "input": "now", "answer": f"is {i} 3"} for i in range(10)]
    rows[PLACES[0]], rows[PLACES[1]]["answer"] = rows[0], ""
    data = folder / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Rows\n")
    scoring = ["--model", str(tiny_model_dir), "--dataset", str(data), "--output", str(folder / "scores")]
    columns = ["--prompt_column", "instruction", "input", "--completion_column", "answer", "--separator", " = "]
    main(["score", *scoring, *columns, "--drop_duplicates", "--drop_empty", "--max_length", "32", "--eps", "1e-6"])
    main(["select", str(folder / "scores"), "--output", str(folder / "kept"), "--keep", "0.25", "--by=score,-loss"])
    return folder


def test_its_commands_give_the_same_selection(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    card = DatasetCard.load(folder / "kept" / "dataset" / "README.md")
    for command in commands(card):
        main(command)

    again, before = Selection.load(tmp_path / "kept"), Selection.load(folder / "kept")
    assert ScoreTable.load(tmp_path / "scores").table.equals(ScoreTable.load(folder / "scores").table)
    assert np.array_equal(again.keep, before.keep)
    assert again.reason == before.reason


def test_it_counts_rows_and_carries_the_licence_over(folder):
    card = DatasetCard.load(folder / "kept" / "dataset" / "README.md")
    kept = load_from_disk(str(folder / "kept" / "dataset"))

    assert card.data.to_dict()["license"] == "cc-by-4.0"
    assert f"{len(kept)} of 10 rows" in card.text
    assert "| 1 | empty completion |" in card.text
    assert "| 1 | same prompt as another row |" in card.text


def test_another_criterion_and_a_threshold_stand_in_the_commands():
    provenance = make_provenance(rows=3, config={"criterion": "ifd", "drop": "smallest"})
    selection = DataSelector(threshold="otsu").select(make_scores([1.0, 2.0, 9.0], provenance=provenance))
    score, select = commands(selection.card())

    assert "--criterion=ifd" in score
    assert {"--threshold=otsu", "--drop=smallest"} <= set(select)


def test_a_training_run_has_no_command():
    selection = Selection(np.array([True]), ["kept"], {"keep": 0.5, "epoch": 2}, make_provenance(rows=1).to_json())
    card = selection.card()
    assert not commands(card)
    assert "ResonanceCallback" in card.text


def test_no_licence_is_made_up():
    card = DataSelector().select(make_scores([1.0, 2.0])).card()
    assert "license" not in card.data.to_dict()
    assert "Licence: see the source dataset." in card.text


def test_text_of_a_dataset_cannot_break_out_of_the_card():
    reasons = ["kept", "<script>x</script> | [a](b)\n# Title `c`"]
    provenance = make_provenance(rows=2, model="a`b```\n# c | d", source={"dataset": "<b>rows</b>\n---\n"})
    policy = dataclasses.asdict(DataSelector())
    text = Selection(np.array([True, False]), reasons, policy, provenance.to_json()).card(name="*x*\n---").text

    assert "\n# Title" not in text
    assert "\n# c" not in text
    assert "\\<script\\>" in text
    assert "\\[a\\](b)" in text


def test_scores_become_columns_of_the_kept_rows():
    scores = make_scores([3.0, None, 1.0, 2.0])
    selection = DataSelector(keep=0.5).select(scores)
    rows = selection.annotate(Dataset.from_dict({"text": list("abcd")}), scores)

    assert rows["text"][:] == ["c", "d"]
    assert rows["resofilter_score"][:] == [1.0, 2.0]
    assert rows["resofilter_loss"][:] == [0.5, 1.0]
    assert "resofilter_reason" not in rows.column_names


GROUPED = {
    "a share in every group": (DataSelector(), {"groups": ["a", "b", "a"]}),
    "a share for each group": (DataSelector(keep={"a": 0.5, "b": 1.0}), {"groups": ["a", "b", "a"]}),
    "lots": (SoftPruning(), {}),
    "random": (RandomSelector(), {}),
}


@pytest.mark.parametrize("name", GROUPED)
def test_what_no_command_can_repeat_has_none(name):
    policy, more = GROUPED[name]
    card = policy.select(make_scores([1.0, 2.0, 3.0]), **more).card()
    assert not commands(card)
    assert "In Python" in card.text


def test_the_column_of_groups_stands_in_the_command(folder, tmp_path):
    main(["select", str(folder / "scores"), "--output", str(tmp_path), "--group_column", "input"])
    assert "--group_column=input" in commands(DatasetCard.load(tmp_path / "dataset" / "README.md"))[1]


LICENCES = {
    "in its folder": ("rows/README.md", "---\nlicense: mit\n---\n", "rows", "mit"),
    "of something else beside a file": ("README.md", "---\nlicense: mit\n---\n", "rows/train.jsonl", None),
    "in a header that is no YAML": ("rows/README.md", "---\n: [\n---\n", "rows", None),
    "nowhere": ("rows/notes.txt", "", "rows", None),
    "of a file that is gone": ("rows/notes.txt", "", "rows/none.jsonl", None),
}


@pytest.mark.parametrize("name", LICENCES)
def test_the_licence_is_the_datasets_own(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").touch()
    file, text, source, expected = LICENCES[name]
    (tmp_path / file).write_text(text)
    assert licence_of(source) == expected
