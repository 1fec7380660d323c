"""A warm-up before a pass: a copy is tuned, the model stays as it is, and the scores are those of the tuned copy."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.families import tiny
from helpers.scoring import COLUMNS, ROWS, arguments
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTTrainer

from resofilter_trainer import (
    InputError,
    ResonanceConfig,
    ScoreTable,
    Warmup,
    score_by,
    score_dataset,
    score_layers,
    score_stream,
)
from resofilter_trainer.config import NotFiniteError, ScoreWarning
from resofilter_trainer.scoring import tuning, warmup
from resofilter_trainer.scoring.passes import Parts

SHORT = Warmup(rows=8, lr=1e-2, batch_size=2)
EPS = ResonanceConfig(eps=1e-4)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset.from_list(ROWS)


@pytest.fixture(scope="module")
def score(tiny_llama, tokenizer, dataset):
    """Scores of the tiny model, by default; `score(warmup=...)`."""

    def of(model: Any = None, rows: Dataset = dataset, output: Path | None = None, **options: Any) -> ScoreTable:
        args = options.pop("args", None) or arguments(disable_tqdm=True, activation_checkpointing=False)
        model = tiny_llama() if model is None else model
        return score_dataset(model, rows, tokenizer, args, EPS, output, **COLUMNS, **options)

    return of


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    """The folder of the scores after a warm-up."""
    return tmp_path_factory.mktemp("scored")


@pytest.fixture(scope="module")
def warm(score, scored) -> ScoreTable:
    return score(warmup=SHORT, output=scored)


@pytest.fixture(scope="module")
def cold(score) -> ScoreTable:
    return score()


@pytest.fixture
def no_tuning(monkeypatch) -> None:
    """A second warm-up fails the test."""
    monkeypatch.setattr(tuning.Tuning, "run", lambda *args: pytest.fail("it was tuned again"))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_weights(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def plain(scores: ScoreTable) -> Any:
    """The table without what a warm-up adds."""
    return scores.table.drop_columns("warmed_up") if "warmed_up" in scores.table.column_names else scores.table


def by_hand(model: nn.Module, rows: list[dict[str, list[int]]], settings: Warmup) -> None:
    """Tune a model as SFTTrainer's own loop would, in plain PyTorch: the rows of each step from a list."""
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=0.0)
    steps = len(rows) // settings.batch_size
    model.train()
    for step in range(steps):
        batch = rows[step * settings.batch_size : (step + 1) * settings.batch_size]
        tokens = sum(sum(label != -100 for label in row["labels"][1:]) for row in batch)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * (1 - step / steps)
        optimizer.zero_grad()
        for row in batch:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum") / tokens
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


class Seen(TrainerCallback):
    """The rows of each step, as the trainer gives them to the model."""

    rows: list[dict[str, list[int]]]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for ids, labels, mask in zip(kwargs["input_ids"], kwargs["labels"], kwargs["attention_mask"], strict=True):
            own = mask.bool()
            self.rows.append({"input_ids": ids[own].tolist(), "labels": labels[own].tolist()})


def test_the_scores_are_those_of_the_model_tuned_by_hand(score, cold, tiny_llama, monkeypatch):
    """Against a plain loop in float64 over the very rows that SFTTrainer took, in its order."""
    spy = Seen()
    spy.rows = []
    monkeypatch.setattr(tuning, "_Progress", lambda: spy)
    scores = score(tiny_llama(dtype=torch.float64), warmup=SHORT)
    oracle = tiny_llama(dtype=torch.float64)
    by_hand(oracle, spy.rows, SHORT)
    expected = score(oracle.eval())
    assert len(spy.rows) == 8
    np.testing.assert_allclose(scores.column("loss"), expected.column("loss"), rtol=1e-5)
    np.testing.assert_allclose(scores.column("score"), expected.column("score"), rtol=1e-4)
    assert np.abs(cold.column("loss") / expected.column("loss") - 1).max() > 0.01


