"""Cleaning by a token rule: the decision against plain formulas on all logits, the passes, the files, the refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from helpers.cleaning import ARGS, COUNT, data, prepared_by_trl
from helpers.families import tiny
from helpers.samples import collate, make_samples
from helpers.training import llama
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from resofilter_trainer import InputError, TokenCleaning, TokenInputs, TokenRule, clean_dataset, token_rule
from resofilter_trainer.model import head
from resofilter_trainer.model.head import find_way
from resofilter_trainer.model.losses import inputs_of
from resofilter_trainer.model.modes import own_precision
from resofilter_trainer.model.token_statistics import TokenStatistics
from resofilter_trainer.report import read_contents
from resofilter_trainer.scores.token_scores import STATISTICS, TokenScores
from resofilter_trainer.scoring import token_losses as loss_pass
from resofilter_trainer.selecting.token_selection import EMPTIED
from resofilter_trainer.tokens import cleaning as cleaning_module
from resofilter_trainer.tokens.cleaned_dataset import described
from resofilter_trainer.tokens.cleaning import measure_tokens

BOUND = 6.0  # nats; untrained models find nearly everything improbable
ALONE = {  # need no other model
    "profit": {"threshold": math.exp(-BOUND)},
    "stm": {"threshold": math.exp(BOUND)},
    "eaft": {},
    "conflict": {},
    "random": {"seed": 42},
    "all_but_first": {},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("reference", 1)):
        model = llama(len(tokenizer), seed)
        with torch.no_grad():
            model.lm_head.weight.normal_(std=0.5)  # distributions far from even
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def passes(monkeypatch) -> list[tuple[str, ...]]:
    """What every pass over a model measures."""
    seen: list[tuple[str, ...]] = []
    losses, statistics = cleaning_module.losses_under, cleaning_module.statistics_under
    monkeypatch.setattr(cleaning_module, "losses_under", lambda *args: seen.append((args[1], "loss")) or losses(*args))
    monkeypatch.setattr(
        cleaning_module, "statistics_under", lambda *args: seen.append((args[1], *args[5])) or statistics(*args)
    )
    return seen


def clean(place: Path, rule: Any, output: Path | None = None, **options: Any):
    options = {"args": ARGS, "output": output, **options}
    return clean_dataset(str(place / "base"), options.pop("dataset", data()), rule=rule, **options)


def plain_rows(model: torch.nn.Module, samples: list[dict[str, Tensor]]) -> list[dict[str, list[float]]]:
    """Of each row alone, from all its logits in float64: what a rule reads of the learnt tokens."""
    found = []
    for sample in samples:
        with torch.no_grad():
            logits = model(input_ids=sample["input_ids"][None], use_cache=False).logits[0, :-1].double()
        learnt = sample["labels"][1:] != -100
        p = logits[learnt].softmax(-1)
        top = p.sort(1, descending=True).values[:, :20]
        top = top / top.sum(1, keepdim=True)
        loss = F.cross_entropy(logits[learnt], sample["labels"][1:][learnt], reduction="none")
        columns = {"loss": loss, "entropy": -(p * p.log()).sum(1), "top_entropy": -(top * top.log()).sum(1)}
        found.append({name: values.tolist() for name, values in columns.items()})
    return found


def flat(rows: list[dict[str, list[float]]], name: str) -> np.ndarray:
    return np.array([value for row in rows for value in row[name]])


def smallest(values: np.ndarray, share: float) -> list[bool]:
    order = sorted(range(len(values)), key=lambda n: (values[n], n))
    return [n in set(order[: int(len(values) * share)]) for n in range(len(values))]


def plain_weights(name: str, rows: list[dict[str, list[float]]], vocabulary: int, bound: float = BOUND) -> np.ndarray:
    """The weights of a rule with the settings above."""
    loss = flat(rows, "loss")
    if name in ("profit", "stm"):
        return loss <= bound
    if name == "eaft":
        return flat(rows, "top_entropy") / math.log(20)
    if name == "conflict":
        return np.array(smallest(loss * (1 - flat(rows, "entropy") / math.log(vocabulary)), 0.6))
    if name == "random":
        return np.array(smallest(-np.random.default_rng(42).random(len(loss)), 0.6))
    assert name == "all_but_first"
    return np.array([place > 0 for row in rows for place in range(len(row["loss"]))])


# ---- the decision


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_weights_in_float64_are_those_of_all_logits_whatever_the_batch(family, monkeypatch):
    monkeypatch.setattr(head, "SMALLEST_TILE", 1)
    monkeypatch.setitem(head.TILE_LOGITS, "cpu", 900)
    monkeypatch.setattr(head, "PIECE_LOGITS", 900)
    torch.manual_seed(0)
    model, samples = tiny(family).double().eval(), make_samples(7, longest=40)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
    with own_precision(model):
        rows = plain_rows(model, samples)
    middle = np.sort(flat(rows, "loss"))[len(flat(rows, "loss")) // 2 :][:2].mean()
    bounds = {"profit": {"threshold": math.exp(-middle)}, "stm": {"threshold": math.exp(middle)}}
    offsets = np.cumsum([0, *(len(row["loss"]) for row in rows)])
    vocabulary = model.config.vocab_size
    with torch.no_grad(), own_precision(model):
        way = find_way(model, samples[0]["input_ids"][None])
        padded = "right" if family == "gemma2" else "left"  # its own forward gives NaN beside padding on the left
        for size, side in ((1, "right"), (3, padded), (7, "right")):
            measured = TokenStatistics(STATISTICS)
            losses = [
                way(model, inputs_of(model, collate(samples[i : i + size], side), causal=False)).losses(measured)
                for i in range(0, len(samples), size)
            ]
            tokens = TokenInputs(
                offsets, torch.cat(losses).numpy(), vocabulary, {name: measured.of(name).numpy() for name in STATISTICS}
            )
            for name in ALONE:
                rule = token_rule(name, **(ALONE | bounds)[name])
                truth = plain_weights(name, rows, vocabulary, middle)
                assert 0 < truth.mean() < 1
                np.testing.assert_allclose(rule.weights(tokens).astype(float), truth, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", ALONE)
def test_a_dataset_is_masked_or_weighed_by_the_formula(name, place, tokenizer, passes):
    cleaned = clean(place, token_rule(name, **ALONE[name]), tokens_per_batch=150)
    samples = prepared_by_trl(data(), str(place / "base"), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    tensors = list(samples.select_columns(["input_ids", "labels"]).with_format("torch"))
    truth = plain_weights(name, plain_rows(model, tensors), len(tokenizer))
    assert len(passes) == 1
    left = iter(truth)
    for row, labels in enumerate(samples["labels"]):
        own = [next(left) if label != -100 and place > 0 else None for place, label in enumerate(labels)]
        here = [at for at, each in enumerate(cleaned.dataset["sample_id"]) if each == row]
        if not any(own):
            assert not here
            assert cleaned.reasons[row] == EMPTIED
            continue
        found = cleaned.dataset[here[0]]
        assert found["input_ids"] == samples["input_ids"][row]
        if name == "eaft":
            assert found["labels"] == labels
            np.testing.assert_allclose(found["token_weights"], [each or 0 for each in own], atol=1e-5)
        else:
            assert found["labels"] == [
                label if weight or (weight is None and label == -100) else -100 if weight is not None else label
                for label, weight in zip(labels, own, strict=True)
            ]
    columns = ["sample_id", "input_ids", "labels", *(["token_weights"] if name == "eaft" else [])]
    assert cleaned.dataset.column_names == columns


@pytest.mark.parametrize("ranking", ["global", "sample"])
def test_the_rules_of_token_cleaning_are_token_cleaning_to_the_byte(ranking, place, tmp_path):
    reference = str(place / "reference")
    name = "token_cleaning" if ranking == "global" else "rho"
    old = TokenCleaning(0.4, reference, ranking, group_by="source")
    before = clean_dataset(str(place / "base"), data(), old, args=ARGS, output=tmp_path / "old")
    found = clean(place, name, tmp_path / "new", keep=0.4, reference=reference, group_by="source")
    assert found.dataset.to_list() == before.dataset.to_list()
    assert found.selection == before.selection
    for file in ("token_scores.arrow", "summary.json"):
        assert (tmp_path / "new" / file).read_bytes() == (tmp_path / "old" / file).read_bytes()


def test_sstoken_keeps_what_the_model_has_learnt_since(place):
    cleaned = clean(place, "sstoken", reference=str(place / "reference"), keep=0.5)
    scores = cleaned.selection.scores
    for row, count in enumerate(scores.num_tokens):
        own = slice(scores.offsets[row], scores.offsets[row + 1])
        better = scores.reference[own].astype(float) - scores.base[own]
        kept = cleaned.selection.keep[own]
        assert kept.sum() == math.ceil(count * 0.5)
        assert kept.all() or better[kept].min() >= better[~kept].max()


def test_sstoken_mixes_what_was_learnt_with_attention_to_the_prompt_as_the_paper(place, tokenizer, tmp_path, passes):
    """From the weights that an eager model returns, row by row; the same folder then has both parts for any gamma."""
    cleaned = clean(place, token_rule("sstoken", gamma=0.5), tmp_path, reference=str(place / "reference"))
    scores, rows = cleaned.selection.scores, prepared_by_trl(data(), str(place / "base"), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(place / "base", attn_implementation="eager")
    earlier = (scores.reference - scores.base).astype(np.float64)
    for number, row in enumerate(scores.sample_id.tolist()):
        span = slice(scores.offsets[number], scores.offsets[number + 1])
        with torch.no_grad():
            heads = model(input_ids=torch.tensor([rows[row]["input_ids"]]), output_attentions=True).attentions[-1][0]
        prompt = (torch.tensor(rows[row]["labels"]) == -100).float()
        attention = (heads.mean(0) @ prompt)[scores.position[span]].numpy()
        np.testing.assert_allclose(scores.prompt_attention[span], attention, rtol=1e-4, atol=1e-6)
        own = earlier[span]
        scaled = (own - own.min()) / (own.max() - own.min() + 1e-8)
        values = 0.5 * scaled + 0.5 * scores.prompt_attention[span]
        kept = np.argsort(-values, kind="stable")[: math.ceil(0.6 * len(own))]
        assert sorted(kept) == np.flatnonzero(cleaned.selection.keep[span]).tolist()
    assert passes == [("base", "prompt_attention"), ("reference", "loss")]
    again = clean(place, token_rule("sstoken", gamma=0), tmp_path)
    assert (again.selection.keep != cleaned.selection.keep).any()
    assert len(passes) == 2
    assert TokenScores.load(tmp_path) == scores


def test_a_rule_of_ones_own_and_a_share_of_each_group(place, tokenizer):
    rule = TokenRule("steady", lambda tokens: 1 / (1 + tokens.entropy), ["entropy"])
    cleaned = clean(place, rule, group_by="source")
    weight = cleaned.selection.weight
    assert cleaned.summary["rule"] == "steady"
    assert cleaned.summary["settings"] is None
    assert cleaned.summary["mean_weight"] == pytest.approx(weight.mean())
    row = np.repeat(np.arange(COUNT), cleaned.selection.scores.num_tokens)
    for number, group in enumerate("ab"):
        assert cleaned.summary["share_of_groups"][group] == pytest.approx(weight[row % 2 == number].mean())
    token = cleaned.selection.scores.token
    first = cleaned.summary["most_kept"][0]
    assert first["share"] == pytest.approx(weight[token == tokenizer.encode(first["token"])[-1]].mean())
    assert f"  mean weight of a token: {weight.mean():.3f}" in described(cleaned.summary, {}).splitlines()


def test_rows_that_do_not_teach_where_to_stop_are_counted_and_said(place):
    def without_ends(tokens: TokenInputs) -> np.ndarray:
        keep = np.ones(len(tokens), bool)
        keep[tokens.offsets[1:4] - 1] = False
        return keep

    summary = clean(place, without_ends).summary
    assert (summary["row_ends"], summary["row_ends_masked"]) == (COUNT, 3)
    said = f"  the end token is masked in 3 of {COUNT} rows, which do not teach the model to stop"
    assert said in described(summary, {}).splitlines()
    assert "end token" not in described(clean(place, lambda tokens: tokens.loss < np.inf).summary, {})


def test_a_token_of_the_weight_zero_keeps_its_label_and_a_row_of_them_is_left_out(place):
    def weigh(tokens: TokenInputs) -> np.ndarray:
        weights = np.full(len(tokens), 0.5)
        weights[: tokens.offsets[2] + 1] = 0  # two rows, and a token of the third
        return weights

    cleaned = clean(place, weigh)
    assert cleaned.dataset["sample_id"] == list(range(2, COUNT))
    assert dict(cleaned.reasons) == {0: EMPTIED, 1: EMPTIED}
    first = cleaned.dataset[0]
    learnt = [place for place, label in enumerate(first["labels"]) if label != -100]
    assert [first["token_weights"][place] for place in learnt] == [0, *[0.5] * (len(learnt) - 1)]
    assert all(weight == 0 for place, weight in enumerate(first["token_weights"]) if place not in learnt)


# ---- passes and files


def test_the_same_folder_by_other_rules_measures_only_what_is_missing(place, tmp_path, passes):
    reference, seen = str(place / "reference"), []

    def again(rule: str, **options: Any) -> None:
        found = clean(place, rule, tmp_path, **options)
        seen.append(list(passes))
        passes.clear()
        fresh = clean(place, rule, **options)
        passes.clear()
        assert found.dataset.to_list() == fresh.dataset.to_list() == load_from_disk(tmp_path).to_list()

    again("profit", keep=0.5)
    again("stm", keep=0.3)
    again("conflict")
    again("token_cleaning", reference=reference)
    again("eaft")
    again("rho", reference=reference)
    assert seen == [
        [("base", "loss")],
        [],
        [("base", "entropy")],
        [("reference", "loss")],
        [("base", "top_entropy")],
        [],
    ]
    assert TokenScores.load(tmp_path).columns == ["position", "token", "base", "reference", "entropy", "top_entropy"]
    with pytest.raises(InputError, match="reference_weights"):
        clean(place, "sstoken", tmp_path, reference=str(place / "base"))


@pytest.mark.parametrize("name", ["eaft", "random"])
def test_an_interrupted_pass_is_resumed_and_that_of_another_rule_is_not_in_its_way(name, place, tmp_path, monkeypatch):
    whole = clean(place, name, tokens_per_batch=64)
    real, done = loss_pass._losses_of, []

    def stops(*args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(tuple(args[2].tolist()))
        return real(*args)

    for each in (name, "conflict"):
        done.clear()
        with monkeypatch.context() as patch:
            patch.setattr(loss_pass, "_losses_of", stops)
            with pytest.raises(KeyboardInterrupt):
                clean(place, each, tmp_path, tokens_per_batch=64)
    first = list(done)
    done.clear()
    monkeypatch.setattr(loss_pass, "_losses_of", lambda *args: done.append(tuple(args[2].tolist())) or real(*args))
    found = clean(place, name, tmp_path, tokens_per_batch=64)
    assert done
    assert not {*done} & {*first}
    assert found.dataset.to_list() == whole.dataset.to_list() == load_from_disk(tmp_path).to_list()
    assert found.selection.scores == whole.selection.scores
    assert not (tmp_path / "parts").exists()


def test_losses_are_the_same_to_the_last_bit_with_statistics(place):
    one = clean(place, "random").selection.scores.base
    other = clean(place, "eaft").selection.scores.base
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("rule", ["random", "eaft", "conflict", "token_cleaning"])
def test_a_report_shows_the_tokens_of_a_rule(rule, place, tmp_path):
    options = {"reference": str(place / "reference")} if rule == "token_cleaning" else {}
    cleaned = clean(place, rule, tmp_path, **options)
    contents = read_contents(tmp_path)
    assert contents.cleaned == cleaned.selection


def test_a_report_of_a_rule_of_ones_own_has_no_decision_to_show(place, tmp_path):
    clean(place, lambda tokens: tokens.loss < 6, tmp_path)
    with pytest.raises(InputError):
        read_contents(tmp_path)


def test_the_summary_says_by_what(place, tmp_path):
    clean(place, "stm", tmp_path, keep=0.3)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["rule"], summary["settings"], summary["keep_tokens"]) == ("stm", {"keep": 0.3}, 0.3)
    assert "reference" not in summary
    assert "reference" not in TokenScores.load(tmp_path).provenance.source
    assert clean(place, token_rule("stm", threshold=300)).summary["settings"] == {"threshold": 300}
    assert clean(place, "random").summary["settings"] == {"keep": 0.6, "seed": ARGS.seed}


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "Pass a rule, such as rule='profit', or cleaning=TokenCleaning"),
        ({"rule": "profit", "cleaning": TokenCleaning()}, "Pass a rule, such as"),
        ({"cleaning": TokenCleaning(reference="x"), "keep": 0.5}, "keep= goes with rule="),
        ({"rule": "bogus"}, "rule must be one of"),
        ({"rule": 3}, "rule must be a name, a TokenRule or a function, got 3"),
        ({"rule": "profit", "keep": 2}, "keep is the share of the tokens to keep"),
        ({"rule": "eaft", "keep": 0.5}, "The token rule 'eaft' has no setting keep="),
        ({"rule": "profit", "reference": "x"}, "needs no reference model: leave reference= out"),
        ({"rule": "token_cleaning"}, "'token_cleaning' needs 'reference_loss': pass reference="),
        ({"rule": "sstoken"}, "'sstoken' needs 'earlier_loss': pass reference="),
        ({"rule": token_rule("sstoken", gamma=0.5)}, "'sstoken' needs 'earlier_loss': pass reference="),
        (
            {"rule": TokenRule("both", len, ["reference_loss", "earlier_loss"]), "reference": "x"},
            "needs the losses of two other models",
        ),
        ({"rule": "profit", "tokens_per_batch": 0}, "tokens_per_batch must be a whole number of at least 1"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_opened(options, expected):
    with pytest.raises(InputError) as refused:
        clean_dataset("/nowhere/model", data(), **options)
    assert expected in str(refused.value)


def test_a_share_that_keeps_nothing_is_refused_before_a_forward(place, monkeypatch):
    monkeypatch.setattr(loss_pass, "_losses_of", lambda *args: pytest.fail("measured"))
    with pytest.raises(InputError, match=r"keep=1e-06 keeps none"):
        clean(place, "conflict", keep=1e-6)
    with pytest.raises(InputError, match="No row has more than first=500 tokens"):
        clean(place, token_rule("all_but_first", first=500))


def test_weights_that_are_none_are_refused_and_the_scores_stay(place, tmp_path):
    for weigh, expected in (
        (lambda tokens: tokens.loss, "returned [0-9.]+ for token"),
        (lambda tokens: tokens.loss < 0, "gives each of the [0-9]+ tokens the weight 0"),
        (lambda tokens: tokens.loss[1:] < 6, "returned weights of the shape"),
    ):
        with pytest.raises(InputError, match=f"The token rule '<lambda>' {expected}"):
            clean(place, weigh, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["token_scores.arrow"]
    assert clean(place, "random", tmp_path).summary["rule"] == "random"


def test_the_losses_of_two_models_are_still_measured_alone(place):
    cleaning = TokenCleaning(keep=1.0, reference=str(place / "reference"))
    _, scores = measure_tokens(str(place / "base"), data(), cleaning, args=ARGS)
    assert scores.columns == ["position", "token", "base", "reference"]


def test_scores_without_a_reference_have_no_score(place):
    scores = clean(place, "random").selection.scores
    assert "mean loss" in scores._repr_html_()
    with pytest.raises(InputError, match="measured without a reference model"):
        scores.of_row(0)


def test_prompts_and_masked_labels_are_no_candidates(place, tokenizer):
    samples = prepared_by_trl(data(), str(place / "base"), tokenizer)
    labels = [[-100 if at % 2 else token for at, token in enumerate(ids)] for ids in samples["input_ids"]]
    tokens = Dataset.from_dict({"input_ids": samples["input_ids"], "labels": labels})
    cleaned = clean(place, "random", dataset=tokens, keep=0.5)
    candidates = sum(label != -100 for row in labels for label in row[1:])
    assert len(cleaned.selection) == candidates
    assert cleaned.selection.keep.sum() == candidates // 2


def test_rows_whose_tokens_have_weights_are_not_cleaned_again(place):
    weighed = clean(place, "eaft").dataset
    with pytest.raises(InputError, match=r"The rows have weights of their tokens .* which cleaning would lose"):
        clean(place, "random", dataset=weighed)
