"""Selectors by token rules: the rows are cleaned by the rule and trained as they are, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from helpers.versions import arguments_here
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from resofilter_trainer import InputError, TokenRule, TokenWeights, clean_dataset
from resofilter_trainer.compare import round as comparison_round
from resofilter_trainer.compare.config import ComparisonConfig, SelectorConfig, slug
from resofilter_trainer.compare.data import make_data
from resofilter_trainer.compare.marked import marked_tokens
from resofilter_trainer.compare.method_scores import as_tokens
from resofilter_trainer.compare.methods import check, method_of
from resofilter_trainer.compare.run import run
from resofilter_trainer.compare.selector_scores import SelectorScores
from resofilter_trainer.compare.token_rules import COMPARED
from resofilter_trainer.compare.training import sft_config
from resofilter_trainer.scores.token_scores import TokenScores
from resofilter_trainer.selecting.named_rules import token_rule

ALL = [*COMPARED, "unmarked"]
BY_TWO = ("token_cleaning", "rho", "sstoken")


def entry(rule: str, **settings: Any) -> dict[str, Any]:
    more = {"spans": "spans"} if rule == "unmarked" else {}
    return {"token_rule": rule, "settings": {**more, **settings}}


@pytest.fixture
def settings(tiny_settings) -> dict[str, Any]:
    """The rows have marks: of every third, the characters of its equation."""
    path = Path(tiny_settings["dataset"])
    rows = [{**row, "spans": [[0, row["a"].index(".")]] if n % 3 == 0 else []} for n, row in enumerate(_rows(path))]
    Dataset.from_list(rows).to_json(path)
    return tiny_settings


def _rows(path: Path) -> list[dict[str, Any]]:
    return list(load_dataset("json", data_files=str(path), split="train"))


@pytest.fixture
def trained(monkeypatch) -> dict[str, torch.Tensor]:
    """The weights after each training, by the number of the training."""
    found: dict[str, Any] = {}
    own = comparison_round.train

    def train(*args, **kwargs):
        done = own(*args, **kwargs)
        found[str(len(found))] = {name: each.clone() for name, each in done.model.state_dict().items()}
        return done

    monkeypatch.setattr(comparison_round, "train", train)
    return found


# ---- the settings


@pytest.mark.parametrize("rule", ALL)
def test_every_rule_is_a_selector_with_its_cost(rule):
    chosen = SelectorConfig.of(entry(rule))
    config = ComparisonConfig([chosen], dataset="rows.jsonl")
    check(config)
    assert chosen.method == "token_rule"
    assert chosen.name == (rule if rule == "token_cleaning" else f"token_{rule}")
    method = method_of(chosen)
    policy = method.policy(0.25, 7, chosen)
    assert isinstance(policy, TokenRule)
    assert method.whole == (rule in ("eaft", "all_but_first", "unmarked"))
    assert method.whole or policy.settings["keep"] == 0.25
    assert policy.settings.get("seed") == (7 if rule == "random" else None)
    free = rule in ("random", "all_but_first", "unmarked")
    assert method.cost(config, chosen, 2) == (0 if free else 2 + 3 * 0.2 * 2 if rule in BY_TWO else 1)
    given = ComparisonConfig([chosen], dataset="rows.jsonl", reference_model="tuned/")
    assert method.cost(given, chosen, 2) == (2 if rule in BY_TWO[:2] else method.cost(config, chosen, 2))


def test_a_rule_with_a_bound_is_trained_once():
    bound = SelectorConfig.of({"token_rule": "stm", "name": "bound", "settings": {"threshold": 4}})
    assert method_of(bound).whole
    assert method_of(bound).policy(0.5, 0, bound).settings == {"threshold": 4}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "token_rule", "name": "x"}, "In the selector 'x': The method 'token_rule' needs a setting 'rule'"),
        ({"token_rule": "eafd"}, "In the selector 'token_eafd': rule must be one of .* Did you mean 'eaft'?"),
        ({"token_rule": ["eaft"]}, "rule must be one of "),
        ({"token_rule": "eaft", "method": "full"}, "A selector with 'token_rule' has the method 'token_rule': leave"),
        ({"token_rule": "eaft", "settings": {"rule": "stm"}}, "has its rule there: leave rule out of its settings"),
        ({"token_rule": "eaft", "settings": {"keep": 1}}, "has no setting 'keep'. Its settings are: rule, threshold"),
        ({"token_rule": "eaft", "settings": {"threshold": 1}}, "'eaft' has no setting threshold="),
        ({"token_rule": "profit", "settings": {"threshold": 2}}, "threshold must be .* at most 1"),
        ({"token_rule": "eaft", "settings": {"spans": "x"}}, "spans goes with the rule 'unmarked'"),
        ({"token_rule": "unmarked"}, "spans goes with the rule 'unmarked', which needs one"),
        ({"token_rule": "unmarked", "settings": {"spans": 3}}, "spans must be the name of a column"),
        ({"token_rule": "unmarked", "settings": {"spans": "spans", "first": 1}}, "'unmarked' has no setting first"),
        ({"token_rule": "eaft", "drop": "largest"}, "drop goes with score_column"),
        ({"token_rule": "eaft", "score_model": "x"}, "'token_rule' cannot use a score_model"),
        ({"token_rule": "unmarked", "settings": {"spans": "marks"}}, "has no column 'marks'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(wrong, message, settings, tmp_path):
    with pytest.raises(InputError, match=message):
        run(ComparisonConfig.of({**settings, "selectors": [wrong]}))
    assert not (tmp_path / "out").exists()


def test_the_demo_has_no_marks():
    with pytest.raises(InputError, match="The demo's problems have no column 'spans'"):
        check(ComparisonConfig.of({"selectors": [entry("unmarked")]}))


# ---- what is trained


@pytest.mark.slow
def test_every_rule_trains_on_what_it_cleans(settings, trained, tmp_path):
    """The weights are those of SFTTrainer on what `clean_dataset` returns; rules by one model share a forward."""
    rules = ["profit", "conflict", "eaft", "random"]
    made = run(ComparisonConfig.of({**settings, "selectors": ["full", "random", *map(entry, rules)]}))
    cells = {cell.selector: cell for cell in made}
    rows = make_data(ComparisonConfig.of({**settings, "selectors": ["full"]}), 0).rows
    for number, rule in enumerate(rules, start=2):
        chosen = token_rule(rule, **({} if rule == "eaft" else {"keep": 0.5}))
        cleaned = clean_dataset(settings["model"], rows, rule=chosen)
        for name, mine in _trained(settings, cleaned.dataset, tmp_path / rule, weighted=rule == "eaft").items():
            assert torch.equal(mine, trained[str(number)][name]), (rule, name)
        cell = cells[f"token_{rule}"]
        assert (cell.rows, cell.kept) == (len(cleaned.selection), int(cleaned.selection.keep.sum()))
        assert cell.keep == (1 if rule == "eaft" else 0.5)
        assert (cell.selection_flops == 0) == (rule == "random")
    measured = cells["token_eaft"].selection_flops
    assert measured == cells["token_profit"].selection_flops == pytest.approx(cells["full"].training_flops / 3)
    folder = Path(settings["output"]) / "scores" / slug(settings["model"])
    assert {"token_statistics", "length", "loss"} == {path.name for path in folder.iterdir()}


def _trained(settings: dict[str, Any], rows: Dataset, folder: Path, weighted: bool) -> dict[str, torch.Tensor]:
    own = {**settings["training"], "bf16": False, "report_to": "none", "save_strategy": "no"}
    args = SFTConfig(**arguments_here({**own, "output_dir": str(folder), "seed": 0}))
    model, tokenizer = (each.from_pretrained(settings["model"]) for each in (AutoModelForCausalLM, AutoTokenizer))
    callbacks = [TokenWeights()] if weighted else None
    SFTTrainer(model, args, None, rows, processing_class=tokenizer, callbacks=callbacks).train()
    return model.state_dict()


def test_sstoken_compares_the_model_after_its_first_training_with_the_model_before(settings):
    """The same numbers as Token Cleaning's, the other way round, and not those of a given reference model."""
    found, attentive = {}, entry("sstoken", gamma=0.5)
    for rule, chosen in (("rho", entry("rho")), ("attention", entry("sstoken", gamma=0.0)), ("sstoken", attentive)):
        config = ComparisonConfig.of({**settings, "selectors": [chosen]})
        found[rule] = SelectorScores(config, settings["model"], 0, make_data(config, 0)).of(config.selectors[0])
    before, after = (found[rule].table for rule in ("rho", "sstoken"))
    assert isinstance(before, TokenScores)
    np.testing.assert_array_equal(before.base, after.reference)
    np.testing.assert_array_equal(before.reference, after.base)
    assert (before.base != after.base).any()
    folders = {path.name for path in (Path(settings["output"]) / "scores" / slug(settings["model"])).iterdir()}
    assert folders == {"token_losses-seed-0", "token_progress_attention-seed-0", "reference-seed-0"}
    given = ComparisonConfig.of({**settings, "selectors": [attentive], "reference_model": settings["model"]})
    again = SelectorScores(given, settings["model"], 0, make_data(given, 0)).of(given.selectors[0])
    np.testing.assert_array_equal(again.table.base, after.base)
    assert ((after.prompt_attention > 0) & (after.prompt_attention <= 1)).all()