@pytest.mark.parametrize("method", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_the_model_is_not_changed_and_its_scores_neither(method, score, cold, tiny_llama):
    model, settings = tiny_llama(), dataclasses.replace(SHORT, method=method)
    modules = [type(each) for each in model.modules()]
    before, flags = weights_of(model), [each.requires_grad for each in model.parameters()]
    warm = score(model, warmup=settings)
    assert same_weights(model, before)
    assert [type(each) for each in model.modules()] == modules
    assert [each.requires_grad for each in model.parameters()] == flags
    assert not model.training
    assert score(model).table.equals(cold.table)
    assert (warm.column("loss") < cold.column("loss")).all()


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_scores_are_those_of_the_saved_tuned_model(method, score, tiny_llama, tokenizer, tmp_path, monkeypatch):
    """Tune, save, score by the path without a warm-up: the same, bit for bit."""
    tuned, own = [], warmup.with_weights
    monkeypatch.setattr(warmup, "with_weights", lambda *args: (tuned.append(own(*args)), tuned[0])[1])
    warm = score(tiny_llama(), warmup=dataclasses.replace(SHORT, method=method))
    tuned[0].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert plain(score(str(tmp_path))).equals(plain(warm))


def test_a_path_and_its_model_have_the_same_scores(score, warm, tiny_model_dir):
    assert score(str(tiny_model_dir), warmup=SHORT).table.equals(warm.table)


def test_a_second_pass_returns_the_scores_without_tuning(score, warm, scored, no_tuning):
    again = score(warmup=SHORT, output=scored)
    assert again.table.equals(warm.table)
    assert again.provenance == warm.provenance


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (None, "warmup_rows (8 / None)"),
        (9, "warmup_rows (8 / 9)"),
        (dataclasses.replace(SHORT, seed=1), "warmup_seed (0 / 1); warmup_tokens"),
        (dataclasses.replace(SHORT, method="lora"), "warmup_method (full / lora)"),
        (dataclasses.replace(SHORT, lr=1e-3), "warmup_lr (0.01 / 0.001)"),
    ],
)
def test_scores_of_another_warm_up_are_refused(other, name, score, warm, scored, no_tuning):
    with pytest.raises(InputError, match="holds scores made from something else") as refused:
        score(warmup=other, output=scored)
    assert name in str(refused.value)


def test_the_tuned_weights_are_kept_for_other_signals_and_criteria(
    score, warm, scored, tiny_llama, tokenizer, dataset, tmp_path, no_tuning
):
    kept = dataclasses.replace(SHORT, cache=scored / "warmup")
    more = score(warmup=kept, output=tmp_path, signals=["entropy"])
    losses = score_by("loss", tiny_llama(), dataset, tokenizer, arguments(), warmup=kept, **COLUMNS)
    assert more.table.select(warm.table.column_names).equals(warm.table)
    np.testing.assert_allclose(losses.column("score"), warm.column("loss"), rtol=1e-5)
    assert losses.column("warmed_up").tolist() == warm.column("warmed_up").tolist()


def test_every_layer_is_measured_with_the_same_tuned_copy(warm, scored, tiny_llama, tokenizer, dataset, no_tuning):
    args = arguments(disable_tqdm=True)
    layers = score_layers(tiny_llama(), dataset, tokenizer, args, EPS, scored, limit=5, warmup=SHORT, **COLUMNS)
    rows = np.flatnonzero(layers.scored)
    assert len(rows) == 5
    np.testing.assert_allclose(layers.column("layer_3")[rows], warm.column("layer_3")[rows], rtol=1e-4)
    assert layers.column("warmed_up")[rows].tolist() == warm.column("warmed_up")[rows].tolist()


def test_kept_weights_of_another_model_are_refused_and_damaged_ones_too(score, warm, scored, tiny_llama, tmp_path):
    kept, file = dataclasses.replace(SHORT, cache=tmp_path), tmp_path / warmup.WEIGHTS
    whole = (scored / "warmup" / warmup.WEIGHTS).read_bytes()
    file.write_bytes(whole)
    with pytest.raises(InputError, match="holds a warm-up made from something else: they differ in weights"):
        score(tiny_llama(seed=1), warmup=kept)
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"x" * 20):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"is damaged\. Remove it: the warm-up is made again\."):
            score(warmup=kept)


class Stopped(Exception):
    pass


def stop(*args: Any) -> None:
    raise Stopped


