"""Selectors by a signal: the column, the pass and its cost; and those that a probe recommends."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from helpers.probes import record, result
from transformers import AutoModelForCausalLM

from resofilter_trainer import DataSelector, InputError, ScoreTable
from resofilter_trainer.compare.config import ComparisonConfig, SelectorConfig, slug
from resofilter_trainer.compare.cost import parameters_of
from resofilter_trainer.compare.methods import RESONANCE_FORWARDS, check, method_of
from resofilter_trainer.compare.run import run
from resofilter_trainer.compare.signals import FORWARDS as COUNTED
from resofilter_trainer.compare.signals import SignalSettings
from resofilter_trainer.probe.recommendation import Recommendation
from resofilter_trainer.scoring import further_signals
from resofilter_trainer.scoring.further_signals import ALL_SIGNALS, FURTHER


def signal(by: str, name: str | None = None, **settings: Any) -> dict[str, Any]:
    return {"method": "signal", "name": name or by, "settings": {"by": by, **settings}}


@pytest.fixture
def compared(tiny_settings, tmp_path):
    """A function from selectors to the cells by name; and the folder of the scores."""

    def cells(*selectors: Any, **changes: Any):
        config = ComparisonConfig.of({**tiny_settings, "selectors": list(selectors), **changes})
        return {cell.selector: cell for cell in run(config)}

    return cells, tmp_path / "out" / "scores" / slug(tiny_settings["model"])


def costs_of(table: ScoreTable, model: str, forwards: float) -> float:
    """FLOPs of forwards of all rows."""
    size = parameters_of(AutoModelForCausalLM.from_pretrained(model))
    return 2 * forwards * size * float(np.nansum(table.column("length")))


# ---- the settings


def test_every_further_forward_is_counted():
    assert COUNTED.keys() == further_signals.FORWARDS.keys()


@pytest.mark.parametrize("by", ALL_SIGNALS)
def test_every_signal_is_a_selector_with_its_own_end(by):
    chosen = SelectorConfig.of(signal(by))
    check(ComparisonConfig([chosen], reference_model="other"))
    assert method_of(chosen).policy(0.5, 0, chosen) == DataSelector(keep=0.5, by=by)


@pytest.mark.parametrize(
    ("settings", "folder", "forwards"),
    [
        ({"by": "loss_sum"}, "signals", 0),
        ({"by": "entropy", "length_out": True, "drop": "smallest"}, "signals", 0),
        ({"by": "ifd"}, "signal-ifd", 1),
        ({"by": "jitter"}, "signal-jitter", 2),
        ({"by": "verdict"}, "signal-verdict", 1),
        ({"by": "superfiltering"}, "signal-superfiltering", 2),
        ({"by": "loss", "warmup": 640}, "signals-warmup-640", 0),
        ({"by": "ifd", "warmup": {"rows": 8, "lr": 1e-3}}, "signal-ifd-warmup-8-lr-0.001", 1),
        (
            {"by": "loss", "warmup": {"rows": None, "method": "lora", "epochs": 2}},
            "signals-warmup-all-lora-epochs-2",
            0,
        ),
    ],
)
def test_scores_have_a_folder_for_each_pass(settings, folder, forwards):
    assert SignalSettings(**settings).folder == folder
    chosen = SelectorConfig("signal", settings=settings)
    method, config = method_of(chosen), ComparisonConfig([chosen])
    assert method.scores == folder
    assert method.cost(config, chosen, 1) == pytest.approx(RESONANCE_FORWARDS + forwards)
    assert method.needs.llms == int("warmup" in settings)
    assert method.needs.model_free == ("warmup" not in settings and settings["by"] != "superfiltering")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "In the selector 'mine': The method 'signal' needs a setting 'by'"),
        ({"by": "los_sum"}, "In the selector 'mine': by must be one of .* Did you mean 'loss_sum'?"),
        ({"by": 3}, "by must be one of "),
        ({"by": ["loss", "entropy"]}, "by must be one of "),
        ({"by": "loss", "drop": "both"}, "drop must be one of 'largest', 'smallest', got 'both'"),
        ({"by": "loss", "length_out": "yes"}, "length_out must be True or False"),
        ({"by": "num_tokens", "length_out": True}, "length_out=True takes num_tokens out"),
        ({"by": "num_tokens", "warmup": 8}, "A warm-up does not change num_tokens"),
        ({"by": "loss", "keep": 0.5}, "The selector 'mine' has no setting 'keep'. Its settings are: by, drop, "),
        ({"by": "loss", "warmup": 0}, "warmup must be a whole number of at least 1, got 0"),
        ({"by": "loss", "warmup": "short"}, "warmup must be a number of rows, or a mapping, got 'short'"),
        ({"by": "loss", "warmup": {"row": 8}}, "A setting of warmup must be one of .* Did you mean 'rows'?"),
        ({"by": "loss", "warmup": {"cache": "x"}}, "A setting of warmup must be one of "),
        ({"by": "loss", "warmup": {"lr": 0}}, "The warm-up's lr must be a finite number above 0"),
        ({"by": "excess"}, "The selector 'mine' compares with a second model: name one as reference_model"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(settings, message, tiny_settings, tmp_path):
    chosen = {"method": "signal", "name": "mine", "settings": settings}
    with pytest.raises(InputError, match=message):
        run(ComparisonConfig.of({**tiny_settings, "selectors": ["full", chosen]}))
    assert not (tmp_path / "out").exists()


def test_numbers_within_the_settings_of_a_warmup_are_numbers():
    chosen = SelectorConfig.of(signal("loss", warmup={"rows": 8, "lr": "2e-4"}))
    assert SignalSettings(**chosen.settings).tuning.lr == 2e-4


# ---- the scores


@pytest.mark.slow
def test_signals_of_one_pass_share_it_and_each_ranks_by_its_column(compared, tiny_settings):
    cells, folder = compared
    selectors = [signal("loss_sum"), signal("el2n"), signal("loss", "out", length_out=True)]
    found = cells(*selectors, signal("loss_sum", "other_end", drop="smallest"))
    assert [each.name for each in folder.iterdir() if each.name != "loss"] == ["signals"]
    table = ScoreTable.load(folder / "signals")
    wrong = np.arange(12) % 2 == 1
    policies = {
        "loss_sum": DataSelector(0.5, by="loss_sum", drop="largest"),
        "el2n": DataSelector(0.5, by="el2n", drop="smallest"),
        "out": DataSelector(0.5, by="loss", drop="largest", length_out=True),
        "other_end": DataSelector(0.5, by="loss_sum", drop="smallest"),
    }
    for name, policy in policies.items():
        kept = policy.select(table).keep
        assert found[name].wrong_kept == pytest.approx(wrong[kept].mean())
        assert found[name].selection_flops == pytest.approx(
            costs_of(table, tiny_settings["model"], RESONANCE_FORWARDS), rel=1e-9
        )
    assert found["loss_sum"].auroc == pytest.approx(1 - found["other_end"].auroc)
    assert found["out"].method == "signal by=loss length_out=True"


def test_a_signal_with_a_further_forward_has_its_own_pass_and_cost(compared, tiny_settings):
    cells, folder = compared
    cell = cells(signal("ifd"))["ifd"]
    table = ScoreTable.load(folder / "signal-ifd")
    assert {*ALL_SIGNALS} & {*table.table.column_names} == {"ifd", "loss"}
    assert cell.selection_flops == pytest.approx(costs_of(table, tiny_settings["model"], RESONANCE_FORWARDS + 1))
    assert {name for name in FURTHER if name in table.table.column_names} == {"ifd"}


def test_excess_is_measured_with_the_reference_model(compared, tiny_settings, tiny_llama, tokenizer, tmp_path):
    other = tmp_path / "other"
    tiny_llama(seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    cells, folder = compared
    cell = cells(signal("excess"), reference_model=str(other))["excess"]
    table = ScoreTable.load(folder / "signal-excess")
    assert np.abs(table.column("excess")).max() > 0.01
    assert cell.selection_flops == pytest.approx(costs_of(table, tiny_settings["model"], RESONANCE_FORWARDS + 1))


def test_the_number_of_tokens_costs_nothing(compared):
    cells, _ = compared
    found = cells(signal("num_tokens"), "shortest")
    mine, theirs = found["num_tokens"], found["shortest"]
    assert (mine.selection_flops, mine.scored_by) == (0, "")
    assert (mine.metric, mine.wrong_kept) == (theirs.metric, theirs.wrong_kept)


@pytest.mark.slow
def test_a_warmup_has_its_own_scores_and_its_training_is_counted(compared, tiny_settings):
    cells, folder = compared
    warmup = {"rows": 4, "lr": 1e-2, "batch_size": 2}
    found = cells(signal("loss"), signal("loss", "warm", warmup=warmup), signal("loss_sum", "too", warmup=warmup))
    cold, warm = (ScoreTable.load(folder / name) for name in ("signals", "signals-warmup-4-lr-0.01-batch_size-2"))
    assert warm.column("loss").mean() < cold.column("loss").mean()
    assert warm.column("warmed_up").sum() == 4
    tokens = warm.column("length")[warm.column("warmed_up") == 1].sum()
    size = parameters_of(AutoModelForCausalLM.from_pretrained(tiny_settings["model"]))
    once = costs_of(cold, tiny_settings["model"], RESONANCE_FORWARDS)
    assert found["loss"].selection_flops == pytest.approx(once)
    assert found["warm"].selection_flops == found["too"].selection_flops == pytest.approx(once + 6 * size * tokens)
    kept = DataSelector(0.5, by="loss", drop="largest").select(warm).keep
    assert found["warm"].wrong_kept == pytest.approx((np.arange(12) % 2)[kept].mean())


# ---- from a probe


def saved(folder, **fields: Any) -> str:
    result(**fields).save(folder)
    return str(folder)


FOUND = Recommendation("loss_sum", "smallest", "The smallest values find it.", length_out=True)


def test_a_probe_is_a_selector_by_what_it_recommends(compared, tmp_path):
    cells, _ = compared
    probe = saved(tmp_path / "probe", recommendation=FOUND)
    found = cells({"probe": probe}, signal("loss_sum", "by_hand", drop="smallest", length_out=True))
    mine, theirs = found["probe"], found["by_hand"]
    assert (mine.metric, mine.wrong_kept, mine.auroc) == (theirs.metric, theirs.wrong_kept, theirs.auroc)
    assert mine.method == "signal by=loss_sum drop=smallest length_out=True"
    saved(tmp_path / "probe", recommendation=Recommendation("loss", "largest", "Now these."))
    with pytest.raises(InputError, match=r"probe-0.5-0\.json' has a cell that was made from something else"):
        cells({"probe": probe})


@pytest.mark.parametrize(
    ("warmup", "told", "expected"),
    [
        (None, {}, None),
        (640, {"rows": 640, "method": "full", "lr": 1e-4, "epochs": 1, "batch_size": 8, "seed": 0}, 640),
        (0, {"rows": None, "method": "full", "lr": 1e-4, "epochs": 1, "batch_size": 8, "seed": 0}, {"rows": None}),
        (
            64,
            {"rows": 64, "method": "lora", "lr": 2e-4, "epochs": 2, "batch_size": 8, "lora_rank": 16, "seed": 0},
            {"rows": 64, "method": "lora", "epochs": 2},
        ),
    ],
)
def test_the_warmup_of_a_probe_is_repeated(warmup, told, expected, tmp_path):
    provenance = {f"warmup_{name}": value for name, value in told.items()}
    best = Recommendation("loss", "largest", "These find it.", warmup=warmup)
    probe = saved(tmp_path / "probe", recommendation=best, provenance=provenance)
    chosen = SelectorConfig.of({"probe": probe, "name": "mine", "score_model": "other"})
    assert (chosen.method, chosen.name, chosen.score_model) == ("signal", "mine", "other")
    assert chosen.settings.get("warmup") == expected
    tuning = SignalSettings(**chosen.settings).tuning
    assert (tuning and tuning.to_json()) == (told or None)


@pytest.mark.parametrize(
    ("entry", "fields", "message"),
    [
        ({}, {"recommendation": Recommendation(None, None, "None finds it.")}, "says not to filter, .*: None finds it"),
        ({"method": "signal"}, {}, "A selector's probe says what to rank by: leave method out"),
        ({"settings": {"by": "loss"}}, {}, "leave settings out"),
        ({"drop": "largest"}, {}, "leave drop out"),
        ({"probe": 3}, {}, "A selector's probe is the folder of one, as text, got 3"),
        ({"probe": "nowhere"}, {}, "There is no probe at 'nowhere"),
        ({"size": 3}, {"recommendation": FOUND}, "Unknown setting 'size' of a selector"),
        (
            {},
            {
                "recommendation": Recommendation("loss", "largest", "These.", warmup=8),
                "provenance": {"warmup_rows": 8, "warmup_method": "full", "warmup_dataset": "hash"},
            },
            "after a warm-up on a warmup_dataset, .*: probe without warmup_dataset=",
        ),
        (
            {},
            {"recommendation": Recommendation("loss", "largest", "These.", warmup=8), "provenance": {}},
            "does not say how its warm-up was done",
        ),
    ],
)
def test_a_probe_that_gives_no_selector_is_refused(entry, fields, message, tmp_path):
    probe = saved(tmp_path / "probe", **fields)
    with pytest.raises(InputError, match=message):
        SelectorConfig.of({"probe": probe, **entry})


def test_a_damaged_probe_is_refused(tmp_path):
    (tmp_path / "probe.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match=r"probe\.json' is damaged"):
        SelectorConfig.of({"probe": str(tmp_path)})


def test_a_probe_that_recommends_a_signal_with_a_reference_needs_one(tmp_path):
    probe = saved(tmp_path / "probe", recommendation=Recommendation("excess", "smallest", "These find it."))
    with pytest.raises(InputError, match="The selector 'probe' compares with a second model"):
        check(ComparisonConfig.of({"selectors": [{"probe": probe}]}))
    check(ComparisonConfig.of({"selectors": [{"probe": probe}], "reference_model": "other"}))


def test_records_of_the_helper_recommend_something(tmp_path):
    """A real recommendation, as a probe makes it from its records."""
    found = result([record("loss", "labelled", 0.7), record("loss", "all", 0.7)])
    found.save(tmp_path)
    assert SelectorConfig.of({"probe": str(tmp_path)}).settings["by"] == "loss"
