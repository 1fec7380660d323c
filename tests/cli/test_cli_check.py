"""`resofilter check`, and `select` with what it found."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.commands import refused, write
from helpers.tables import make_provenance, make_scores

from resofilter_trainer import Selection, TextChecks, load_rows
from resofilter_trainer.cli.entry import main
from resofilter_trainer.io.digest import hash_rows
from resofilter_trainer.selecting.dataset_card import commands_of

ROWS = [
    {"question": f"What is {row} and {row * 7}?", "answer": f"Take {row * 13}, and find {row}."} for row in range(8)
]
ROWS += [ROWS[0], {"question": "Why?", "answer": "We walk along the old road to the town and"}]
MAPPED = ["--prompt_column", "question", "--completion_column", "answer"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", ROWS)
    source = {"dataset": "rows.jsonl", "split": "train", "content": hash_rows(load_rows("rows.jsonl"))}
    preparation = {"max_length": 64, "prompt_column": ["question"], "completion_column": "answer"}
    provenance = make_provenance(rows=10, source=source, preparation=preparation)
    make_scores([float(row) for row in range(10)], provenance=provenance).save(tmp_path / "scores")
    return tmp_path


def test_what_is_found_is_printed_and_saved(place, capsys):
    main(["check", "--dataset", "rows.jsonl", *MAPPED, "--output", "checks"])
    printed = capsys.readouterr().out
    found = TextChecks.load("checks")
    assert (found.counts["exact_duplicate"], found.counts["cut"]) == (1, 1)
    assert found.source["dataset"] == "rows.jsonl"
    assert printed.startswith("10 rows checked.\n       1 exact_duplicate: repeats an earlier row. Drop them")
    assert "row 8: repeats row 0\n" in printed
    assert "row 9: ends in the middle, with 'and'\n" in printed
    assert printed.endswith("Next: resofilter select scores/ --checks checks --output kept/\n")


@pytest.mark.parametrize(("options", "dropped"), [([], [8, 9]), (["--checked", "cut"], [9])])
def test_select_drops_these_rows_first_and_the_card_says_how(options, dropped, place, capsys):
    main(["check", "--dataset", "rows.jsonl", *MAPPED, "--output", "checks"])
    main(["select", "scores", "--checks", "checks", *options, "--keep", "1.0", "--output", "kept"])
    selection = Selection.load("kept")
    assert [row for row in range(10) if not selection.keep[row]] == dropped
    assert selection.reason[9] == "ends in the middle, with 'and'"
    card = (place / "kept" / "dataset" / "README.md").read_text()
    assert "resofilter check --dataset=rows.jsonl --prompt_column=question --completion_column=answer" in card
    assert "--checks=checks --checked" in card


def test_the_card_has_the_commands_in_their_order():
    source = {"dataset": "a.jsonl", "checks": ["cut", "loop"]}
    policy = {"keep": 0.5, "drop": "largest", "threshold": None, "by": "score", "combine": "ranks"}
    policy |= {"stratify_by": None, "strata": 10}
    commands = commands_of(make_provenance(source=source), policy, ["kept"], None)
    assert [each.split()[1] for each in commands] == ["check", "score", "select"]
    assert commands[2].endswith("--checks=checks --checked cut loop --output=kept")
    plain = dataclasses.replace(make_provenance(), source={"dataset": "a.jsonl"})
    assert [each.split()[1] for each in commands_of(plain, policy, ["kept"], None)] == ["score", "select"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("check --output checks", "--dataset is missing."),
        ("check --dataset rows.jsonl", "--output is missing."),
        ("check --dataset rows.jsonl --output checks --only cuts", "There is no check 'cuts'. There are: exact"),
        ("select scores --checked cut --output kept", "--checked goes with --checks"),
        ("select scores --checks nowhere --output kept", "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(argv, named, place, capsys):
    assert named in refused(capsys, *argv.split())
