"""The folder of data from the clones of its sources, with made-up ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHARED = BENCHMARKS.parents[1] / "shared" / "data"
GSM8K = "grade-school-math/grade_school_math/data"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Clones with a problem each, and the solutions of `SOLUTIONS`."""
    solved = {name: {"solution": "A 1", "is_correct": True} for name in ("6b_finetuning", "175b_verification")}
    problems = [
        {"instruction": f" {each} ", "input": "", "answer": answer, "output": solution}
        for each, (answer, solution, *_) in enumerate(SOLUTIONS)
    ]
    files = {
        f"{GSM8K}/train.jsonl": json.dumps({"question": "2?", "answer": "#### 2"}),
        f"{GSM8K}/test.jsonl": json.dumps({"question": "0", "answer": "#### 4"}),
        f"{GSM8K}/example_model_solutions.jsonl": json.dumps({"question": "0", **solved}),
        "SVAMP/SVAMP.json": json.dumps([{"Body": "b", "Question": "q", "Answer": 1.0}]),
        "LLM-Adapters/math_data.json": json.dumps(problems),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


SOLUTIONS = [  # an answer, a solution, the number that it says, and whether that is right
    ([4.0], "2 + 2 = 4. The answer is 4.", 4.0, True),
    (["1,300"], "That is $800 + $500. The answer is $1,300.", 1300.0, True),
    ([-293.0], "He has $4 - $297 = -$293", -293.0, True),
    ([370.0], "The answer is 220 + 90 + 60 = 370.", 370.0, True),
    ([138.0], "The answer is 139", 139.0, True),  # within 1 %
    ([3.0], "The answer is 4.", 4.0, False),
    ([0.0], "The answer is .", None, False),
    (["A"], "The answer is (A), 45.", None, None),  # no number is asked for
]


def run(sources: Path, output: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "real_models_data.py"), "--sources", str(sources)]
    return subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)


def test_solutions_are_labelled_by_their_last_number(sources, tmp_path, monkeypatch):
    done = run(sources, tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("7 labelled solutions, 2 of them wrong\n")
    monkeypatch.syspath_prepend(BENCHMARKS)
    from real_models_rows import DATA, gsm8k_training

    lines = (tmp_path / "data/math_data/llm_adapters_math_labelled.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["pred"], row["correct"]) for row in rows] == [tuple(each[2:]) for each in SOLUTIONS[:-1]]
    assert [row["question"] for row in rows if row["in_gsm8k_test"]] == ["0"]
    assert {name: len(rows_of(tmp_path / "data")) for name, rows_of in DATA.items()} == {"gsm8k": 2, "math": 6}
    assert len(gsm8k_training(tmp_path / "data")) == 1


def test_a_missing_source_is_named(sources, tmp_path):
    (sources / "SVAMP" / "SVAMP.json").unlink()
    done = run(sources, tmp_path / "data")
    assert done.returncode == 1
    assert "has no 'SVAMP/SVAMP.json': clone the sources into it" in done.stderr
    assert not (tmp_path / "data").exists()


def test_the_labels_are_those_that_were_measured_with(monkeypatch):
    path = SHARED / "math_data" / "llm_adapters_math_labelled.jsonl"
    if not path.is_file():
        pytest.skip(f"needs the labelled solutions at {path}")
    monkeypatch.syspath_prepend(BENCHMARKS)
    from real_models_data import labelled

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    problems = [{"instruction": row["question"], "answer": [row["gold"]], "output": row["solution"]} for row in rows]
    tests = {json.loads(line)["question"] for line in (SHARED / "gsm8k" / "test.jsonl").read_text().splitlines()}
    found = labelled(problems, tests)
    for name in ("question", "solution", "gold", "correct", "in_gsm8k_test"):
        assert [row[name] for row in found] == [row[name] for row in rows]
