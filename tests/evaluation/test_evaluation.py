"""The final answer of a text, the metric on it, and answers in the order of the prompts."""

from __future__ import annotations

from decimal import Decimal

import evaluate
import pytest
import torch
from transformers import LlamaForCausalLM

from resofilter_trainer.evaluation.generate import FINAL_ANSWER, Written, exact_match, generate, sample
from resofilter_trainer.evaluation.metrics.final_answer import final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234,567", "1234567"),
        ("#### 2.50", "2.5"),
        ("#### .5", "0.5"),
        ("#### -12", "-12"),
        ("#### $18", "18"),
        ("####72", "72"),
        ("#### 72.", "72"),
        ("#### 5 apples", "5"),
        ("The answer is: 72", "72"),
        ("The answer is 72", "72"),
        ("so the answer is: $1,000.", "1000"),
        ("#### 3\nno, wait\n#### 4", "4"),
        ("The answer is 3. #### 4", "4"),
        ("#### 007", "7"),
    ],
)
def test_final_answer_is_the_last_marked_number(text, answer):
    assert final_answer(text) == Decimal(answer)


@pytest.mark.parametrize("text", ["", "72", "#### none", "####", "#### ,", "# 72", "The answer is unknown", "is: 72"])
def test_no_final_answer(text):
    assert final_answer(text) is None


@pytest.mark.parametrize("text", ["#### -$5", "#### $-5"])
def test_a_debt_is_negative_on_either_side_of_the_sign(text):
    assert final_answer(text) == -5


# ---- the metric


@pytest.fixture(scope="module")
def metric() -> evaluate.Metric:
    return evaluate.load(str(FINAL_ANSWER))


def test_metric_counts_equal_numbers(metric):
    references = ["#### 1,000", "#### 2", "The answer is: 3", "#### 4"]
    predictions = ["The answer is 1000.0", "#### 3", "3", "so #### 4\nand then something"]
    assert metric.compute(predictions=predictions, references=references) == {"exact_match": 0.5}


def test_a_reference_without_answer_is_an_error(metric):
    with pytest.raises(ValueError, match="Reference 1 has no final answer"):
        metric.compute(predictions=["#### 1", "#### 2"], references=["#### 1", "2"])


# ---- answers of a model

PROMPTS = ["what is 1 + 2 ?", "q", "the quick brown fox: what is 1 + 2 ? question", "fox", "is answer what", "1 2"]


def alone(model: LlamaForCausalLM, tokenizer, prompt: str, length: int) -> str:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in range(length):
        following = model(ids).logits[0, -1].argmax()
        if following == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, following.view(1, 1)], dim=1)
    return tokenizer.decode(ids[0, len(tokenizer(prompt).input_ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_answers_are_each_prompts_own_in_the_prompts_order(tiny_llama, tokenizer, batch_size):
    """Prompts of different lengths in padded batches, against a plain loop over one prompt."""
    model = tiny_llama(dtype=torch.float64)
    expected = [alone(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)  # otherwise the order would not show

    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size) == expected


@pytest.mark.parametrize("at_first", [1, 3, 6])
def test_long_answers_that_are_put_together_are_those_of_each_prompt_alone(
    tiny_llama, tokenizer, monkeypatch, at_first
):
    """Some prompts are taught to end early, so only some of a batch are continued."""
    monkeypatch.setattr("resofilter_trainer.evaluation.generate.AT_FIRST", at_first)
    short = PROMPTS[1:4]
    model = taught(tiny_llama(dtype=torch.float64), tokenizer, short, [" fox<eos>"] * len(short))
    expected = [alone(model, tokenizer, prompt, 9) for prompt in PROMPTS]
    assert len({len(tokenizer(text).input_ids) for text in expected}) > 1

    assert generate(model, tokenizer, PROMPTS, max_new_tokens=9, batch_size=2) == expected


def test_messages_are_answered_through_the_chat_template(tiny_llama, tokenizer):
    model = tiny_llama(dtype=torch.float64)
    talk = [{"role": "user", "content": "what is 1 + 2 ?"}]
    written = generate(model, tokenizer, [talk], max_new_tokens=6, batch_size=1)
    assert written == [alone(model, tokenizer, "<|user|>what is 1 + 2 ?<|end|><|assistant|>", 6)]


def test_generating_leaves_the_model_as_it_was(tiny_llama, tokenizer):
    model = tiny_llama().train()
    generate(model, tokenizer, PROMPTS[:1], max_new_tokens=1, batch_size=1)
    assert all(module.training for module in model.modules())


def test_exact_match_of_a_model_that_knows_two_answers_of_three(tiny_llama, tokenizer):
    prompts, answers = ["what is 1 + 2 ?", "fox", "the quick answer"], [" #### 3<eos>", " #### 4<eos>", " #### 5<eos>"]
    model = taught(tiny_llama(), tokenizer, prompts, answers)
    references = ["1 + 2 = 3\n#### 3", "#### 4", "#### 6"]
    assert exact_match(model, tokenizer, prompts, references, 8, batch_size=2) == pytest.approx(2 / 3)


def taught(model: LlamaForCausalLM, tokenizer, prompts: list[str], answers: list[str]) -> LlamaForCausalLM:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    rows = [
        tokenizer(prompt + answer, return_tensors="pt").input_ids
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    for _ in range(60):
        sum(model(ids, labels=ids).loss for ids in rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# ---- random continuations


def test_a_sample_of_near_certainty_is_the_greedy_answer(tiny_llama, tokenizer):
    """Whatever the padding: at a temperature near 0, the likeliest token is drawn."""
    model = tiny_llama(dtype=torch.float64)
    settings = {"special": True, "seed": 0, "temperature": 1e-6}
    written = sample(model, tokenizer, PROMPTS, 6, **settings)
    assert [each.text for each in written] == [alone(model, tokenizer, prompt, 6) for prompt in PROMPTS]


def test_a_sample_is_repeated_by_its_seed_and_leaves_the_random_state(tiny_llama, tokenizer):
    model = tiny_llama().train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (sample(model, tokenizer, PROMPTS, 6, special=True, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())


def test_what_ends_a_sample(tiny_llama, tokenizer):
    model = taught(tiny_llama(), tokenizer, ["fox"], [" is 4 answer<|end|> 5 <eos>"])
    settings = {"special": True, "seed": 0, "temperature": 0.01}
    (whole,) = sample(model, tokenizer, ["fox"], 40, **settings)
    assert whole == Written(" is 4 answer 5 ", finished=True)  # special tokens are no text
    (ended,) = sample(model, tokenizer, ["fox"], 40, ends=[tokenizer.convert_tokens_to_ids("<|end|>")], **settings)
    assert ended == Written(" is 4 answer", finished=True)
    (limited,) = sample(model, tokenizer, ["fox"], 2, **settings)
    assert not limited.finished
    assert whole.text.startswith(limited.text)
    (told,) = sample(model, tokenizer, ["fox"], 40, ended=lambda row, text: "4" in text, **settings)
    assert told == Written(" is 4", finished=True)
    (late,) = sample(model, tokenizer, ["fox"], 40, seconds=1e-9, **settings)
    assert not late.finished


def test_unlikely_tokens_are_not_drawn(tiny_llama, tokenizer):
    model = tiny_llama(dtype=torch.float64)
    greedy = [alone(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    assert [each.text for each in sample(model, tokenizer, PROMPTS, 6, special=True, seed=0, min_p=1.0)] == greedy
    assert [each.text for each in sample(model, tokenizer, PROMPTS, 6, special=True, seed=0)] != greedy
