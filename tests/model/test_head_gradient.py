"""The norm of the gradient of the head's weight is autograd's, for every way to compute it."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from helpers.families import tiny
from helpers.samples import collate, make_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from resofilter_trainer import InputError, Recorder, ResonanceConfig
from resofilter_trainer.model import head, head_gradient, token_statistics
from resofilter_trainer.model.head import Decoded, linear_losses
from resofilter_trainer.model.token_statistics import HEAD_GRADIENT, TokenStatistics

FORMS = {"plain": lambda own: own, "capped": lambda own: 3 * torch.tanh(own / 3), "scaled": lambda own: own / 4}


def plain_norms(linear: nn.Linear, hidden: Tensor, targets: Tensor, counts: list[int], form) -> Tensor:
    """By autograd, row after row; 0 for a row without a token."""
    norms, weight = [], linear.weight.detach().clone().requires_grad_()
    for own, y in zip(hidden.split(counts), targets.split(counts), strict=True):
        logits = form(nn.functional.linear(own, weight, linear.bias))
        loss = nn.functional.cross_entropy(logits, y) if len(y) else logits.sum()
        norms.append(torch.autograd.grad(loss, weight)[0].norm().double())
    return torch.stack(norms)


def found_norms(linear: nn.Linear, hidden: Tensor, targets: Tensor, counts: list[int], form="plain") -> Tensor:
    """As a recorder finds them."""
    statistics, f = TokenStatistics([HEAD_GRADIENT], counts), FORMS[form]
    its_head = (linear, None) if form == "plain" else (lambda own: f(linear(own)), linear)
    decoded = Decoded(hidden, targets, its_head[0], linear.out_features, its_head[1])
    decoded.losses_and_gradient(torch.ones(len(hidden), dtype=hidden.dtype), statistics)
    return statistics.of(HEAD_GRADIENT)


@pytest.mark.parametrize("second_run", [0, 2, 1000])  # all rows, long rows, none
@pytest.mark.parametrize("form", FORMS)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(2, 30), st.integers(1, 40), st.booleans(),
    st.integers(0, 1000), st.floats(0.01, 10),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_way_gives_the_gradient_of_autograd(form, second_run, counts, vocabulary, width, bias, seed, scale):
    torch.manual_seed(seed)
    linear = nn.Linear(4, vocabulary, bias=bias, dtype=torch.float64)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, std=scale)
    hidden = torch.randn(sum(counts), 4, dtype=torch.float64)
    targets = torch.randint(min(vocabulary, 3), (sum(counts),))  # few, so that some are equal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_statistics, "SECOND_RUN", second_run)
        patch.setattr(head, "SMALLEST_TILE", 1)
        patch.setattr(head_gradient, "BLOCK_ENTRIES", 3 * width)  # a few tokens of a row at a time
        patch.setitem(head.TILE_LOGITS, "cpu", width * len(hidden))
        found = found_norms(linear, hidden, targets, counts, form)
    truth = plain_norms(linear, hidden, targets, counts, FORMS[form])
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("second_run", [0, 2])
@pytest.mark.parametrize("width", [1, 5, 100])
@pytest.mark.parametrize("margin", [1.0, 20.0, 40.0, 80.0])
def test_a_row_of_all_but_certain_tokens_has_all_its_digits(margin, width, second_run, monkeypatch):
    """1 - p is below float32's spacing near 1 from a margin of 17 on; e^-2m underflows at 52."""
    monkeypatch.setattr(head, "SMALLEST_TILE", 1)
    monkeypatch.setitem(head.TILE_LOGITS, "cpu", width * 3)
    monkeypatch.setattr(token_statistics, "SECOND_RUN", second_run)
    linear = nn.Linear(3, 12, bias=False)
    with torch.no_grad():
        linear.weight.fill_(-margin)
        linear.weight[[0, 1, 2], [0, 1, 2]] = 0
    hidden, targets = torch.eye(3), torch.arange(3)
    r = 11 * math.exp(-margin)
    rest = r / (1 + r)  # of each token; the gradients of tokens whose inputs are orthogonal do not mix
    truth = math.sqrt(3 * rest**2 * (1 + 1 / 11)) / 3
    assert found_norms(linear, hidden, targets, [3]).item() == pytest.approx(truth, rel=1e-5)


