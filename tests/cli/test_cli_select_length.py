"""`resofilter select` with selections that resist length, from scores alone; and the commands that a card repeats."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
from helpers.commands import refused
from helpers.tables import make_provenance, make_scores

from resofilter_trainer import DataSelector, OnePerPrompt, ScoreTable, Selection
from resofilter_trainer.cli.entry import main
from resofilter_trainer.selecting.dataset_card import commands_of

VALUES = [float(value) for value in np.random.default_rng(1).permutation(20)]


@pytest.fixture
def scores(tmp_path) -> ScoreTable:
    made = make_scores(VALUES, provenance=make_provenance(rows=20, source={}))
    made.save(tmp_path / "scores")
    (tmp_path / "probe").mkdir()
    signals = [{"signal": name, "kind": "all", "auroc": value} for name, value in (("loss", 0.8), ("layer_2", 0.4))]
    (tmp_path / "probe" / "probe.json").write_text(json.dumps({"signals": signals}))
    (tmp_path / "select.yaml").write_text("by: loss,-num_tokens\nweights: [0.7, 0.6]\n")
    (tmp_path / "band.yaml").write_text("by: loss\nlength_out: true\nband: [0.1, 0.7]\n")
    return made


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ("--by loss --length_out", DataSelector(by="loss", length_out=True)),
        ("--band 0.1 0.7", DataSelector(band=(0.1, 0.7))),
        ("--by loss,-num_tokens --weights 0.7 0.6", DataSelector(by={"loss": 0.7, "-num_tokens": 0.6})),
        ("--config select.yaml", DataSelector(by={"loss": 0.7, "-num_tokens": 0.6})),
        ("--config band.yaml", DataSelector(band=(0.1, 0.7), by="loss", length_out=True)),
        ("--by=-layer_2 --weights 2", DataSelector(by={"-layer_2": 2})),
        ("--votes probe", DataSelector(by={"+loss": 0.6, "-layer_2": 0.2})),
        ("--per_prompt 1", OnePerPrompt()),
        ("--per_prompt 2 --by score --drop smallest", OnePerPrompt(by="score", drop="smallest", keep=2)),
    ],
)
def test_the_command_selects_as_the_policy(options, policy, scores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["select", "scores", *options.split(), "--output", "kept"])
    found, expected = Selection.load("kept"), policy.select(scores)
    assert found.reason == expected.reason
    assert 0 < found.keep.sum() < 20

    command = commands_of(scores.provenance, found.policy, found.reason, None)[-1]
    main([*shlex.split(command)[1:], "--output", "again"])
    assert Selection.load("again").reason == expected.reason
    assert "DataSelector" in repr(policy) or "--per_prompt" in command


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--weights 0.7", "--weights has 1 weight for 1 column: pass one for each in --by"),
        ("--by loss,score --weights 0.7", "--weights has 1 weight for 2 columns: pass"),
        ("--by loss --weights -1", "The weight of loss must be a finite number of at least 0"),
        ("--votes probe --by loss", "--votes has the columns and their weights: leave --by and --weights out."),
        ("--votes nowhere", "There is no 'nowhere/probe.json'"),
        ("--band 0.7 0.1", "begins at 0.7 and ends at 0.1"),
        ("--band 0.1 0.7 --keep 0.5", "got --keep and --band"),
        ("--by num_tokens --length_out", "--length_out takes num_tokens out: rank by another column."),
        ("--per_prompt 1 --keep 0.5", "--per_prompt says which rows are kept: leave --keep out."),
        ("--per_prompt 1 --length_out", "--per_prompt says which rows are kept: leave --length_out out."),
        ("--per_prompt 0", "must be a whole number of at least 1, got 0"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(options, named, scores, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, "select", "scores", *options.split(), "--output", "kept")
