"""The question after a row: what it looks like with and without a chat template, and which tokens answer it."""

from __future__ import annotations

import pytest
from helpers.tokenizers import CHAT_TEMPLATE, make_tokenizer
from transformers import PreTrainedTokenizerFast

from resofilter_trainer import InputError
from resofilter_trainer.criteria.verdict import Question

ASKED = "Is this answer right? Answer Yes or No."
CHATML = (  # drops what an earlier turn thought, and ends every turn with a line break
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif"
    " %}{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
    "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = make_tokenizer()
    made.add_tokens(["Yes", " Yes", "No", " no"])
    return made


def asked(question: Question, tokenizer, text: str, learnt: int) -> str:
    """The text that a row becomes, whose last tokens are learnt, without the token that stands for the verdict."""
    ids = tokenizer(text)["input_ids"]
    found, labels = question(ids, [-100] * (len(ids) - learnt) + ids[-learnt:])
    assert labels == [-100] * (len(found) - 1) + found[-1:]
    assert found[-1] == question.yes[0]
    return tokenizer.decode(found[:-1])


def test_plain_text_is_asked_in_plain_text(tokenizer):
    question = Question.of(tokenizer, {tokenizer.eos_token_id})
    for end in ("<eos>", ""):
        assert asked(question, tokenizer, f"what is 1 ? 3{end}", 1 + bool(end)) == f"what is 1 ? 3\n{ASKED}\nAnswer:"
    assert [tokenizer.decode([each]) for each in question.no] == ["No", " no"]
    assert [tokenizer.decode([each]) for each in question.yes] == [" Yes", "Yes"]


def test_a_chat_has_a_turn_of_the_user_with_the_question(tokenizer):
    question = Question.of(tokenizer, {tokenizer.eos_token_id}, CHAT_TEMPLATE)
    said = "<|user|>what is 1 ?<|end|><|assistant|>3"
    expected = f"{said}<|end|><|user|>{ASKED}<|end|><|assistant|>"
    for end, learnt in (("<|end|>", 2), ("", 1), ("<|end|><eos>", 3)):
        text = said + end
        assert asked(question, tokenizer, text, learnt) == (
            expected if end != "<|end|><eos>" else f"{said}<|end|>{expected.removeprefix(said)}"
        )


def test_the_model_answers_at_once_where_its_template_lets_it_think(tokenizer):
    question = Question.of(tokenizer, {tokenizer.eos_token_id}, CHATML)
    said = "<|user|>\nwhat is 1 ?<|end|>\n<|assistant|>\n<think></think>3"
    expected = f"{said}<|end|>\n<|user|>\n{ASKED}<|end|>\n<|assistant|>\n<think></think>"
    for end, learnt in (("<|end|>\n", 3), ("<|end|>", 2), ("", 1)):  # the line break is learnt, too, or not
        assert asked(question, tokenizer, said + end, learnt) == expected


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0]['content'] }}", None, "{% oops"])
def test_a_template_that_cannot_ask_gives_a_plain_question(template, tokenizer):
    question = Question.of(tokenizer, {tokenizer.eos_token_id}, template)
    assert asked(question, tokenizer, "what is 1 ? 3<eos>", 2) == f"what is 1 ? 3\n{ASKED}\nAnswer:"


def test_a_tokenizer_without_the_words_is_refused():
    made = make_tokenizer()
    with pytest.raises(InputError, match="the tokenizer has no token for the answer 'No'"):
        Question.of(made, ())
    made.add_tokens(["No"])
    with pytest.raises(InputError, match="the tokenizer has no token for the answer 'Yes'"):
        Question.of(made, ())
