"""Self-evolving cleaning in stages: what a loop by hand gives, also after an interrupt; and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers.cleaning import prepared_by_trl
from helpers.samples import plain_losses
from helpers.training import arguments, in_order, llama, rows
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from resofilter_trainer.config import InputError, TokenCleaning
from resofilter_trainer.data import surveys
from resofilter_trainer.scores.token_scores import TokenScores
from resofilter_trainer.scoring import token_losses as loss_pass
from resofilter_trainer.selecting.token_selection import EMPTIED
from resofilter_trainer.tokens import losses as token_losses
from resofilter_trainer.tokens.cleaning import clean_dataset
from resofilter_trainer.training import self_evolving
from resofilter_trainer.training.self_evolving import Evolved, self_evolve

COUNT = 14  # 5, 5 and 4 rows in three stages
CLEANING = TokenCleaning(keep=0.5, parts=3, group_by="source")
PREPARED = "base model, dataset or preparation of the rows"  # as in stages.json
SPLIT = np.array_split(np.arange(COUNT), 3)


def data() -> Dataset:
    return rows(COUNT).add_column("source", ["ab"[i % 2] for i in range(COUNT)])


def settings(output: Path, **changes: Any):
    return in_order(arguments(output, **{"num_train_epochs": 1, "learning_rate": 1e-2, **changes}))


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("base")
    llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def evolve(base: Any, output: Path, cleaning: TokenCleaning = CLEANING, **options: Any) -> Evolved:
    changes, dataset = options.pop("changes", {}), options.pop("dataset", None)
    return self_evolve(base, data() if dataset is None else dataset, cleaning, settings(output, **changes), **options)


@pytest.fixture(scope="module")
def evolved(base, tmp_path_factory) -> tuple[Evolved, Path]:
    """One run that nothing disturbed."""
    output = tmp_path_factory.mktemp("evolved")
    return evolve(base, output), output


@pytest.fixture
def trained(monkeypatch) -> list[int]:
    """The first row of every stage that is trained on."""
    seen: list[int] = []
    real = self_evolving.fine_tune

    def spy(model, stage, *args):
        seen.append(stage["sample_id"][0])
        return real(model, stage, *args)

    monkeypatch.setattr(self_evolving, "fine_tune", spy)
    return seen


def assert_same_end(one: Evolved, other: Evolved) -> None:
    for mine, theirs in zip(one.stages, other.stages, strict=True):
        assert mine.dataset.to_list() == theirs.dataset.to_list()
        assert json.dumps(mine.summary) == json.dumps(theirs.summary)
    assert one.dataset.to_list() == other.dataset.to_list()
    assert one.reasons == other.reasons
    weights = other.model.state_dict()
    assert weights.keys() == one.model.state_dict().keys()
    assert all(torch.equal(value, weights[name]) for name, value in one.model.state_dict().items())


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- what it is


def masked_by_hand(rows_of_stage: Dataset, base, latest, keep: float) -> Dataset:
    """The labels of the int(N * keep) tokens that the latest model has learnt most about; rows without are left out."""
    samples = list(rows_of_stage.select_columns(["input_ids", "labels"]).with_format("torch"))
    scores = (plain_losses(base.eval(), samples).double() - plain_losses(latest.eval(), samples).double()).tolist()
    best = set(sorted(range(len(scores)), key=lambda n: -scores[n])[: int(len(scores) * keep)])
    labels, n = [], 0
    for row in rows_of_stage["labels"]:
        new = []
        for place, label in enumerate(row):
            learnt = place > 0 and label != -100
            new.append(label if learnt and n in best else -100)
            n += learnt
        labels.append(new)
    masked = Dataset.from_dict({"input_ids": rows_of_stage["input_ids"], "labels": labels})
    return masked.select([row for row, new in enumerate(labels) if set(new) != {-100}])


def test_stages_are_those_of_a_loop_by_hand(evolved, base, tokenizer, tmp_path):
    found, _ = evolved
    tokens = prepared_by_trl(data().remove_columns("source"), base, tokenizer)
    blocks = [tokens.select(block) for block in SPLIT]
    fixed, latest = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    for number, block in enumerate(blocks):
        learnt = block if number == 0 else masked_by_hand(block, fixed, latest, CLEANING.keep)
        stage = found.stages[number].dataset
        assert list(stage["labels"]) == list(learnt["labels"]), number
        assert list(stage["input_ids"]) == list(learnt["input_ids"])
        trainer = SFTTrainer(latest, settings(tmp_path), train_dataset=learnt, processing_class=tokenizer)
        trainer._get_train_sampler = lambda rows, *_: SequentialSampler(rows)
        trainer.train()
        latest = trainer.model
    weights = found.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in latest.state_dict().items())


def test_the_first_stage_keeps_all_tokens_and_the_others_a_share(evolved):
    found, _ = evolved
    first, *others = found.stages
    assert first.selection is None
    assert first.dataset["sample_id"] == SPLIT[0].tolist()
    assert first.summary["tokens"] == first.summary["tokens_kept"]
    for stage, block in zip(others, SPLIT[1:], strict=True):
        assert set(stage.dataset["sample_id"]) <= set(block.tolist())
        assert stage.selection.scores.sample_id.tolist() == block.tolist()
        assert stage.summary["tokens_kept"] == int(stage.summary["tokens"] * 0.5) == stage.selection.keep.sum()


def test_what_is_left_can_be_opened(evolved, tokenizer):
    found, output = evolved
    dataset = load_from_disk(output)
    assert dataset.to_list() == found.dataset.to_list() == [row for stage in found.stages for row in stage.dataset]
    assert sorted([*dataset["sample_id"], *found.reasons]) == list(range(COUNT))
    assert set(found.reasons.values()) <= {EMPTIED}
    summary = json.loads((output / "summary.json").read_text())
    assert summary == {**json.loads(json.dumps(found.summary)), "rows_left_out": len(found.reasons)}
    assert [stage["stage"] for stage in summary["stages"]] == [0, 1, 2]
    model = AutoModelForCausalLM.from_pretrained(output / "stage-2" / "model")
    assert all(torch.equal(value, found.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert not (output / "parts").exists()
    assert not [name for name in files_in(output) if name.endswith(".part")]
    for number in (1, 2):
        scores = TokenScores.load(output / f"stage-{number}")
        assert scores.base.tobytes() == found.stages[number].selection.scores.base.tobytes()


def test_each_cleaned_stage_says_what_the_groups_keep(evolved):
    found, _ = evolved
    for stage in found.summary["stages"][1:]:
        selection = found.stages[stage["stage"]].selection
        ids, kept, tokens = selection.scores.sample_id, selection.kept_of_row, selection.scores.num_tokens
        for number, group in enumerate("ab"):
            mine = ids % 2 == number
            assert stage["share_of_groups"][group] == pytest.approx(kept[mine].sum() / tokens[mine].sum())


def test_ranking_within_samples(base, tmp_path):
    found = evolve(base, tmp_path, dataclasses.replace(CLEANING, parts=2, ranking="sample"))
    selection = found.stages[1].selection
    assert selection.kept_of_row.tolist() == (selection.scores.num_tokens * 0.5).astype(int).tolist()


# ---- interrupted


@contextlib.contextmanager
def stopped_after(done: int, trained: list[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An interrupt comes once so many stages are trained."""
    real = self_evolving.fine_tune

    def stop(*args):
        if len(trained) == done:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(self_evolving, "fine_tune", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("done", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupted_run_comes_to_the_same_end(done, evolved, base, tmp_path, trained, monkeypatch):
    with stopped_after(done, trained, monkeypatch):
        evolve(base, tmp_path)
    firsts = [int(block[0]) for block in SPLIT]
    assert len(trained) == done
    torch.rand(3)  # nothing hangs on the state that an interrupt leaves
    found = evolve(base, tmp_path)
    assert len(trained) == len(firsts)  # none twice
    assert_same_end(found, evolved[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "object", "adapters"])
def test_a_run_that_is_stopped_while_measuring_is_resumed(kind, base, tokenizer, tmp_path, trained, monkeypatch):
    real, count = loss_pass._losses_of, []

    def stop(*args):
        count.append(1)
        if len(count) % 3 == 0:
            raise KeyboardInterrupt
        return real(*args)

    def run(folder: str) -> Evolved:
        model = llama(len(tokenizer)) if kind == "object" else base  # which nobody has saved yet
        options = {"peft_config": LORA} if kind == "adapters" else {}
        cleaning = dataclasses.replace(CLEANING, tokens_per_batch=64)
        return evolve(model, tmp_path / folder, cleaning, processing_class=tokenizer, **options)

    whole = run("whole")
    trained.clear()
    monkeypatch.setattr(loss_pass, "_losses_of", stop)
    starts, found = 0, None
    while found is None:
        starts += 1
        with contextlib.suppress(KeyboardInterrupt):
            found = run("stopped")
    assert_same_end(found, whole)
    assert starts > 3
    assert len(trained) == 3


def test_a_run_that_is_done_trains_and_measures_nothing(evolved, base, tmp_path, trained, monkeypatch):
    first = evolve(base, tmp_path)
    assert len(trained) == 3
    monkeypatch.setattr(token_losses, "measure_token_losses", None)
    again = evolve(base, tmp_path)
    assert len(trained) == 3
    assert_same_end(again, first)
    assert_same_end(again, evolved[0])


# ---- refused


@pytest.mark.parametrize(
    ("cleaning", "options", "told"),
    [
        ({"keep": 0.4}, {}, {"token cleaning.keep (0.5 / 0.4)"}),
        ({"parts": 2}, {}, {"token cleaning.parts (3 / 2)"}),
        ({"ranking": "sample"}, {}, {"token cleaning.ranking (global / sample)"}),
        ({}, {"changes": {"learning_rate": 1e-4}}, {"training.learning_rate (0.01 / 0.0001)"}),
        ({}, {"changes": {"seed": 1}}, {"training.seed (42 / 1)"}),
        (
            {},
            {"changes": {"max_length": 40}},
            {f"{PREPARED}.preparation.max_length (64 / 40)", "training.max_length (64 / 40)"},
        ),
        (
            {},
            {"dataset": data().select(range(COUNT - 1))},
            {f"{PREPARED}.dataset", f"{PREPARED}.rows (14 / 13)"},
        ),
        ({}, {"peft_config": LoraConfig(r=2)}, {"LoRA"}),
    ],
)
def test_stages_of_other_settings_are_refused_by_name(cleaning, options, told, evolved, base, trained):
    _, output = evolved
    before = files_in(output)
    with pytest.raises(InputError, match="made from something else") as refused:
        evolve(base, output, dataclasses.replace(CLEANING, **cleaning), **options)
    differing, way_out = str(refused.value).split("they differ in ")[1].split(" (there / here). ")
    found = differing.split("; ")
    assert all(any(each.startswith(name) for each in found) for name in told)
    assert all(any(each.startswith(name) for name in told) for each in found)
    assert way_out == f"Choose another output_dir, or remove '{output}'."
    assert "\n" not in str(refused.value)
    assert (trained, files_in(output)) == ([], before)


def test_stages_of_a_version_with_another_fingerprint_of_rows_are_loaded(evolved, base, trained, monkeypatch):
    _, output = evolved
    before = files_in(output)
    monkeypatch.setattr(surveys, "MANY", 5)  # as in this version for many rows
    evolve(base, output)
    assert (trained, files_in(output)) == ([], before)
    with pytest.raises(InputError, match=f"they differ in {PREPARED}.dataset"):
        evolve(base, output, dataset=data().select([1, 0, *range(2, COUNT)]))


def test_stages_of_another_base_model_are_refused(evolved, trained):
    _, output = evolved
    with pytest.raises(InputError, match=f"they differ in {PREPARED}.weights"):
        evolve(str(output / "stage-2" / "model"), output)
    assert trained == []


def test_fewer_rows_than_stages_are_refused_before_anything_is_written(base, tmp_path, trained):
    with pytest.raises(InputError, match="2 rows have tokens to learn, too few for parts=3"):
        evolve(base, tmp_path, dataset=data().select(range(2)))
    assert (trained, files_in(tmp_path)) == ([], [])


def test_a_folder_with_another_dataset_is_refused(base, tmp_path, trained):
    data().save_to_disk(tmp_path)
    before = files_in(tmp_path)
    with pytest.raises(InputError, match="made in another way"):
        evolve(base, tmp_path)
    assert (trained, files_in(tmp_path)) == ([], before)


def test_a_share_that_keeps_no_token_of_a_stage_is_refused(base, tmp_path):
    with pytest.raises(InputError):
        evolve(base, tmp_path, dataclasses.replace(CLEANING, keep=1e-4))


def test_what_an_interrupted_run_measured_is_not_taken_for_the_whole_dataset(base, tmp_path, monkeypatch):
    cleaning = TokenCleaning(keep=0.5, reference=base, tokens_per_batch=64)
    whole = clean_dataset(base, data(), cleaning, args=settings(tmp_path))
    monkeypatch.setattr(self_evolving, "fine_tune", lambda *args: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        evolve(base, tmp_path, TokenCleaning(keep=0.5, parts=2, tokens_per_batch=64))
    try:
        found = clean_dataset(base, data(), cleaning, args=settings(tmp_path), output=tmp_path)
    except InputError:
        return
    np.testing.assert_array_equal(found.selection.scores.base, whole.selection.scores.base)


# ---- LoRA

LORA = LoraConfig(r=2, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear")


@pytest.mark.slow
def test_adapters_are_merged_between_stages_and_base_losses_measured_once(base, tmp_path, trained, monkeypatch):
    labels: list[str] = []
    real = token_losses.measure_token_losses

    def spy(model, prepared, args, budget, label, parts=None):
        labels.append(label)
        assert not [name for name, _ in model.named_modules() if "lora" in name]
        return real(model, prepared, args, budget, label, parts)

    monkeypatch.setattr(token_losses, "measure_token_losses", spy)
    before = json.dumps(LORA.to_dict(), default=str)
    found = evolve(base, tmp_path, peft_config=LORA)
    assert labels == [f"Losses of the {name} model" for name in ("base", "stage-1", "stage-2")]
    assert json.dumps(LORA.to_dict(), default=str) == before
    original = AutoModelForCausalLM.from_pretrained(base).state_dict()
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / f"stage-{number}" / "model") for number in range(3)]
    states = [original, *(model.state_dict() for model in models)]
    assert type(found.model) is type(models[0])
    assert not hasattr(found.model, "peft_config")
    for earlier, later in itertools.pairwise(states):
        changed = [name for name, value in later.items() if not torch.equal(value, earlier[name])]
        assert changed
        assert all("proj" in name for name in changed)
    assert all(torch.equal(value, states[-1][name]) for name, value in found.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("done", [1, 2])
def test_an_interrupted_run_with_adapters_comes_to_the_same_end(done, base, tmp_path, trained, monkeypatch):
    whole = evolve(base, tmp_path / "whole", peft_config=LORA)
    trained.clear()
    with stopped_after(done, trained, monkeypatch):
        evolve(base, tmp_path / "stopped", peft_config=LORA)
    torch.manual_seed(1234)
    assert_same_end(evolve(base, tmp_path / "stopped", peft_config=LORA), whole)
    assert len(trained) == 3
