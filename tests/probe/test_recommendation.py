"""What is recommended for which numbers, and in which words."""

from __future__ import annotations

import pytest
from helpers.probes import record

from resofilter_trainer.probe.findings import ALL, CONTRADICTED, LABELLED, SELF_MADE
from resofilter_trainer.probe.recommendation import USUAL, recommend
from resofilter_trainer.selecting.votes import WARMED


def test_the_largest_lower_bound_wins():
    found = recommend([record("a", SELF_MADE, 0.75, 0.2), record("b", SELF_MADE, 0.7, 0.05)])
    assert (found.signal, found.drop, found.evidence) == ("b", "largest", SELF_MADE)
    assert (found.auroc, found.low, found.high) == (0.7, 0.65, 0.75)


def test_the_other_end_of_a_signal_counts_with_its_bounds():
    found = recommend([record("a", SELF_MADE, 0.2, 0.05), record("b", SELF_MADE, 0.7, 0.05)])
    assert (found.signal, found.drop) == ("a", "smallest")
    assert (found.auroc, found.low, found.high) == pytest.approx((0.8, 0.75, 0.85))
    other = recommend([record("a", SELF_MADE, 0.2, 0.05, direction="smallest")])
    assert other.drop == "largest"


def test_labels_count_before_self_made_errors_and_these_before_planted_ones():
    records = [record("a", LABELLED, 0.7), record("b", LABELLED, 0.6), record("a", SELF_MADE, 0.6)]
    records += [record("b", SELF_MADE, 0.8), record("c", "cut", 0.9), record("c", ALL, 0.9), record("c", LABELLED, 0.5)]
    assert recommend(records).signal == "a"
    without = [each for each in records if each["kind"] != LABELLED]
    assert recommend(without).signal == "b"
    planted = recommend([each for each in without if each["kind"] != SELF_MADE])
    assert (planted.signal, planted.evidence) == (None, ALL), "what finds cut answers may find no wrong ones"
    assert "Planted faults are not real ones" in planted.reason
    assert "Planted" not in recommend(without).reason


def test_rows_that_others_contradict_count_before_self_made_errors():
    records = [record("a", CONTRADICTED, 0.7), record("a", SELF_MADE, 0.6), record("b", SELF_MADE, 0.8)]
    records += [record("b", CONTRADICTED, 0.6)]
    found = recommend(records)
    assert (found.signal, found.evidence) == ("a", CONTRADICTED)
    assert "the rows that other answers to the same prompt contradict" in found.reason


def test_self_made_errors_against_answers_of_others_are_no_evidence():
    """They would show the writer's style."""
    records = [record("a", SELF_MADE, 0.9, against="rows"), record("b", SELF_MADE, 0.6, against="rows")]
    records += [record(USUAL, "number", 0.6, auroc_within_prompt=0.8), record("a", ALL, 0.9)]
    found = recommend(records)
    assert (found.signal, found.evidence) == (USUAL, ALL)


@pytest.mark.parametrize("kind", [SELF_MADE, CONTRADICTED])
@pytest.mark.parametrize(
    ("best", "half", "expected"), [(0.70, 0.05, USUAL), (0.73, 0.05, USUAL), (0.76, 0.05, "a"), (0.76, 0.08, USUAL)]
)
def test_the_usual_signal_gives_way_only_to_one_whose_lower_bound_is_above_its_auroc(kind, best, half, expected):
    found = recommend([record(USUAL, kind, 0.7, 0.1), record("a", kind, best, half)])
    assert (found.signal, found.drop, found.evidence) == (expected, "largest", kind)
    assert ("a, with an AUROC of 0." in found.reason) == (expected == USUAL)


@pytest.mark.parametrize(("usual", "half"), [(0.7, 0.25), (0.54, 0.01), (0.3, 0.05)])
def test_the_usual_signal_has_to_find_the_evidence_itself(usual, half):
    assert recommend([record(USUAL, SELF_MADE, usual, half), record("a", SELF_MADE, 0.72, 0.03)]).signal == "a"


def test_where_rows_are_labelled_no_signal_is_usual():
    assert recommend([record(USUAL, LABELLED, 0.7), record("a", LABELLED, 0.71)]).signal == "a"


@pytest.mark.parametrize("kind", [SELF_MADE, CONTRADICTED])
@pytest.mark.parametrize(("half", "evidence"), [(0.14, True), (0.2, False)])
def test_too_few_rows_are_no_evidence_that_nothing_finds_them(kind, half, evidence):
    """Eleven right answers beside sixty wrong ones leave an interval of .25 to both sides."""
    records = [record("a", kind, 0.52, half), record("b", kind, 0.55, 0.3)]
    records += [record(USUAL, "number", 0.6, auroc_within_prompt=0.8), record("a", ALL, 0.9)]
    found = recommend(records)
    assert (found.signal, found.evidence) == ((None, kind) if evidence else (USUAL, ALL))


