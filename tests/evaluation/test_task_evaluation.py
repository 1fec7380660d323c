"""Tasks of lm-evaluation-harness from local files, against the metric computed by hand."""

from __future__ import annotations

import sys

import pytest
from helpers.tasks import write_tasks
from transformers import AutoModelForCausalLM, AutoTokenizer

from resofilter_trainer import InputError
from resofilter_trainer.demo.problems import make_problems
from resofilter_trainer.demo.run import BASE
from resofilter_trainer.evaluation.generate import exact_match
from resofilter_trainer.evaluation.tasks import evaluate_tasks, main_metric


@pytest.fixture
def demo_model():
    return AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)


@pytest.mark.slow
def test_the_metric_is_that_of_the_answers(tmp_path, demo_model):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    folder = str(write_tasks(tmp_path))
    found = evaluate_tasks(*demo_model, ["sums", "choices"], 4, folder) | evaluate_tasks(
        *demo_model, ["both"], 4, folder
    )
    problems = make_problems(12, seed=5)
    prompts, answers = [each.prompt for each in problems], [each.completion for each in problems]
    assert found["sums"] == pytest.approx(exact_match(*demo_model, prompts, answers, max_new_tokens=56, batch_size=4))
    assert found["sums"] > 0
    assert found["choices"] == 1
    assert found["both"] == pytest.approx((found["sums"] + found["choices"]) / 2)


@pytest.mark.slow
def test_an_unknown_task_and_one_that_cannot_be_read_are_refused(tmp_path, demo_model):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    folder = write_tasks(tmp_path)
    with pytest.raises(InputError, match="knows no task 'beauty'"):
        evaluate_tasks(*demo_model, ["beauty"], 4, str(folder))
    (folder / "problems.jsonl").unlink()
    with pytest.raises(InputError, match="The tasks sums failed"):
        evaluate_tasks(*demo_model, ["sums"], 4, str(folder))


def test_without_the_harness_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match="pip install 'lm_eval"):
        evaluate_tasks(None, None, ["gsm8k"], 4)


FOUND = {
    "results": {
        "a": {"alias": "a", "perplexity,none": 3.0, "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.7},
        "b": {"exact_match,strict": 0.1, "exact_match,flexible": 0.3},
        "c": {"perplexity,none": 3.0},
        "g": {"alias": "g"},
        "h": {"alias": "h", "acc,none": 0.9},
    },
    "group_subtasks": {"g": ["a", "b"], "h": ["i"], "i": ["a"]},  # like mmlu, for which the harness gives no directions
    "higher_is_better": {
        "a": {"perplexity": False, "acc": True, "acc_norm": True},
        "b": {"exact_match": True},
        "c": {"perplexity": False},
    },
}


@pytest.mark.parametrize(("name", "value"), [("a", 0.5), ("b", 0.1), ("g", 0.3), ("h", 0.9)])
def test_the_main_metric_is_the_first_for_which_larger_is_better(name, value):
    assert main_metric(name, FOUND) == pytest.approx(value)


def test_a_task_without_such_a_metric_is_refused():
    with pytest.raises(InputError, match=r"'c' has no metric .* perplexity,none"):
        main_metric("c", FOUND)