def test_a_bfloat16_forward_brings_its_rounding_and_no_more():
    torch.manual_seed(0)
    linear, hidden, targets, counts = nn.Linear(32, 700), torch.randn(50, 32), torch.randint(700, (50,)), [20, 30]
    truth = plain_norms(linear, hidden, targets, counts, FORMS["plain"])
    for second_run in (0, 2):
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
            patch.setattr(token_statistics, "SECOND_RUN", second_run)
            found = found_norms(linear, hidden, targets, counts)
        torch.testing.assert_close(found, truth, rtol=0.02, atol=0)


def test_tokens_that_a_bias_masks_out_have_no_part_in_it():
    torch.manual_seed(0)
    linear, hidden, targets = nn.Linear(6, 10), torch.randn(8, 6), torch.arange(8) % 5
    linear.bias.data[[6, 7, 8, 9]] = -torch.inf
    shorter = nn.Linear(6, 6)
    shorter.weight.data, shorter.bias.data = linear.weight.data[:6], linear.bias.data[:6]
    truth = plain_norms(shorter, hidden, targets, [3, 5], FORMS["plain"])
    torch.testing.assert_close(found_norms(linear, hidden, targets, [3, 5]), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", [1, 5])  # by the products of tokens, by the gradient
def test_a_row_of_certain_tokens_has_none(count, monkeypatch):
    monkeypatch.setattr(token_statistics, "SECOND_RUN", 0)
    linear = nn.Linear(1, 5, bias=False)
    linear.weight.data = torch.tensor([[0.0], [-300], [-300], [-300], [-300]])
    assert found_norms(linear, torch.ones(count, 1), torch.zeros(count).long(), [count]).tolist() == [0]


def test_losses_and_their_gradient_are_the_same_to_the_last_bit():
    torch.manual_seed(0)
    linear, hidden, targets, weights = nn.Linear(8, 90), torch.randn(9, 8), torch.arange(9), torch.rand(9)
    with_it = linear_losses(hidden, linear, targets, weights, 90, TokenStatistics([HEAD_GRADIENT], [4, 5]))
    without = linear_losses(hidden, linear, targets, weights, 90)
    assert all(torch.equal(one, other) for one, other in zip(with_it, without, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_float32_model_is_close_and_logits_are_never_all_in_memory(family, monkeypatch):
    model, samples = tiny(family), make_samples(6, longest=40)
    monkeypatch.setattr(head, "SMALLEST_TILE", 1)
    monkeypatch.setitem(head.TILE_LOGITS, "cpu", 2000)
    monkeypatch.setattr(head, "PIECE_LOGITS", 2000)
    seen, real = [], torch.Tensor.exp
    monkeypatch.setattr(torch.Tensor, "exp", lambda own: seen.append(own.numel()) or real(own))
    with Recorder(model, ResonanceConfig(), "grand_head") as record:
        batch = collate(samples)
        found = record(batch).signals["grand_head"]
    learnt = int((batch["labels"][:, 1:] != -100).sum())
    assert seen
    assert max(seen) <= 2000 < learnt * model.config.vocab_size
    with Recorder(model.double(), ResonanceConfig(), "grand_head") as record:
        np.testing.assert_allclose(found, record(batch).signals["grand_head"], rtol=1e-4)


# ---- models that cannot give it


def without_a_linear_head(kind: str) -> nn.Module:
    """A model whose head is an adapter's, or normalises over the vocabulary."""
    model = tiny("llama")
    if kind == "adapter":
        return get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    real = model.forward

    @functools.wraps(real)
    def forward(*args, **kwargs):
        found = real(*args, **kwargs)
        found.logits = 2 * found.logits.log_softmax(-1)
        return found

    model.forward = forward
    return model


@pytest.mark.parametrize("kind", ["adapter", "normalised"])
def test_a_head_that_is_not_one_linear_map_is_named_and_left_out_of_all(kind):
    model, batch = without_a_linear_head(kind), collate(make_samples(3))
    message = (
        r"The signal 'grand_head' cannot be measured: its logits (do not come|are not) .*\. Leave it out of signals\.$"
    )
    with pytest.raises(InputError, match=message), Recorder(model, ResonanceConfig(), ["rank", "grand_head"]):
        pass
    with Recorder(model, ResonanceConfig(), "all") as record:
        assert [*record.left_out] == ["grand_head"]
        found = record(batch)
    assert "grand_head" not in record.signals
    assert [*found.signals] == [*record.signals]
    assert np.isfinite(found.signals["embedding_chain"]).all()