@pytest.mark.parametrize(
    ("family", "method", "at"),
    [
        ("llama", "full", 5),
        pytest.param("gpt2", "lora", 2, marks=pytest.mark.slow),
        pytest.param("mixtral", "full", 2, marks=pytest.mark.slow),
        pytest.param("gpt_neox", "full", 2, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_warm_up_resumes_to_the_same_weights(family, method, at, score, tmp_path, monkeypatch):
    """The Trainer's own checkpoints lack Mixtral's experts and GPT-NeoX's head when they are read."""
    model, settings = tiny(family, vocab_size=512), dataclasses.replace(SHORT, method=method, epochs=2)
    whole = score(model, warmup=settings)
    own, steps = tuning._Tuner.training_step, []

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        steps.append(self.state.global_step)
        if len(steps) == at + 1:
            raise Stopped
        return own(self, *args, **kwargs)

    monkeypatch.setattr(tuning._Tuner, "training_step", training_step)
    with pytest.raises(Stopped):
        score(model, warmup=settings, output=tmp_path)
    assert len(list((tmp_path / "warmup" / "training").glob("checkpoint-*"))) == 1
    resumed = score(model, warmup=settings, output=tmp_path)
    assert steps == [*range(at + 1), *range(at, 8)]
    assert resumed.table.equals(whole.table)
    assert resumed.provenance.warmup["weights"] == whole.provenance.warmup["weights"]
    assert [path.name for path in (tmp_path / "warmup").iterdir()] == [warmup.WEIGHTS]


def test_a_warm_up_that_was_killed_while_it_wrote_a_checkpoint_begins_again(score, warm, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "replacing", stop)
    with pytest.raises(Stopped):
        score(warmup=SHORT, output=tmp_path)
    monkeypatch.undo()
    assert list((tmp_path / "warmup" / "training").glob("checkpoint-*"))
    assert score(warmup=SHORT, output=tmp_path).table.equals(warm.table)


def test_an_interrupted_warm_up_of_something_else_is_refused(score, tmp_path, monkeypatch):
    own = tuning._Tuner.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step == 2:
            raise Stopped
        return own(self, *args, **kwargs)

    monkeypatch.setattr(tuning._Tuner, "training_step", training_step)
    with pytest.raises(Stopped):
        score(warmup=SHORT, output=tmp_path)
    with pytest.raises(InputError, match=r"differ in warmup_lr \(0.01 / 0.001\).*remove that folder"):
        score(warmup=dataclasses.replace(SHORT, lr=1e-3), output=tmp_path)


def test_an_interrupted_pass_resumes_with_the_same_tuned_copy(score, warm, tmp_path, monkeypatch):
    """And not with one that was tuned anew and differs in its last digits."""
    made_of = []
    own = Parts.store
    monkeypatch.setattr(Parts, "store", lambda self, *args: (made_of.append(self.made_of), own(self, *args))[1])
    monkeypatch.setattr(
        "resofilter_trainer.scoring.output.PassOutput.finish", lambda *args: (_ for _ in ()).throw(Stopped)
    )
    with pytest.raises(Stopped):
        score(warmup=SHORT, tokens_per_batch=40, output=tmp_path)
    assert {each["warmup_weights"] for each in made_of} == {warm.provenance.warmup["weights"]}
    monkeypatch.undo()
    monkeypatch.setattr(tuning.Tuning, "run", lambda *args: pytest.fail("it was tuned again"))
    resumed = score(warmup=SHORT, tokens_per_batch=40, output=tmp_path)
    np.testing.assert_allclose(resumed.column("score"), warm.column("score"), rtol=1e-5)


# ---- rows


def test_the_rows_are_drawn_by_the_seed_and_marked(score, warm):
    other = score(warmup=dataclasses.replace(SHORT, seed=1))
    for seed, scores in enumerate((warm, other)):
        expected = np.sort(np.random.default_rng(seed).permutation(30)[:8])
        assert np.flatnonzero(scores.column("warmed_up")).tolist() == expected.tolist()
    assert not np.array_equal(other.column("warmed_up"), warm.column("warmed_up"))


def test_only_usable_rows_are_drawn_and_equal_rows_are_marked_too(score):
    rows = [*ROWS[:6], {"question": "nothing", "answer": " "}, ROWS[0]]
    warm = score(rows=Dataset.from_list(rows), warmup=Warmup(rows=7, batch_size=7, lr=1e-3), drop_empty=True)
    assert warm.provenance.warmup["rows"] == 7
    assert warm.table["warmed_up"].to_pylist() == [1, 1, 1, 1, 1, 1, None, 1]
    one = score(rows=Dataset.from_list([ROWS[0], ROWS[1], ROWS[0]]), warmup=Warmup(rows=1, batch_size=1, lr=1e-3))
    assert one.table["warmed_up"].to_pylist() in ([1, 0, 1], [0, 1, 0])


def test_a_dataset_of_its_own_is_read_like_the_scored_rows(score, dataset):
    others = Dataset.from_list([{"answer": f"{i} fox", "question": f"is it {i} ?", "more": i} for i in range(6)])
    whole = score(warmup_dataset=others.add_item(ROWS[3] | {"more": 0}))
    assert whole.provenance.warmup["rows"] == 7
    assert whole.provenance.config["warmup_rows"] == 7
    assert np.flatnonzero(whole.column("warmed_up")).tolist() == [3]
    assert score(warmup=4, warmup_dataset=others).provenance.warmup["rows"] == 4


def test_without_a_warm_up_nothing_is_different(cold):
    assert "warmed_up" not in cold.table.column_names
    assert not [name for name in cold.provenance.config if "warmup" in name]
    assert cold.provenance.warmup == {}


def test_the_cost_is_counted_and_not_compared(score, tmp_path):
    one = score(warmup=dataclasses.replace(SHORT, epochs=2))
    cost, lengths = one.provenance.warmup, one.column("length")[one.column("warmed_up") == 1]
    assert cost["tokens"] == 2 * lengths.sum()
    assert (cost["rows"], cost["steps"], cost["processes"]) == (8, 8, 1)
    assert cost["seconds"] > 0
    slower = dataclasses.replace(one.provenance, warmup={**cost, "seconds": 1e6})
    assert one.provenance.differences(slower) == []
    assert one.provenance.key == slower.key
    one.save(tmp_path)
    assert ScoreTable.load(tmp_path).provenance == one.provenance


@pytest.mark.slow
def test_a_stream_is_scored_with_one_tuned_copy(score, tiny_llama, tokenizer, dataset, tmp_path, monkeypatch):
    whole = score(warmup=SHORT, warmup_dataset=dataset)
    runs, own = [], tuning.Tuning.run
    monkeypatch.setattr(tuning.Tuning, "run", lambda self, *args: (runs.append(1), own(self, *args))[1])
    monkeypatch.setattr("resofilter_trainer.scoring.stream.whole_number", lambda name, value, **bounds: 0)

    def streamed(**settings: Any) -> ScoreTable:
        args = arguments(disable_tqdm=True, activation_checkpointing=False)
        given = dataset.to_iterable_dataset()
        more = {"rows_per_piece": 12, "warmup_dataset": dataset, **COLUMNS, **settings}
        return score_stream(tiny_llama(), given, tmp_path, tokenizer, args, EPS, **more)

    scores = streamed(warmup=SHORT)
    np.testing.assert_allclose(scores.column("score"), whole.column("score"), rtol=1e-5)
    assert scores.column("warmed_up").tolist() == whole.column("warmed_up").tolist()
    assert streamed(warmup=SHORT).table.equals(scores.table)
    assert len(runs) == 1
    with pytest.raises(InputError, match="differ in warmup_rows"):
        streamed(warmup=dataclasses.replace(SHORT, rows=7))
    with pytest.raises(InputError, match="has no rows to draw for a warm-up before it is read: pass a warmup_dataset"):
        streamed(warmup=SHORT, warmup_dataset=None)


# ---- models


def with_adapter(model: nn.Module, **settings: Any) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM", **settings)
    )


@pytest.mark.parametrize("trainable", [True, False])
def test_the_adapter_of_a_peft_model_is_tuned_as_sft_trainer_would(trainable, score, tiny_llama, monkeypatch):
    tuned, own = [], warmup.with_weights
    monkeypatch.setattr(warmup, "with_weights", lambda *args: (tuned.append(own(*args)), tuned[0])[1])
    model = with_adapter(tiny_llama())
    for each in model.parameters():
        each.requires_grad_(each.requires_grad and trainable)
    before = weights_of(model)
    warm = score(model, warmup=dataclasses.replace(SHORT, method="lora"))
    assert same_weights(model, before)
    changed = {name for name, value in tuned[0].state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert score(tuned[0]).column("score").tolist() == warm.column("score").tolist()
    with pytest.raises(InputError, match="has an adapter, which a warm-up tunes: choose 'lora' as its method"):
        score(model, warmup=SHORT)


def test_a_frozen_model_is_tuned_whole_and_stays_frozen(score, warm, tiny_llama):
    model = tiny_llama().requires_grad_(False)
    assert score(model, warmup=SHORT).table.equals(warm.table)
    assert not any(each.requires_grad for each in model.parameters())


def test_weights_that_are_frozen_stay_as_they_are_and_are_part_of_the_recipe(score, warm, tiny_llama, monkeypatch):
    tuned, own = [], warmup.with_weights
    monkeypatch.setattr(warmup, "with_weights", lambda *args: (tuned.append(own(*args)), tuned[0])[1])
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    scores = score(model, warmup=SHORT)
    same = {name for name, value in tuned[0].state_dict().items() if torch.equal(value, model.state_dict()[name])}
    assert same == {"lm_head.weight"}
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["lm_head.weight"]
    (difference,) = warm.provenance.differences(scores.provenance)
    assert difference.startswith("warmup_trained (all / ")


def test_a_model_that_a_trainer_has_patched_is_scored_with_its_copys_weights(
    score, warm, tiny_llama, tokenizer, tmp_path
):
    """SFTTrainer leaves a forward on the model that is bound to it, also in its copies."""
    model = tiny_llama()
    args = arguments(disable_tqdm=True, activation_checkpointing=False)
    args.output_dir = str(tmp_path)
    SFTTrainer(model, args, train_dataset=Dataset.from_list([{"text": "fox"}]), processing_class=tokenizer)
    assert score(model.eval(), warmup=SHORT).table.equals(warm.table)


def test_a_model_with_a_forward_of_the_users_own_is_refused(score, tiny_llama):
    model = tiny_llama()
    own = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: own(x)
    with pytest.raises(InputError, match=r"The forward of 'model.layers.1.mlp' was replaced"):
        score(model, warmup=SHORT)


def test_the_users_training_arguments_do_not_matter(score, warm):
    odd = {"learning_rate": 1.0, "weight_decay": 0.5, "max_steps": 1, "seed": 9, "num_train_epochs": 7}
    odd |= {"max_grad_norm": 9, "lr_scheduler_type": "cosine", "warmup_steps": 5, "optim": "sgd", "packing": True}
    args = arguments(disable_tqdm=True, activation_checkpointing=False, **odd)
    assert score(warmup=SHORT, args=args).table.equals(warm.table)
    assert args.learning_rate == 1.0
    small = arguments(disable_tqdm=True, activation_checkpointing=False, per_device_train_batch_size=1)
    in_parts = score(warmup=SHORT, args=small)
    np.testing.assert_allclose(in_parts.column("loss"), warm.column("loss"), rtol=1e-4)


def test_activation_checkpointing_changes_nothing(score, warm):
    args = arguments(disable_tqdm=True, activation_checkpointing=True)
    assert score(warmup=SHORT, args=args).table.equals(warm.table)


def test_nothing_is_printed_without_a_progress_bar(score, capfd, tmp_path):
    capfd.readouterr()
    score(warmup=SHORT, output=tmp_path)
    printed = capfd.readouterr()
    assert "step/s" not in printed.out + printed.err
    assert "train_runtime" not in printed.out
    assert "shards" not in printed.err


def test_the_random_states_are_those_without_a_warm_up(score):
    score()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    score(warmup=SHORT)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.slow
def test_two_processes_score_with_one_tuned_copy(tmp_path, tiny_model_dir):
    """Each step has the same rows in any number of processes, up to the order of a sum."""
    rows = Dataset.from_list(ROWS)
    rows.to_json(tmp_path / "rows.jsonl")
    command = ["score", "--model", tiny_model_dir, "--dataset", tmp_path / "rows.jsonl", "--precision", "float32"]
    command += ["--prompt_column", "question", "--completion_column", "answer", "--eps", "1e-4", "--warmup", "16"]
    command += ["--warmup_lr", "1e-3", "--tokens_per_batch", "40"]

    def scores(name: str, *options: Any) -> ScoreTable:
        given = [*command, "--output", tmp_path / name, *options]
        done = subprocess.run(
            [sys.executable, "-m", "resofilter_trainer.cli", *map(str, given)], capture_output=True, text=True,
            timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("after a warm-up (16 rows, ") == 1
        return ScoreTable.load(tmp_path / name)

    one, two, again = scores("one"), scores("two", "--num_processes", 2), scores("again", "--num_processes", 2)
    assert two.provenance.warmup["processes"] == 2
    assert two.table.equals(again.table)
    np.testing.assert_allclose(two.column("loss"), one.column("loss"), rtol=1e-5)
    assert not one.provenance.differences(two.provenance)
    shutil.rmtree(tmp_path / "again" / "warmup")
    kept = scores("third", "--num_processes", 2, "--warmup_cache", tmp_path / "one" / "warmup")
    assert kept.table.equals(one.table)


# ---- what cannot work


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"warmup": 0}, "warmup must be a whole number of at least 1, got 0."),
        ({"warmup": -1}, "warmup must be a whole number of at least 1, got -1."),
        ({"warmup": "many"}, "warmup must be a whole number of at least 1, got 'many'."),
        ({"warmup": 1.5}, "warmup must be a whole number of at least 1, got 1.5."),
        ({"warmup": True}, "warmup must be a whole number of at least 1, got True."),
        ({"warmup": 31}, "The warm-up needs 31 rows, and 30 of the rows to score can be learnt: ask for fewer"),
        ({"warmup_dataset": ROWS}, "warmup_dataset must be a datasets.Dataset, got a list."),
        ({"warmup_dataset": Dataset.from_list(ROWS[:0])}, "In the warm-up's dataset: "),
        (
            {"warmup_dataset": Dataset.from_list([{"text": "x"}])},
            "In the warm-up's dataset: The dataset has no column 'question'",
        ),
        (
            {"warmup_dataset": Dataset.from_list([ROWS[0], {"question": "x", "answer": ""}])},
            "In the warm-up's dataset: 1 of 2 rows have an empty completion and teach nothing: rows 1.",
        ),
        (
            {"warmup": 3, "warmup_dataset": Dataset.from_list(ROWS[:2])},
            "The warm-up needs 3 rows, and 2 of warmup_dataset can be learnt",
        ),
        ({"warmup": 3, "sharded": True}, "leave sharded=True out"),
        ({"warm_up": 3}, "There is no argument warm_up=. Did you mean warmup=?"),
    ],
)
def test_what_cannot_work_is_one_line(options, expected, score):
    with pytest.raises(InputError) as refused:
        score(**options)
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rows": 0}, "The warm-up's rows must be a whole number of at least 1, got 0."),
        ({"method": "qlora"}, "The warm-up's method must be one of 'full', 'lora', got 'qlora'. Did you mean 'lora'?"),
        ({"lr": 0}, "The warm-up's lr must be a finite number above 0, got 0."),
        ({"epochs": 0.5}, "The warm-up's epochs must be a whole number of at least 1, got 0.5."),
        ({"batch_size": 0}, "The warm-up's batch_size must be a whole number of at least 1, got 0."),
        ({"cache": 3}, "The warm-up's cache must be a folder, got 3."),
        ({"learning_rate": 1}, "There is no argument learning_rate=."),
    ],
)
def test_settings_out_of_range_are_refused(settings, expected):
    with pytest.raises(InputError) as refused:
        Warmup(**settings)
    assert expected in str(refused.value)


