"""What further forwards measure, against plain formulas in float64 from one row at a time and all logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.families import tiny
from helpers.samples import Sample, collate, make_samples, state_of
from torch import Tensor, nn

from resofilter_trainer import InputError
from resofilter_trainer.criteria.forwards import jitter, mean_losses, response_alone
from resofilter_trainer.criteria.verdict import verdict
from resofilter_trainer.model import head
from resofilter_trainer.model.head import find_way
from resofilter_trainer.model.losses import IGNORE, unwrapped
from resofilter_trainer.model.modes import own_precision

# Families whose logits are one linear map, capped or scaled; with position embeddings; with embeddings of each layer.
FAMILIES = ["llama", "gemma2", "cohere", "gpt2", "gemma3n_text"]
SAMPLES = make_samples(7, longest=14)
for each in SAMPLES:
    each["labels"][0] = IGNORE  # nothing predicts it, on whichever side a batch is padded


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch) -> None:
    """Tiles of a few tokens of the vocabulary, and few positions at a time."""
    monkeypatch.setattr(head, "SMALLEST_TILE", 1)
    monkeypatch.setitem(head.TILE_LOGITS, "cpu", 700)
    monkeypatch.setattr(head, "PIECE_LOGITS", 700)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> nn.Module:
    torch.manual_seed(0)
    made = tiny(request.param).double()
    with torch.no_grad():
        made.get_output_embeddings().weight.normal_(std=0.5)
    return made


def log_p(model: nn.Module, ids: Tensor) -> Tensor:
    """ln p of every next token, (T, V), from one row alone."""
    with torch.no_grad(), own_precision(model):
        return model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)


def learnt(model: nn.Module, sample: Sample) -> Tensor:
    """-ln p of the learnt tokens of one sample."""
    each = -log_p(model, sample["input_ids"])[:-1].gather(1, sample["input_ids"][1:, None])[:, 0]
    return each[sample["labels"][1:] != IGNORE]


def found(measure, model: nn.Module, samples: list[Sample], side: str, size: int) -> dict[str, np.ndarray]:
    with torch.no_grad(), own_precision(model):
        way = find_way(model, torch.arange(3, 11)[None])
        each = [measure(model, collate(samples[i : i + size], side), way) for i in range(0, len(samples), size)]
    return {name: torch.cat([own[name] for own in each]).numpy() for name in each[0]}


@pytest.mark.parametrize(("side", "size"), [("right", 7), ("left", 7), ("right", 1), ("left", 3)])
def test_losses_are_the_plain_ones(side, size, model):
    losses = [learnt(model, sample) for sample in SAMPLES]
    expected = {"loss": [float(each.mean()) for each in losses], "first": [float(each[0]) for each in losses]}
    measured = found(mean_losses, model, SAMPLES, side, size)
    for name, values in expected.items():
        np.testing.assert_allclose(measured[name], values, rtol=1e-9)


def plain_jitter(model: nn.Module, sample: Sample) -> float:
    """With the perturbed embeddings looked up by hand, a row at a time, in the place of the module's own forward."""
    embeddings = unwrapped(model).get_input_embeddings()
    own = embeddings(sample["input_ids"][None]).detach()
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((100, own.shape[-1])))[: own.shape[1]]
    moved = torch.stack([e + 0.1 * (e @ e / len(e)).sqrt() * z for e, z in zip(own[0], noise, strict=True)])[None]
    before, real = learnt(model, sample), embeddings.forward
    embeddings.forward = lambda ids: moved
    try:
        after = learnt(model, sample)
    finally:
        embeddings.forward = real
        del embeddings.forward
    return float((after - before).abs().mean())


@pytest.mark.parametrize(("side", "size"), [("right", 7), ("left", 7), ("right", 1), ("left", 3)])
def test_jitter_is_how_far_the_probabilities_move(side, size, model):
    before = state_of(model)
    expected = [plain_jitter(model, sample) for sample in SAMPLES]
    np.testing.assert_allclose(found(jitter, model, SAMPLES, side, size)["jitter"], expected, rtol=1e-9)
    assert min(expected) > 1e-3
    assert state_of(model) == before


def test_a_model_that_does_not_embed_tokens_one_by_one_is_refused(monkeypatch):
    model = tiny("llama").double()
    monkeypatch.setattr(model, "get_input_embeddings", lambda: nn.Embedding(2, 2))  # which the model does not call
    with pytest.raises(InputError, match=r"^jitter perturbs the embeddings.*leave jitter out"):
        found(jitter, model, SAMPLES, "right", 7)


@pytest.mark.parametrize(("side", "size"), [("right", 7), ("left", 7), ("right", 1)])
def test_a_verdict_is_the_difference_of_two_log_probabilities(side, size, model):
    no, yes = [5, 9], [11]
    asked = [{**each, "labels": torch.full_like(each["labels"], IGNORE)} for each in SAMPLES]
    expected = []
    for sample in asked:
        sample["labels"][-1] = 11
        p = log_p(model, sample["input_ids"])[-2].exp()
        expected.append(float((p[no].sum() / p[yes].sum()).log()))

    def measure(model, batch, way):
        return {"verdict": verdict(model, batch, way, no, yes)}

    np.testing.assert_allclose(found(measure, model, asked, side, size)["verdict"], expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("ids", "labels", "start", "expected"),
    [
        ([7, 8, 9, 2], [-100, -100, 9, 2], None, ([9, 2], [-100, 2])),
        ([1, 8, 9, 2], [-100, -100, 9, 2], 1, ([1, 9, 2], [-100, 9, 2])),
        ([1, 8, 9, 2], [-100, -100, 9, 2], None, ([9, 2], [-100, 2])),
        ([7, 8, 9, 2, 3], [-100, 8, -100, 2, -100], None, ([8, 9, 2], [-100, -100, 2])),  # two turns, and one to come
        ([7, 8, 9], [7, 8, 9], 1, ([7, 8, 9], [-100, 8, 9])),  # no prompt: the row itself
        ([1, 8, 9], [1, 8, 9], 1, ([1, 8, 9], [-100, 8, 9])),
        ([1, 8, 9], [-100, 8, 9], 1, ([1, 8, 9], [-100, 8, 9])),
        ([7, 8], [-100, 8], None, ([8], [-100])),
    ],
)
def test_a_response_alone_is_from_its_first_learnt_token_to_its_last(ids, labels, start, expected):
    assert response_alone(ids, labels, start) == expected
