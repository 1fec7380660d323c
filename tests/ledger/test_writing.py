"""Parts of a ledger: whole or absent, in the order of the steps, cut where a run resumes, and small."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from resofilter_trainer import InputError
from resofilter_trainer.io.files import load_parquet
from resofilter_trainer.ledger import writing
from resofilter_trainer.ledger.schema import COLUMNS, KEY, schema_of, steps_of
from resofilter_trainer.ledger.writing import LedgerWriter, keep_until

LAYERS = [5, 6, 7]
PER_STEP = 3


def writer(folder: Path, run: str = "own") -> LedgerWriter:
    return LedgerWriter(folder, run, 1, 2, LAYERS)


def add(into: LedgerWriter, steps: Sequence[int], rows: int = PER_STEP) -> None:
    """Lines whose numbers follow from their step."""
    for step in steps:
        at = np.arange(rows) + step * 10
        layers = np.stack([at + layer / 10 for layer in LAYERS], axis=1)
        into.add(layers, epoch=0, micro_batch=0, sample_id=at, loss=at / 2, num_tokens=at, weight=1 / at)
        into.end_step(step, 1e-3 / step, step / 4)


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "process-1").iterdir())


def steps(folder: Path) -> list[list[int]]:
    """The steps of the lines of each part."""
    return [load_parquet(path, KEY, "part")[0]["step"].to_pylist() for path in parts(folder)]


def all_steps(folder: Path) -> list[int]:
    return [step for part in steps(folder) for step in part]


def test_a_part_has_the_columns_of_the_schema(tmp_path):
    with_lines = writer(tmp_path)
    add(with_lines, [1, 2])
    with_lines.flush()
    (path,) = parts(tmp_path)
    table, about = load_parquet(path, KEY, "part")
    assert path.name == "00000001-00000002.parquet"
    assert json.loads(about) == {"version": 1, "run": "own", "process": 1, "processes": 2, "layers": LAYERS}
    assert table.schema.remove_metadata() == schema_of(LAYERS)
    found = table.to_pydict()
    assert [*found] == [*COLUMNS, "layer_5", "layer_6", "layer_7"]
    assert found["step"] == [1] * 3 + [2] * 3
    assert found["sample_id"] == found["num_tokens"] == [10, 11, 12, 20, 21, 22]
    assert found["loss"] == [5, 5.5, 6, 10, 10.5, 11]
    assert found["process"] == [1] * 6
    assert found["grad_norm"] == [0.25] * 3 + [0.5] * 3
    np.testing.assert_allclose(found["learning_rate"], [1e-3] * 3 + [5e-4] * 3, rtol=1e-6)
    np.testing.assert_allclose(found["layer_6"], [10.6, 11.6, 12.6, 20.6, 21.6, 22.6], rtol=1e-6)


def test_a_step_whose_update_was_left_out_is_marked(tmp_path):
    own = writer(tmp_path)
    add(own, [1])
    own.add(np.ones((2, 3)), epoch=0, micro_batch=0, sample_id=np.array([8, 9]), loss=2.0, num_tokens=7, weight=0.5)
    own.end_step(2, 1e-3, 0.5, left_out=True)
    add(own, [3])
    own.flush()
    assert (
        load_parquet(parts(tmp_path)[0], KEY, "part")[0]["left_out"].to_pylist()
        == [False] * 3 + [True] * 2 + [False] * 3
    )


def test_micro_batches_of_a_step_that_has_not_ended_wait_for_it(tmp_path):
    own = writer(tmp_path)
    add(own, [1])
    values = {"epoch": 4, "loss": 2.0, "num_tokens": 7, "weight": 0.5}
    own.add(np.ones((2, 3)), micro_batch=0, sample_id=np.array([8, 9]), **values)
    own.flush()
    own.flush()
    own.add(np.ones((1, 3)), micro_batch=1, sample_id=np.array([3]), **values)
    own.end_step(2, 1e-3, float("nan"))
    own.flush()
    assert steps(tmp_path) == [[1, 1, 1], [2, 2, 2]]
    table, _ = load_parquet(parts(tmp_path)[1], KEY, "part")
    assert table["sample_id"].to_pylist() == [8, 9, 3]
    assert table["micro_batch"].to_pylist() == [0, 0, 1]
    assert np.isnan(table["grad_norm"].to_numpy()).all()
    assert table["grad_norm"].null_count == 0


def test_a_process_without_a_line_in_some_steps_writes_an_empty_part(tmp_path):
    """As one with fillers alone; without the part, its steps would seem to be lost."""
    own = writer(tmp_path)
    add(own, [1, 2], rows=0)
    own.flush()
    add(own, [3], rows=0)
    add(own, [4])
    own.flush()
    own.flush()
    assert steps(tmp_path) == [[], [4, 4, 4]]
    assert [steps_of(path) for path in parts(tmp_path)] == [(1, 2), (3, 4)]
    assert load_parquet(parts(tmp_path)[0], KEY, "part")[0].schema.remove_metadata() == schema_of(LAYERS)


@pytest.mark.parametrize(("name", "most"), [("MOST_LINES", 6), ("MOST_STEPS", 2)])
def test_a_part_is_written_when_there_are_many_lines_or_steps(name, most, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, name, most)
    add(writer(tmp_path), range(1, 6))
    assert steps(tmp_path) == [[1] * 3 + [2] * 3, [3] * 3 + [4] * 3]


@pytest.mark.parametrize("step", range(8))
def test_a_resumed_run_begins_after_its_step(step, tmp_path):
    """Whatever parts there are, they end at the step, and the lines are those of an undisturbed run in the end."""
    own = writer(tmp_path)
    for some in ([1, 2], [3, 4, 5], [6]):
        add(own, some)
        own.flush()
    own = writer(tmp_path)
    own.begin(step)
    if step:
        assert all_steps(tmp_path) == [each for each in range(1, min(step, 6) + 1) for _ in range(PER_STEP)]
        assert max(steps_of(path)[1] for path in parts(tmp_path)) == min(step, 6)
    else:
        assert not (tmp_path / "process-1").exists()
    add(own, range(step + 1, 10))
    own.flush()
    expected = [each for each in range(1, 10) if each <= 6 or each > step for _ in range(PER_STEP)]
    assert all_steps(tmp_path) == expected


def test_a_kill_between_cutting_a_part_and_renaming_it(tmp_path, monkeypatch):
    own = writer(tmp_path)
    add(own, range(1, 5))
    own.flush()

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            keep_until(tmp_path / "process-1", 3, "own")
    assert steps(tmp_path) == [[1] * 3 + [2] * 3 + [3] * 3]  # its name promises more
    keep_until(tmp_path / "process-1", 3, "own")
    assert [path.name for path in parts(tmp_path)] == ["00000001-00000003.parquet"]
    assert steps(tmp_path) == [[1] * 3 + [2] * 3 + [3] * 3]


def test_parts_of_another_run_and_temporary_files_are_removed(tmp_path):
    for run, some in (("another", [1, 2]), ("own", [3])):
        each = writer(tmp_path, run)
        each._written = some[0] - 1
        add(each, some)
        each.flush()
    (tmp_path / "process-1" / ".00000004-00000005.parquet.123.part").write_text("half")
    keep_until(tmp_path / "process-1", 4, "own")
    assert [path.name for path in parts(tmp_path)] == ["00000003-00000003.parquet"]


def test_a_damaged_part_is_refused_where_it_has_to_be_cut(tmp_path):
    own = writer(tmp_path)
    add(own, range(1, 5))
    own.flush()
    (path,) = parts(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    keep_until(path.parent, 4, "own")
    assert path.exists()  # those who read it say that it is damaged
    with pytest.raises(InputError, match=r"00000001-00000004.parquet' cannot be read: it is truncated"):
        keep_until(path.parent, 3, "own")
    keep_until(path.parent, 0, "own")
    assert not path.exists()


def test_a_line_takes_at_most_forty_bytes(tmp_path):
    """Three layers, rows in a random order, and numbers with all their digits."""
    random, per_step, count = np.random.default_rng(0), 8, 1000
    own = LedgerWriter(tmp_path, "own", 0, 1, LAYERS)
    rows = random.permutation(50_000)[: per_step * count].reshape(count, per_step)
    for step, sample_id in enumerate(rows):
        tokens = np.exp(random.normal(5, 0.6, per_step)).astype(int)
        values = {"loss": random.gamma(4, 0.3, per_step), "num_tokens": tokens, "weight": tokens / tokens.sum()}
        layers = np.abs(random.normal(1e-5, 3e-6, (per_step, 3)))
        own.add(layers, epoch=step // 400, micro_batch=0, sample_id=sample_id, **values)
        own.end_step(step + 1, 1e-5 * (1 - step / count), random.gamma(3, 0.4))
    (path,) = (tmp_path / "process-0").iterdir()
    assert path.stat().st_size / (per_step * count) < 25
