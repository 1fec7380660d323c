"""Errors that a model makes itself: what is continued, which continuations are wrong, and what is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers.tokenizers import make_tokenizer
from helpers.training import arguments
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from resofilter_trainer.config import ColumnMapping, InputError
from resofilter_trainer.data.endings import ending_of
from resofilter_trainer.demo.problems import make_problems
from resofilter_trainer.demo.run import BASE, as_dataset
from resofilter_trainer.evaluation.generate import Written
from resofilter_trainer.probe import self_made
from resofilter_trainer.probe.beginnings import beginnings_of, mean_losses
from resofilter_trainer.probe.examples import Example, examples_of
from resofilter_trainer.probe.faults import Planted
from resofilter_trainer.probe.self_made import ends_otherwise, majority, write

ASKED = {"role": "user", "content": "what is 1 + 2 ?"}
STEPS = "1 + 1 = 2.\n2 + 1 = 3.\n#### 3"


def pair(answer: str, prompt: str = "what is 1 + 2 ?\n", row: int = 0) -> Example:
    return Example(row, {"prompt": prompt, "completion": answer}, prompt, answer, "completion")


def chat(answer: str, row: int = 0) -> Example:
    values = {"messages": [ASKED, {"role": "assistant", "content": answer}]}
    return Example(row, values, "what is 1 + 2 ?", answer, "messages")


# ---- what is continued


def test_a_pair_is_continued_from_three_places(tiny_llama, tokenizer):
    found = beginnings_of(tiny_llama(), tokenizer, pair(STEPS))
    assert {each.stratum: each.prefix for each in found} == {
        "0": "",
        "1/3": "1 + 1 = 2.",
        "2/3": "1 + 1 = 2.\n2 + 1 = 3.",
    }
    assert [each.context for each in found] == ["what is 1 + 2 ?\n" + each.prefix for each in found]
    assert all(each.special and each.ends == () and each.end_text == "" for each in found)
    assert [each.tokens for each in found] == [len(tokenizer(STEPS[len(each.prefix) :]).input_ids) for each in found]
    assert [each.room for each in found] == [256 - len(tokenizer(each.context).input_ids) for each in found]


def test_a_chat_is_continued_where_the_template_has_the_answer(tiny_llama, tokenizer):
    for example in (chat(STEPS), pair(STEPS)):
        for each in beginnings_of(tiny_llama(), tokenizer, example):
            rest = STEPS[len(each.prefix) :]
            if example.messages:
                whole = tokenizer.apply_chat_template(example.messages, tokenize=False)
                assert each.context + rest + "<|end|>" == whole
                assert each.ends == (tokenizer.convert_tokens_to_ids("<|end|>"),)
                assert not each.special


def test_what_ends_an_answer_may_be_text(tiny_llama, tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n--\\n' }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    first = beginnings_of(tiny_llama(), tokenizer, chat(STEPS))[0]
    assert (first.context, first.ends, first.end_text) == ("user: what is 1 + 2 ?\n--\nassistant: ", (), "--")
    assert first.end_of("3.\n--\nuser: x") == 3
    assert first.end_of("3.") is None


def test_what_cannot_be_continued(tiny_llama, tokenizer, monkeypatch):
    plain = Example(0, {"text": STEPS}, "", STEPS, "text")
    assert [each.stratum for each in beginnings_of(tiny_llama(), tokenizer, plain)] == ["1/3", "2/3"]
    assert [each.stratum for each in beginnings_of(tiny_llama(), tokenizer, pair("so 3"))] == ["0"]
    assert beginnings_of(tiny_llama(), tokenizer, pair("1 " * 300)) == []  # longer than the model's positions
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}")
    assert beginnings_of(tiny_llama(), tokenizer, chat(STEPS)) == []
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m['role'] }}{% endfor %}")
    assert beginnings_of(tiny_llama(), tokenizer, chat(STEPS)) == []


@pytest.mark.parametrize(
    ("own", "prefix_share", "text", "kept"),
    [
        ("a = 3\n#### 3", "0", "b = 4\n#### 4\n\nQuestion:", "b = 4\n#### 4"),
        ("a = 3\n#### 3", "0", "b = 4\n#### 4", None),  # the number may go on
        ("a = 3\n#### 3", "0", "b = 4\n\nQuestion:", "b = 4\n"),
        ("a\n\nb = 3", "0", "b = 4\n\nc", None),
        ("It is three", "0", "\n\nIt is four\r\n\r\nWhat", "\n\nIt is four\r\n"),
        (STEPS, "2/3", "\n#### 4\nthen", "\n#### 4"),
        (STEPS, "1/3", "\n2 + 1 = 4", None),
    ],
)
def test_where_a_continuation_ends(tiny_llama, tokenizer, own, prefix_share, text, kept):
    found = {each.stratum: each for each in beginnings_of(tiny_llama(), tokenizer, pair(own))}[prefix_share]
    end = found.end_of(text)
    assert (None if end is None else text[:end]) == kept


# ---- right or wrong


@pytest.mark.parametrize(
    ("own", "answer", "otherwise"),
    [
        ("so 3\n#### 3", "so 3.0\n#### 3.0", False),
        ("so 3\n#### 3", "so 4\n#### 4", True),
        ("so 3\n#### 3", "3 at first. So it is 4.", None),
        ("so 3\n#### 3", "So it is 3.", None),
        ("So it is 3.", "3 at first. So it is 4.", True),
        ("So it is 3.", "It is 3 in 2 ways.", None),
        ("So it is 3.", "2 + 1 = 3. The answer is 3.", False),
        ("so 3\n#### 3", "It ends without any number, as far as can be seen.", None),
        ("The answer is (B).", "As said. The answer is (C).", True),
        ("The answer is (B).", "As said, (B) it is, of all of these that are there.", None),
        ("Paris.", "paris", False),
        ("Paris.", "The capital is Paris, of course.", None),
        ("Paris.", "Rome.", True),
        ("A long text in words alone that has no end.", "Another long text in words alone, without an end.", None),
        ("A long text in words alone that has no end.", " A long text in words alone that has no end.\n", False),
    ],
)
def test_which_answers_end_otherwise(own, answer, otherwise):
    assert ends_otherwise(own, answer) is otherwise


@pytest.mark.parametrize(
    ("answers", "most"),
    [
        (["#### 3", "3.0", "#### 4"], "3"),
        (["#### 3", "#### 4"], None),
        (["#### 3"], None),
        (["#### 3", "#### 3", "long texts without a number at the end", "#### 4"], None),
        ([], None),
    ],
)
def test_the_majority(answers, most):
    assert majority(answers) == most


def test_mean_losses_are_those_of_the_rest_alone(tiny_llama, tokenizer):
    model = tiny_llama(dtype=torch.float64)
    beginnings = beginnings_of(model, tokenizer, pair(STEPS))
    answers = [STEPS, "1 + 1 = 2.\nthe quick fox", STEPS]
    found = mean_losses(model, tokenizer, beginnings, answers)
    for beginning, answer, loss in zip(beginnings, answers, found, strict=True):
        given = len(tokenizer(beginning.context).input_ids)
        ids = torch.tensor(tokenizer(beginning.context + answer[len(beginning.prefix) :]).input_ids)
        assert torch.equal(ids[:given], torch.tensor(tokenizer(beginning.context).input_ids))
        logits = model(ids[None]).logits[0, given - 1 : -1]
        torch.testing.assert_close(loss, F.cross_entropy(logits, ids[given:]).detach(), atol=1e-9, rtol=0)


# ---- a writer that says what it is told


@pytest.fixture
def scripted(monkeypatch):
    """Lets `sample` give answers of a list, in turn, and returns what it was asked for."""

    def start(*answers: str | None) -> list[SimpleNamespace]:
        asked: list[SimpleNamespace] = []

        def say(model, tokenizer, texts: Sequence[str], max_new_tokens: int, **settings) -> list[Written]:
            first = sum(len(each.texts) for each in asked)
            asked.append(SimpleNamespace(texts=list(texts), max_new_tokens=max_new_tokens, **settings))
            said = [answers[(first + number) % len(answers)] for number in range(len(texts))]
            return [Written("cut off" if text is None else text, text is not None) for text in said]

        monkeypatch.setattr(self_made, "sample", say)
        return asked

    return start


def test_wrong_and_right_ones_are_told_apart_in_each_stratum(tiny_llama, tokenizer, scripted):
    asked = scripted("\n#### 3", "\n#### 5", "\n2 + 1 = 3.\n#### 3", None, "x = 3\n#### 3", "y = 4\n#### 4")
    example = pair(STEPS, row=7)
    planted, notes = write(tiny_llama(), tokenizer, [example], 3, seed=0)
    assert planted == [
        Planted("self_made", 7, example.with_answer("1 + 1 = 2.\n2 + 1 = 3.\n#### 5"), "2/3", True),
        Planted("self_made", 7, example.with_answer("y = 4\n#### 4"), "0", True),
        *(Planted("self_made", 7, example.values, stratum, False) for stratum in ("2/3", "1/3")),
        Planted("self_made", 7, example.with_answer("x = 3\n#### 3"), "0", False),
    ]
    assert [len(each.texts) for each in asked] == [2, 2, 2]
    assert [each.max_new_tokens for each in asked] == [
        round(1.5 * each.tokens) + 16 for each in beginnings_of(tiny_llama(), tokenizer, example)[::-1]
    ]
    assert len({each.seed for each in asked}) == 3
    told = " ".join(notes)
    assert "continued the answers of 1 rows" in told
    assert "temperature 0.8 and min_p 0.05: 2 ended wrongly and 3 rightly" in told
    assert "1 continuations did not come to an end" in told
    assert "Fewer were found than the 3 wrong" in told


def test_short_answers_are_continued_first_until_there_are_enough(tiny_llama, tokenizer, scripted):
    asked = scripted("#### 4", "so\n#### 3")
    examples = [pair("so " * length + "\n#### 3", f"{length}?", row) for row, length in enumerate((9, 2, 5, 1, 7))]
    planted, notes = write(tiny_llama(), tokenizer, examples, 2, seed=0, batch_size=4)
    assert asked[-1].texts == ["1?", "1?", "2?", "2?"]
    assert {text[:2] for each in asked for text in each.texts} == {"1?", "2?"}
    assert {each.row for each in planted} <= {1, 3}
    assert Counter(each.faulty for each in planted) == {True: 2, False: 2}
    assert not any("Fewer" in note for note in notes)


def test_answers_without_an_end_are_told_by_a_majority(tiny_llama, tokenizer, scripted):
    scripted("It is 4.", "Well, 4.", "It is 5.")
    example = pair("nothing but words, " * 4)
    planted, notes = write(tiny_llama(), tokenizer, [example], 9, seed=0, samples=3)
    wrong = {each.values["completion"].rsplit(" ", 1)[-1] for each in planted if each.faulty}
    right = {each.values["completion"].rsplit(" ", 1)[-1] for each in planted if not each.faulty}
    assert (wrong, right) == ({"5."}, {"4."})
    assert any("9 were told by the end of most samples of the prompt, 0 are wrong if" in note for note in notes)


def test_without_a_majority_the_models_likelihood_tells(tiny_llama, tokenizer, scripted):
    scripted("the quick brown fox the quick brown", "z@z !! 77 <<", "what is the answer to this question")
    example = pair("nothing but words, and more of them, as it seems")
    model = tiny_llama(dtype=torch.float64)
    planted, notes = write(model, tokenizer, [example], 9, seed=0, samples=1)
    by_stratum = {each.stratum: each for each in beginnings_of(model, tokenizer, example)}
    assert len(planted) == 3
    for each in planted:
        texts = [example.answer, each.values["completion"]]
        own, written = mean_losses(model, tokenizer, [by_stratum[each.stratum]] * 2, texts)
        assert each.faulty == bool(own < written)
    assert any("3 are wrong if the row's own words are more likely to the model" in note for note in notes)


def test_what_cannot_be_told_is_left_out_and_counted(tiny_llama, tokenizer, scripted):
    scripted("The capital is Paris, as everyone knows.", "Rome.")
    planted, notes = write(tiny_llama(), tokenizer, [pair("Paris.")], 3, seed=0)
    assert [(each.values["completion"], each.faulty) for each in planted] == [("Rome.", True)]
    assert "1 continuations have no end that can be compared, and were left out." in notes
    assert "Fewer were found than the 3 wrong and 3 right ones that were asked for." in notes


def test_a_beginning_from_which_all_end_alike_is_given_up(tiny_llama, tokenizer, scripted):
    asked = scripted("#### 4")
    examples = [pair("#### 3", f"{row}?", row) for row in range(60)]
    planted, notes = write(tiny_llama(), tokenizer, examples, 50, seed=0, batch_size=10, samples=1)
    assert len(asked) == 3
    assert planted == []
    assert any("of which nothing is given, 30 wrong and 0 right were found, and left out" in note for note in notes)


def test_no_more_than_asked_for_are_kept(tiny_llama, tokenizer, scripted):
    scripted("#### 3", "#### 4", "#### 5")
    planted, _ = write(tiny_llama(), tokenizer, [pair("#### 3", f"{row}?", row) for row in range(20)], 5, seed=0)
    assert Counter(each.faulty for each in planted) == {True: 5, False: 5}


def test_rows_that_cannot_be_continued_are_counted(tiny_llama, tokenizer):
    planted, notes = write(tiny_llama(), tokenizer, [pair("1 " * 300)] * 2, 3, seed=0)
    assert planted == []
    assert any(note.startswith("2 rows cannot be continued") for note in notes)
    assert write(tiny_llama(), tokenizer, [], 3, seed=0)[0] == []


def test_a_time_that_is_over_is_told(tiny_llama, tokenizer, scripted, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(self_made.time, "monotonic", lambda: float(next(clock)))
    asked = scripted("#### 4")
    _, notes = write(tiny_llama(), tokenizer, [pair(f"so so so so #### {n}") for n in range(64)], 9, seed=0, seconds=11)
    assert len(asked) == 1
    assert asked[0].seconds < 11
    assert any("The time was over (seconds=11)" in note for note in notes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count must be a whole number of at least 1, got 0"),
        ({"seconds": 0}, "seconds must be a finite number above 0"),
        ({"temperature": 0}, "temperature must be a finite number above 0"),
        ({"min_p": 1.5}, "min_p must be a finite number of at least 0 and at most 1"),
        ({"samples": 0}, "samples must be a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    ],
)
def test_settings_out_of_range(tiny_llama, tokenizer, settings, message):
    with pytest.raises(InputError, match=message):
        write(tiny_llama(), tokenizer, [pair(STEPS)], **{"count": 1, "seed": 0, **settings})


# ---- real models


@pytest.fixture(scope="module")
def demo():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), AutoTokenizer.from_pretrained(BASE)


def test_the_demos_base_makes_errors_of_its_own(demo, tmp_path):
    problems = make_problems(40, seed=3)
    rows, examples = examples_of(as_dataset(problems), ColumnMapping(), arguments(tmp_path))
    planted, notes = write(*demo, examples, 10, seed=0, batch_size=16)
    assert Counter(each.faulty for each in planted) == {True: 10, False: 10}
    for each in planted:
        problem = problems[each.row]
        assert each.values["prompt"] == problem.prompt
        assert (ending_of(each.values["completion"]) != str(problem.answer)) == each.faulty
        assert "#### " in each.values["completion"]  # finished
    assert len({each.stratum for each in planted}) > 1
    assert len(Dataset.from_list([each.values for each in planted], features=rows.features)) == 20
    again, told = write(*demo, examples, 10, seed=0, batch_size=16)
    assert (again, told) == (planted, notes)
    assert write(*demo, examples, 10, seed=1, batch_size=16)[0] != planted


def test_a_chat_is_answered_and_ends_with_its_own_token(tiny_llama, tokenizer):
    """A model that has learnt one chat by heart writes the row's own answer."""
    model, example = tiny_llama(), chat("the answer is 3")
    text = tokenizer.apply_chat_template(example.messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(40):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    planted, _ = write(model, tokenizer, [example], 3, seed=0, min_p=0.5)  # equal ones are one
    assert planted == [Planted("self_made", 0, example.values, each, False) for each in ("2/3", "1/3", "0")]


def test_a_model_without_any_skill_and_a_tokenizer_without_a_pad_token(tiny_llama, tmp_path):
    plain = make_tokenizer(eos_token="<eos>")
    planted, notes = write(tiny_llama(), plain, [pair(STEPS)], 3, seed=0)
    assert plain.pad_token is None
    assert len(planted) <= 6
    assert any("Fewer were found" in note for note in notes)
