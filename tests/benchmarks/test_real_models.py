"""The rows, the numbers and the whole command of the benchmark on real models, with made-up data and a tiny model."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from resofilter_trainer.demo.run import BASE
from resofilter_trainer.scores.statistics import auroc

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder like the shared one: 40 rows on GSM8K's test questions, half wrong, 150 others and 6 of SVAMP."""
    svamp = [{"Body": f"Tom has {i} pens ", "Question": f"How many pens, {i}?", "Answer": float(i)} for i in range(6)]
    rows = [_row(f"Of GSM8K, {i}?", i, i % 2 == 0, True) for i in range(40)]
    rows += [_row(f"Another, {i}?", i, i % 10 > 0, False) for i in range(150)]
    rows += [_row(f"Tom has {i} pens. How many pens, {i}?", i, i != 3, False) for i in range(6)]
    solutions = [
        {"question": f"Test {i}?", **{name: _solution(i + place, place > 1) for place, name in enumerate(SOLVERS)}}
        for i in range(8)
    ]
    _write(tmp_path / "data" / "gsm8k" / "example_model_solutions.jsonl", solutions)
    _write(tmp_path / "data" / "math_data" / "llm_adapters_math_labelled.jsonl", rows)
    (tmp_path / "data" / "svamp").mkdir()
    (tmp_path / "data" / "svamp" / "SVAMP.json").write_text(json.dumps(svamp))
    return tmp_path


def _row(question: str, number: int, correct: bool, of_gsm8k: bool) -> dict:
    answer = number if correct else number + 1
    return {
        "question": question,
        "solution": f"A: It is {answer}. The answer is {answer}.",
        "correct": correct,
        "in_gsm8k_test": of_gsm8k,
    }


def _solution(number: int, correct: bool) -> dict:
    return {"solution": f"So it is {number}. " * (2 + number % 3) + f"#### {number}", "is_correct": correct}


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_no_question_of_the_test_is_trained_on(module, shared):
    rows = module("real_models_rows").training_rows(shared / "data")
    trained = {row["question"] for row in (*rows.as_is, *rows.noisy)}
    assert not any("Tom" in question for question in trained)
    assert [row["completion"] for row in rows.test] == [f" The answer is {i}." for i in range(6)]
    assert sorted(row["question"] for row in rows.held_out) == [
        f"Tom has {i} pens. How many pens, {i}?" for i in (0, 1, 2, 4, 5)
    ]
    assert len(rows.validation) == 100
    assert not any(row["wrong"] for row in rows.validation)
    assert not {row["question"] for row in rows.validation} & trained
    assert len(rows.as_is) == 50
    assert sum(row["wrong"] for row in rows.as_is) == 15


def test_fewer_rows_are_some_of_all_rows(module, shared):
    make = module("real_models_rows").training_rows
    whole, few, same = make(shared / "data"), make(shared / "data", 20, 3), make(shared / "data", 2000, 2000)
    assert same == whole
    for name, count in {"as_is": 20, "noisy": 20, "held_out": 3, "test": 3}.items():
        assert len(getattr(few, name)) == count
        assert all(row in getattr(whole, name) for row in getattr(few, name))
    assert few.validation == whole.validation
    assert 0 < sum(row["wrong"] for row in few.as_is) < 20


def test_the_origin_of_noisy_rows_says_nothing_of_wrong_ones(module, shared):
    rows = module("real_models_rows").training_rows(shared / "data").noisy
    for of_gsm8k, count in ((True, 40), (False, 30)):
        own = [row["wrong"] for row in rows if row["of_gsm8k_test"] == of_gsm8k]
        assert (len(own), sum(own)) == (count, count // 2)


@pytest.mark.parametrize("asked", [0.6, 0.9, 1.0])
def test_a_detector_detects_as_well_as_asked(module, asked):
    rows = [{"wrong": i % 3 == 0} for i in range(6000)]
    values = module("real_models_training").detector(rows, asked, seed=1)
    assert auroc(values, np.array([row["wrong"] for row in rows])) == pytest.approx(asked, abs=0.02)
    assert not np.array_equal(values, module("real_models_training").detector(rows, asked, seed=2))


def test_the_first_questions_come_with_all_their_rows(module):
    rows = [{"question": i // 4} for i in range(40)]
    found = module("real_models_detection").first_questions(rows, 10)
    assert [row["question"] for row in found] == [i // 4 for i in range(12)]
    assert module("real_models_detection").first_questions(rows, 50) == rows


def test_a_plan_counts_what_is_asked_for(module, shared, monkeypatch):
    plan = module("real_models_plan")
    monkeypatch.setattr(plan, "_seconds", lambda work: 100.0)
    main = module("real_models")

    def hours(*options: str) -> dict[str, float]:
        command = ["real_models.py", "--models", str(BASE), "--shared", str(shared), "--test_rows", "4", *options]
        monkeypatch.setattr(sys, "argv", command)
        first, *parts = plan.plan(str(BASE), shared / "data", main._arguments())
        assert re.match(r"demo-base on (cpu|cuda): .* tokens a second in a forward", first)
        return {name: float(each) for name, _, each, _ in map(str.split, parts)}

    monkeypatch.setattr(plan, "WRITING", 36_000)
    whole = hours()
    assert [*whole] == ["detection", "probe", "training", "detectors"]
    without = hours("--no_self_made")
    assert whole["probe"] - without["probe"] == whole["training"] - without["training"] == pytest.approx(20, abs=0.2)
    assert hours("--learning_rate", "1e-4")["training"] < whole["training"]
    assert hours("--parts", "detectors").keys() == {"detectors"}


@pytest.mark.slow
def test_the_whole_command_and_again(shared, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "real_models.py"), "--models", str(BASE), "missing", "--threads", "1"]
    command += ["--shared", str(shared), "--output", str(tmp_path / "real"), "--rows", "32", "--states", "as it comes"]
    command += ["--probe_rows", "40", "--no_self_made", "--seeds", "0", "1", "--equal_cost"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "skipped: there is no model at 'missing'" in first.stdout
    files = {path: path.read_text() for path in (tmp_path / "real").glob("*.json")}
    found = json.loads(files[tmp_path / "real" / "detection-demo-base-gsm8k-as-it-comes.json"])
    value, low, high = found["signals"]["loss"]["within question"]
    assert 0 <= low <= value <= high <= 1
    assert {"resonance, eps 0.001", "layer_0", "resonance, all layers"} <= found["signals"].keys()
    cells = json.loads(files[tmp_path / "real" / "training-demo-base-noisy.json"])
    arms = {cell["selector"] for cell in cells}
    assert {"full", "random", "resonance", "low_loss", "right rows only"} <= arms
    assert all(cell["held_out_loss"] > 0 for cell in cells)
    right = next(cell for cell in cells if cell["selector"] == "right rows only")
    assert (right["kept"], right["rows"]) == (35, 70)
    detectors = json.loads(files[tmp_path / "real" / "detectors-demo-base.json"])
    best = next(cell for cell in detectors if cell["selector"] == "AUROC 1")
    assert (best["auroc"], best["wrong_kept"]) == (1.0, 0.0)

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {path: path.read_text() for path in files} == files
    assert "Answering" not in again.stderr
