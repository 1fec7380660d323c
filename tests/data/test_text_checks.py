"""Checks of a dataset's texts: what each finds in rows of every form, what is written, and what select makes of it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from helpers.tables import make_provenance, make_scores
from hypothesis import given
from hypothesis import strategies as st

from resofilter_trainer import DataSelector, Selection, TextChecks, check_texts
from resofilter_trainer.config import InputError
from resofilter_trainer.data import repeated_texts
from resofilter_trainer.data.checks import CHECKS
from resofilter_trainer.data.repeated_texts import BANDS, ROWS_OF_BAND, near_duplicates, odd_endings
from resofilter_trainer.io.digest import ARROW, hash_rows
from resofilter_trainer.scores.score_table import ScoreTable

rensa = pytest.mark.skipif(not repeated_texts.has_minhash(), reason="rensa is not installed")


def filler(number: int) -> tuple[str, str]:
    return (
        f"What is {number} and then {number * 7} ?",
        f"Take {number * 13}, and you will find {number * number} of it.",
    )


def rows_with(*pairs: tuple[str, str], fillers: int = 20) -> list[tuple[str, str]]:
    """The rows, and after them some in which nothing is wrong."""
    return [*pairs, *map(filler, range(fillers))]


def as_pairs(rows):
    return Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in rows]), {}


def as_columns(rows):
    found = Dataset.from_list([{"q": prompt, "a": answer} for prompt, answer in rows])
    return found, {"prompt_column": "q", "completion_column": "a"}


def as_chats(rows):
    talks = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in rows]
    return Dataset.from_list([{"messages": talk} for talk in talks]), {}


def as_conversations(rows):
    talks = [[{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}] for prompt, answer in rows]
    return Dataset.from_list([{"conversations": talk} for talk in talks]), {"messages_column": "conversations"}


FORMS = [as_pairs, as_columns, as_chats, as_conversations]
LONG = "We walk along the old road to the town, and there we buy bread, milk and cheese for all of us."
RUSSIAN = "\u044d\u0442\u043e \u043e\u0442\u0432\u0435\u0442 \u043d\u0430 \u0432\u043e\u043f\u0440\u043e\u0441."
FAULTS = {
    "exact_duplicate": [("How do you go?", LONG), ("How do you  go?", f"{LONG} ")],
    "endings_differ": [("2 + 2 ?", "It is 4."), ("2 + 2 ?", "It is 5."), ("2 + 2 ?", "So we find: 4")],
    "cut": [("How?", "We walk along the old road to the town and")],
    "empty": [("Why?", " \n")],
    "echo": [("say this again", "say this again")],
    "refusal": [("Who?", "As an AI language model, I cannot say.")],
    "odd_script": [("Who?", RUSSIAN)],
    "damaged": [("Who?", "In the Caf\u00c3\u00a9.")],
    "loop": [("What?", "and so it goes on " * 8)],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAULTS)
def test_each_check_finds_its_fault_in_every_form_of_rows_and_no_other(name, form):
    dataset, options = form(rows_with(*FAULTS[name]))
    found = check_texts(dataset, **options)
    expected = dict.fromkeys(found.names, 0) | {name: 1}
    if name == "loop":  # which also ends openly
        expected["cut"] = found.counts["cut"]
    assert found.counts == expected
    row = {"exact_duplicate": 1, "endings_differ": 1}.get(name, 0)
    assert found.rows([name]).tolist() == [row]
    assert found.reasons[row]
    assert [each for place, each in enumerate(found.reasons) if place != row] == [None] * (len(dataset) - 1)


def test_rows_in_which_nothing_is_wrong_have_no_reason():
    for form in FORMS:
        dataset, options = form(rows_with())
        assert set(check_texts(dataset, **options).counts.values()) == {0}


def test_the_reasons_are_words_with_the_rows_of_the_dataset():
    unreadable = {"prompt": None, "completion": "a"}
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in rows_with(*FAULTS["endings_differ"])]
    found = check_texts(Dataset.from_list([unreadable, *rows, rows[5]]))
    assert found.reasons[2] == "ends with 5, and row 1 with 4, to the same prompt"
    assert found.reasons[-1] == "repeats row 6"
    assert found.table["exact_duplicate"].to_pylist()[-1] == 6
    assert found.table["endings_differ"].to_pylist()[:4] == [None, None, 1, None]
    assert found.table["cut"].type == pa.bool_()
    assert found.unreadable == [0]
    assert found.reasons[0].startswith("cannot be read: ")
    assert len(found) == len(rows) + 2


def test_text_rows_have_no_prompt_to_miss():
    found = check_texts(Dataset.from_list([{"text": f"This is text number {row}."} for row in range(5)] * 2))
    assert found.counts == {name: 5 * (name == "exact_duplicate") for name in found.names}


def test_a_missing_prompt_is_a_fault_only_where_others_have_one():
    some, _ = as_pairs(rows_with(("", "This is a text.")))
    most, _ = as_pairs([(f"{'' if row < 5 else 'why'}", f"This is text number {row}.") for row in range(8)])
    assert check_texts(some).reasons[0] == "has no prompt"
    assert check_texts(most).counts["empty"] == 0


@pytest.mark.parametrize(("openly", "expected"), [(10, 0), (5, 5)])
def test_where_most_end_without_a_full_stop_that_says_nothing(openly, expected):
    ends = [f"Take {row}, and you will find a lot of it there{'' if row < openly else '.'}" for row in range(15)]
    dataset, _ = as_pairs([(f"What is {row}?", end) for row, end in enumerate(ends)])
    assert check_texts(dataset).counts["cut"] == expected


def test_rows_of_which_none_can_be_read_are_named():
    found = check_texts(Dataset.from_list([{"prompt": None, "completion": "a"}, {"prompt": None, "completion": "b"}]))
    assert found.unreadable == [0, 1]
    assert set(found.counts.values()) == {0}


def test_calls_of_tools_are_answers():
    def call(city):
        calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    asked = {"role": "user", "content": "Weather?"}
    dataset = Dataset.from_list([{"messages": [asked, call(city)]} for city in ("Ulm", "Rome", "Ulm")])
    found = check_texts(dataset)
    assert found.counts["empty"] == 0
    assert found.reasons == [None, None, "repeats row 0"]


def test_rows_that_differ_in_a_picture_are_not_compared():
    pairs = [{"prompt": "What is it?", "completion": "A cat.", "image": each} for each in ("a.png", "b.png")]
    found = check_texts(Dataset.from_list(pairs), checks=["exact_duplicate", "cut"])
    assert found.names == ["cut"]
    assert found.left_out == {"exact_duplicate": "the column 'image' is not compared, and rows may differ in it alone"}


# ---- near duplicates


@rensa
def test_a_near_duplicate_is_found_and_its_similarity_is_exact():
    text = " ".join(f"word{number}" for number in range(40))
    dataset, _ = as_pairs(rows_with(("How?", text), ("how", text.replace("word20", "other").upper() + "!")))
    found = check_texts(dataset)
    assert found.counts["near_duplicate"] == 1
    assert found.reasons[1].startswith(f"is like row 0 ({100 * 35 / 41:.0f} % of the word trigrams)")
    assert found.table["near_duplicate"].to_pylist()[:3] == [None, 0, None]


@rensa
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("2 + 2", "the same long answer is given here"), ("2 - 2", "the same long answer is given here")),
        (("how", "+"), ("how", "-")),
        (("how many are there", "3"), ("how many are there", "4")),
        ((LONG, "yes"), (LONG, "no")),
        ((LONG, f"{LONG} #### 12"), (LONG, f"{LONG} #### 13")),
    ],
)
def test_rows_that_differ_where_it_matters_are_no_duplicates(one, other):
    assert near_duplicates([one, other]) == {}


@rensa
@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12), min_size=1, max_size=12))
def test_no_false_pair_is_reported_and_rows_that_stay_are_named(rows):
    texts = [("", " ".join(words)) for words in rows]
    found = near_duplicates(texts)
    for row, (other, similarity) in found.items():
        assert other < row
        assert other not in found
        assert similarity == jaccard(rows[row], rows[other]) >= 0.8
    assert found == near_duplicates(texts)


def jaccard(one: list[str], other: list[str]) -> float:
    a, b = ({tuple(words[start : start + 3]) for start in range(max(len(words) - 2, 1))} for words in (one, other))
    return len(a & b) / len(a | b)


@rensa
def test_rows_of_one_template_are_no_duplicates_and_its_repeats_are():
    template = " ".join(f"t{each}" for each in range(150))
    rng = np.random.default_rng(0)
    words = [" ".join(f"w{each}" for each in rng.integers(0, 10**6, 8)) for _ in range(120)]
    texts = [(f"{template} {each}", "The answer is unknown.") for each in words]
    assert near_duplicates(texts) == {}
    assert near_duplicates(texts[:40])[1][0] == 0  # too few rows to tell a template
    assert near_duplicates([*texts, texts[7]]) == {120: (7, 1.0)}


@rensa
def test_hardly_any_pair_is_missed():
    rng = np.random.default_rng(0)
    texts = [[f"w{each}" for each in rng.integers(0, 10**6, 60)] for _ in range(100)]
    near = [[*words[:30], "changed", *words[31:]] for words in texts]
    found = near_duplicates([("", " ".join(words)) for words in (*texts, *near)])
    assert found.keys() == set(range(100, 200))
    assert (1 - 0.8**ROWS_OF_BAND) ** BANDS < 1 / 10_000


def test_without_the_library_near_duplicates_are_left_out_and_that_is_said(monkeypatch, tmp_path):
    from resofilter_trainer.cli.check import summary

    monkeypatch.setattr(repeated_texts.importlib.util, "find_spec", lambda name: None)
    dataset, _ = as_pairs(rows_with(*FAULTS["exact_duplicate"]))
    found = check_texts(dataset)
    assert "near_duplicate" not in found.names
    why = "it needs the library rensa, pip install 'resofilter_trainer[checks]'"
    assert f"- near_duplicate: not checked, as {why}." in summary(found)
    with pytest.raises(InputError, match=r"was not made: it needs the library rensa, pip install"):
        found.rows(["near_duplicate"])
    with pytest.raises(InputError, match=r"There is no check to make\. near_duplicate: it needs the library rensa"):
        check_texts(dataset, ["near_duplicate"])
    with pytest.raises(InputError, match="need the library rensa"):
        near_duplicates([("a", "b")])
    assert TextChecks.load(found.save(tmp_path)).left_out == found.left_out


# ---- answers that disagree


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["#### 4", "so it is 4.0", "\\boxed{5} and done"], [2]),
        (["4", "5"], [0, 1]),
        (["Yes.", "no", "yes"], [1]),
        (["Paris", "It is Paris, of course"], []),
        (["In 1990 it was so.\nAnd that is all there is to say", "In 1991.\nNothing more is known"], []),
        (["4", "four"], []),
        (["4"], []),
    ],
)
def test_answers_that_end_otherwise_than_most_are_found(answers, expected):
    assert list(odd_endings(["2 + 2"] * len(answers), answers)) == expected


def test_answers_without_a_prompt_are_not_compared():
    assert odd_endings(["", " "], ["4", "5"]) == {}


# ---- what is written, and what select makes of it


def checked_rows() -> Dataset:
    return as_pairs(rows_with(*FAULTS["exact_duplicate"], *FAULTS["cut"], *FAULTS["endings_differ"], fillers=4))[0]


@pytest.fixture
def checked() -> tuple[TextChecks, ScoreTable]:
    dataset = checked_rows()
    provenance = make_provenance(rows=10, source={"content": hash_rows(dataset)})
    values = [None if row == 9 else float(row) for row in range(10)]
    return check_texts(dataset), make_scores(values, provenance=provenance)


def test_what_is_saved_is_loaded(checked, tmp_path):
    found, _ = checked
    loaded = TextChecks.load(found.save(tmp_path))
    assert loaded.table.equals(found.table)
    assert (loaded.source, loaded.left_out, loaded.counts) == (found.source, found.left_out, found.counts)
    assert (tmp_path / "checks.parquet").exists()


def test_rows_are_dropped_for_what_was_found_before_the_score_decides(checked, tmp_path):
    found, scores = checked
    selection = DataSelector(keep=0.5).select(found.drop(scores))
    assert selection.reason[1:3] == [found.reasons[1], found.reasons[2]]
    rest = [row for row in range(9) if row not in (1, 2)]
    assert selection.sample_ids.tolist() == rest[:4]
    assert found.drop(scores).column("loss")[[1, 2]].tolist() == pytest.approx([np.nan] * 2, nan_ok=True)
    assert found.drop(scores).table.schema.equals(scores.table.schema)
    assert Selection.load(selection.save(tmp_path)).reason == selection.reason


def test_checks_are_chosen_by_name(checked):
    found, scores = checked
    assert found.rows().tolist() == [1, 2]
    expected = "1 exact_duplicate, 1 endings_differ, 1 cut"
    assert repr(found) == f"TextChecks(10 rows: {expected})"
    assert found.rows(["endings_differ"]).tolist() == [4]
    assert np.flatnonzero(~found.drop(scores, ["endings_differ"]).scored).tolist() == [4, 9]
    assert found.drop(scores, []).table.equals(scores.table)
    with pytest.raises(InputError, match=r"'cuts' was not made: there is no such check\. There are: exact_duplicate"):
        found.drop(scores, ["cuts"])


def test_checks_of_other_rows_are_refused(checked):
    found, scores = checked
    other = dataclasses.replace(scores.provenance, source={"content": hash_rows(as_pairs(rows_with())[0])})
    with pytest.raises(InputError, match="of other rows than the scores"):
        found.drop(ScoreTable(scores.table, other))
    first = dataclasses.replace(scores.provenance, source={"content": "0123456789abcdef"})
    with pytest.raises(InputError, match="written by different versions"):
        found.drop(ScoreTable(scores.table, first))
    earlier = dataclasses.replace(scores.provenance, source={"content": hash_rows(checked_rows(), ARROW)})
    assert found.drop(ScoreTable(scores.table, earlier)).table.equals(found.drop(scores).table)
    shuffled = dataclasses.replace(scores.provenance, source={"content": hash_rows(checked_rows().shuffle(1), ARROW)})
    with pytest.raises(InputError, match="of other rows than the scores"):
        found.drop(ScoreTable(scores.table, shuffled))
    with pytest.raises(InputError, match="The checks are of 10 rows and the scores of 3"):
        found.drop(make_scores([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    ("dataset", "options", "named"),
    [
        ({"prompt": ["a"], "completion": ["b"]}, {"checks": ["cuts"]}, "There is no check 'cuts'. There are: exact"),
        (
            {"prompt": ["a"], "completion": ["b"]},
            {"checks": "cut"},
            "checks must be a list of names of checks",
        ),
        ({"prompt": ["a"], "completion": ["b"]}, {"checks": []}, "There is no check to make. Name some, or leave"),
        ({"prompt": ["a"], "completion": ["b"]}, {"promt_column": "a"}, "Did you mean prompt_column=?"),
        ({"prompt": ["a"], "completion": ["b"]}, {"prompt_column": "c", "completion_column": "b"}, "no column 'c'"),
        ({"prompt": [], "completion": []}, {}, "no rows"),
        ({"input_ids": [[1, 2]]}, {}, "The rows are tokens, and checks read texts"),
    ],
)
def test_what_cannot_be_checked_is_refused_in_one_line(dataset, options, named):
    with pytest.raises(InputError) as refused:
        check_texts(Dataset.from_dict(dataset), **options)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_foreign_file_is_refused(checked, tmp_path):
    checked[1].save(tmp_path / "checks.parquet")
    with pytest.raises(InputError):
        TextChecks.load(tmp_path)


def test_every_check_says_what_it_is_and_what_to_do():
    for name, check in CHECKS.items():
        assert name.isidentifier()
        assert check.says[0].islower()
        assert not check.says.endswith(".")
        assert check.remedy.endswith(".")


def test_checks_import_no_torch():
    code = (
        "from datasets import Dataset; from resofilter_trainer import check_texts; import sys; "
        "check_texts(Dataset.from_dict({'prompt': ['a'], 'completion': ['b']})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
