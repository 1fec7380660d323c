"""`resofilter inspect`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import refused, write
from helpers.ledgers import drawn, part, write_ledger, write_part
from helpers.tables import make_provenance, make_scores

from resofilter_trainer import DataSelector, Ledger, ScoreTable, Selection
from resofilter_trainer.cli.entry import main
from resofilter_trainer.selecting.results import NAME, selection_file

ROWS = 60
BAD = drawn(45, epochs=3)[33]["sample_id"]  # of the ninth step
TEXTS = [
    {"prompt": f"What is {row} + 1 ?", "completion": f" It is {row + 1}." + " long" * 90 * (row == BAD)}
    for row in range(ROWS)
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three epochs of 15 steps; row BAD has a loss of garbage in the first, and is not trained after it."""
    monkeypatch.chdir(tmp_path)
    lines = [{**line, "grad_norm": 1.5} for line in drawn(45, epochs=3)]
    next(line for line in lines if line["sample_id"] == BAD)["loss"] = 64.0
    write_ledger(tmp_path / "run", [line for line in lines if line["sample_id"] != BAD or line["epoch"] == 0])
    provenance = make_provenance(rows=ROWS, source={}, preparation={"max_length": 64})
    scores = make_scores([100.0 if row == BAD else float(row) for row in range(ROWS)], provenance=provenance)
    scores.save(tmp_path / "run" / NAME)
    for epoch in range(3):
        selection = DataSelector(keep=59 / 60 if epoch else 1.0).select(scores)
        selection.save(tmp_path / "run" / NAME / selection_file(epoch))
    write(tmp_path / "rows.jsonl", TEXTS)
    return tmp_path / "run"


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    main(["inspect", "run", *argv])
    return capsys.readouterr().out


def inspected(*argv: str) -> dict[str, Any]:
    main(["inspect", "run", *argv, "--json", "found.json"])
    found: dict[str, Any] = json.loads(Path("found.json").read_text())
    return found


def test_a_summary(run, capsys):
    steps, spike = Ledger.load(run).steps(), Ledger.load(run).row(BAD)["step"][0]
    said = printed(capsys)
    assert said.startswith(f"Steps 1 to 45 by 1 process, in {Path('run') / NAME / 'ledger'}:\n")
    assert f"178 lines with {steps['tokens'].sum():,} learnt tokens." in said
    mean = steps["loss"][:15].mean()
    assert f"  epoch 1: steps 1 to 15, 60 lines, mean loss {mean:.4g}, median gradient norm 1.5\n" in said
    assert "  epoch 3: steps 31 to 45, 59 lines" in said
    assert f"Steps that stand out: {spike}" in said
    assert said.endswith("Next: resofilter inspect run --spikes\n")
    assert inspected()["spikes"][0] == spike


def test_a_step(run, capsys):
    ledger = Ledger.load(run)
    rows = ledger.step(40).sort_values("share_of_loss", ascending=False)
    loss = ledger.steps()["loss"][39]
    said = printed(capsys, "--step", "40", "--shown", "3").splitlines()
    assert said[0].startswith(
        f"Step 40, epoch 3: loss {loss:.4g}, gradient norm 1.5, learning rate 0.0125, 4 lines with"
    )
    assert [line.split(":")[0] for line in said[1:]] == [f"  row {row}" for row in rows["sample_id"][:3]]
    first = rows.iloc[0]
    assert f"loss {first.loss:.4g}, {first.share_of_loss:.1%} of the step's loss" in said[1]
    found = inspected("--step", "40")
    assert found["loss"] == pytest.approx(loss)
    assert [row["sample_id"] for row in found["rows"]] == rows["sample_id"].tolist()
    assert sum(row["weight"] * row["loss"] for row in found["rows"]) == pytest.approx(loss)


def test_a_step_whose_update_was_left_out_says_so(run, capsys):
    spike = int(Ledger.load(run).row(BAD)["step"][0])
    other = next(line["sample_id"] for line in drawn(45, epochs=3) if line["step"] == spike + 1)
    lines = [{**line, "left_out": line["step"] == spike} for line in drawn(45, epochs=3)]
    next(line for line in lines if line["sample_id"] == BAD)["loss"] = 64.0
    write_ledger(run, lines)
    assert "learnt tokens, its update was left out\n" in printed(capsys, "--step", str(spike))
    assert "left out" not in printed(capsys, "--step", str(spike + 1))
    assert f"Steps that stand out: {spike}" in (said := printed(capsys))
    assert "The update of 1 step was left out." in said
    assert printed(capsys, "--spikes").count("  its update was left out\n") == 1
    life = printed(capsys, "--row", str(BAD)).splitlines()
    assert [line.endswith(", the update was left out") for line in life if "  step " in line] == [True, False, False]
    assert "left out" not in printed(capsys, "--row", str(other))
    found = inspected("--step", str(spike))
    assert (found["left_out"], found["rows"][0]["left_out"]) == (True, True)
    assert inspected()["updates_left_out"] == 1