def test_the_learning_rate_is_that_of_the_method():
    assert (Warmup().lr, Warmup(method="lora").lr) == (1e-4, 2e-4)


def test_a_warm_up_that_diverges_is_one_line_and_leaves_nothing(score, tiny_llama, tmp_path):
    with pytest.raises(NotFiniteError, match=r"The warm-up has diverged, .*choose a smaller learning rate"):
        score(warmup=dataclasses.replace(SHORT, lr=1e30), output=tmp_path / "out")
    broken = tiny_llama()
    with torch.no_grad():
        broken.lm_head.weight[5, 5] = torch.nan
    with pytest.raises(NotFiniteError, match="the loss of step 1 is not finite: nothing was scored"):
        score(broken, warmup=SHORT, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float16_is_refused(tiny_llama, tokenizer, dataset):
    with pytest.raises(InputError, match="A warm-up in float16 loses small gradients"):
        score_by("loss", tiny_llama(dtype=torch.float16), dataset, tokenizer, arguments(), warmup=3, **COLUMNS)


def test_a_full_warm_up_of_bfloat16_weights_is_refused(score, tiny_llama):
    """Nearly all of its steps would be rounded away."""
    model = tiny_llama().to(torch.bfloat16)
    with pytest.raises(InputError, match=r"too small for weights in bfloat16\. Load the model in float32"):
        score(model, warmup=SHORT)
    with pytest.warns(ScoreWarning, match="weights are bfloat16"):
        assert score(model, warmup=dataclasses.replace(SHORT, method="lora")).scored.all()


def test_what_cannot_be_measured_is_refused_before_the_tuning(tiny_llama, tokenizer, dataset, no_tuning):
    args = arguments(disable_tqdm=True, activation_checkpointing=False)
    for signals, config in ((["layer_vote"], ResonanceConfig(n_layers=1)), (None, ResonanceConfig(up_projection="no"))):
        with pytest.raises(InputError, match=r"'layer_vote' cannot be measured|up_projection"):
            score_dataset(tiny_llama(), dataset, tokenizer, args, config, warmup=SHORT, signals=signals, **COLUMNS)
