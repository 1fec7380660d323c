"""Nuggets and SelectIT against the plain sums, one row and one task at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.samples import collate, make_samples
from torch.nn import functional as F

from resofilter_trainer import InputError
from resofilter_trainer.criteria.prompted import ALPHA, RATING_PROMPTS, Nuggets, SelectIT, _after, _without_end
from resofilter_trainer.model.losses import IGNORE


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(dtype=torch.float64)


@pytest.fixture
def samples():
    return make_samples(5, shortest=6)


def answer_loss(model, ids, labels):
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    losses = [-F.log_softmax(logits[i - 1], -1)[labels[i]].item() for i in range(1, len(ids)) if labels[i] != IGNORE]
    return np.mean(losses)


@torch.no_grad()
def test_the_golden_score_is_the_share_of_tasks_that_become_likelier(model, samples):
    anchors = make_samples(4, shortest=6, seed=1)
    expected = []
    for sample in samples:
        better = 0
        for anchor in anchors:
            ids, labels = anchor["input_ids"].tolist(), anchor["labels"].tolist()
            labels[0] = IGNORE
            before = [*sample["input_ids"].tolist(), 7, 8]
            alone, after = (
                answer_loss(model, ids, labels),
                answer_loss(model, before + ids, [IGNORE] * len(before) + labels),
            )
            better += after < alone
        expected.append(better / 4)
    assert len(set(expected)) > 1
    nuggets = Nuggets(anchors, between=[7, 8])
    assert nuggets(model, collate(samples)).tolist() == expected
    assert nuggets(model, collate(samples[:2])).tolist() == expected[:2]


def test_sample_and_task_are_one_text(tiny_llama):
    """Without the end of the one and the beginning of the other."""
    model = tiny_llama()
    model.config.bos_token_id, model.config.eos_token_id = 2, [1, 3]
    ids, labels = torch.tensor([2, 5, 6, 7]), torch.tensor([IGNORE, IGNORE, 6, 7])
    for end in (1, 3):
        assert _without_end(torch.tensor([5, 6, end]), model.config.eos_token_id).tolist() == [5, 6]
    after = _after(torch.tensor([9, 9]), {"input_ids": ids, "labels": labels}, 2)
    assert after["input_ids"].tolist() == [9, 9, 5, 6, 7]
    assert after["labels"].tolist() == [IGNORE, IGNORE, IGNORE, 6, 7]


def test_a_row_too_long_for_the_model_is_refused(tiny_llama):
    long = {"input_ids": torch.full((200,), 5), "labels": torch.full((200,), 5)}
    with pytest.raises(InputError, match="400 tokens and the model 256 positions"):
        Nuggets([long])(tiny_llama(), collate([long]))


def test_another_model_is_asked_anew(tiny_llama, samples):
    nuggets = Nuggets(make_samples(4, seed=1))
    nuggets(tiny_llama(0), collate(samples))
    fresh = Nuggets(make_samples(4, seed=1))(tiny_llama(1), collate(samples))
    assert nuggets(tiny_llama(1), collate(samples)).tolist() == fresh.tolist()


def test_nuggets_needs_tasks():
    with pytest.raises(InputError, match="pass a validation set"):
        Nuggets([])


@torch.no_grad()
def test_selectit_is_its_formula(model, tokenizer, samples):
    expected = []
    for sample in samples:
        learnt = (sample["labels"] != IGNORE).tolist()
        ids = sample["input_ids"].tolist()
        levels = []
        for before, between, after in RATING_PROMPTS:
            prompt = [token for token, is_learnt in zip(ids, learnt, strict=True) if not is_learnt]
            response = [token for token, is_learnt in zip(ids, learnt, strict=True) if is_learnt]
            pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, between, after)]
            row = pieces[0] + prompt + pieces[1] + response + pieces[2]
            logits = model(input_ids=torch.tensor([row])).logits[0, -1]
            p = torch.softmax(torch.stack([logits[tokenizer.convert_tokens_to_ids(k)] for k in "12345"]), -1).numpy()
            k = int(p.argmax())
            levels.append((k + 1) * sum(abs(p[k] - each) for each in p) / 4)
        expected.append(np.mean(levels) / (1 + ALPHA * np.std(levels)))
    np.testing.assert_allclose(SelectIT(tokenizer)(model, collate(samples)), expected, rtol=1e-6)


def test_a_tokenizer_without_the_numbers_is_refused(model, samples):
    class Wordy:
        unk_token_id = 0

        def convert_tokens_to_ids(self, token):
            return 0

    with pytest.raises(InputError, match="no token for '1'"):
        SelectIT(Wordy())(model, collate(samples))
