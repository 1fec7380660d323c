"""What every pass has in common: its checks, the lock, and which scores in a folder are its own."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.scoring import COLUMNS, ROWS, arguments
from trl import SFTConfig

from resofilter_trainer import (
    Criterion,
    DataSelector,
    InputError,
    ScoreTable,
    read_contents,
    score_by,
    score_dataset,
    score_layers,
    write_report,
)
from resofilter_trainer.compare.config import SelectorConfig
from resofilter_trainer.compare.method_scores import Request, by_column, by_less
from resofilter_trainer.config import ScoreWarning
from resofilter_trainer.criteria.criterion import CRITERIA
from resofilter_trainer.criteria.model import loss
from resofilter_trainer.io.files import folder_lock
from resofilter_trainer.scores.score_table import SCORES_FILE
from resofilter_trainer.scoring import criterion as criterion_pass
from resofilter_trainer.scoring import passes

FORK = multiprocessing.get_context("fork")
Pass = Callable[..., ScoreTable]


@pytest.fixture
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture
def every(tiny_llama, tokenizer) -> dict[str, Pass]:
    """By name every pass over the same rows; each takes a folder, arguments and maybe a model."""
    dataset = Dataset.from_list(ROWS)
    named = dataset.rename_columns({"question": "prompt", "answer": "completion"})

    def compared(score: Callable[[Request], ScoreTable], **selector: Any) -> Pass:
        def run(output: Path, args: SFTConfig, model=None) -> ScoreTable:
            rows, own = named.add_column("mine", list(range(len(ROWS)))), SelectorConfig(**selector)
            request = Request(model or tiny_llama(), tokenizer, rows, args, output, own, named.select(range(2)))
            return score(request)

        return run

    def resonance(output: Path, args: SFTConfig, model=None) -> ScoreTable:
        return score_dataset(model or tiny_llama(), dataset, tokenizer, args, output=output, **COLUMNS)

    def criterion(output: Path, args: SFTConfig, model=None) -> ScoreTable:
        return score_by("loss", model or tiny_llama(), dataset, tokenizer, args, output, **COLUMNS)

    def layers(output: Path, args: SFTConfig, model=None) -> ScoreTable:
        return score_layers(model or tiny_llama(), dataset, tokenizer, args, output=output, limit=2, **COLUMNS)

    return {
        "resonance": resonance,
        "criterion": criterion,
        "layers": layers,
        "less": compared(by_less, method="less", settings={"lora_r": 2, "epochs": 1}),
        "column": compared(by_column, method="column", score_column="mine", drop="largest"),
    }


PASSES = ("resonance", "criterion", "layers", "less", "column")
OURS = PASSES[:3]


class OnAppleGpu(SFTConfig):
    device = property(lambda self: torch.device("mps"))


def folder_of(name: str, output: Path) -> Path:
    return output / "layers" if name == "layers" else output


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---- the lock


@pytest.fixture
def elsewhere() -> Iterator[Callable[[Path], None]]:
    """Lets another process lock a folder until the test ends."""
    ends, children = FORK.Event(), []

    def lock(folder: Path) -> None:
        has_it = FORK.Event()

        def work() -> None:
            with folder_lock(folder):
                has_it.set()
                ends.wait(60)

        children.append(FORK.Process(target=work))
        children[-1].start()
        assert has_it.wait(60)

    yield lock
    ends.set()
    for child in children:
        child.join(60)


@pytest.mark.parametrize("name", PASSES)
def test_a_folder_that_another_run_writes_to_is_refused(name, every, tmp_path, elsewhere):
    elsewhere(folder_of(name, tmp_path))
    said = refusal(lambda: every[name](tmp_path, arguments()))
    assert said.startswith(f"Another run writes to '{folder_of(name, tmp_path)}'. Wait until it ends")
    assert not (folder_of(name, tmp_path) / SCORES_FILE).exists()


@pytest.mark.parametrize("name", PASSES)
def test_the_lock_is_released_and_nothing_but_scores_is_left(name, every, tmp_path):
    scores = every[name](tmp_path, arguments(disable_tqdm=True))
    assert [path.name for path in folder_of(name, tmp_path).iterdir()] == [SCORES_FILE]
    again = every[name](tmp_path, arguments(disable_tqdm=True))
    assert again.table.equals(scores.table)
    assert again.provenance == scores.provenance


# ---- the checks


@pytest.mark.parametrize("name", OURS)
def test_a_device_without_float64_is_refused(name, every, tmp_path):
    args = OnAppleGpu(output_dir="unused", bf16=False, report_to="none", use_cpu=True)
    assert "no float64" in refusal(lambda: every[name](tmp_path, args))


@pytest.mark.parametrize("name", ["resonance", "layers"])
def test_gradients_in_float16_are_refused(name, every, model, tmp_path):
    args = arguments()
    args.fp16 = True
    assert "vanish in float16" in refusal(lambda: every[name](tmp_path, args))
    assert "vanish in float16" in refusal(lambda: every[name](tmp_path, arguments(), model.half()))


@pytest.mark.parametrize("name", [*OURS, "column"])
def test_arguments_that_cannot_work_are_refused(name, every, tmp_path):
    for setting, value in (("per_device_train_batch_size", 0), ("ddp_timeout", 0), ("max_length", 0)):
        args = arguments()
        setattr(args, setting, value)
        said = refusal(lambda args=args: every[name](tmp_path, args))
        assert said.startswith(f"{setting} must be")
        assert said.endswith("of at least 1, got 0.")


def test_a_warning_about_scores_names_the_users_own_line(model, tokenizer):
    with pytest.warns(ScoreWarning, match="below 0.95 the ranking is partly noise") as warned:
        score_dataset(model, Dataset.from_list(ROWS), tokenizer, arguments(bf16=True), **COLUMNS)
    assert [each.filename for each in warned if each.category is ScoreWarning] == [__file__] * 2


# ---- the source of a function of the user's own


def first_version() -> Callable[..., Any]:
    def mine(model, batch):
        return batch["attention_mask"].sum(1)

    return mine


def second_version() -> Callable[..., Any]:
    def mine(model, batch):
        return -batch["attention_mask"].sum(1)

    return mine


def same_as_first_version() -> Callable[..., Any]:
    def mine(model, batch):
        return batch["attention_mask"].sum(1)

    return mine


@pytest.fixture
def score(model, tokenizer, tmp_path) -> Callable[..., ScoreTable]:
    dataset = Dataset.from_list(ROWS)
    return lambda criterion, **options: score_by(
        criterion, model, dataset, tokenizer, arguments(), tmp_path, **options, **COLUMNS
    )


def test_an_unchanged_function_returns_the_scores_in_the_folder(score, monkeypatch):
    first = score(first_version())
    monkeypatch.setattr(criterion_pass, "measure_rows", None)  # is not called again
    assert score(same_as_first_version()).table.equals(first.table)


def test_a_changed_function_of_the_same_name_does_not_return_old_scores(score, tmp_path):
    score(first_version())
    before = (tmp_path / SCORES_FILE).read_bytes()
    said = refusal(lambda: score(second_version()))
    assert f"'{tmp_path}' holds scores made from something else: they differ in criterion_source (" in said
    assert said.count(";") == 0  # in nothing else
    assert said.endswith("Choose another folder, or remove that one.")
    assert (tmp_path / SCORES_FILE).read_bytes() == before


def test_a_changed_way_to_join_the_numbers_does_not_return_old_scores(score):
    def total(values):
        return values.sum(1)

    def mean(values):
        return values.mean(1)

    score(Criterion(first_version(), join=total))
    assert "criterion_source" in refusal(lambda: score(Criterion(first_version(), join=mean)))
    assert "criterion_source" in refusal(lambda: score(first_version()))


def test_a_changed_function_does_not_resume_an_interrupted_pass(score, monkeypatch):
    monkeypatch.setattr(passes, "LEAST_LOST", 0.0)
    monkeypatch.setattr(passes, "LOST_SHARE", 0.0)
    real, calls = passes._Results.add, []

    def interrupt(self, number, results) -> None:
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, number, results)

    with monkeypatch.context() as patch:
        patch.setattr(passes._Results, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            score(first_version(), tokens_per_batch=60)
    assert "criterion_source (" in refusal(lambda: score(second_version(), tokens_per_batch=60))
    assert score(same_as_first_version(), tokens_per_batch=60).scored.all()


def without_source(folder: Path) -> None:
    """Make the scores in a folder those of the version before, which did not record a source."""
    scores = ScoreTable.load(folder)
    config = {name: value for name, value in scores.provenance.config.items() if not name.endswith("_source")}
    ScoreTable(scores.table, dataclasses.replace(scores.provenance, config=config)).save(folder)


def test_scores_of_the_version_before_are_read_and_ours_are_reused(score, tmp_path, monkeypatch):
    first = score("loss")
    without_source(tmp_path)
    there = ScoreTable.load(tmp_path).provenance
    assert there.config == {k: v for k, v in first.provenance.config.items() if k != "built_in_source"}
    assert there.differences(first.provenance) == first.provenance.differences(there) == []
    monkeypatch.setattr(criterion_pass, "measure_rows", None)  # is not called again
    assert score("loss").table.equals(first.table)


def test_functions_of_the_package_keep_the_names_that_scores_know_them_by():
    from resofilter_trainer.criteria.model import loss
    from resofilter_trainer.criteria.prompted import Nuggets, SelectIT

    assert criterion_pass._named(loss)[0] == "resofilter_trainer.criteria.loss"
    names = [criterion_pass._named(Criterion(kind.__new__(kind)))[0] for kind in (Nuggets, SelectIT)]
    assert names == ["resofilter_trainer.prompted_criteria.Nuggets", "resofilter_trainer.prompted_criteria.SelectIT"]


def test_changed_code_of_a_criterion_of_the_package_does_not_return_old_scores(score, monkeypatch):
    assert "built_in_source" in score("loss").provenance.config
    monkeypatch.setattr(criterion_pass, "source_of", lambda criterion: "other code")
    assert "built_in_source (" in refusal(lambda: score("loss"))


def test_scores_of_the_version_before_by_a_users_function_are_read_and_not_reused(score, tmp_path):
    first = score(first_version())
    without_source(tmp_path)
    there = ScoreTable.load(tmp_path)
    assert DataSelector(keep=0.5).select(there).keep.tolist() == DataSelector(keep=0.5).select(first).keep.tolist()
    assert write_report(read_contents(tmp_path), tmp_path / "page").path.exists()
    assert "criterion_source (None / " in refusal(lambda: score(first_version()))


def test_a_function_of_the_users_own_among_the_criteria_is_known_by_its_source(score, monkeypatch):
    monkeypatch.setitem(CRITERIA, "new", Criterion(first_version()))
    assert "criterion_source" in score("new").provenance.config
    monkeypatch.delitem(CRITERIA, "new")
    monkeypatch.setitem(CRITERIA, "new", Criterion(second_version()))
    assert "criterion_source (" in refusal(lambda: score("new"))


# ---- names


def test_another_function_under_the_name_of_a_criterion_is_refused(score, tmp_path):
    def entropy(model, batch):
        return batch["attention_mask"].sum(1)

    for criterion in (entropy, Criterion(entropy, drop="smallest")):
        said = refusal(lambda criterion=criterion: score(criterion))
        assert said.startswith("There is already a criterion 'entropy'.")
    assert not list(tmp_path.iterdir())


def test_the_function_of_a_criterion_may_be_passed_itself(score):
    assert score(loss).scored.all()
