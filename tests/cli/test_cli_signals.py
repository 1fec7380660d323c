"""`--signals`: what is measured beside resonance, and what `select --by` makes of it."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import ROWS, files_in, refused, write

from resofilter_trainer.cli import score
from resofilter_trainer.cli.entry import main
from resofilter_trainer.scores.score_table import ScoreTable
from resofilter_trainer.scoring.further_signals import ALL_SIGNALS
from resofilter_trainer.selecting.selection import Selection


@pytest.fixture(scope="module")
def usual(tmp_path_factory, tiny_model_dir) -> list[str]:
    rows = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)
    return ["--model", str(tiny_model_dir), "--dataset", str(rows)]


@pytest.fixture(scope="module")
def scored(usual, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    main(["score", *usual, "--output", str(folder), "--signals", "all"])
    return folder


def test_the_help_names_every_signal(capsys):
    assert [*ALL_SIGNALS] == [*score.SIGNALS]
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    assert f"all, or some of {', '.join(ALL_SIGNALS)}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("given", [["entropy", "el2n"], ["el2n,entropy"], ["el2n,", "entropy"]])
def test_signals_are_given_in_any_way(given, usual, tmp_path):
    main(["score", *usual, "--output", str(tmp_path), "--signals", *given])
    assert ScoreTable.load(tmp_path).provenance.config["signals"] == ["entropy", "el2n"]


def test_signals_of_a_settings_file(usual, tmp_path):
    settings = tmp_path / "score.yaml"
    settings.write_text("signals: [entropy, rank]\n")
    main(["score", *usual, "--config", str(settings), "--output", str(tmp_path / "out")])
    assert ScoreTable.load(tmp_path / "out").provenance.config["signals"] == ["entropy", "rank"]


def test_a_second_model_is_the_reference_of_signals(usual, tiny_model_dir, tmp_path):
    options = ["--signals", "excess", "ifd", "--reference", str(tiny_model_dir)]
    main(["score", *usual, "--output", str(tmp_path), *options])
    scores = ScoreTable.load(tmp_path)
    assert scores.provenance.config["signals"] == ["ifd", "excess"]
    assert np.abs(scores.column("excess")).max() < 1e-5  # it is the same model
    assert scores.direction("excess") == "smallest"


@pytest.mark.parametrize(("by", "largest"), [("entropy", True), ("el2n", False), ("-el2n", True)])
def test_select_by_a_signal_drops_its_own_end(by, largest, scored, tmp_path):
    main(["select", str(scored), f"--by={by}", "--output", str(tmp_path)])
    values = ScoreTable.load(scored).column(by.removeprefix("-"))
    order = np.argsort(values if largest else -values, kind="stable")
    assert np.flatnonzero(Selection.load(tmp_path).keep).tolist() == sorted(order[:6])


def test_a_report_of_scores_with_signals_is_written(scored, tmp_path, capsys):
    main(["select", str(scored), "--by", "el2n", "--output", str(tmp_path / "kept")])
    main(["report", str(scored), "--selection", str(tmp_path / "kept"), "--output", str(tmp_path / "page")])
    assert (tmp_path / "page" / "report.html").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--signals", "entrpy"], "--signals must be one of 'resonance', "),
        (["--signals", "entropy", "ranks"], "got 'ranks'. Did you mean 'rank'?"),
        (["--signals", "all", "--criterion", "loss"], "--signals are measured beside resonance: leave --criterion"),
        (["--signals", "rank", "--layers", "all"], "--signals are measured beside resonance: leave --criterion"),
        (["--signal", "rank"], "Did you mean --signals?"),
        (["--signals", "excess"], "excess needs a second model: pass --reference"),
        (["--signals", "ifd", "--reference", "/nowhere"], "--reference is for the signals excess and superfiltering"),
        (["--reference", "/nowhere"], "--reference is for signals: pass --signals excess, superfiltering or all."),
        (["--signals", "excess", "--reference", "/nowhere"], "There is no reference model at '/nowhere'"),
        (["--signals", "verdict"], "verdict cannot be measured: the tokenizer has no token for the answer 'No'"),
        (["--signals", "ifd", "--streaming"], "ifd takes a forward of its own, and a stream is read once: leave it"),
        (["--signals", "all", "--streaming", "--reference", "/nowhere"], "leave --streaming or --reference out"),
        (
            ["--signals", "rank", "layer_vote", "--n_layers", "1"],
            "The signal 'layer_vote' cannot be measured: only one",
        ),
    ],
)
def test_signals_that_cannot_be_measured_are_refused_in_one_line(options, expected, usual, tmp_path, capsys):
    assert expected in refused(capsys, "score", *usual, "--output", tmp_path / "out", *options)
    assert files_in(tmp_path) == []


def test_select_names_the_signals_that_there_are(scored, tmp_path, capsys):
    message = refused(capsys, "select", scored, "--by", "entropi", "--output", tmp_path / "out")
    assert "no column 'entropi'" in message
    assert "entropy" in message