def test_exactly_the_unmarked_tokens_are_trained(settings):
    config = ComparisonConfig.of({**settings, "selectors": [entry("unmarked")]})
    rows, tokenizer = make_data(config, 0).rows, AutoTokenizer.from_pretrained(settings["model"])
    prepared = as_tokens(rows, tokenizer, sft_config(config, settings["model"], 0))
    found, start = marked_tokens(rows, prepared, tokenizer, "spans"), 0
    for row, own in zip(rows, prepared.dataset, strict=True):
        learnt = [token for token, label in zip(own["input_ids"], own["labels"], strict=True) if label != -100]
        span = found[start : start + len(learnt)]
        marked = tokenizer.decode([token for token, bad in zip(learnt, span, strict=True) if bad])
        (first, last), *_ = [*row["spans"], [0, 0]]
        assert marked.replace(" ", "") == row["completion"][first:last].replace(" ", "")
        start += len(learnt)
    (cell,) = run(config)
    assert (cell.rows, cell.kept, cell.selection_flops) == (len(found), int((~found).sum()), 0)


@pytest.mark.parametrize("spans", [[[0, 99]], [[3, 2]], [[-1, 2]], [[1]], "x", [["a", "b"]]])
def test_marks_that_are_no_places_of_the_completion_are_refused(spans, settings):
    config = ComparisonConfig.of({**settings, "selectors": ["full"]})
    rows, tokenizer = make_data(config, 0).rows, AutoTokenizer.from_pretrained(settings["model"])
    prepared = as_tokens(rows, tokenizer, sft_config(config, settings["model"], 0))
    wrong = Dataset.from_list([{**row, "marks": spans} for row in rows.select_columns(["prompt", "completion"])])
    with pytest.raises(InputError, match=r"Row 0 has .* in its column 'marks': give a list of pairs"):
        marked_tokens(wrong, prepared, tokenizer, "marks")
