"""Files that an earlier version wrote are read, reused and resumed by this one, with the same numbers."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import load_from_disk
from fixtures import make_fixtures as make
from helpers.versions import older_than, skip_without

from resofilter_trainer import ScoreTable, Selection, TokenScores, load_rows, read_contents
from resofilter_trainer.io.digest import same_rows
from resofilter_trainer.io.store import Store, read_manifest, read_parts
from resofilter_trainer.scores.provenance import Provenance
from resofilter_trainer.scores.score_table import PROMPT
from resofilter_trainer.training.measurements import Measurements

VERSIONS = sorted((Path(__file__).parent / "fixtures").glob("version_*"))
CHECKPOINT = f"checkpoint-{make.STEPS}"
OURS = "resofilter_trainer"
RUNS = ["run", "token_run"]
REWORDED = {"not among the 5 rows of --limit": "not among the 5 random rows that were measured"}


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def old(request, tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of what a version wrote, as the working directory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    shutil.copytree(request.param, tmp_path / "old")
    if older_than("transformers", "5.0"):  # whose name of the class of these tokenizers is another
        for path in tmp_path.glob("old/**/tokenizer_config.json"):
            path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    monkeypatch.chdir(tmp_path / "old")
    yield tmp_path / "old"
    torch.set_num_threads(threads)


@pytest.fixture
def exact(old) -> bool:
    """Whether this machine and these packages compute as those did that made the files."""
    return make.machine() == json.loads((old / "machine.json").read_text())


@pytest.fixture
def same_versions(old) -> bool:
    """Whether the packages are those that made the scores; an interrupted pass is resumed with no others."""
    return ScoreTable.load("scores").provenance.versions == ScoreTable.load(again("score")).provenance.versions


def again(what: str) -> str:
    """The same made by this version, in a folder beside; its name."""
    folder = f"{what}_again"
    if not Path(folder).exists():
        getattr(make, what)(folder)
    return folder


def assert_same_numbers(found: np.ndarray, expected: np.ndarray, exact: bool) -> None:
    assert found.dtype == expected.dtype
    if exact or not np.issubdtype(found.dtype, np.floating):
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=0)


def assert_same_table(found: pa.Table, expected: pa.Table, exact: bool) -> None:
    """The columns of the earlier version are the same; this one also says which rows have the same prompt."""
    if PROMPT in found.column_names and PROMPT not in expected.column_names:
        found = found.drop_columns(PROMPT)
    assert found.schema.remove_metadata() == expected.schema.remove_metadata()
    for name in expected.column_names:
        assert found[name].is_null().equals(expected[name].is_null())
        assert_same_numbers(found[name].to_numpy(), expected[name].to_numpy(), exact)


def assert_same_selection(found: Selection, expected: Selection) -> None:
    assert found.keep.tolist() == expected.keep.tolist()
    assert list(found.reason) == list(expected.reason)
    assert found.policy == expected.policy


# ---- opened


def test_there_are_files_of_a_version_before():
    assert VERSIONS


@pytest.mark.parametrize("path", ["scores", "scores/layers", "loss", *(f"{run}/resofilter" for run in RUNS),
                                  "run/resofilter/scores-epoch-1.parquet"])  # fmt: skip
def test_scores_are_opened(path, old):
    scores = ScoreTable.load(path)
    assert len(scores) == scores.provenance.rows == (10 if "run" in path else 12)
    assert scores.scored.sum() == (5 if "layers" in path else 10)
    assert Provenance.from_json(scores.provenance.to_json()) == scores.provenance
    if "run" not in path:
        assert scores.reasons[10:] == ["empty completion", "same prompt as row 0"]
        assert scores.provenance.source["dataset"] == "rows.jsonl"


@pytest.mark.parametrize("path", ["kept", "run/resofilter/selection-epoch-3.parquet"])
def test_a_selection_is_opened(path, old):
    selection = Selection.load(path)
    assert selection.keep.sum() == 5
    assert [reason == "kept" for reason in selection.reason] == selection.keep.tolist()


def test_token_scores_are_opened(old):
    scores = TokenScores.load("cleaned")
    assert scores.sample_id.tolist() == list(range(10))
    assert scores.num_tokens.tolist() == [5 + i % 4 for i in range(10)]


@pytest.mark.parametrize("run", RUNS)
def test_measurements_are_opened(run, old):
    measurements, extra = Measurements.load(Path(run) / CHECKPOINT / "resofilter")
    assert measurements.layers.shape == (10, 2)
    assert set(measurements.epoch) == {0, 1}
    assert not measurements.idle.any()
    assert (
        sorted(extra["order"][extra["order"] >= 0])
        == np.flatnonzero(
            Selection.load(Path(run) / CHECKPOINT / "resofilter" / "selection-epoch-2.parquet").keep
        ).tolist()
    )


# ---- used again


def test_select_makes_the_same_selection_of_the_same_scores(old):
    make.select("again")
    assert_same_selection(Selection.load("again"), Selection.load("kept"))
    assert load_from_disk("again/dataset")[:] == load_from_disk("kept/dataset")[:]


@pytest.mark.parametrize(
    ("source", "options"), [("scores", "--selection kept"), *((run, "") for run in RUNS), ("cleaned", ""),
                            ("comparison", "")]
)  # fmt: skip
def test_a_report_is_written(source, options, old, capsys):
    make.run(f"report {source} {options} --output page")
    assert "Report: page/report.html" in capsys.readouterr().out
    assert Path("page/report.html").stat().st_size > 20_000


def test_a_report_finds_everything(old):
    scored, run, tokens = read_contents("scores", "kept"), read_contents("run"), read_contents("token_run")
    assert scored.layers is not None
    assert [epoch.number for epoch in run.epochs] == [1, 2, 3]
    assert all(epoch.scores is not None and epoch.selection is not None for epoch in run.epochs)
    assert len(tokens.log) > 11
    assert read_contents("cleaned").cleaned is not None
    assert len(read_contents("comparison").comparison["lines"]) == 3


def test_token_scores_are_used_again(old, exact, same_versions):
    dataset, scores = load_from_disk("cleaned")[:], Path("cleaned/token_scores.arrow").read_bytes()
    if not same_versions:
        with pytest.raises(SystemExit):
            make.clean("cleaned")
        return
    make.clean("cleaned")
    assert load_from_disk("cleaned")[:] == dataset
    make.clean("cleaned", keep=0.25)
    assert json.loads(Path("cleaned/summary.json").read_text())["tokens_kept"] == 15
    assert Path("cleaned/token_scores.arrow").read_bytes() == scores


def test_a_finished_comparison_is_not_done_again(old, capsys):
    cells = everything(Path("comparison/cells"))
    lines = json.loads(Path("comparison/comparison.json").read_text())
    assert len(cells) == 3

    make.run("compare compare.yaml --output comparison")

    assert "keep 0.5 seed 0" not in capsys.readouterr().out  # which is said of a training that has ended
    assert everything(Path("comparison/cells")) == cells
    assert json.loads(Path("comparison/comparison.json").read_text()) == lines


# ---- measured again


@pytest.mark.parametrize(("what", "path"), [("score", "scores"), ("score_layers", "scores/layers"),
                                            ("score_by_loss", "loss")])  # fmt: skip
def test_scores_are_the_same_numbers(what, path, old, exact):
    made = ScoreTable.load(again(what) + ("/layers" if "layers" in path else ""))
    there = ScoreTable.load(path)
    assert made.reasons == [REWORDED.get(why, why) for why in there.reasons]
    assert_same_table(made.table.drop_columns("reason"), there.table.drop_columns("reason"), exact)


def test_token_scores_are_the_same_numbers(old, exact):
    made, there = TokenScores.load(again("clean")), TokenScores.load("cleaned")
    for name in ("sample_id", "offsets", "position", "token", "base", "reference"):
        assert_same_numbers(getattr(made, name), getattr(there, name), exact)


def test_provenance_is_the_same(old, same_versions):
    made, there = ScoreTable.load(again("score")).provenance, ScoreTable.load("scores").provenance
    differing = there.differences(made)
    settings = ["model_config"] if older_than("transformers", "5.0") else []  # it has other settings
    expected = [] if same_versions else settings + differing_packages(made, there)
    assert [each.split(" ")[0] for each in differing] == expected
    assert {**made.source, "content": ""} == {**there.source, "content": ""}
    assert same_rows(there.source["content"], load_rows("rows.jsonl"))
    assert same_rows(made.source["content"], load_rows("rows.jsonl"))


def differing_packages(one: Provenance, other: Provenance) -> list[str]:
    return sorted(name for name in one.versions if one.versions[name] != other.versions.get(name))


# ---- resumed


def test_an_interrupted_pass_is_resumed(old, exact, same_versions, capsys, monkeypatch):
    folder = Path("interrupted/parts/resonance/scoring-float32")
    assert read_manifest(folder)["n_layers"] == 2
    done = [unit for part in read_parts(folder) for unit in part["unit"].to_pylist()]
    measured, append = [], Store.append

    def spy(store: Store, lines: pa.Table) -> Path | None:
        measured.append((store.folder, *sorted(set(lines["unit"].to_pylist()))))
        return append(store, lines)

    monkeypatch.setattr(Store, "append", spy)
    if not same_versions:
        with pytest.raises(SystemExit):
            make.score("interrupted")
        assert "they differ in" in capsys.readouterr().err
        return
    measured.clear()
    make.score("interrupted")
    assert {*done} == {0, 1}
    assert measured == [(folder, 2, 3, 4)]
    assert_same_table(ScoreTable.load("interrupted").table, ScoreTable.load("scores").table, exact)
    assert not folder.exists()


@pytest.mark.parametrize(("what", "there"), [("score", "scores"), ("score", "interrupted"), ("clean", "cleaned")])
def test_a_later_version_adds_nothing_to_scores_of_an_earlier_one(what, there, old, monkeypatch, capsys):
    version, files = importlib.metadata.version, everything(Path(there))
    earlier = ScoreTable.load("scores").provenance.versions[OURS]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == OURS else version(name))
    with pytest.raises(SystemExit):
        getattr(make, what)(there)
    said = capsys.readouterr().err
    assert "made from something else" in said
    assert f"{OURS} ({earlier} / 99.0)" in said
    assert everything(Path(there)) == files


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def log_of(entries: list[dict[str, Any]]) -> np.ndarray:
    """Step, loss, gradient norm and learning rate of the steps after the checkpoint."""
    names = ("step", "loss", "grad_norm", "learning_rate")
    later = [each for each in entries if "loss" in each and each["step"] > make.STEPS]
    return np.array([[each[name] for name in names] for each in later])


@pytest.mark.filterwarnings("ignore:.*lacks the random state")  # left out of the fixtures: nothing is random
@pytest.mark.parametrize("run", RUNS)
def test_a_training_is_resumed_to_the_same_end(run, old, exact):
    skip_without("activation_checkpointing")  # which the trainings of the files were given
    there = Path(run) / "resofilter"
    scores, stages = ScoreTable.load(there), there / "token_cleaning.json"
    log, tokens = json.loads((there / "log.json").read_text()), stages.read_text() if stages.exists() else ""
    selections = [Selection.load(path) for path in sorted(there.glob("selection-epoch-*"))]

    trainer, callback = make.train(run, tokens=run == "token_run", resume=f"{run}/{CHECKPOINT}")

    assert trainer.state.global_step == make.LAST
    assert_same_table(callback.scores.table, scores.table, exact)
    assert_same_numbers(log_of(trainer.state.log_history), log_of(log), exact)
    assert len(callback.selections) == 3
    for found, expected in zip(callback.selections, selections, strict=False):
        assert_same_selection(found, expected)
    assert len(selections) == (3 if run == "run" else 0)
    assert (stages.read_text() if stages.exists() else "") == tokens
