"""A probe from rows to results with a tiny model: whole, the same again, resumed, refused in one line."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import yaml
from datasets import Dataset
from helpers.probes import QUESTIONS
from helpers.scoring import COLUMNS, arguments

from resofilter_trainer import DataSelector, InputError, ProbeResult, ScoreTable, Warmup, probe_dataset, score_dataset
from resofilter_trainer.io.digest import ARROW, hash_rows
from resofilter_trainer.model.signals import SIGNALS
from resofilter_trainer.probe import measuring, run
from resofilter_trainer.probe.faults import Planted
from resofilter_trainer.probe.findings import ALL, LABELLED, SELF_MADE
from resofilter_trainer.scores.statistics import auroc
from resofilter_trainer.selecting.votes import WARMED

USUAL = {"kinds": ["exchanged", "cut"], "faults_per_kind": 15, "self_made": False, **COLUMNS}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset.from_list(QUESTIONS)


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def probed(model, dataset, tokenizer, tmp_path_factory) -> tuple[ProbeResult, ScoreTable]:
    folder = tmp_path_factory.mktemp("probed") / "probe"
    found = probe_dataset(model, dataset, tokenizer, arguments(), folder, **USUAL)
    assert ProbeResult.load(folder) == found
    return found, ScoreTable.load(folder / "scores")


def written(examples, count, wrong=True) -> list[Planted]:
    texts = [f"{each.answer} {'no, 99' if wrong else 'yes'}" for each in examples[:count]]
    return [Planted(SELF_MADE, each.row, each.with_answer(text), "0", wrong)
            for each, text in zip(examples, texts, strict=False)]  # fmt: skip


def test_every_signal_is_measured_for_every_kind(probed):
    found, _ = probed
    names = [*SIGNALS, "num_tokens"]
    assert {(each["signal"], each["kind"]) for each in found.signals} == {
        (name, kind) for name in names for kind in ("exchanged", "cut", ALL)
    }
    assert all(0 <= each["auroc"] <= 1 and each["low"] <= each["auroc"] <= each["high"] for each in found.signals)
    assert all((each["seconds"] > 0) == (each["signal"] != "num_tokens") for each in found.signals)
    assert found.kinds["cut"] == "truncation"
    assert found.cost == {"rows": 40, "planted": 30, "tokens": found.cost["tokens"], "seconds": found.cost["seconds"]}
    assert len(found.alike["spearman"]) == len(names)
    assert any("40 rows were drawn, not 400" in note for note in found.notes)


def test_the_numbers_are_those_of_the_pass(probed):
    found, scores = probed
    assert len(scores) == 70
    planted = np.arange(70) >= 40
    own = np.concatenate([np.arange(40), np.arange(40, 55)])  # the rows, and the first kind
    for name in ("loss", "el2n", "num_tokens"):
        sign = -1 if scores.direction(name) == "smallest" else 1
        expected = auroc(sign * scores.column(name)[own], planted[own])
        assert found.record(name, "exchanged")["auroc"] == pytest.approx(expected)


def test_the_rows_are_measured_as_without_a_probe(probed, model, dataset, tokenizer):
    _, scores = probed
    alone = score_dataset(model, dataset, tokenizer, arguments(), signals=["loss", "rank"], **COLUMNS)
    for name in ("score", "loss", "rank", "num_tokens"):
        assert scores.column(name)[:40] == pytest.approx(alone.column(name), rel=1e-4)


def without_seconds(found: ProbeResult) -> dict:
    content = json.loads(json.dumps(found.to_json()))
    for each in (*content["signals"], content["cost"]):
        each.pop("seconds")
    return content


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(probed, model, dataset, tokenizer):
    again = probe_dataset(model, dataset, tokenizer, arguments(), **USUAL)
    assert without_seconds(again) == without_seconds(probed[0])
    other = probe_dataset(model, dataset, tokenizer, arguments(), seed=1, **USUAL)
    assert other.record("loss", "exchanged")["auroc"] != again.record("loss", "exchanged")["auroc"]


def test_a_folder_has_one_probe(model, dataset, tokenizer, tmp_path, monkeypatch):
    first = probe_dataset(model, dataset, tokenizer, arguments(), tmp_path, **USUAL)
    monkeypatch.setattr(measuring, "score_dataset", None)  # nothing is measured again
    assert probe_dataset(model, dataset, tokenizer, arguments(), tmp_path, **USUAL) == first
    with pytest.raises(InputError, match=r"holds a probe made from something else: they differ in rows .*; seed"):
        probe_dataset(model, dataset, tokenizer, arguments(), tmp_path, seed=1, **USUAL)
    with pytest.raises(InputError, match="differ in signals"):
        probe_dataset(model, dataset, tokenizer, arguments(), tmp_path, signals=["loss"], **USUAL)


def test_an_interrupted_probe_resumes_and_writes_no_answer_again(model, dataset, tokenizer, tmp_path, monkeypatch):
    calls = []

    def write(model, tokenizer, examples, count, seed):
        calls.append(count)
        return written(examples, 15) + written(examples, 12, wrong=False), ["a note"]

    monkeypatch.setattr(run, "write", write)
    settings = {**USUAL, "self_made": True, "kinds": None}
    whole = probe_dataset(model, dataset, tokenizer, arguments(), **settings)
    measure = measuring.score_dataset

    def killed(*args, **options):
        measure(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "score_dataset", killed)
    with pytest.raises(KeyboardInterrupt):
        probe_dataset(model, dataset, tokenizer, arguments(), tmp_path, **settings)
    assert not (tmp_path / "probe.json").exists()
    monkeypatch.setattr(measuring, "score_dataset", measure)
    resumed = probe_dataset(model, dataset, tokenizer, arguments(), tmp_path, **settings)
    assert len(calls) == 2, "once without a folder, once before the kill"
    assert without_seconds(resumed) == without_seconds(whole)
    assert resumed.cost["seconds"] is None
    assert (resumed.evidence, resumed.record("loss", SELF_MADE)["compared"]) == (SELF_MADE, 12)
    assert "a note" in resumed.notes


@pytest.mark.slow
def test_a_warm_up_is_measured_beside_the_model_as_it_is(model, dataset, tokenizer, tmp_path):
    """It tunes on rows that were not drawn; the signals as they are do not change."""
    usual = {**USUAL, "rows": 24}
    warm = Warmup(rows=8, lr=1e-2, batch_size=4)
    found = probe_dataset(model, dataset, tokenizer, arguments(), tmp_path, warmup=warm, **usual)
    plain = probe_dataset(model, dataset, tokenizer, arguments(), **usual)
    assert found.record("loss", "cut")["auroc"] == plain.record("loss", "cut")["auroc"]
    assert f"loss{WARMED}" in found.ranked
    tuned = ScoreTable.load(tmp_path / "scores_warmed")
    as_it_is = ScoreTable.load(tmp_path / "scores")
    assert tuned.column("loss")[:24].mean() < as_it_is.column("loss")[:24].mean()
    assert tuned.column("warmed_up").sum() == 0
    assert tuned.provenance.warmup["rows"] == 8
    assert not any("has learnt" in note for note in found.notes)
    seen = probe_dataset(model, dataset, tokenizer, arguments(), warmup=warm, warmup_dataset=dataset, **usual)
    learnt = [note for note in seen.notes if "The warm-up has learnt" in note]
    assert len(learnt) == 1
    assert learnt[0].endswith("of the measured rows, whose losses are smaller for that.")
    with pytest.raises(InputError, match="differ in warmup_"):
        probe_dataset(model, dataset, tokenizer, arguments(), tmp_path, **usual)


def test_a_probe_of_a_version_with_another_digest_of_rows_is_resumed(model, dataset, tokenizer, tmp_path, monkeypatch):
    def killed(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "score_dataset", killed)
    usual = {**USUAL, "warmup": Warmup(rows=8, lr=1e-2, batch_size=4)}
    settings = tmp_path / run.SETTINGS_FILE
    for rows, refused in ((dataset, KeyboardInterrupt), (dataset, KeyboardInterrupt), (dataset.shuffle(1), InputError)):
        with pytest.raises(refused):
            probe_dataset(model, dataset, tokenizer, arguments(), tmp_path, warmup_dataset=rows, **usual)
        there = json.loads(settings.read_text())
        settings.write_text(json.dumps({**there, "warmup_dataset": hash_rows(dataset, ARROW)}))


def test_signals_of_further_forwards_are_probed(model, dataset, tokenizer):
    found = probe_dataset(model, dataset, tokenizer, arguments(), signals=["loss", "ifd"], **USUAL)
    assert found.record("ifd", "exchanged")["direction"] == "smallest"
    assert 0 < found.record("ifd")["seconds"] < found.cost["seconds"]
    assert 0 < found.record("loss")["seconds"] < found.cost["seconds"]
    with pytest.raises(InputError, match="excess needs a second model: pass reference="):
        probe_dataset(model, dataset, tokenizer, arguments(), signals=["excess"], **USUAL)


def test_labels_are_the_evidence_and_wrong_rows_get_no_faults(model, tokenizer):
    wrong = [place % 3 == 0 for place in range(40)]
    labelled = Dataset.from_list([{**row, "bad": flag} for row, flag in zip(QUESTIONS, wrong, strict=True)])
    settings = {name: value for name, value in USUAL.items() if name != "self_made"}
    found = probe_dataset(model, labelled, tokenizer, arguments(), wrong_column="bad", **settings)
    assert found.evidence == LABELLED
    assert SELF_MADE not in found.kinds
    assert found.record("loss", LABELLED)["faulty"] == sum(wrong)
    assert found.record("loss", "cut")["compared"] == 40 - sum(wrong)
    plain = Dataset.from_list(QUESTIONS)
    scores = score_dataset(model, plain, tokenizer, arguments(), **COLUMNS)
    expected = auroc(scores.column("loss"), np.array(wrong))
    assert found.record("loss", LABELLED)["auroc"] == pytest.approx(expected, abs=1e-3)


def test_a_fault_of_ones_own_is_a_kind(model, dataset, tokenizer):
    def shouted(row):
        return {**row, "completion": row["completion"].upper()}

    found = probe_dataset(model, dataset, tokenizer, arguments(), **{**USUAL, "kinds": None}, faults=[shouted])
    assert found.kinds == {"shouted": "what shouted does", ALL: found.kinds[ALL]}


def test_faults_that_may_be_cut_off_do_not_count(probed, model, dataset, tokenizer):
    lengths = probed[1].column("length")[40:]
    limit = int(np.quantile(lengths, 0.85))
    long = int((lengths >= limit).sum())
    assert 0 < long < 10
    found = probe_dataset(model, dataset, tokenizer, arguments(max_length=limit), **USUAL)
    assert any(note.startswith(f"{long} rows with a fault reach max_length={limit} tokens") for note in found.notes)
    assert found.record("loss")["faulty"] == 30 - long


def test_the_recommended_settings_are_those_of_the_selection(model, dataset, tokenizer, tmp_path):
    found = probe_dataset(model, dataset, tokenizer, arguments(), tmp_path, **USUAL)
    settings = yaml.safe_load((tmp_path / "recommended.yaml").read_text())
    wanted = found.recommendation
    assert settings["select"]["keep"] == (1.0 if wanted.signal is None else 0.5)
    if wanted.signal is not None:
        assert settings["select"]["by"][0] == wanted.signal
        selection = DataSelector(**settings["select"]).select(ScoreTable.load(tmp_path / "scores"))
        assert selection.keep.sum() == 35


def test_few_and_odd_numbers_stay_numbers(probed):
    assert not any(isinstance(value, float) and math.isnan(value) for each in probed[0].signals
                   for value in each.values())  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kinds": ["cutt"]}, "kinds must be one of .* got 'cutt'. Did you mean 'cut'"),
        ({"signals": ["entropi"]}, "signals must be one of .* Did you mean 'entropy'"),
        ({"rows": 10}, "rows must be a whole number of at least 20, got 10"),
        ({"faults_per_kind": 1}, "faults_per_kind must be a whole number of at least 5"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"kinds": None}, "No fault can be planted in these rows. Plant other kinds"),
        ({"kinds": ["other_turn"]}, "No fault can be planted in these rows. other_turn: no row has"),
        ({"wrong_column": "answr"}, "no column 'answr', named as wrong_column. Did you mean 'answer'"),
        ({"wrong_column": "answer"}, "Row 0: wrong_column 'answer' has 'we add"),
        ({"writer": "m"}, "A writer writes the answers of self_made=True"),
        ({"faults": [3]}, "A function from a row to a row is needed, got a int"),
        ({"faults": ["nowhere.py:f"]}, "There is no file nowhere.py"),
        ({"tokenizer": 3}, "Did you mean processing_class="),
    ],
)
def test_bad_input_is_one_line_before_any_work(options, expected, model, dataset, tokenizer, tmp_path):
    with pytest.raises(InputError, match=expected):
        probe_dataset(model, dataset, tokenizer, arguments(), tmp_path / "out", **{**USUAL, **options})
    assert not (tmp_path / "out").exists()


def test_too_few_rows_are_refused_with_how_many_are_needed(model, dataset, tokenizer):
    with pytest.raises(InputError, match="19 of 19 rows can be probed, and at least 20 are needed"):
        probe_dataset(model, dataset.select(range(19)), tokenizer, arguments(), **USUAL)


@pytest.mark.parametrize(("wrong", "what"), [(9, "9 of the 40 drawn rows wrong"), (31, "9 of the 40 drawn rows right")])
def test_too_few_labels_of_a_kind_are_refused(wrong, what, model, dataset, tokenizer):
    labelled = dataset.add_column("bad", [int(place < wrong) for place in range(40)])
    with pytest.raises(InputError, match=f"wrong_column 'bad' calls {what}, and at least 10 are needed"):
        probe_dataset(model, labelled, tokenizer, arguments(), wrong_column="bad", **USUAL)