def test_few_labels_are_evidence_all_the_same():
    records = [record("a", LABELLED, 0.52, 0.3), record(USUAL, "number", 0.6, auroc_within_prompt=0.8)]
    assert recommend(records).evidence == LABELLED


@pytest.mark.parametrize(("within", "direction"), [(0.9, "largest"), (0.1, "smallest")])
def test_without_real_errors_the_usual_signal_is_recommended_if_the_model_notices_wrong_numbers(within, direction):
    """In copies of a row: among all rows, their lengths and prompts would be compared."""
    records = [record(USUAL, "number", 0.5, auroc_within_prompt=within, direction=direction)]
    records += [record("loss_max", "number", 0.95), record(USUAL, "cut", 0.1), record("loss_max", ALL, 0.9)]
    found = recommend(records)
    assert (found.signal, found.drop, found.evidence, found.auroc) == (USUAL, "largest", ALL, None)
    assert "No real errors are known here" in found.reason
    assert "in 90% of the rows" in found.reason
    assert "Planted faults are not real ones" in found.reason


def test_an_exchanged_answer_counts_only_where_there_are_no_numbers():
    """It is found by nearly every signal of nearly every model."""
    records = [record(USUAL, "exchanged", 0.95, auroc_within_prompt=1.0), record(USUAL, ALL, 0.8)]
    assert recommend(records).signal == USUAL
    assert recommend([*records, record(USUAL, "final_number", 0.9, auroc_within_prompt=0.5)]).signal is None


def test_a_signal_after_a_warm_up_has_its_name_and_the_rows_of_the_warm_up():
    records = [record("loss", LABELLED, 0.6), record(f"loss{WARMED}", LABELLED, 0.8)]
    found = recommend(records, 640)
    assert (found.signal, found.warmup, found.name) == ("loss", 640, f"loss{WARMED}")
    assert f"loss{WARMED}" in found.reason
    plain = recommend([record("loss", LABELLED, 0.9), record(f"loss{WARMED}", LABELLED, 0.8)], 640)
    assert (plain.signal, plain.warmup, plain.name) == ("loss", None, "loss")


@pytest.mark.parametrize("within", [0.59, 0.1, None])
def test_without_real_errors_nothing_is_recommended_if_the_model_notices_nothing(within):
    records = [record(USUAL, "number", 0.9, auroc_within_prompt=within), record(USUAL, ALL, 0.9)]
    found = recommend([*records, record("loss_max", ALL, 0.9)])
    assert (found.signal, found.drop) == (None, None)
    assert found.reason.endswith("Do not filter by score: look for repeats and cut answers first.")


def test_of_those_about_as_good_the_one_that_finds_most_kinds():
    records = [record("a", SELF_MADE, 0.71), record("b", SELF_MADE, 0.70), record("c", SELF_MADE, 0.68)]
    records += [record("a", "cut", 0.5), record("b", "cut", 0.9), record("c", "cut", 1.0)]
    assert recommend(records).signal == "b"


@pytest.mark.parametrize(("plain", "out", "expected"), [(0.7, 0.8, True), (0.8, 0.7, False), (0.7, 0.7, False)])
def test_the_length_is_taken_out_where_that_finds_more(plain, out, expected):
    found = recommend([record("a", SELF_MADE, plain, length_out=out)])
    assert (found.signal, found.length_out) == ("a", expected)
    assert ("with the length taken out" in found.reason) == expected


@pytest.mark.parametrize(("auroc", "half"), [(0.54, 0.01), (0.56, 0.07), (0.46, 0.01), (0.5, 0.1)])
def test_nothing_is_recommended_where_nothing_finds_it(auroc, half):
    found = recommend([record("a", SELF_MADE, auroc, half), record("b", SELF_MADE, 0.5, 0.2)])
    assert (found.signal, found.drop, found.length_out) == (None, None, False)
    assert found.reason.startswith("None of these finds wrong answers that a model wrote itself")
    assert f"AUROC of {max(auroc, 1 - auroc):.2f}" in found.reason
    assert found.reason.endswith("Do not filter by score: look for repeats and cut answers first.")


def test_a_signal_without_a_number_is_passed_over():
    assert recommend([record("a", SELF_MADE, None), record("b", SELF_MADE, 0.7)]).signal == "b"
    nothing = recommend([record("a", SELF_MADE, None)])
    assert (nothing.signal, nothing.auroc) == (None, None)
    assert nothing.reason.startswith("Nothing could be measured.")


def test_the_reason_has_the_numbers():
    found = recommend([record("loss", LABELLED, 0.71, beyond=0.2)])
    assert found.reason == (
        "The largest values of loss find the rows that you labelled as wrong with an AUROC of 0.71 (95 % interval 0.68 "
        "to 0.74); 20% of the rows as they are lie beyond the median of the faulty ones."
    )