def test_an_earlier_version_does_not_say_whose_update_was_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_part(tmp_path / "run", part(drawn(30)).drop_columns(["left_out"]), 1, 30)
    for argv in ([], ["--step", "3"], ["--row", "3"], ["--spikes", "--threshold", "0.1"]):
        assert "left out" not in printed(capsys, *argv)
    found = inspected("--step", "3")
    assert (found["left_out"], found["rows"][0]["left_out"]) == (None, None)
    assert inspected()["updates_left_out"] is None


def test_a_step_is_read_without_the_others(run, capsys):
    cut = sorted((run / NAME / "ledger" / "process-0").iterdir())[1]
    loss = Ledger.load(run).steps()["loss"][31]
    cut.write_bytes(cut.read_bytes()[:-100])
    assert printed(capsys, "--step", "32").startswith(f"Step 32, epoch 3: loss {loss:.4g}, gradient norm 1.5,")


def test_a_step_that_trained_no_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_part(tmp_path / "run", part([{"step": 1}]), 1, 2)
    assert printed(capsys, "--step", "2") == "Step 2: no row was trained\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--step", "1", "--window", "101"], "--window goes with --spikes or the summary."),
        (["--row", "9", "--most", "3"], "--most goes with --spikes or the summary."),
        (["--dynamics", "new", "--threshold", "5"], "--threshold goes with --spikes or the summary."),
        (["--row", "9", "--shown", "3"], "--shown goes with --step or --spikes."),
        (["--shown", "3"], "--shown goes with --step or --spikes."),
    ],
)
def test_a_setting_that_the_question_does_not_use(argv, says, run, capsys):
    assert refused(capsys, "inspect", "run", *argv) == says
    assert not Path("new").exists()


def test_the_settings_of_a_summary(run):
    assert len(inspected("--threshold", "0.1", "--window", "11", "--most", "3")["spikes"]) == 3


def test_spikes_with_their_texts(run, capsys):
    said = printed(capsys, "--spikes", "--dataset", "rows.jsonl").splitlines()
    assert said[0].endswith("stands out by its loss:")
    assert said[2] == "  gradient norm 1.5 at a level of 1.5, 0 standard deviations"
    assert said[3].startswith(f"  row {BAD}: explains ")
    assert said[4] == f"      prompt: What is {BAD} + 1 ?"
    assert said[5] == f"      completion: {' '.join(TEXTS[BAD]['completion'].split())[:200]}…"
    (spike, *_) = inspected("--spikes", "--most", "1")["spikes"]
    assert (spike["rows"][0]["sample_id"], spike["by"]) == (BAD, "loss")
    assert spike["rows"][0]["explains"] > 0.5
    assert "prompt" not in spike["rows"][0]


def test_a_loss_that_is_not_a_number_is_written_as_json_has_it(run, capsys):
    lines = [{**line, "loss": math.nan if line["sample_id"] == BAD else line["loss"]} for line in drawn(45, epochs=3)]
    write_ledger(Path("other"), lines)
    main(["inspect", "other", "--spikes", "--json", "found.json"])
    assert "standard deviations" in capsys.readouterr().out
    spike = json.loads(Path("found.json").read_text())["spikes"][0]
    assert (spike["loss"], spike["score"], spike["rows"][0]["sample_id"]) == (None, "inf", BAD)


def test_a_calm_run_has_no_spike(run, capsys):
    assert printed(capsys, "--spikes", "--threshold", "1e6") == (
        "No step stands out by 1e+06 robust standard deviations or more.\n"
    )


