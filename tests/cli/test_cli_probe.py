"""`resofilter probe`: the table, the files, and that other commands take what it recommends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from helpers.commands import files_in, refused, write
from helpers.probes import QUESTIONS

from resofilter_trainer import ProbeResult, ScoreTable, Selection
from resofilter_trainer.cli import probe
from resofilter_trainer.cli.entry import main
from resofilter_trainer.probe.faults import FAULTS
from resofilter_trainer.probe.findings import LABELLED
from resofilter_trainer.probe.recommendation import Recommendation
from resofilter_trainer.probe.recommended import settings_text

COLUMNS = ["--prompt_column", "question", "--completion_column", "answer"]
OWN = "def loud(row):\n    return {**row, 'completion': row['completion'].upper()}\n"


@pytest.fixture(scope="module")
def usual(tmp_path_factory, tiny_model_dir) -> list[str]:
    rows = [{**row, "bad": place % 3 == 0} for place, row in enumerate(QUESTIONS)]
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    return ["--model", str(tiny_model_dir), "--dataset", str(path), *COLUMNS]


@pytest.fixture(scope="module")
def probed(usual, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed") / "probe"
    few = ["--no_self_made", "--kinds", "cut,", "boilerplate", "--faults_per_kind", "12", "--precision", "float32"]
    main(["probe", *usual, "--output", str(folder), *few])
    return folder


def test_it_writes_whole_results(probed):
    found = ProbeResult.load(probed)
    assert {"cut", "boilerplate", "all"} == {each["kind"] for each in found.signals}
    assert {"probe.json", "recommended.yaml", "report.html", "scores/scores.parquet"} <= {*files_in(probed)}
    assert json.loads((probed / "probe.json").read_text())["recommendation"].keys() >= {"signal", "drop", "reason"}


def test_the_same_again_prints_the_table_and_measures_nothing(usual, probed, capsys, tmp_path):
    found = ProbeResult.load(probed)
    settings = ["--no_self_made", "--kinds", "cut", "boilerplate", "--faults_per_kind", "12", "--precision", "float32"]
    main(["probe", *usual, "--output", str(probed), *settings])
    printed = capsys.readouterr().out
    assert "Scoring" not in printed
    lines = printed.split("\n")
    assert max(map(len, lines[: lines.index("")])) <= 120
    assert [line.split(" ")[0] for line in lines if line.split(" ")[0] in found.ranked] == found.ranked
    assert "cut: truncation" in printed
    assert f"Next: resofilter score --config {probed / 'recommended.yaml'}, then resofilter select" in printed


def test_score_and_select_take_the_very_file(usual, probed, tmp_path):
    config = str(tmp_path / "recommended.yaml")
    wanted = Recommendation("rank", "smallest", "It finds what was asked for.", length_out=True)
    Path(config).write_text(settings_text(wanted, ProbeResult.load(probed).provenance))
    settings = yaml.safe_load(Path(config).read_text())
    main(["score", *usual, "--config", config, "--output", str(tmp_path / "scores")])
    main(["select", str(tmp_path / "scores"), "--config", config, "--output", str(tmp_path / "kept")])
    policy = Selection.load(tmp_path / "kept").policy
    assert policy["drop"] == settings["select"]["drop"]
    by = policy["by"] if isinstance(policy["by"], list) else [policy["by"]]
    assert by == settings["select"]["by"]
    assert ScoreTable.load(tmp_path / "scores").provenance.config.get("signals") == settings.get("score", {}).get(
        "signals"
    )


def test_a_probe_without_a_recommendation_keeps_all_rows(usual, probed, tmp_path):
    (tmp_path / "recommended.yaml").write_text("# None of these finds it.\nselect:\n  keep: 1.0  # all rows\n")
    config = ["--config", str(tmp_path / "recommended.yaml")]
    main(["score", *usual, *config, "--output", str(tmp_path / "scores")])
    main(["select", str(tmp_path / "scores"), *config, "--output", str(tmp_path / "kept")])
    assert Selection.load(tmp_path / "kept").keep.all()


def test_report_shows_a_probe(probed, tmp_path, capsys):
    main(["report", str(probed), "--output", str(tmp_path)])
    assert (tmp_path / "report.html").read_text() == (probed / "report.html").read_text()
    assert f"Report: {tmp_path / 'report.html'}" in capsys.readouterr().out
    assert "holds a probe, whose page has no --title" in refused(capsys, "report", probed, "--title", "x")


def test_labels_and_a_fault_of_ones_own(usual, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    config = tmp_path / "run.yaml"
    config.write_text(f"kinds: none\nfault: '{tmp_path / 'own.py'}:loud'\nsignals: [loss, rank]\nwrong_column: bad\n")
    main(["probe", *usual, "--config", str(config), "--output", str(tmp_path / "out"), "--precision", "float32"])
    found = ProbeResult.load(tmp_path / "out")
    assert found.evidence == LABELLED
    assert {each["kind"] for each in found.signals} == {LABELLED, "loud", "all"}
    assert {each["signal"] for each in found.signals} == {"loss", "rank", "num_tokens"}


def test_the_help_names_every_kind(capsys):
    assert [*FAULTS] == [*probe.KINDS]
    with pytest.raises(SystemExit):
        main(["probe", "--help"])
    assert f"some of {', '.join(FAULTS)}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--kinds", "cutt"], "--kinds must be one of "),
        (["--signals", "rnk"], "Did you mean 'rank'?"),
        (["--rows", "5"], "--rows must be a whole number of at least 20, got 5."),
        (["--wrong_column", "ban"], "The dataset has no column 'ban', named as --wrong_column. Did you mean 'bad'?"),
        (["--wrong_column", "answer"], "Row 0: --wrong_column 'answer' has 'we add 0 and 1"),
        (["--kinds", "none", "--no_self_made"], "No fault can be planted in these rows."),
        (["--writer", "m", "--no_self_made"], "--writer writes the answers that --no_self_made leaves out"),
        (["--fault", "x"], "A fault is a function, file.py:function or module:function, got 'x'."),
        (["--self_made"], "Did you mean --no_self_made?"),
    ],
)
def test_bad_input_is_one_line_before_any_work(options, expected, usual, tmp_path, capsys):
    assert expected in refused(capsys, "probe", *usual, "--output", tmp_path / "out", *options)
    assert files_in(tmp_path) == []


def test_too_few_rows_are_refused(usual, tmp_path, capsys):
    message = refused(capsys, "probe", *usual, "--split", "train[:12]", "--output", tmp_path / "out")
    assert message.startswith("12 of 12 rows can be probed, and at least 20 are needed")
