"""The losses from the decoder's output are those from all logits at once, for any tiles and any model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.families import FAMILIES, tiny
from helpers.samples import Sample, collate, make_samples, plain_losses, state_of, watch_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from resofilter_trainer.model import head
from resofilter_trainer.model.head import (
    PROBE,
    Decoded,
    find_way,
    is_causal,
    linear_losses,
    losses_in_pieces,
    to_head,
    to_logits,
)
from resofilter_trainer.model.losses import inputs_of, token_losses
from resofilter_trainer.model.modes import own_precision

VOCAB, WIDTH = 128, 6
CAPPED = {"cohere", "cohere2", "gemma2", "nanochat", "recurrent_gemma", "vaultgemma", "xlstm", "gemma3n_text"}
CAPPED |= {"cohere2_moe", "beam", "inkling2_text"}  # something comes after the head: a cap, a scale


def random_head(vocabulary: int, bias: bool = True, dtype: torch.dtype = torch.float64, scale: float = 1) -> nn.Linear:
    linear = nn.Linear(WIDTH, vocabulary, bias=bias, dtype=torch.float64)
    for parameter in linear.parameters():
        nn.init.normal_(parameter, std=scale)
    return linear.to(dtype)


def by_autograd(hidden: Tensor, linear: nn.Module, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """All logits at once, in float64."""
    hidden, linear = hidden.detach().double().requires_grad_(), linear.double()
    losses = F.cross_entropy(linear(hidden), targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses @ weights.double(), hidden)[0]


def in_tiles(hidden: Tensor, linear: nn.Linear, targets: Tensor, weights: Tensor | None, width: int):
    """With tiles of `width` tokens of the vocabulary, at least SMALLEST_TILE."""
    return linear_losses(hidden, linear, targets, weights, width * len(hidden))


def losses_of(model: nn.Module, batch: Sample) -> Tensor:
    """A batch as the pass over a dataset measures it."""
    with torch.no_grad():
        return find_way(model, batch["input_ids"][:1, :PROBE])(model, inputs_of(model, batch, causal=False)).losses()


@pytest.fixture
def narrow_tiles(monkeypatch) -> None:
    monkeypatch.setattr(head, "SMALLEST_TILE", 1)


@pytest.fixture
def few_logits(monkeypatch, narrow_tiles) -> None:
    """Five positions and a vocabulary, with a little unused memory."""
    monkeypatch.setitem(head.TILE_LOGITS, "cpu", VOCAB * 5 + 7)
    monkeypatch.setattr(head, "PIECE_LOGITS", VOCAB * 5 + 7)


# ---- behind a linear map


@given(
    st.integers(1, 7), st.integers(1, 40), st.integers(1, 50), st.booleans(), st.integers(0, 1000), st.floats(0.01, 30)
)
@settings(max_examples=200, deadline=None)
def test_tiles_give_what_all_logits_give(rows, vocabulary, width, bias, seed, scale):
    torch.manual_seed(seed)
    linear, hidden = random_head(vocabulary, bias, scale=scale), torch.randn(rows, WIDTH, dtype=torch.float64)
    targets, weights = torch.randint(vocabulary, (rows,)), torch.randn(rows, dtype=torch.float64)
    smallest, head.SMALLEST_TILE = head.SMALLEST_TILE, 1
    try:
        losses, gradient = in_tiles(hidden, linear, targets, weights, width)
        alone, nothing = in_tiles(hidden, linear, targets, None, width)
    finally:
        head.SMALLEST_TILE = smallest
    true_losses, true_gradient = by_autograd(hidden, linear, targets, weights)
    size = 1 + float((hidden.abs().sum(1).max() + 1) * scale)  # of a logit; what cancels leaves its rounding
    torch.testing.assert_close(losses, true_losses, rtol=1e-12, atol=1e-14 * size)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-12, atol=1e-13 * size * scale)
    assert torch.equal(alone, losses)
    assert nothing.numel() == 0


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_pieces_give_what_all_logits_give(rows, size, seed):
    torch.manual_seed(seed)
    linear, hidden = random_head(20), torch.randn(rows, WIDTH, dtype=torch.float64)
    capped = nn.Sequential(linear, nn.Tanh())
    targets, weights = torch.randint(20, (rows,)), torch.randn(rows, dtype=torch.float64)
    losses, gradient = losses_in_pieces(hidden, capped, targets, weights, size)
    true_losses, true_gradient = by_autograd(hidden, capped, targets, weights)
    torch.testing.assert_close(losses, true_losses, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-12, atol=1e-14)
    alone, nothing = losses_in_pieces(hidden, capped, targets, None, size)
    torch.testing.assert_close(alone, losses, rtol=1e-15, atol=0)
    assert nothing.numel() == 0
    assert not hidden.requires_grad


@pytest.mark.parametrize("width", [7, 10, 30])
@pytest.mark.parametrize("target", [0, 6, 7, 20, 28, 29])
def test_a_target_may_be_in_any_tile(target, width, narrow_tiles):
    torch.manual_seed(0)
    linear, hidden, weights = random_head(30), torch.randn(3, WIDTH, dtype=torch.float64), torch.rand(3).double()
    targets = torch.full((3,), target)
    found, truth = in_tiles(hidden, linear, targets, weights, width), by_autograd(hidden, linear, targets, weights)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_other_precisions_bring_their_rounding_and_no_more(dtype, tolerance, bias, narrow_tiles):
    torch.manual_seed(0)
    linear, hidden = random_head(50, bias, dtype), torch.randn(40, WIDTH).to(dtype)
    targets, weights = torch.randint(50, (40,)), torch.rand(40)
    losses, gradient = in_tiles(hidden, linear, targets, weights, 12)
    assert (losses.dtype, gradient.dtype) == (torch.float32, torch.float32)
    true_losses, true_gradient = by_autograd(hidden, linear, targets, weights)
    assert (losses - true_losses).norm() < tolerance * true_losses.norm()
    assert (gradient - true_gradient).norm() < tolerance * true_gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_an_all_but_certain_token_is_no_difference_of_large_numbers(dtype, narrow_tiles):
    torch.manual_seed(0)
    linear, hidden = random_head(50, bias=False, dtype=dtype), (6 * torch.randn(40, WIDTH)).to(dtype)
    targets = linear(hidden).argmax(1)
    _, gradient = in_tiles(hidden, linear, targets, torch.ones(40), 12)
    true_losses, true_gradient = by_autograd(hidden, linear, targets, torch.ones(40))
    sure = true_losses < 0.02
    assert sure.sum() > 10
    errors = (gradient - true_gradient).norm(dim=1) / true_gradient.norm(dim=1)
    assert errors[sure].max() < (1e-3 if dtype == torch.float32 else 0.3)  # the roundings of logits, no more


def test_an_autocast_decides_the_precision_of_the_products(narrow_tiles):
    torch.manual_seed(0)
    linear, hidden = random_head(50, dtype=torch.float32), torch.randn(40, WIDTH)
    targets, weights = torch.randint(50, (40,)), torch.rand(40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = in_tiles(hidden, linear, targets, weights, 12)
    rounded = random_head(50, dtype=torch.bfloat16)
    rounded.load_state_dict(linear.state_dict())
    truth = in_tiles(hidden.bfloat16(), rounded, targets, weights, 12)
    torch.testing.assert_close(found, truth, rtol=0.01, atol=0.01)
    assert not torch.equal(found[0], in_tiles(hidden, linear, targets, weights, 12)[0])
    assert linear.weight.dtype == torch.float32


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("width", [3, 10])
def test_huge_logits_do_not_overflow(width, sign, narrow_tiles):
    torch.manual_seed(0)
    linear, hidden = random_head(10, dtype=torch.float32), sign * torch.randn(8, WIDTH) * 1e4
    targets, weights = torch.arange(8), torch.ones(8)
    losses, gradient = in_tiles(hidden, linear, targets, weights, width)
    true_losses, true_gradient = by_autograd(hidden, linear, targets, weights)
    assert true_losses.max() > 1e4
    torch.testing.assert_close(losses, true_losses.float(), rtol=1e-5, atol=0.02)
    torch.testing.assert_close(gradient, true_gradient.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_row_there_is_nothing(dtype, weighted):
    hidden, targets = torch.zeros(0, WIDTH, dtype=dtype), torch.zeros(0, dtype=torch.long)
    linear, weights = random_head(20, dtype=dtype), torch.zeros(0) if weighted else None
    for losses, gradient in (
        linear_losses(hidden, linear, targets, weights, 100),
        losses_in_pieces(hidden, linear, targets, weights, 5),
    ):
        assert (losses.shape, losses.dtype) == ((0,), torch.float32)
        assert gradient.numel() == 0


def test_the_gradient_is_in_the_precision_of_the_decoder():
    linear, hidden = random_head(20, dtype=torch.bfloat16), torch.randn(4, WIDTH).bfloat16()
    for its_head in (linear, partial(linear.forward)):
        decoded = Decoded(hidden, torch.arange(4), its_head, 20)
        losses, gradient = decoded.losses_and_gradient(torch.ones(4).double())
        assert (losses.dtype, gradient.dtype, gradient.shape) == (torch.float32, torch.bfloat16, hidden.shape)
        torch.testing.assert_close(decoded.losses(), losses)


# ---- of any model


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_give_what_the_whole_gives(family, few_logits):
    model = tiny(family)
    batch = collate(make_samples(3, VOCAB), "left" if family == "cpmant" else "right")
    with torch.no_grad():
        whole = token_losses(model, batch)
    before = state_of(model)  # big_bird changes its attention in its first forward
    pieces = losses_of(model, batch)
    assert len(pieces) == int((batch["labels"][:, 1:] != -100).sum()) > 5
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)
    assert (find_way(model, batch["input_ids"][:1]) is to_head) == (family not in CAPPED)
    assert state_of(model) == before


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "cohere", "granite", "bart", "mixtral"])
def test_no_more_logits_are_held_than_asked(family, few_logits, monkeypatch):
    model, batch = tiny(family), collate(make_samples(4, VOCAB))
    way = find_way(model, batch["input_ids"][:1])
    learnt = int((batch["labels"][:, 1:] != -100).sum())
    sizes = watch_logits(monkeypatch)
    with torch.no_grad():
        way(model, inputs_of(model, batch, causal=False)).losses()
    assert max(sizes) == (VOCAB * 5 if family in CAPPED else (VOCAB * 5 + 7) // learnt * learnt)
    assert sum(sizes) == VOCAB * learnt


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_head_too_large_for_the_budget_still_gives_the_least_at_a_time(family, narrow_tiles, monkeypatch):
    model, batch = tiny(family), collate(make_samples(2, VOCAB))
    truth = token_losses(model, batch).detach()
    monkeypatch.setitem(head.TILE_LOGITS, "cpu", 1)
    monkeypatch.setattr(head, "PIECE_LOGITS", 1)
    sizes = watch_logits(monkeypatch)
    torch.testing.assert_close(losses_of(model, batch), truth, rtol=0, atol=1e-5)
    assert max(sizes) == (VOCAB if family in CAPPED else len(truth))  # of a position, of a token of the vocabulary


def test_a_tile_is_wide_enough_to_be_fast(monkeypatch):
    sizes = watch_logits(monkeypatch)
    torch.manual_seed(0)
    linear, hidden = random_head(1200, dtype=torch.float32), torch.randn(9, WIDTH)
    linear_losses(hidden, linear, torch.arange(9), None, 1)
    assert sizes == [9 * 512, 9 * 512, 9 * 176]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_decoder_runs_once_however_many_pieces(family, few_logits):
    model, calls, batch = tiny(family), [], collate(make_samples(4, VOCAB))
    way = find_way(model, batch["input_ids"][:1])
    model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        way(model, inputs_of(model, batch, causal=False)).losses()
    assert len(calls) == 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gpt2", "opt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_pieces_are_what_each_sample_loses_alone(family, side, few_logits):
    model, samples = tiny(family), make_samples(5, VOCAB)
    torch.testing.assert_close(
        losses_of(model, collate(samples, side)), plain_losses(model, samples), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_gradient_is_that_of_the_whole(family, side, causal, few_logits):
    model, batch = tiny(family, tie_word_embeddings=False).double(), collate(make_samples(4, VOCAB), side)
    weights = torch.rand(int((batch["labels"][:, 1:] != -100).sum()), dtype=torch.float64)
    embedding = model.get_input_embeddings().weight
    with own_precision(model):
        truth = torch.autograd.grad(token_losses(model, batch) @ weights, embedding)[0]
        decoded = find_way(model, batch["input_ids"][:1])(model, inputs_of(model, batch, causal))
        losses, gradient = decoded.losses_and_gradient(weights)
        found = torch.autograd.grad(decoded.hidden, embedding, gradient)[0]
        torch.testing.assert_close(losses, token_losses(model, batch).detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12 * float(truth.abs().max()))


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True")  # which PEFT 0.18 says of untied ones, too
@pytest.mark.parametrize("wrapped", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_pieces_of_a_model_with_an_adapter(wrapped, few_logits):
    lora = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **wrapped})
    model = get_peft_model(tiny("llama"), lora).eval()
    before, samples = state_of(model), make_samples(4, VOCAB)
    found = losses_of(model, collate(samples))
    torch.testing.assert_close(found, plain_losses(model, samples), rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert (found - plain_losses(model, samples)).abs().max() > 1e-3
    assert state_of(model) == before


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_forward_of_the_users_own_is_put_back(family, few_logits):
    model, batch = tiny(family), collate(make_samples(3, VOCAB))
    truth = token_losses(model, batch).detach()
    places = [model.model, model.lm_head]
    for place in places:
        place.forward = partial(place.forward)
    wrapped = [place.forward for place in places]
    torch.testing.assert_close(losses_of(model, batch), truth, rtol=0, atol=1e-5)
    assert all(place.forward is own for place, own in zip(places, wrapped, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_nothing_is_left_behind_by_a_failure(family, few_logits):
    model, batch = tiny(family), collate(make_samples(3, VOCAB))
    way = find_way(model, batch["input_ids"][:1])
    broken = False

    def fail(*args) -> None:
        if broken:
            raise RuntimeError("no")

    model.lm_head.register_forward_hook(fail)
    model.model.layers[1].register_forward_hook(fail)
    before, broken = state_of(model), True
    with pytest.raises(RuntimeError, match="no"):
        way(model, inputs_of(model, batch, causal=True)).losses()
    with pytest.raises(RuntimeError, match="no"):
        find_way(model, batch["input_ids"])
    assert state_of(model) == before


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_without_a_learnt_token_there_are_no_losses(family, few_logits):
    batch = collate(make_samples(3, VOCAB))
    batch["labels"][:] = -100
    assert losses_of(tiny(family), batch).shape == (0,)


# ---- how a model is run


@pytest.mark.parametrize(
    ("family", "overrides", "way"),
    [
        ("llama", {}, "to_head"),
        ("llama", {"tie_word_embeddings": True}, "to_head"),
        ("granite", {"logits_scaling": 1.0}, "to_head"),
        ("granite", {"logits_scaling": 8.0}, "to_body"),
        ("gemma2", {}, "to_body"),
        ("cohere", {"logit_scale": 0.5}, "to_body"),
    ],
)
def test_what_comes_after_the_head_decides_the_way(family, overrides, way):
    model, samples = tiny(family, **overrides), make_samples(3, VOCAB)
    found = find_way(model, samples[0]["input_ids"][None])
    assert getattr(found, "func", found).__name__ == way
    torch.testing.assert_close(losses_of(model, collate(samples)), plain_losses(model, samples), rtol=0, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_a_model_whose_head_is_no_module_runs_to_its_logits(causal):
    model, samples = tiny("llama"), make_samples(3, VOCAB)
    truth = plain_losses(model, samples)
    model.get_output_embeddings = lambda: None
    batch = collate(samples)
    way = find_way(model, batch["input_ids"][:1])
    assert way is to_logits
    with torch.no_grad():
        found = way(model, inputs_of(model, batch, causal)).losses()
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "overrides", "causal"),
    [
        ("llama", {}, True),
        ("gemma2", {}, True),
        ("mixtral", {}, True),
        ("rwkv", {}, True),
        ("xlm", {}, False),
        ("gemma3_text", {"use_bidirectional_attention": True}, False),
    ],
)
@pytest.mark.parametrize("same", [False, True], ids=["random tokens", "one token again and again"])
def test_a_model_is_causal_if_no_position_sees_a_later_one(family, overrides, causal, same):
    model = tiny(family, **overrides)
    ids = torch.full((1, PROBE), 7) if same else make_samples(1, VOCAB, PROBE, PROBE)[0]["input_ids"][None]
    assert is_causal(model, ids) == causal
    assert is_causal(model.double(), ids) == causal


def test_one_token_does_not_tell_whether_a_model_is_causal():
    assert not is_causal(tiny("llama"), torch.tensor([[5]]))


def two_rows(side: str) -> Sample:
    samples = [([5, 6, 7], [-100, 6, 7]), ([8, 9, 10, 11], [-100, -100, 10, 11])]
    return collate([{"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)} for ids, labels in samples], side)


@pytest.mark.parametrize(
    ("side", "causal", "ids", "index"),
    [
        ("right", False, [[5, 6, 7, 0], [8, 9, 10, 11]], [0, 1, 5, 6]),
        ("right", True, [[5, 6, 7], [8, 9, 10]], [0, 1, 4, 5]),
        ("left", False, [[0, 5, 6, 7], [8, 9, 10, 11]], [1, 2, 5, 6]),
        ("left", True, [[0, 5, 6], [8, 9, 10]], [1, 2, 4, 5]),
    ],
)
def test_what_a_model_is_called_with(side, causal, ids, index):
    batch = two_rows(side)
    inputs = inputs_of(tiny("llama"), batch, causal)
    assert inputs.arguments["input_ids"].tolist() == ids
    assert inputs.index.tolist() == index
    assert inputs.targets.tolist() == [6, 7, 10, 11]
    assert inputs.shape == (2, len(ids[0]))
    assert inputs.arguments["use_cache"] is False
    expected = {"input_ids", "use_cache"}
    if not (causal and side == "right"):
        expected.add("attention_mask")
        assert inputs.arguments["attention_mask"].tolist() == [[int(each > 0) for each in row] for row in ids]
    if side == "left":
        expected.add("position_ids")
        positions = [[0, 0, 1, 2], [0, 1, 2, 3]]
        assert inputs.arguments["position_ids"].tolist() == [row[: len(ids[0])] for row in positions]
    assert inputs.arguments.keys() == expected
    assert inputs.ids_alone == (causal and side == "right")


def test_a_model_that_takes_no_positions_is_given_none():
    arguments = inputs_of(tiny("bloom"), two_rows("left"), causal=True).arguments
    assert arguments.keys() == {"input_ids", "attention_mask", "use_cache"}


@pytest.mark.parametrize("causal", [False, True])
def test_a_single_token_predicts_nothing(causal):
    one = {"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    inputs = inputs_of(tiny("llama"), one, causal)
    assert inputs.shape == (1, 1)
    assert len(inputs.index) == len(inputs.targets) == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "bloom"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_causal_model_loses_as_much_without_mask_and_last_column(family, side):
    model, samples = tiny(family), make_samples(5, VOCAB)
    batch = collate(samples, side)
    way = find_way(model, samples[0]["input_ids"][None])
    with torch.no_grad():
        found = way(model, inputs_of(model, batch, causal=True)).losses()
        whole = way(model, inputs_of(model, batch, causal=False)).losses()
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, plain_losses(model, samples), rtol=0, atol=1e-5)
