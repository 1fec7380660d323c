"""The scoring benchmark as a whole on a tiny shape, its count of FLOPs, and the imports of all benchmarks."""

from __future__ import annotations

import ast
import graphlib
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
METHODS = ["literal", "recorder", "forward", "forward_labelled"]


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("scoring")


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    """A file like GSM8K's train.jsonl, with eight rows of different lengths."""
    rows = [{"question": "How many? " * (3 + i), "answer": "They are 4. " * (2 + i % 3) + "#### 4"} for i in range(8)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(gsm8k: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "scoring.py"), "--shape", "tiny", "--samples", "6", "--rounds", "1"]
    command += ["--threads", "1", "--eps", "1e-4", "--gsm8k", str(gsm8k), *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_measures_each_method_in_its_own_process(gsm8k: Path, tmp_path: Path) -> None:
    done = run(gsm8k, "--methods", ",".join([*METHODS, "opacus"]), "--json", str(tmp_path / "scoring.json"))
    assert done.returncode == 0, done.stderr
    assert "skipped: opacus: --peers_python is not given" in done.stdout
    found = json.loads((tmp_path / "scoring.json").read_text())
    about = found.pop("about")
    assert list(found) == METHODS
    assert about["shape"] == "tiny"
    assert 0 < about["learnt"] < about["tokens"]
    assert about["machine"]
    for each in found.values():
        assert each["seconds"] > 0
        assert len(each["all_seconds"]) == 1
        assert each["peak_memory"] > 1e8  # torch alone is more
    literal, recorder = (found[name] for name in ("literal", "recorder"))
    assert recorder["rank_correlation"] == pytest.approx(1)
    assert recorder["error"] == 0
    assert literal["rank_correlation"] > 0.99
    assert literal["error"] < 1e-3
    assert len(literal["scores"]) == 6
    assert found["forward"]["rank_correlation"] is None
    assert "Fewest FLOPs" in done.stdout


@pytest.mark.slow
def test_a_broken_method_is_named_and_the_others_run(gsm8k: Path, tmp_path: Path) -> None:
    stand_in = tmp_path / "python"  # an environment without any packages
    stand_in.write_text("#!/bin/sh\necho 'No module named torch' >&2\nexit 1\n")
    stand_in.chmod(0o755)
    path = tmp_path / "scoring.json"
    done = run(gsm8k, "--methods", "opacus,forward", "--peers_python", str(stand_in), "--json", str(path))
    assert "failed: opacus: No module named torch" in done.stdout
    assert done.returncode == 1
    assert list(json.loads(path.read_text())) == ["about", "forward"]


def test_refuses_unknown_methods_and_missing_files(gsm8k: Path, tmp_path: Path) -> None:
    unknown = run(gsm8k, "--methods", "literal,magic")
    assert unknown.returncode == 1
    assert "no method magic" in unknown.stderr
    missing = run(tmp_path / "none.jsonl")
    assert missing.returncode == 1
    assert "there is no GSM8K" in missing.stderr


def test_the_floor_is_that_counted_by_hand(scoring: ModuleType) -> None:
    shape = scoring.Shape(vocabulary=7, hidden=4, intermediate=6, layers=3, heads=2, kv_heads=1)
    # one sample of 3 tokens, 2 of them learnt; in multiply-adds, as the factor 2 to FLOPs cancels
    up = 3 * 4 * 6
    query = output = 3 * 4 * 4
    key = value = 3 * 4 * 2
    pairs = 1 + 2 + 3
    attention = 2 * pairs * 4  # queries with keys, and weights with values
    head = 2 * 4 * 7
    forward = 3 * (3 * up + query + output + key + value + attention) + head
    block = 3 * up + query + output + key + value + 2 * attention
    narrow = 2 / 3  # the share of positions that matter above the last attention
    last = narrow * (3 * up + query + output) + key + value + 2 * attention
    products = (1 + 1 + narrow) * up
    floor = forward - (1 - narrow) * 3 * up + head + last + block + up + products
    assert scoring.flop_floor(shape, [(3, 2)]) == pytest.approx(floor / forward)


def test_the_floor_of_many_samples_is_that_of_their_sums(scoring: ModuleType) -> None:
    shape = scoring.SHAPES["135m"]
    alone = scoring.flop_floor(shape, [(200, 100)])
    assert scoring.flop_floor(shape, [(200, 100)] * 3) == pytest.approx(alone)
    assert 1.1 < alone < 1.3


def test_equal_values_share_their_mean_rank(scoring: ModuleType) -> None:
    assert scoring.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1, 3.5, 2]
    assert scoring.rank_correlation([1.0, 2.0, 3.0], [1.0, 5.0, 9.0]) == pytest.approx(1)
    assert scoring.rank_correlation([1.0, 1.0], [1.0, 2.0]) is None


def imported_by(path: Path) -> set[str]:
    """The benchmarks that a benchmark imports, in functions as well."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name for name in names if (BENCHMARKS / f"{name}.py").exists()}


def test_benchmarks_import_each_other_one_way() -> None:
    graph = {path.stem: imported_by(path) for path in BENCHMARKS.glob("*.py")}
    assert "scoring_peers" in graph["scoring_worker"]
    graphlib.TopologicalSorter(graph).prepare()
