"""The time line of a report: its numbers against plain counts of the lines, and what a click shows."""

from __future__ import annotations

import shutil
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers.ledgers import Line, drawn, part, write_ledger, write_part
from helpers.pages import data_of
from helpers.tables import make_provenance, make_scores

from resofilter_trainer import DataSelector, Ledger, read_contents, write_report
from resofilter_trainer.cli.entry import main
from resofilter_trainer.config import ScoreWarning
from resofilter_trainer.report.findings import of_timeline
from resofilter_trainer.report.run_charts import timeline_figure
from resofilter_trainer.report.timeline import MAX_POINTS, MAX_VISITS, SPIKES, curves_of, lives_of, timeline_of
from resofilter_trainer.selecting.results import NAME, selection_file

ROWS, STEPS = 160, 120
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def lines_of_run() -> tuple[list[Line], int]:
    """Three epochs, the second half of the rows in the first only; and the row of garbage, which step 30 trains."""
    lines = [line for line in drawn(STEPS, epochs=3) if line["epoch"] == 0 or line["sample_id"] < ROWS // 2]
    bad = next(line for line in lines if line["step"] == 30)
    bad["loss"] = 50.0
    return lines, bad["sample_id"]


LINES, BAD = lines_of_run()


def losses_of(ledger: Ledger) -> list[float | None]:
    """The loss of each step; None where filtering left no row in it."""
    return [None if np.isnan(loss) else loss for loss in ledger.steps()["loss"]]


def keep_first_half() -> np.ndarray:
    return np.arange(ROWS) < ROWS // 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = write_ledger(tmp_path_factory.mktemp("run"), LINES)
    scores = make_scores([float(row) for row in range(ROWS)], provenance=make_provenance(rows=ROWS, source={}))
    scores.save(output / NAME)
    for epoch in range(3):
        DataSelector(keep=0.5 if epoch else 1.0).select(scores).save(output / NAME / selection_file(epoch))
    return output


def test_the_time_line_is_that_of_the_ledger(run):
    ledger = Ledger.load(run)
    found, steps = timeline_of(ledger), ledger.steps()
    assert (found.per_point, found.first, found.last) == (1, 1, STEPS)
    assert [each["loss"] for each in found.steps] == losses_of(ledger)
    assert [each["step"] for each in found.steps] == steps["step"].tolist()
    spikes = sorted(ledger.spikes(), key=lambda each: each.step)
    assert [(each.step, each.loss, each.loss_level) for each in found.spikes] == [
        (each.step, each.loss, each.loss_level) for each in spikes
    ]
    (spike,) = (each for each in found.spikes if each.step == 30)
    assert (spike.rows[0]["sample_id"], spike.rows[0]["loss"]) == (BAD, 50)


def test_all_steps_that_stand_out_are_counted_and_the_first_are_listed(tmp_path):
    """Of 40, 25 stand out by their loss, and all of the 20 that are listed by their gradient norm."""
    drawn = np.random.default_rng(0).normal(0, 0.1, (2, 400))
    loss, norm = 2 + drawn[0], np.exp(drawn[1])
    loss[5:380:15] += 3
    norm[12:312:20] *= 100
    lines = [{"step": i + 1, "loss": loss[i], "grad_norm": norm[i]} for i in range(400)]
    write_part(tmp_path, part(lines), 1, 400)
    ledger = Ledger.load(tmp_path)
    found = timeline_of(ledger)
    every = ledger.spikes(most=400)
    assert found.stand_out == {
        "any": len(every),
        "loss": sum("loss" in each.by for each in every),
        "grad_norm": sum("grad_norm" in each.by for each in every),
    }
    assert (len(every), len(found.spikes)) == (40, SPIKES)
    assert of_timeline(found, "loss").endswith("; 25 steps stand out.")
    assert "A dot is one of the 20 steps that stand out most; " in timeline_figure(found, "grad_norm").about


def test_a_point_of_a_long_run_is_the_mean_of_several_steps(tmp_path):
    losses = np.random.default_rng(0).normal(5, 0.1, 2 * MAX_POINTS + 3)
    lines = [{"step": step, "loss": loss, "grad_norm": float("nan")} for step, loss in enumerate(losses, start=1)]
    write_part(tmp_path, part(lines), 1, len(losses))
    found = timeline_of(Ledger.load(tmp_path))
    assert found.per_point == 3
    np.testing.assert_allclose(
        [each["loss"] for each in found.steps[:-1]], losses[:-1].reshape(-1, 3).mean(1), rtol=1e-6
    )
    assert found.steps[-1]["step"] == len(losses)
    assert {each["grad_norm"] for each in found.steps} == {None}


def test_the_lives_of_rows(run):
    ledger = Ledger.load(run)
    lives = lives_of(ledger, [3, BAD, 9])
    for row, visits in zip((3, BAD, 9), lives, strict=True):
        own = [line for line in LINES if line["sample_id"] == row]
        assert [visit[:3] for visit in visits] == [(line["epoch"] + 1, line["step"], line["loss"]) for line in own]
        moved = [(line["layer_3"] + line["layer_5"]) / 2 for line in own]
        np.testing.assert_allclose([visit[3] for visit in visits], moved, rtol=1e-6)


def test_a_long_life_is_cut_and_one_without_layers_has_no_resonance(tmp_path):
    lines = [{"step": step, "sample_id": 2} for step in range(1, MAX_VISITS + 9)]
    write_part(tmp_path, part(lines, layers=[]), 1, len(lines), layers=[])
    ((*visits,), none) = lives_of(Ledger.load(tmp_path), [2, 5])
    assert [visit[1] for visit in visits] == [*range(1, MAX_VISITS + 1)]
    assert {visit[3] for visit in visits} == {None}
    assert none == []


def test_a_long_life_is_cut_while_it_is_read(tmp_path):
    """The first visits by step, whichever process has them; memory is that of a few."""
    count = 20_000
    lines = [{"step": step, "sample_id": 2, "process": step % 2} for step in range(1, count + 1)]
    for process in (1, 0):
        own = [line for line in lines if line["process"] == process]
        write_part(tmp_path, part(own, layers=[]), 1, count, process, 2, layers=[], row_group_size=100)
    ledger = Ledger.load(tmp_path)
    tracemalloc.start()
    (none, visits) = lives_of(ledger, [7, 2])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert none == []
    assert [visit[1] for visit in visits] == [*range(1, MAX_VISITS + 1)]
    assert peak < 500_000, peak


def test_what_filtering_did(run):
    found = curves_of(Ledger.load(run), keep_first_half())
    half = np.random.default_rng(0).permutation(ROWS) < ROWS / 2
    for each in found:
        some = {"kept": keep_first_half(), "dropped": ~keep_first_half(), "random half": half}[each["rows"]]
        own = [line["loss"] for line in LINES if line["epoch"] == each["epoch"] - 1 and some[line["sample_id"]]]
        assert each["loss"] == pytest.approx(np.mean(own), rel=1e-6)
        assert each["count"] == len(own)
    assert [(each["epoch"], each["rows"]) for each in found if each["rows"] == "dropped"] == [(1, "dropped")]
    assert {each["epoch"] for each in found if each["rows"] == "random half"} == {1, 2, 3}
    assert curves_of(Ledger.load(run), np.ones(ROWS, bool)) == []


def test_the_page_of_a_run(run, tmp_path):
    report = write_report(read_contents(run), tmp_path)
    data, text = data_of(report.path), report.path.read_text()
    layers = data["charts"]["loss_by_step"]["layer"]
    assert [each["loss"] for each in layers[0]["data"]["values"]] == losses_of(Ledger.load(run))
    assert 30 in marked(layers, "spike")
    assert marked(layers, "foot") == []
    curves = [each["data"]["values"] for each in data["charts"]["curves"]["layer"] if each["mark"]["type"] == "line"]
    assert sum(map(len, curves)) == len(report.numbers.curves) == 7
    assert data["samples"]["life"] == [
        [[*visit] for visit in visits] for visits in lives_of(Ledger.load(run), range(ROWS))
    ]
    assert '<details class="spike" id="spike-30"><summary>Step 30 stands out by its' in text
    assert f'<td class="number" data-row="{BAD}">{BAD}</td>' in text
    assert {each.stem for each in report.pictures} >= {"loss_by_step", "grad_norm_by_step", "curves"}
    assert 'id="left-out"' not in text


def marked(layers: list[dict], what: str) -> list[int]:
    """The steps that a chart marks: those that stand out (`spike`), or those left out, whose cross is at the foot."""
    values = [each["data"]["values"] for each in layers if each["mark"]["type"] == "point"]
    stand_out = [each["spike"] for points in values for each in points if "spike" in each]
    left_out = [each["step"] for points in values for each in points if "spike" not in each]
    return stand_out if what == "spike" else left_out


def test_left_out_steps_are_marked_and_listed(tmp_path):
    lines = [dict(line, left_out=line["step"] in (30, 77)) for line in LINES]
    output = write_ledger(tmp_path / "run", lines)
    make_scores([float(row) for row in range(ROWS)], provenance=make_provenance(rows=ROWS, source={})).save(
        output / NAME
    )
    report = write_report(read_contents(output), tmp_path / "page")
    timeline, text = report.numbers.timeline, report.path.read_text()
    assert timeline.left_out == [30, 77]
    assert {each.step: each.left_out for each in timeline.spikes}[30]
    for name in ("loss_by_step", "grad_norm_by_step"):
        assert marked(data_of(report.path)["charts"][name]["layer"], "foot") == [30, 77]
    assert '<p id="left-out">The updates of 2 steps were left out: 30, 77.</p>' in text
    assert text.count("; its update was left out</summary>") == sum(each.left_out for each in timeline.spikes)


def test_scores_without_a_ledger_have_no_time_line(run, tmp_path):
    make_scores([1.0, 2.0, 3.0]).save(tmp_path)
    report = write_report(read_contents(tmp_path), tmp_path)
    assert report.numbers.timeline is None
    assert data_of(report.path)["samples"]["life"] is None
    assert "h-timeline" not in report.path.read_text()


def test_a_ledger_that_cannot_be_read_is_told_and_the_page_is_written(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    sorted((tmp_path / "run" / NAME / "ledger" / "process-0").iterdir())[1].unlink()
    with pytest.warns(ScoreWarning, match="The report has no time line: .* lacks steps 11 to 20 of process 0"):
        assert read_contents(tmp_path / "run").ledger is None
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        main(["report", str(tmp_path / "run")])
    printed = capsys.readouterr()
    assert "warning: The report has no time line" in printed.err
    assert "Report: " in printed.out


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_click_on_a_spike_shows_its_rows_and_a_row_its_life(run, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    report = write_report(read_contents(run), tmp_path)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(report.path.as_uri())
        page.wait_for_selector("html[data-drawn]")
        spike = page.locator("#spike-30")
        assert not spike.evaluate("each => each.open")
        points = page.locator("#chart-loss_by_step .mark-symbol path")
        places = [each.step for each in report.numbers.timeline.spikes if "loss" in each.by]
        points.nth(places.index(30)).click()
        assert spike.evaluate("each => each.open")
        spike.locator(f'td[data-row="{BAD}"] button').click()
        assert page.locator("#found").inner_text().startswith("1 of the")
        page.locator(f'[aria-label="Row {BAD}"]').click()
        visits = page.locator("#samples .visit").all_inner_texts()
        browser.close()
    assert visits[0].split()[:3] == ["1", "30", "50.00"]
    assert len(visits) == len([line for line in LINES if line["sample_id"] == BAD])