def test_a_row_s_life(run, capsys):
    visit = Ledger.load(run).row(BAD).iloc[0]
    reason = Selection.load(run / NAME / selection_file(1)).reason[BAD]
    said = printed(capsys, "--row", str(BAD), "--dataset", "rows.jsonl")
    assert said.startswith(f"Row {BAD}, trained 1 time:\n      prompt: What is {BAD} + 1 ?\n")
    assert f"  epoch 1: kept\n    step 9: loss 64, resonance {visit.resonance:.4g}, learning rate" in said
    assert said.endswith(f"  epoch 2: dropped ({reason})\n  epoch 3: dropped ({reason})\n")
    found = inspected("--row", "9")
    assert [each["epoch"] for each in found["visits"]] == [0, 1, 2]
    assert [each["kept"] for each in found["decisions"]] == [True] * 3


def test_dynamics_are_scores_that_select_takes(run, capsys):
    assert "Scores: dynamics" in printed(capsys, "--dynamics", "dynamics")
    scores = ScoreTable.load("dynamics")
    assert scores.column("mean_loss").argmax() == BAD
    main(["select", "dynamics", "--by", "mean_loss", "--keep", "0.5", "--output", "kept"])
    assert not Selection.load("kept").keep[BAD]
    assert not Path("run", NAME, "mean_loss").exists()


def test_a_dataset_without_texts(run, capsys):
    write(Path("tokens.jsonl"), [{"input_ids": [1, 2]}] * ROWS)
    said = printed(capsys, "--row", "9", "--dataset", "tokens.jsonl")
    assert said.startswith("'tokens.jsonl' has no texts to show, only input_ids.\nRow 9, trained 3 times:\n  epoch 1")


def test_steps_that_not_all_processes_have_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = drawn(20, processes=2)
    for process, last in ((0, 20), (1, 15)):
        own = [line for line in lines if line["process"] == process and line["step"] <= last]
        write_part(tmp_path / "run", part(own), 1, last, process, 2)
    said = printed(capsys)
    assert said.startswith("Steps 1 to 15 by 2 processes")
    assert "Left out are 5 steps after them, which not all processes have written." in said


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["nowhere"], "'nowhere' does not exist. Pass the output_dir of a run"),
        (["."], "'.' holds no ledger."),
        (["run", "--step", "46"], "Step 46 is not in the ledger, which has steps 1 to 45."),
        (["run", "--row", "60"], "There is no row 60: the run's dataset has 60 rows."),
        (["run", "--step", "1", "--row", "2"], "Pass one of --step, --spikes, --row and --dynamics"),
        (["run", "--dataset", "rows.jsonl"], "--dataset has the texts of --step, --spikes and --row"),
        (["run", "--step", "1", "--split", "train"], "--split goes with --dataset."),
        (["run", "--step", "1", "--shown", "0"], "--shown must be a whole number of at least 1, got 0."),
        (["run", "--spikes", "--window", "3"], "--window must be a whole number of at least 11, got 3."),
        (["run", "--step", "1", "--dataset", "short.jsonl"], "'short.jsonl' has 2 rows, and the scores are of 60."),
        (["run", "--dynamics", "run/resofilter"], "would replace the run's own scores: choose another folder."),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(argv, named, run, capsys):
    write(Path("short.jsonl"), TEXTS[:2])
    assert named in refused(capsys, "inspect", *argv)


def test_a_gap_is_told_in_the_shell_s_words(run, capsys):
    sorted((run / NAME / "ledger" / "process-0").iterdir())[1].unlink()
    assert "pass --partial for what the others have" in refused(capsys, "inspect", "run")
    assert "Steps 1 to 45" in printed(capsys, "--partial")


def test_another_dataset_where_the_run_has_no_scores(run, capsys):
    (run / NAME / "scores.parquet").unlink()
    write(Path("short.jsonl"), TEXTS[:2])
    said = refused(capsys, "inspect", "run", "--row", "9", "--dataset", "short.jsonl")
    assert said == "The run has row 9 and --dataset has 2 rows: it is another one."


def test_a_dataset_whose_rows_are_not_those_of_the_run(run, capsys):
    scores = ScoreTable.load(run / NAME)
    source = {"dataset": "rows.jsonl", "split": "train", "content": "0"}
    changed = dataclasses.replace(scores, provenance=dataclasses.replace(scores.provenance, source=source))
    changed.save(run / NAME)
    assert "is not what was scored" in refused(capsys, "inspect", "run", "--row", "9", "--dataset", "rows.jsonl")


def test_no_torch_is_imported_without_texts(run):
    code = "import sys; from resofilter_trainer.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "inspect", "run", "--spikes"], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
