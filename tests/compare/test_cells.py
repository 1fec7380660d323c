"""What is made of a comparison's cells, against the formulas written out; and what a configuration may say."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from resofilter_trainer import InputError
from resofilter_trainer.compare.cells import Cell, summarise, transfer
from resofilter_trainer.compare.config import ComparisonConfig, DemoProblems, SelectorConfig
from resofilter_trainer.compare.cost import longer_by
from resofilter_trainer.compare.methods import check
from resofilter_trainer.compare.published import Needs, pir, residual
from resofilter_trainer.compare.report import FLOOR, draw, judged, table
from resofilter_trainer.compare.training import sft_config
from resofilter_trainer.scores.statistics import interval


def cell(selector, seed, metric, keep=0.5, **settings) -> Cell:
    costs = {"selection_seconds": 1.0, "selection_flops": 10.0, "training_seconds": 2.0, "training_flops": 20.0}
    rows = {"rows": 100, "kept": round(100 * keep)}
    return Cell(selector=selector, keep=keep, seed=seed, metric=metric, **{**rows, **costs, **settings})


@pytest.fixture
def cells() -> list[Cell]:
    full = [cell("full", seed, metric, 1.0) for seed, metric in enumerate([0.8, 0.7, 0.9])]
    random = [cell("random", seed, metric) for seed, metric in enumerate([0.7, 0.6, 0.75])]
    mine = [cell("mine", seed, metric, auroc=0.9) for seed, metric in enumerate([0.8, 0.65, 0.9])]
    return [*full, *random, *mine]


def by_name(lines):
    return {line["selector"]: line for line in lines}


def test_differences_are_paired_by_seed(cells):
    line = by_name(summarise(cells))["mine"]
    assert line["over_random"] == pytest.approx(interval([0.1, 0.05, 0.15]))
    assert line["over_full"] == pytest.approx(interval([0.0, -0.05, 0.0]))
    assert line["p"] == pytest.approx(np.mean([0.8 / 0.8, 0.65 / 0.7, 0.9 / 0.9]))
    assert line["sdf"] == 0.5
    assert line["auroc"] == pytest.approx(0.9)


def test_only_seeds_that_both_have_are_paired(cells):
    line = by_name(summarise([each for each in cells if (each.selector, each.seed) != ("random", 1)]))["mine"]
    assert line["over_random"] == pytest.approx(interval([0.1, 0.15]))


def test_other_numbers_of_rows_are_no_pair(cells):
    line = by_name(summarise([*cells, cell("dynamic", 0, 0.9, kept=75)]))["dynamic"]
    assert all(map(math.isnan, line["over_random"]))
    assert line["over_full"][0] == pytest.approx(0.1)


def test_transfer_is_by_who_scored_and_what_was_trained():
    cells = []
    for model, base in (("A", 0.5), ("B", 0.6)):
        cells += [cell("random", seed, base, model=model) for seed in (0, 1)]
        for scorer, gain in (("A", 0.1), ("B", 0.2)):
            name = f"loss by {scorer}"
            both = {"model": model, "scored_by": scorer, "method": "loss"}
            cells += [cell(name, seed, base + gain, **both) for seed in (0, 1)]
    (found,) = transfer(summarise(cells)).items()
    assert found[0] == ("loss", 0.5)
    expected = {("A", "A"): 0.1, ("B", "A"): 0.2, ("A", "B"): 0.1, ("B", "B"): 0.2}
    assert found[1] == pytest.approx(expected)
    needs = {name: Needs(0, 1) for name in ("random", "loss by A", "loss by B")}
    text = table(judged(summarise(cells), needs))
    assert "A: loss by B" in text
    assert text.splitlines()[-2].split() == ["A", "+0.100", "+0.100"]


def test_nearly_as_many_rows_are_a_pair(cells):
    line = by_name(summarise([*cells, cell("other", 0, 0.9, kept=49)]))["other"]
    assert line["over_random"][0] == pytest.approx(0.2)


def test_one_pair_is_no_transfer(cells):
    assert transfer(summarise(cells)) == {}


def test_a_run_that_diverged_is_counted_and_left_out(cells):
    line = by_name(summarise([*cells, cell("mine", 3, None, failure="diverged")]))["mine"]
    assert (line["seeds"], line["failures"]) == (3, ["diverged"])
    assert line["metric"] == pytest.approx(np.mean([0.8, 0.65, 0.9]))
    assert "left out: mine keep 0.5, 1 run(s): diverged" in table(judged([line], {"mine": Needs(0, 1)}))


def test_a_run_that_failed_before_anything_was_selected_counts_in_no_column(cells):
    sound = [cell("mine", 3, 0.8, scored_by="a", method="m"), cell("mine", 4, 0.8, scored_by="a", method="m")]
    nothing = dict.fromkeys(("selection_seconds", "selection_flops", "training_seconds", "training_flops"), 0.0)
    failed = [cell("mine", seed, None, kept=0, failure="diverged", method="m", **nothing) for seed in (0, 1, 2)]
    (line,) = summarise([*failed, *sound])
    assert (line["sdf"], line["scored_by"], line["training_flops"], line["seeds"]) == (0.5, "a", 20.0, 2)
    assert line["failures"] == ["diverged"] * 3


def test_the_picture_names_what_a_selector_without_a_share_kept(cells, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **more: drawn.append(figure))
    rule = cell("eaft", 0, 0.1, 1.0, kept=83)
    lines = judged(summarise([*cells, rule]), {name: Needs(0, 1) for name in ("full", "random", "mine", "eaft")})
    draw(lines, Path("unused"))
    panels = {axes.get_title(): [each.get_text() for each in axes.get_yticklabels()] for axes in drawn[0].axes[::2]}
    assert panels["own share of rows or tokens"] == ["eaft (83 %)", "full (100 %)"]
    assert panels["keep 0.5 of rows or tokens"] == ["random", "mine", "full"]


def test_a_selector_all_of_whose_runs_diverged():
    (line,) = judged(summarise([cell("mine", 0, None, failure="diverged")]), {"mine": Needs(0, 1)})
    assert (line["seeds"], line["failures"], line["pir"]) == (0, ["diverged"], None)
    assert math.isnan(line["metric"])
    assert "mine" in table([line])


@pytest.mark.parametrize(
    ("left", "cost", "epochs", "first", "longer"),
    [
        (100, 50, 2, 25, 2),  # every epoch costs the same
        (100, 60, 2, 40, 2),  # 40, then 20 each: four epochs
        (30, 60, 2, 40, 0.5),  # less than the first
        (100, 20, 1, 20, 5),
    ],
)
def test_how_long_a_budget_lasts(left, cost, epochs, first, longer):
    assert longer_by(left, cost, epochs, first) == pytest.approx(longer)


def test_at_equal_flops_random_is_the_one_that_trained_as_long_and_all_rows_the_budget(cells):
    longer = [cell(name, seed, 0.85, budget="flops") for name in ("random", "mine") for seed in range(3)]
    lines = {(line["budget"], line["selector"]): line for line in summarise([*cells, *longer])}
    assert lines["flops", "mine"]["over_random"][0] == pytest.approx(0)
    assert lines["flops", "mine"]["over_full"][0] == pytest.approx(0.85 - 0.8)
    assert lines["epochs", "mine"]["over_random"][0] == pytest.approx(0.1)
    needs = {name: Needs(0, 1) for name in ("full", "random", "mine")}
    text = table(judged(list(lines.values()), needs))
    assert text.index("selector") < text.index("At equal FLOPs") < text.rindex("selector  ")
    assert len([line for line in text.splitlines() if line.startswith("mine")]) == 2


def test_tokens_are_set_against_as_large_a_share_of_rows(cells):
    line = by_name(summarise([*cells, cell("tokens", 0, 0.9, rows=2000, kept=1000)]))["tokens"]
    assert line["over_random"][0] == pytest.approx(0.2)
    assert line["sdf"] == 0.5


def test_without_all_rows_there_is_no_ratio(cells):
    lines = judged(
        summarise([each for each in cells if each.selector != "full"]), {"random": Needs(0, 1), "mine": Needs(0, 2)}
    )
    assert all(line["p"] is None and line["pir"] is None and "efficiency_rank" not in line for line in lines)
    assert "-" in table(lines)


def test_a_metric_at_its_floor_is_said_to_be_there(cells):
    needs = {name: Needs(0, 1) for name in ("full", "random", "mine")}
    usual = table(judged(summarise(cells), needs))
    assert "floor" not in usual
    assert "over line efficiency feasibility" in usual.splitlines()[0]
    nothing_solved = [dataclasses.replace(each, metric=0.0) for each in cells]
    assert FLOOR in table(judged(summarise(nothing_solved), needs))


def test_efficiency_is_the_surveys(cells):
    needs = {"full": Needs(0, 1), "random": Needs(0, 1), "mine": Needs(0, 2)}
    lines = by_name(judged(summarise(cells), needs))
    mine = lines["mine"]
    assert mine["pir"] == pytest.approx(pir(mine["p"]))
    assert mine["above_line"] == pytest.approx(residual(0.5, mine["pir"]))
    assert [lines[name]["efficiency_rank"] for name in ("mine", "random", "full")] == [1, 2, 3]
    assert [lines[name]["feasibility_rank"] for name in ("full", "random", "mine")] == [1, 1, 2]
    assert mine["flops"] == 30
    assert mine["seconds"] == 3


# ---- what is compared


def test_numbers_that_yaml_takes_for_text_are_numbers():
    values = {
        "selectors": [{"method": "less", "settings": {"learning_rate": "2e-5"}}],
        "training": {"learning_rate": "1E-4"},
    }
    config = ComparisonConfig.of(values)
    assert config.training["learning_rate"] == 1e-4
    assert config.selectors[0].settings["learning_rate"] == 2e-5


def test_a_selector_is_a_name_or_a_mapping():
    config = ComparisonConfig.of(
        {"selectors": ["loss", {"method": "ifd", "name": "mine"}, {"score_column": "quality"}]}
    )
    assert [each.name for each in config.selectors] == ["loss", "mine", "quality"]
    assert config.selectors[2].method == "column"
    assert config.demo == DemoProblems()


def test_one_number_is_a_list_of_one():
    config = ComparisonConfig.of({"selectors": "random", "keep": 0.25})
    assert list(config.keep) == [0.25]
    assert config.selectors == (SelectorConfig("random"),)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"selectors": []}, "selectors is empty"),
        ({}, "has no selectors"),
        ({"selectors": ["a", "a"]}, "Two selectors have the name 'a'"),
        ({"selectors": ["a"], "keep": [0]}, "keep is the share of the rows to keep, above 0 and at most 1, got 0"),
        ({"selectors": ["a"], "keep": [1, 1.0]}, "keep must be a list of different entries"),
        ({"selectors": ["a"], "keep": [0.1234567, 0.12345678]}, "keep must be a list of different entries"),
        ({"selectors": ["a"], "model": ["org/m", "org-m"]}, "model must be a list of different entries"),
        (
            {"selectors": ["a"], "score_model": "./demo"},
            "would be 'demo', which is that of 'demo'",
        ),
        ({"selectors": ["a"], "model": ".."}, "use another path"),
        ({"selectors": ["a"], "demo": {"rows": 0}}, "demo's rows must be a whole number of at least 1, got 0"),
        ({"selectors": ["a"], "keep": [0.5, 0.5]}, "keep must be a list of different entries"),
        ({"selectors": ["a"], "keep": []}, "keep must be a list of different entries"),
        ({"selectors": ["a"], "seeds": 3}, r"seeds must be a list, \[0, 1, 2\] for three seeds, got 3"),
        ({"selectors": ["a"], "seeds": [-1]}, "seeds must be a whole number of at least 0"),
        ({"selectors": ["a"], "seeds": [1 << 32]}, "seeds must be a whole number of at least 0 and at most 4294967295"),
        (
            {"selectors": ["a"], "test_dataset": "rows.jsonl"},
            "test_dataset is for a dataset of your own, but",
        ),
        ({"selectors": ["a"], "prompt_column": "q"}, "prompt_column is for a dataset of your own"),
        ({"selectors": ["a"], "seeds": [0.5]}, "seeds must be a whole number"),
        ({"selectors": ["a"], "ratio": 1}, "Unknown setting 'ratio' of the comparison"),
        ({"selectors": [{"name": "a"}]}, "a mapping with 'method'"),
        ({"selectors": [3]}, "a mapping with 'method'"),
        ({"selectors": [{"method": "ifd", "size": 3}]}, "Unknown setting 'size' of a selector"),
        ({"selectors": [{"method": "ifd", "score_column": "x"}]}, "score_column goes with the method 'column'"),
        ({"selectors": ["../x"]}, "no slash, no leading dot"),
        ({"selectors": ["a"], "model": []}, "model must be a list of different entries"),
        ({"selectors": ["a"], "model": 3}, "model must be a name or a folder"),
        ({"selectors": [{"method": "ifd", "score_model": 3}]}, "A selector's score_model must be text"),
        ({"selectors": [{"method": "less", "settings": 3}]}, "settings must be a mapping"),
        ({"selectors": ["a"], "demo": 3}, "demo must be a mapping"),
        ({"selectors": ["a"], "demo": {"size": 3}}, "Unknown setting 'size' of demo"),
        ({"selectors": ["a"], "training": [1]}, "training must be a mapping"),
        ({"selectors": ["a"], "training": {"seed": 1}}, "Leave seed out of training"),
        ({"selectors": ["a"], "training": {"output_dir": "x"}}, "Leave output_dir out of training"),
        ({"selectors": ["a"], "equal_flops": True}, "add the selector 'full'"),
        ({"selectors": ["a"], "equal_flops": "yes"}, "equal_flops must be true or false"),
        ({"selectors": ["a"], "tasks": [3]}, "tasks must be a name, or a list of different names"),
        ({"selectors": ["a"], "task_limit": 5}, "go with tasks: name some"),
        (
            {"selectors": ["a"], "tasks": "gsm8k", "task_limit": 0},
            "task_limit must be a whole number of at least 1",
        ),
        ({"selectors": ["a"], "dataset": "own", "prompt_column": []}, "prompt_column must be a name"),
        ({"selectors": ["a"], "max_new_tokens": "x"}, "max_new_tokens must be a whole number of at least 1, got 'x'"),
        ({"selectors": ["a"], "max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1"),
        ({"selectors": ["a"], "dataset": None}, "dataset must be text"),
        (
            {"selectors": ["a"], "demo": {"rows": "many"}},
            "demo's rows must be a whole number",
        ),
        ({"selectors": [{"method": "ifd", "name": 3}]}, "A selector's name must be text"),
        ({"selectors": [{"method": ["ifd"]}]}, "A selector's method must be text"),
        ({"selectors": [{"method": "ifd", "drop": "largest"}]}, "drop goes with score_column"),
        ({"selectors": [{"method": "ifd", "drop": "smallest"}]}, "drop goes with score_column"),
        (
            {"selectors": [{"method": "signal", "drop": "smallest", "settings": {"by": "loss"}}]},
            "The method 'signal' has its end to drop in its settings",
        ),
        ({"selectors": [{"score_column": "x", "drop": "worst"}]}, "drop must be one of"),
        ({"selectors": [{"method": "random", "name": "chance"}]}, "The name 'random' is for the method 'random'"),
        ({"selectors": [{"method": "ifd", "name": "full"}]}, "The name 'full' is for the method 'full'"),
    ],
)
def test_what_cannot_be_compared_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        ComparisonConfig.of(values)


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("compare*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_can_be_read_and_their_selectors_and_training_are_known(path):
    config = ComparisonConfig.load(path)
    check(config)
    assert sft_config(dataclasses.replace(config, output="unused"), config.model[0], 0).seed == 0


@pytest.mark.parametrize("text", ["- a", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=r"c\.yaml"):
        ComparisonConfig.load(tmp_path / "c.yaml")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        ComparisonConfig.load(tmp_path / "none.yaml")
