"""Cleaning against a reference model: what is masked, what is said, what is written, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers.cleaning import ARGS, COUNT, data, prepared_by_trl
from helpers.processes import torchrun
from helpers.samples import plain_losses
from helpers.tokenizers import make_tokenizer
from helpers.training import arguments, llama, train
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from resofilter_trainer.config import InputError, TokenCleaning
from resofilter_trainer.data import surveys
from resofilter_trainer.data.reference_model import adapted
from resofilter_trainer.scores.token_scores import TokenScores
from resofilter_trainer.scoring import token_losses as loss_pass
from resofilter_trainer.selecting.token_selection import EMPTIED
from resofilter_trainer.tokens import losses as token_losses
from resofilter_trainer.tokens.cleaned_dataset import described, save_dataset
from resofilter_trainer.tokens.cleaning import clean_dataset

TARGETS = ["q_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def base(place, tokenizer) -> str:
    folder = place / "base"
    llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reference(place, tokenizer) -> str:
    folder = place / "reference"
    llama(len(tokenizer), seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter(place, base) -> str:
    torch.manual_seed(3)
    adapter = LoraConfig(r=4, lora_alpha=32, target_modules=TARGETS, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter).save_pretrained(place / "adapter")
    return str(place / "adapter")


@pytest.fixture(scope="module")
def merged(place, base, adapter, tokenizer) -> str:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    model.save_pretrained(place / "merged")
    tokenizer.save_pretrained(place / "merged")
    return str(place / "merged")


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """What every pass over the models says it measures."""
    seen: list[str] = []
    real = token_losses.measure_token_losses

    def spy(model, prepared, args, budget, label, parts=None):
        seen.append(label)
        return real(model, prepared, args, budget, label, parts)

    monkeypatch.setattr(token_losses, "measure_token_losses", spy)
    return seen


def clean(model: Any, reference: str, output: Path | None = None, dataset: Dataset | None = None, **options: Any):
    names = ("keep", "ranking", "group_by", "tokens_per_batch")
    cleaning = TokenCleaning(reference=reference, **{name: options.pop(name) for name in names if name in options})
    args = options.pop("args", ARGS)
    return clean_dataset(model, data() if dataset is None else dataset, cleaning, args=args, output=output, **options)


def oracle(samples: Dataset, base: str, reference: str, keep: float, ranking: str) -> list[list[int]]:
    """The labels, in plain words: losses one row alone, sorted, the best kept. A first label, never learnt, stays."""
    tensors = list(samples.select_columns(["input_ids", "labels"]).with_format("torch"))
    models = [AutoModelForCausalLM.from_pretrained(name).eval() for name in (base, reference)]
    mine, theirs = (plain_losses(model, tensors).double().numpy() for model in models)
    scores = dict(enumerate(mine - theirs))
    places = [
        (row, place)
        for row, labels in enumerate(samples["labels"])
        for place, label in enumerate(labels)
        if label != -100 and place > 0
    ]
    kept: set[tuple[int, int]] = set()
    whole = range(len(places))
    one_by_one = [[n for n in whole if places[n][0] == row] for row in range(len(samples))]
    for group in [list(whole)] if ranking == "global" else one_by_one:
        best = sorted(group, key=lambda n: -scores[n])[: int(len(group) * keep)]
        kept |= {places[n] for n in best}
    return [
        [label if place == 0 or (row, place) in kept else -100 for place, label in enumerate(labels)]
        for row, labels in enumerate(samples["labels"])
    ]


def everything(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, to the byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def look(model) -> tuple[list[str], dict[str, torch.Tensor], dict[str, bool]]:
    """Modules, weights and what is trained, to be compared."""
    modules = [f"{name} {type(module).__name__}" for name, module in model.named_modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return modules, weights, {name: each.requires_grad for name, each in model.named_parameters()}


def assert_same_look(model, before) -> None:
    modules, weights, flags = look(model)
    assert modules == before[0]
    assert flags == before[2]
    assert weights.keys() == before[1].keys()
    assert all(torch.equal(value, before[1][name]) for name, value in weights.items())


# ---- what is masked


@pytest.mark.parametrize("ranking", ["global", "sample"])
@pytest.mark.parametrize("keep", [0.6, 0.25])
def test_labels_are_those_of_the_plain_procedure(ranking, keep, base, reference, tokenizer):
    cleaned = clean(base, reference, ranking=ranking, keep=keep, tokens_per_batch=150)
    samples = prepared_by_trl(data(), base, tokenizer)
    truth = oracle(samples, base, reference, keep, ranking)
    there = cleaned.dataset["sample_id"]
    learnt = sum(label != -100 for labels in samples["labels"] for label in labels[1:])
    assert list(cleaned.dataset["labels"]) == [truth[row] for row in there]
    assert list(cleaned.dataset["input_ids"]) == [samples["input_ids"][row] for row in there]
    assert set(range(COUNT)) - set(there) == {row for row in range(COUNT) if set(truth[row]) == {-100}}
    assert cleaned.selection.keep.sum() == sum(label != -100 for labels in truth for label in labels)
    if ranking == "global":
        assert cleaned.selection.keep.sum() == int(learnt * keep)
    assert cleaned.dataset.column_names == ["sample_id", "input_ids", "labels"]


def test_prompts_and_labels_that_were_masked_are_no_candidates(base, reference, tokenizer):
    samples = prepared_by_trl(data(), base, tokenizer)
    labels = [
        [-100 if (place + row) % 3 == 0 else token for place, token in enumerate(ids)]
        for row, ids in enumerate(samples["input_ids"])
    ]
    tokens = Dataset.from_dict({"input_ids": samples["input_ids"], "labels": labels})
    cleaned = clean(base, reference, dataset=tokens, keep=0.5)
    assert list(cleaned.dataset["labels"]) == oracle(tokens, base, reference, 0.5, "global")
    for row, before, after in zip(cleaned.dataset["input_ids"], labels, cleaned.dataset["labels"], strict=True):
        assert all(new in (-100, old) for old, new in zip(before, after, strict=True))
        assert all(new in (-100, token) for token, new in zip(row, after, strict=True))
    candidates = sum(label != -100 for row in labels for label in row[1:])
    assert len(cleaned.selection.keep) == candidates


def test_with_everything_kept_it_is_what_the_trainer_prepares(base, reference, tokenizer):
    cleaned = clean(base, reference, keep=1.0)
    samples = prepared_by_trl(data(), base, tokenizer)
    assert cleaned.dataset["sample_id"] == list(range(COUNT))
    for name in ("input_ids", "labels"):
        assert list(cleaned.dataset[name]) == list(samples[name])
    assert cleaned.reasons == {}


def test_each_row_says_where_it_was_and_the_others_why_they_are_not_there(base, reference):
    lines = data().remove_columns("source").to_list()
    lines[2] = {**lines[2], "completion": " "}
    lines[7] = {**lines[7], "prompt": lines[5]["prompt"]}
    lines[9] = {**lines[9], "prompt": "long " * 60}
    dataset = Dataset.from_list(lines)
    cleaned = clean(base, reference, dataset=dataset, keep=0.08, drop_duplicates=True, drop_empty=True)
    reasons = dict(cleaned.reasons)
    assert [reasons.pop(row) for row in (2, 7, 9)] == [
        "empty completion",
        "same prompt as row 5",
        "no token to learn within max_length 64",
    ]
    assert set(reasons.values()) == {EMPTIED}
    assert sorted([*cleaned.dataset["sample_id"], *cleaned.reasons]) == list(range(COUNT))
    whole = clean(base, reference, keep=1.0, dataset=dataset, drop_duplicates=True, drop_empty=True).dataset
    ids = dict(zip(whole["sample_id"], whole["input_ids"], strict=True))
    for row, mine, labels in zip(*(cleaned.dataset[name] for name in cleaned.dataset.column_names), strict=True):
        assert mine == ids[row]
        assert set(labels) != {-100}
        assert all(label in (-100, token) for label, token in zip(labels, mine, strict=True))


# ---- what is said


def test_summary_counts_tokens_rows_and_groups(base, reference, tmp_path):
    cleaned = clean(base, reference, tmp_path, keep=0.1, group_by="source")
    summary, selection = cleaned.summary, cleaned.selection
    kept = dict.fromkeys(range(COUNT), 0)
    for example in cleaned.dataset:
        kept[example["sample_id"]] = sum(label != -100 for label in example["labels"])
    tokens = selection.scores.num_tokens
    assert (summary["reference"], summary["keep_tokens"], summary["ranking"]) == (reference, 0.1, "global")
    assert (summary["tokens"], summary["tokens_kept"]) == (tokens.sum(), sum(kept.values()))
    assert summary["rows"] == COUNT
    assert summary["rows_emptied"] == [row for row in range(COUNT) if not kept[row]] != []
    for number, group in enumerate("ab"):
        share = sum(kept[row] for row in range(number, COUNT, 2)) / tokens[number::2].sum()
        assert summary["share_of_groups"][group] == pytest.approx(share)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written == {**json.loads(json.dumps(summary)), "rows_left_out": len(summary["rows_emptied"])}
    for name in ("most_kept", "least_kept"):
        assert 0 < len(summary[name]) <= 5
    shares = [each["share"] for each in summary["most_kept"]]
    assert shares == sorted(shares, reverse=True)
    assert summary["least_kept"][0]["share"] <= summary["most_kept"][-1]["share"]


def test_shares_of_tokens_are_those_of_the_dataset(base, reference, tokenizer):
    cleaned = clean(base, reference, keep=0.5)
    samples = prepared_by_trl(data(), base, tokenizer)
    all_labels = np.concatenate([np.array(labels[1:]) for labels in samples["labels"]])
    kept_labels = np.concatenate([np.array(labels) for labels in cleaned.dataset["labels"]])
    texts = {tokenizer.decode([token]): token for token in set(all_labels[all_labels != -100].tolist())}
    for each in [*cleaned.summary["most_kept"], *cleaned.summary["least_kept"]]:
        token = texts[each["token"]]
        assert each["count"] == (all_labels == token).sum()
        assert each["share"] == pytest.approx((kept_labels == token).sum() / each["count"])


def test_a_summary_in_lines(base, reference):
    cleaned = clean(base, reference, keep=0.1, group_by="source")
    lines = described(cleaned.summary, cleaned.reasons).splitlines()
    tokens, kept = cleaned.summary["tokens"], cleaned.summary["tokens_kept"]
    assert lines[0] == f"{kept} of {tokens} tokens kept ({kept / tokens:.1%})"
    assert lines[1].startswith("  a: ")
    assert lines[2].startswith("  b: ")
    assert lines[3].startswith("  most kept: '")
    assert lines[4].startswith("  least kept: '")
    ends = f"{cleaned.summary['row_ends_masked']} of {cleaned.summary['row_ends']} rows"
    assert lines[5] == f"  the end token is masked in {ends}, which do not teach the model to stop"
    assert lines[6:] == [f"  {len(cleaned.reasons)} rows left out: {EMPTIED}"]


def test_a_summary_of_stages_in_lines():
    first = {"stage": 0, "tokens": 1200, "tokens_kept": 1200}
    second = {"stage": 1, "tokens": 1000, "tokens_kept": 600, "share_of_groups": {"a": 0.5}}
    assert described({"stages": [first, second]}, {}).splitlines() == [
        "stage 0: 1,200 of 1,200 tokens kept (100.0%)",
        "stage 1: 600 of 1,000 tokens kept (60.0%)",
        "  a: 50.0%",
    ]


# ---- what is written


def test_the_folder_is_a_dataset_that_the_trainer_trains_on_as_it_is(base, reference, tokenizer, tmp_path):
    cleaned = clean(base, reference, tmp_path / "out", keep=0.3)
    opened = load_from_disk(tmp_path / "out")
    assert opened.to_list() == cleaned.dataset.to_list()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "data-00000-of-00001.arrow",
        "dataset_info.json",
        "state.json",
        "summary.json",
        "token_scores.arrow",
    ]
    labels: list[list[int]] = []

    def collated(batch):
        labels.extend([label for label in each if label != -100] for each in batch["labels"].tolist())

    model = AutoModelForCausalLM.from_pretrained(base)
    model.register_forward_pre_hook(lambda module, args, kwargs: collated(kwargs), with_kwargs=True)
    trained = train(tmp_path / "run", tokenizer, dataset=opened, model=model, num_train_epochs=1)
    kept = [[label for label in each if label != -100] for each in opened["labels"]]
    assert sorted(labels) == sorted(kept)
    losses = [entry["loss"] for entry in trained.logs if "loss" in entry]
    assert losses
    assert np.isfinite(losses).all()


def test_another_share_needs_no_model_pass_and_replaces_the_dataset(base, reference, tmp_path, passes):
    clean(base, reference, tmp_path, keep=0.3)
    assert passes == ["Losses of the base model", "Losses of the reference model"]
    scores = (tmp_path / "token_scores.arrow").read_bytes()
    again = clean(base, reference, tmp_path, keep=0.6, ranking="sample")
    assert len(passes) == 2
    fresh = clean(base, reference, keep=0.6, ranking="sample")
    assert load_from_disk(tmp_path).to_list() == again.dataset.to_list() == fresh.dataset.to_list()
    assert (tmp_path / "token_scores.arrow").read_bytes() == scores
    assert json.loads((tmp_path / "summary.json").read_text())["keep_tokens"] == 0.6
    assert len(list(tmp_path.glob("data-*"))) == 1


def test_scores_of_a_version_with_another_fingerprint_of_rows_are_reused(
    base, reference, tmp_path, monkeypatch, passes
):
    clean(base, reference, tmp_path)
    before = TokenScores.load(tmp_path).provenance.dataset
    passes.clear()
    monkeypatch.setattr(surveys, "MANY", 10)  # as in this version for many rows
    clean(base, reference, tmp_path)
    assert passes == []
    assert TokenScores.load(tmp_path).provenance.dataset == before
    clean(base, reference, tmp_path / "new")
    assert TokenScores.load(tmp_path / "new").provenance.dataset != before


def test_an_interrupted_cleaning_is_resumed(base, reference, tmp_path, monkeypatch):
    whole = clean(base, reference, tokens_per_batch=64)
    real, done, stops = loss_pass._losses_of, [], [3, 10, 13]  # in the base's pass, or the reference's

    def spy(*args):
        if len(done) == next(iter(stops), None):
            del stops[0]
            raise KeyboardInterrupt
        losses = real(*args)
        done.append(tuple(args[2].tolist()))
        return losses

    monkeypatch.setattr(loss_pass, "_losses_of", spy)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            clean(base, reference, tmp_path, tokens_per_batch=64)
        with pytest.raises(FileNotFoundError):
            load_from_disk(tmp_path)
    found = clean(base, reference, tmp_path, tokens_per_batch=64)
    assert all(done.count(batch) == 2 for batch in done)  # once by each model
    assert found.selection.scores.base.tobytes() == whole.selection.scores.base.tobytes()
    assert found.selection.scores.reference.tobytes() == whole.selection.scores.reference.tobytes()
    assert found.dataset.to_list() == whole.dataset.to_list()
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("broken", [1, 2, 3])
def test_a_failure_while_writing_never_leaves_a_mixture(broken, base, reference, tmp_path, monkeypatch):
    old = clean(base, reference, tmp_path, keep=0.3).dataset.to_list()
    calls: list[Path] = []
    real = os.replace

    def fail(source, target):
        calls.append(target)
        if len(calls) == broken:
            raise OSError("disk full")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            clean(base, reference, tmp_path, keep=0.6)
    try:
        found = load_from_disk(tmp_path).to_list()
    except FileNotFoundError:
        found = None
    assert found in (None, old)
    assert not list(tmp_path.glob(".dataset*"))
    again = clean(base, reference, tmp_path, keep=0.6)
    assert load_from_disk(tmp_path).to_list() == again.dataset.to_list()


def test_without_its_last_file_nothing_is_opened(base, reference, tmp_path, monkeypatch):
    clean(base, reference, tmp_path, keep=0.3)
    moved: list[str] = []
    real = os.replace

    def spy(source, target):
        assert not (tmp_path / "state.json").exists()
        moved.append(Path(target).name)
        real(source, target)

    monkeypatch.setattr(os, "replace", spy)
    clean(base, reference, tmp_path, keep=0.6)
    assert sorted(moved[:-1]) == ["data-00000-of-00001.arrow", "dataset_info.json", "summary.json"]
    assert moved[-1] == "state.json"


def test_a_failure_before_the_first_file_is_moved_leaves_the_old_dataset(tmp_path, monkeypatch):
    old, new = (Dataset.from_dict({"labels": [[number]]}) for number in (1, 2))
    save_dataset(old, {"number": 1}, tmp_path)

    def fail(self, path):
        Path(path).mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(Dataset, "save_to_disk", fail)
    with pytest.raises(OSError, match="disk full"):
        save_dataset(new, {"number": 2}, tmp_path)
    assert load_from_disk(tmp_path).to_list() == old.to_list()
    assert json.loads((tmp_path / "summary.json").read_text()) == {"number": 1}
    assert not list(tmp_path.glob(".dataset*"))


# ---- what is refused


@pytest.mark.parametrize("what", ["rows", "base", "reference", "tokens_per_batch", "max_length"])
def test_scores_of_something_else_are_refused_by_name_and_left_alone(what, base, reference, merged, tmp_path, passes):
    clean(base, reference, tmp_path)
    before, dataset = everything(tmp_path), data()
    if what == "rows":
        other, told = (base, reference, tmp_path, dataset.select(range(COUNT - 1))), "rows"
    elif what == "base":
        other, told = (merged, reference, tmp_path), "model weights"
    elif what == "reference":
        other, told = (base, merged, tmp_path), "reference_weights"
    else:
        other, told = (base, reference, tmp_path), what
    options = {"tokens_per_batch": 100} if what == "tokens_per_batch" else {}
    if what == "max_length":
        options["args"] = arguments(Path("unused"), max_length=40)
    with pytest.raises(InputError, match="holds token scores made from something else") as refused:
        clean(*other, **options)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(passes) == 2
    assert everything(tmp_path) == before


def test_a_folder_with_another_dataset_is_refused(base, reference, tmp_path, passes):
    data().save_to_disk(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(InputError, match="made in another way"):
        clean(base, reference, tmp_path)
    assert (passes, everything(tmp_path)) == ([], before)


@pytest.mark.parametrize("what", ["tokenizer", "size"])
def test_a_reference_with_another_vocabulary_is_refused_before_anything_is_measured(
    what, base, place, tokenizer, tmp_path, passes
):
    folder = place / f"other-{what}"
    if what == "tokenizer":
        other = make_tokenizer()
        other.add_tokens(["fox_fox"])
        other.save_pretrained(folder)
        llama(len(tokenizer)).save_pretrained(folder)
    else:
        llama(len(tokenizer) + 8).save_pretrained(folder)
    with pytest.raises(InputError, match="another vocabulary") as refused:
        clean(base, str(folder), tmp_path / "out")
    assert str(folder) in str(refused.value)
    assert f"{len(tokenizer) + (1 if what == 'tokenizer' else 8)} tokens against {len(tokenizer)}" in str(refused.value)
    assert passes == []
    assert not (tmp_path / "out").exists()


def test_a_reference_of_the_same_size_without_a_tokenizer_is_accepted(base, place, tokenizer):
    llama(len(tokenizer), seed=1).save_pretrained(place / "bare")
    assert len(clean(base, str(place / "bare")).dataset)


def test_a_reference_whose_tokens_stand_in_another_order_is_refused(base, place, tokenizer, passes):
    folder = place / "swapped"
    llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="2 differ"):
        clean(base, str(folder))
    assert passes == []


def test_a_reference_that_is_not_there_is_refused(base, tmp_path, passes):
    for name, told in ((f"{tmp_path}/none", "no reference model at"), (str(tmp_path), "cannot be loaded")):
        with pytest.raises(InputError, match=told) as refused:
            clean(base, name, tmp_path / "out")
        assert "\n" not in str(refused.value)
    assert (passes, list(tmp_path.iterdir())) == ([], [])


def test_rows_with_nothing_to_learn_and_columns_that_are_not_there_are_refused(base, reference, tmp_path, passes):
    prompts = Dataset.from_list([{"prompt": "long " * 70, "completion": " 3"}] * 3)
    with pytest.raises(InputError, match="no token to learn within max_length 64"):
        clean(base, reference, tmp_path / "out", prompts)
    masked = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 3, "labels": [[-100] * 3] * 3})
    with pytest.raises(InputError, match=r"None of the 3 rows.* Row 0: .*masked"):
        clean(base, reference, tmp_path / "out", masked)
    with pytest.raises(InputError, match=r"no column 'origin'.*prompt, completion, source"):
        clean(base, reference, tmp_path / "out", group_by="origin")
    with pytest.raises(InputError, match="reference='self'"):
        clean(base, "self", tmp_path / "out")
    assert (passes, list(tmp_path.iterdir())) == ([], [])


def test_a_broken_reference_names_the_row_and_leaves_no_scores(base, place, tokenizer, tmp_path):
    broken = llama(len(tokenizer))
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    broken.save_pretrained(place / "broken")
    with pytest.raises(InputError, match=r"Row \d+ of the dataset has a token whose loss is not finite"):
        clean(base, str(place / "broken"), tmp_path)
    assert not (tmp_path / "token_scores.arrow").exists()


# ---- an adapter as the reference


def test_an_adapter_is_what_the_merged_model_is_and_needs_no_second_base(base, adapter, merged, monkeypatch):
    whole = clean(base, merged)
    loaded: list[object] = []
    real = LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(
        LlamaForCausalLM, "from_pretrained", lambda *args, **kwargs: loaded.append(args) or real(*args, **kwargs)
    )
    found = clean(base, adapter)
    assert len(loaded) == 1
    mine, theirs = found.selection.scores, whole.selection.scores
    np.testing.assert_allclose(mine.reference, theirs.reference, rtol=0, atol=1e-5)
    assert mine.base.tobytes() == theirs.base.tobytes()
    assert np.abs(mine.base - mine.reference).max() > 1e-3
    assert found.dataset.to_list() == whole.dataset.to_list()


def test_a_model_that_is_passed_is_left_as_it_was(base, adapter, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before, attributes = look(model), set(vars(model))
    first = clean(model, adapter, tmp_path, processing_class=tokenizer)
    assert_same_look(model, before)
    assert set(vars(model)) == attributes
    again = clean(model, adapter, tmp_path, keep=0.3, processing_class=tokenizer)
    assert_same_look(model, before)
    assert again.selection.scores.reference.tobytes() == first.selection.scores.reference.tobytes()


@pytest.mark.parametrize("targets", [TARGETS, ["v_proj", "up_proj"]])
def test_a_model_with_an_adapter_of_its_own_takes_another_and_is_restored(targets, base, adapter):
    torch.manual_seed(5)
    own = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), own, "mine")
    truth = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    batch = {"input_ids": torch.arange(5, 25)[None]}
    before, logits = look(model), model.eval()(**batch).logits
    with adapted(model, adapter) as other, torch.no_grad():
        torch.testing.assert_close(other.eval()(**batch).logits, truth(**batch).logits)
    assert_same_look(model, before)
    assert model.active_adapter == "mine"
    assert list(model.peft_config) == ["mine"]
    assert torch.equal(model.eval()(**batch).logits, logits)


@pytest.mark.parametrize("kind", ["plain", "with an adapter"])
def test_a_model_is_left_as_it_was_when_its_use_with_an_adapter_fails(kind, base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base)
    if kind != "plain":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS), "mine")
    before = look(model)
    with pytest.raises(RuntimeError, match="no"), adapted(model, adapter):
        raise RuntimeError("no")
    assert_same_look(model, before)


@pytest.mark.parametrize("kind", ["plain", "with an adapter"])
@pytest.mark.parametrize(
    "damage", ["cut off", "no weights", "other shape", "other modules", "a module more", "more layers", "fewer layers"]
)
def test_an_adapter_that_does_not_fit_is_refused_and_the_model_is_left_as_it_was(
    damage, kind, base, adapter, tokenizer, tmp_path
):
    folder = tmp_path / "adapter"
    if damage in ("cut off", "no weights"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).save_pretrained(folder)
        weights = folder / "adapter_model.safetensors"
        content = weights.read_bytes()
        weights.unlink()
        if damage == "cut off":
            weights.write_bytes(content[:-100])
    else:
        shapes = {"other shape": {"hidden_size": 32}}
        shapes |= {"more layers": {"num_hidden_layers": 5}, "fewer layers": {"num_hidden_layers": 3}}
        other = llama(len(tokenizer), **shapes.get(damage, {}))
        other.model.layers[0].mlp.extra = torch.nn.Linear(4, 4)
        target = {"other modules": ["extra"], "a module more": ["q_proj", "extra"]}.get(damage, ["q_proj"])
        get_peft_model(other, LoraConfig(r=2, target_modules=target)).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    if kind != "plain":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS), "mine")
    before = look(model)
    with pytest.raises(InputError, match="cannot be used") as refused, adapted(model, str(folder)):
        pass
    assert "\n" not in str(refused.value)
    assert_same_look(model, before)


def test_the_mode_of_a_model_that_is_passed_is_left(base, adapter, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(base).train()
    clean(model, adapter, processing_class=tokenizer)
    assert all(module.training for module in model.modules())


# ---- two processes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["interrupted", "late"])
def test_two_processes_give_the_token_scores_of_one(kind, base, reference, tmp_path):
    one = clean(base, reference, tokens_per_batch=64).selection.scores
    torchrun("two_processes_clean", base, reference, tmp_path, kind)
    two = TokenScores.load(tmp_path)
    for name in ("sample_id", "offsets", "position", "token", "base", "reference"):
        assert np.array_equal(getattr(two, name), getattr(one, name)), name
    assert load_from_disk(tmp_path).to_list() == clean(base, reference, tokens_per_batch=64).dataset.to_list()
    computed = [json.loads((tmp_path / f"batches-{rank}.json").read_text()) for rank in (0, 1)]
    assert all(computed)  # each has its share
    assert not {tuple(each) for each in computed[0]} & {tuple(each) for each in computed[1]}
