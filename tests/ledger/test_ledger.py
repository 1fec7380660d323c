"""What a ledger answers, against the lines it was written from, and what it says where something is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from helpers.ledgers import LAYERS, Line, drawn, part, write_ledger, write_part
from helpers.tables import make_scores

from resofilter_trainer import DataSelector, InputError, Ledger
from resofilter_trainer.ledger import parts
from resofilter_trainer.ledger.ledger import frame_of
from resofilter_trainer.ledger.schema import LEDGER, PROCESS, VERSION, part_name
from resofilter_trainer.selecting.results import NAME, selection_file

LINES = drawn(45, seed=1, epochs=3)
TWO = drawn(45, seed=2, processes=2, epochs=3)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_ledger(tmp_path, LINES)


@pytest.fixture
def run_of_two(tmp_path: Path) -> Path:
    return write_ledger(tmp_path, TWO, processes=2)


def of_step(lines: list[Line], step: int) -> list[Line]:
    return [line for line in lines if line["step"] == step]


@pytest.mark.parametrize("below", [".", NAME, f"{NAME}/{LEDGER}"])
def test_a_run_its_results_and_its_ledger_are_the_same(run, below):
    ledger = Ledger.load(run / below)
    assert (ledger.first, ledger.last, ledger.processes, ledger.layers) == (1, 45, 1, [*LAYERS])
    assert repr(ledger) == "Ledger(steps 1 to 45, 1 process, 5 parts)"
    assert len(ledger) == len(LINES)


def test_all_lines_come_back_as_they_were_written(run):
    pd.testing.assert_frame_equal(Ledger.load(run).to_pandas(), frame_of(part(LINES)))


def test_lines_of_several_processes_are_in_the_order_of_training(run_of_two):
    ledger = Ledger.load(run_of_two)
    assert (ledger.processes, len(ledger)) == (2, len(TWO))
    pd.testing.assert_frame_equal(ledger.to_pandas(), frame_of(part(TWO)))


def test_some_columns_of_some_steps_are_read_in_batches(run_of_two):
    tables = [*Ledger.load(run_of_two).batches(["sample_id"], first=8, last=12)]
    assert [table.column_names for table in tables] == [["step", "sample_id"]] * 4
    found = sorted(
        zip(*(np.concatenate([table[name] for table in tables]) for name in ("step", "sample_id")), strict=True)
    )
    assert found == sorted((line["step"], line["sample_id"]) for line in TWO if 8 <= line["step"] <= 12)


def test_row_groups_are_read_as_one(tmp_path):
    write_part(tmp_path, part(LINES), 1, 45, row_group_size=7)
    ledger = Ledger.load(tmp_path)
    pd.testing.assert_frame_equal(ledger.to_pandas(), frame_of(part(LINES)))
    assert ledger.step(9)["sample_id"].tolist() == [line["sample_id"] for line in of_step(LINES, 9)]
    losses = [sum(line["weight"] * line["loss"] for line in of_step(LINES, step)) for step in range(1, 46)]
    np.testing.assert_allclose(ledger.steps()["loss"], losses, rtol=1e-12)


@pytest.mark.parametrize(("lines", "processes"), [(LINES, 1), (TWO, 2)])
def test_the_loss_of_a_step_is_the_weighted_sum_over_all_processes(tmp_path, lines, processes):
    steps = Ledger.load(write_ledger(tmp_path, lines, processes=processes)).steps()
    assert steps["step"].tolist() == [*range(1, 46)]
    for line in steps.to_dict("records"):
        own = of_step(lines, line["step"])
        assert line["loss"] == pytest.approx(sum(each["weight"] * each["loss"] for each in own), rel=1e-12)
        assert line["tokens"] == sum(each["num_tokens"] for each in own)
        assert (line["lines"], line["epoch"]) == (len(own), max(each["epoch"] for each in own))
        assert line["grad_norm"] == own[0]["grad_norm"]
        assert line["learning_rate"] == np.float32(own[0]["learning_rate"])


def test_a_row_without_a_learnt_token_adds_nothing_and_a_step_without_rows_has_no_loss(tmp_path):
    empty = {"step": 1, "loss": float("nan"), "weight": 0.0, "num_tokens": 0, "sample_id": 7, "layer_3": float("nan")}
    write_part(tmp_path, part([{"step": 1, "loss": 2.0, "layer_3": 1.0}, empty]), 1, 2)
    ledger = Ledger.load(tmp_path)
    steps = ledger.steps()
    assert (steps["loss"][0], steps["lines"].tolist(), steps["epoch"].tolist()) == (2.0, [2, 0], [0, -1])
    assert np.isnan(steps["loss"][1])
    assert ledger.step(1)["share_of_loss"].tolist() == [1.0, 0.0]
    assert len(ledger.step(2)) == 0


def test_the_shares_of_a_step(run):
    rows = Ledger.load(run).step(17)
    own = of_step(LINES, 17)
    loss = np.array([line["weight"] * line["loss"] for line in own])
    update = np.array([line["weight"] * (line["layer_3"] + line["layer_5"]) / 2 for line in own])
    np.testing.assert_allclose(rows["share_of_loss"], loss / loss.sum(), rtol=1e-5)
    np.testing.assert_allclose(rows["share_of_update"], update / update.sum(), rtol=1e-5)
    np.testing.assert_allclose(rows["resonance"], [(line["layer_3"] + line["layer_5"]) / 2 for line in own], rtol=1e-5)


def test_steps_whose_update_was_left_out(tmp_path):
    lines = [{**line, "left_out": line["step"] in (12, 31)} for line in TWO]
    ledger = Ledger.load(write_ledger(tmp_path, lines, processes=2))
    assert ledger.steps()["left_out"].dtype == "boolean"
    assert ledger.steps().query("left_out")["step"].tolist() == [12, 31]
    assert ledger.step(12)["left_out"].all()
    assert not ledger.step(13)["left_out"].any()
    row = of_step(lines, 12)[0]["sample_id"]
    expected = [line["step"] for line in lines if line["sample_id"] == row and line["left_out"]]
    assert ledger.row(row).query("left_out")["step"].tolist() == expected


def test_an_earlier_version_does_not_say_whose_update_was_left_out(tmp_path):
    """Its parts lack the column, also those before others of this version: nothing is known of their steps."""
    old, new = drawn(20), [{**line, "step": line["step"] + 20, "left_out": line["step"] == 5} for line in drawn(20)]
    write_part(tmp_path, part(old).drop_columns(["left_out"]), 1, 20)
    write_part(tmp_path, part(new), 21, 40)
    ledger = Ledger.load(tmp_path)
    found, steps = ledger.to_pandas(), ledger.steps()
    assert [*found] == ledger.columns
    for lines in (found, steps):
        assert lines["left_out"][lines["step"] <= 20].isna().all()
        assert lines["left_out"][lines["step"] > 20].notna().all()
        assert {*lines["step"][lines["left_out"].fillna(False)]} == {25}
    assert ledger.step(3)["left_out"].isna().all()
    columns = [table.column_names for table in ledger.batches(["left_out", "loss"], last=30)]
    assert columns == [["step", "left_out", "loss"]] * 2
    assert ledger.to_arrow(["loss", "left_out"])["left_out"].null_count == 20 * 4


def test_a_ledger_without_layers_has_no_share_of_the_update(tmp_path):
    write_part(tmp_path, part(LINES[:4], layers=[]), 1, 1, layers=[])
    rows = Ledger.load(tmp_path).step(1)
    assert rows["share_of_update"].isna().all()
    assert rows["share_of_loss"].sum() == pytest.approx(1)


@pytest.mark.parametrize("row", [0, 11, 59])
def test_a_row_s_life_is_every_visit(run, row):
    life = Ledger.load(run).row(row)
    own = [line for line in LINES if line["sample_id"] == row]
    assert len(own) == 3
    assert life["step"].tolist() == [line["step"] for line in own]
    assert life["loss"].tolist() == [line["loss"] for line in own]
    assert life["epoch"].tolist() == [0, 1, 2]


def test_a_row_s_life_has_all_pieces_and_processes(run_of_two):
    life = Ledger.load(run_of_two).row(5)
    own = [line for line in TWO if line["sample_id"] == 5]
    assert [*zip(life["step"], life["process"], strict=True)] == [(line["step"], line["process"]) for line in own]


def save_selections(run: Path, rows: int) -> list[str]:
    """Two epochs: all rows, then a half. Returns the reasons of the second."""
    scores = make_scores([float(row) for row in range(rows)])
    for epoch, keep in enumerate((1.0, 0.5)):
        selection = DataSelector(keep=keep).select(scores)
        selection.save(run / NAME / selection_file(epoch))
    return list(selection.reason)


def test_the_decisions_about_a_row(run):
    reasons = save_selections(run, 61)
    ledger = Ledger.load(run)
    assert ledger.decisions(3) == [(0, True, "kept"), (1, True, "kept")]
    assert ledger.decisions(60) == [(0, True, "kept"), (1, False, reasons[60])]
    assert reasons[60] == "largest 50 %"
    with pytest.raises(InputError, match=r"There is no row 61: the run's dataset has 61 rows\."):
        ledger.decisions(61)


# ---- what is missing


def test_a_step_that_does_not_exist(run):
    for step in (0, 46):
        with pytest.raises(InputError, match=f"Step {step} is not in the ledger, which has steps 1 to 45."):
            Ledger.load(run).step(step)
    with pytest.raises(InputError, match=r"step must be a whole number, got 1\.5\."):
        Ledger.load(run).step(1.5)


def test_a_row_that_was_never_trained(run):
    with pytest.raises(InputError, match=r"Row 60 was not trained in steps 1 to 45\.$"):
        Ledger.load(run).row(60)
    save_selections(run, 61)
    with pytest.raises(InputError, match=r"Row 60 was not trained .*: it was dropped \(largest 50 %\)\.$"):
        Ledger.load(run).row(60)
    with pytest.raises(InputError, match="There is no row 61"):
        Ledger.load(run).row(61)


def test_a_run_without_a_ledger(tmp_path):
    with pytest.raises(InputError, match=r"holds no ledger\. Pass the output_dir of a run with ResonanceCallback"):
        Ledger.load(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        Ledger.load(tmp_path / "none")
    (tmp_path / NAME / LEDGER / f"{PROCESS}0").mkdir(parents=True)
    with pytest.raises(InputError, match="has no part yet"):
        Ledger.load(tmp_path)


def test_parts_of_two_runs(run):
    write_part(run, part(of_step(LINES, 45)), 46, 50, run="r1")
    with pytest.raises(InputError, match=r"00000046-00000050\.parquet' is of another run"):
        Ledger.load(run).to_pandas()


def test_processes_of_two_runs(tmp_path):
    write_part(tmp_path, part(LINES), 1, 45, processes=2)
    write_part(tmp_path, part(LINES), 1, 45, process=1, processes=2, run="r1")
    with pytest.raises(InputError, match="holds parts of two runs"):
        Ledger.load(tmp_path)


def test_overlapping_parts(run):
    write_part(run, part(of_step(LINES, 45)), 45, 50)
    with pytest.raises(InputError, match="both have step 45: they are of two runs"):
        Ledger.load(run)


def parts_of(run: Path, process: int = 0) -> list[Path]:
    return sorted((run / NAME / LEDGER / f"{PROCESS}{process}").iterdir())


def test_a_part_cut_short(run):
    cut = parts_of(run)[2]
    cut.write_bytes(cut.read_bytes()[:-100])
    ledger = Ledger.load(run)
    assert len(ledger.step(5)) == 4
    for ask in (ledger.to_pandas, ledger.steps, ledger.spikes, lambda: ledger.step(25), lambda: len(ledger)):
        with pytest.raises(InputError, match=r"00000021-00000030\.parquet' is cut short or damaged .* Copy it again"):
            ask()


def test_a_flipped_byte_is_noticed(tmp_path):
    path = write_part(tmp_path, part(LINES), 1, 45, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="is cut short or damaged"):
        Ledger.load(tmp_path).to_pandas()


def test_steps_that_are_not_those_of_the_name(tmp_path):
    for lines, name in ((LINES[::-1], (1, 45)), (LINES, (1, 44))):
        path = write_part(tmp_path, part(lines), *name)
        with pytest.raises(InputError, match="its steps are not those of its name"):
            Ledger.load(tmp_path, partial=True).to_pandas()
        path.unlink()


def test_a_gap_between_parts(run):
    parts_of(run)[2].unlink()
    with pytest.raises(InputError, match=r"lacks steps 21 to 30 of process 0\. Copy its parts .* partial=True"):
        Ledger.load(run)
    partial = Ledger.load(run, partial=True)
    assert len(partial) == len(LINES) - 40
    assert np.isnan(partial.steps()["loss"][20:30]).all()


@pytest.mark.parametrize("process", [0, 1])
def test_a_missing_process(run_of_two, process):
    for path in parts_of(run_of_two, process):
        path.unlink()
    with pytest.raises(InputError, match=f"lacks steps 1 to 45 of process {process}."):
        Ledger.load(run_of_two)
    partial = Ledger.load(run_of_two, partial=True)
    assert (partial.processes, len(partial)) == (1, len(TWO) // 2)


def test_a_gap_in_another_process(run_of_two):
    parts_of(run_of_two, 1)[1].unlink()
    with pytest.raises(InputError, match=r"lacks steps 11 to 20 of process 1\."):
        Ledger.load(run_of_two)


def test_the_first_part_of_one_process(run_of_two):
    """Of the first one, too, whose parts tell where the others begin."""
    parts_of(run_of_two, 0)[0].unlink()
    with pytest.raises(InputError, match=r"lacks steps 1 to 10 of process 0\."):
        Ledger.load(run_of_two)
    write_part(run_of_two, part([line for line in TWO if line["step"] <= 10 and not line["process"]]), 1, 10, 0, 2)
    assert len(Ledger.load(run_of_two)) == len(TWO)
    parts_of(run_of_two, 1)[0].unlink()
    with pytest.raises(InputError, match=r"lacks steps 1 to 10 of process 1\."):
        Ledger.load(run_of_two)


def test_a_part_without_lines_is_one_of_steps_without_rows(run_of_two):
    """As a process writes it that had nothing but fillers to train."""
    more = [{**line, "step": line["step"] + 45} for line in TWO if line["step"] <= 5 and line["process"] == 0]
    row, more[0]["loss"] = more[0]["sample_id"], 90.0
    write_part(run_of_two, part(more), 46, 50, 0, 2)
    write_part(run_of_two, part([]), 46, 50, 1, 2)
    make_scores([float(row) for row in range(120)]).save(run_of_two / NAME)
    ledger = Ledger.load(run_of_two)
    assert (ledger.last, ledger.unfinished, len(ledger)) == (50, 0, len(TWO) + len(more))
    assert len(ledger.to_pandas()) == len(TWO) + len(more)
    assert ledger.step(48)["process"].tolist() == [0] * 4
    assert ledger.steps()["lines"].tolist() == [8] * 45 + [4] * 5
    assert ledger.row(row)["step"].tolist() == [line["step"] for line in TWO + more if line["sample_id"] == row]
    (spike,) = ledger.spikes(most=1)
    assert (spike.step, spike.rows["sample_id"][0]) == (46, row)
    assert np.isfinite(ledger.dynamics().column("mean_loss")).all()


def test_some_steps_are_those_of_all(run_of_two):
    ledger = Ledger.load(run_of_two)
    pd.testing.assert_frame_equal(
        ledger.steps(first=12, last=31), ledger.steps().iloc[11:31].reset_index(drop=True), check_exact=True
    )
    assert ledger.steps(first=-3, last=2)["step"].tolist() == [1, 2]
    assert ledger.steps(first=44)["step"].tolist() == [44, 45]
    assert len(ledger.steps(first=46)) == len(ledger.steps(first=3, last=1)) == 0


def test_a_life_reads_no_row_group_twice(tmp_path, monkeypatch):
    lines = [{"step": step, "sample_id": step % 3} for step in range(1, 301)]
    write_part(tmp_path, part(lines), 1, 300, row_group_size=100)
    read = []

    class Counting(pq.ParquetFile):
        def read_row_group(self, group: int, columns: list[str]) -> Any:
            read.append((group, len(columns)))
            return super().read_row_group(group, columns=columns)

    monkeypatch.setattr(parts.pq, "ParquetFile", Counting)
    ledger = Ledger.load(tmp_path)
    assert ledger.row(1)["step"].tolist() == [*range(1, 301, 3)]
    all_columns = len(ledger.columns)
    assert read == [(0, 2), (1, 2), (2, 2), (0, all_columns), (1, all_columns), (2, all_columns)]


def test_steps_at_the_end_that_one_process_lacks_are_left_out(run_of_two):
    """A run that is killed, or is still running."""
    parts_of(run_of_two, 1)[-1].unlink()
    ledger = Ledger.load(run_of_two)
    assert (ledger.last, ledger.unfinished) == (40, 5)
    assert len(ledger) == len(ledger.to_pandas()) == 40 * 8
    assert len(ledger.steps()) == 40
    with pytest.raises(InputError, match="which has steps 1 to 40"):
        ledger.step(41)


def test_a_run_may_resume_with_another_number_of_processes(tmp_path):
    one, two = drawn(10), drawn(10, processes=2)
    write_part(tmp_path, part(one), 1, 10)
    later = [{**line, "step": line["step"] + 10} for line in two]
    for process in range(2):
        write_part(tmp_path, part([line for line in later if line["process"] == process]), 11, 20, process, 2)
    write_part(tmp_path, part([{**line, "step": line["step"] + 20} for line in one]), 21, 30)
    ledger = Ledger.load(tmp_path)
    assert (ledger.last, ledger.unfinished) == (30, 0)
    assert ledger.steps()["lines"].tolist() == [4] * 10 + [8] * 10 + [4] * 10


def test_files_that_are_no_parts(run):
    folder = run / NAME / LEDGER / f"{PROCESS}0"
    (folder / ".00000046-00000050.parquet.12.part").write_bytes(b"")  # being written
    assert Ledger.load(run).last == 45
    (folder / "notes.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"notes\.parquet' has not the name of a part"):
        Ledger.load(run)


def test_a_part_in_another_process_s_folder(tmp_path):
    path = write_part(tmp_path, part(LINES), 1, 45, process=1, processes=2)
    path.parent.rename(path.parent.with_name(f"{PROCESS}0"))
    with pytest.raises(InputError, match=f"was written by process 1.* Move it to {PROCESS}1"):
        Ledger.load(tmp_path)


def test_another_version(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.ledgers.VERSION", VERSION + 1)
    write_part(tmp_path, part(LINES), 1, 45)
    with pytest.raises(InputError, match="is of another version of resofilter_trainer"):
        Ledger.load(tmp_path)


def test_a_column_that_does_not_exist(run):
    with pytest.raises(InputError, match=r"columns must be one of 'step', .* got 'los'\. Did you mean 'loss'\?"):
        Ledger.load(run).to_pandas(["los"])


def test_what_is_no_list_of_columns_and_no_step(run):
    ledger = Ledger.load(run)
    for ask in (ledger.to_pandas, ledger.to_arrow, ledger.batches):
        with pytest.raises(InputError, match=r"columns is a list of names, got 'loss': pass \['loss'\]\."):
            ask("loss")
    for ask in (ledger.batches, ledger.steps):
        with pytest.raises(InputError, match=r"first must be a whole number, got 'a'\."):
            ask(first="a")
        with pytest.raises(InputError, match=r"last must be a whole number, got 2\.5\."):
            ask(last=2.5)


def test_a_part_and_a_process_name_the_ledger_above(run, monkeypatch):
    ledger = run / NAME / LEDGER
    with pytest.raises(InputError, match=f"process-0' is the folder of one process of a ledger.* ledger: '{ledger}'"):
        Ledger.load(ledger / "process-0")
    with pytest.raises(InputError, match=f"parquet' is one part of a ledger.* ledger: '{ledger}'"):
        Ledger.load(ledger / "process-0" / part_name(1, 10))
    monkeypatch.chdir(ledger / "process-0")
    with pytest.raises(InputError, match=f"'.' is the folder of one process of a ledger.* ledger: '{ledger}'"):
        Ledger.load(".")


def test_opening_reads_names_and_a_step_its_own_part(tmp_path, monkeypatch):
    write_ledger(tmp_path, LINES, every=1)
    opened = []

    class Counting(pq.ParquetFile):
        def __init__(self, path: Path, **options: Any) -> None:
            opened.append(path.name)
            super().__init__(path, **options)

    monkeypatch.setattr(parts.pq, "ParquetFile", Counting)
    ledger = Ledger.load(tmp_path)
    assert opened == [part_name(1, 1), part_name(45, 45)]
    ledger.step(7)
    assert opened[2:] == [part_name(7, 7)]


def test_a_ledger_is_read_without_torch(run):
    code = (
        "import sys; from resofilter_trainer import Ledger; ledger = Ledger.load(sys.argv[1]); ledger.steps();"
        "ledger.spikes(); ledger.row(3); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run)], timeout=60).returncode == 0
