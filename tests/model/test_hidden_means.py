"""The mean hidden states of a pass are those that the model returns, whatever the forward skips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.families import VOCAB, tiny
from helpers.samples import Sample, collate, make_samples, state_of
from torch import Tensor, nn

from resofilter_trainer import InputError, Recorder, ResonanceConfig
from resofilter_trainer.model import prefixes
from resofilter_trainer.model.hidden_means import HiddenMeans
from resofilter_trainer.model.modes import own_precision
from resofilter_trainer.model.signals import chain_of_embedding

CONFIG = ResonanceConfig(n_layers=2)  # of three
FAMILIES = ["llama", "gemma2", "gpt2", "opt", "mixtral", "bart", "bert", "llama4_text", "modernbert-decoder"]


def plain_means(model: nn.Module, sample: Sample) -> Tensor:
    """(L + 1, H), from all hidden states."""
    learnt = sample["labels"][1:] != -100
    with torch.no_grad(), own_precision(model):
        found = model(input_ids=sample["input_ids"][None], use_cache=False, output_hidden_states=True).hidden_states
    return torch.stack([each[0, :-1][learnt].double().mean(0) for each in found])


@pytest.fixture
def seen(monkeypatch) -> list[np.ndarray]:
    """The means of every batch."""
    found, real = [], HiddenMeans.means
    monkeypatch.setattr(HiddenMeans, "means", lambda own: found.append(real(own)) or found[-1])
    return found


def measure(model: nn.Module, batches: list[Sample], config: ResonanceConfig = CONFIG) -> None:
    with Recorder(model, config, "embedding_chain") as record:
        for batch in batches:
            record(batch)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_means_are_those_of_all_hidden_states(family, side, seen):
    if (family, side) == ("bart", "left"):
        pytest.skip("bart counts positions from the padding on")
    model, samples = tiny(family).double(), make_samples(5)
    before = state_of(model)
    measure(model, [collate(samples, side), collate(samples[2:3], side)])
    assert state_of(model) == before
    truth = torch.stack([plain_means(model, each) for each in samples]).numpy()
    assert len(seen) == 2
    np.testing.assert_allclose(seen[0], truth, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(seen[1], truth[2:3], rtol=1e-9, atol=1e-12)


# ---- a shared prefix


def sharing(texts: list[tuple[int, int]], seed: int = 1) -> list[Sample]:
    """Samples that begin alike, given the lengths of the prompt, which is not learnt, and of all."""
    prefix = make_samples(1, VOCAB, 14, 14, seed)[0]["input_ids"]
    samples = []
    for number, (prompt, length) in enumerate(texts):
        rest = make_samples(1, VOCAB, length, length, 100 + number)[0]["input_ids"]
        ids = torch.cat([prefix, rest])[:length]
        labels = ids.clone()
        labels[:prompt] = -100
        samples.append({"input_ids": ids, "labels": labels})
    return samples


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_a_shared_prefix_has_its_learnt_positions_too(family, seen, monkeypatch):
    """The prefix runs once, also for the second batch; the third learns a position before those that were kept."""
    model, runs, real = tiny(family).double(), [], prefixes.SharedPrefix._up_to_the_layer
    monkeypatch.setattr(
        prefixes.SharedPrefix,
        "_up_to_the_layer",
        lambda own, ids, *others: runs.append(tuple(ids.shape)) or real(own, ids, *others),
    )
    batches = [
        sharing([(14, 20), (14, 22), (16, 18)]),
        sharing([(14, 20), (15, 19), (14, 23), (17, 20)]),
        sharing([(3, 20), (14, 21), (16, 19)]),
        sharing([(1, 20), (14, 21), (9, 19)]),
    ]
    with Recorder(model, CONFIG, "embedding_chain") as record, Recorder(model, CONFIG) as plain:
        for samples in batches:
            batch = collate(samples)
            runs.clear()
            found = record(batch, 14)
            prefix_runs = [shape for shape in runs if shape == (1, 14)]
            truth = torch.stack([plain_means(model, each) for each in samples]).numpy()
            np.testing.assert_allclose(seen[-1], truth, rtol=1e-9, atol=1e-12)
            np.testing.assert_array_equal(found.layers, plain(batch, 14).layers)
            assert runs[-1] == (len(samples), batch["input_ids"].shape[1] - 1 - 14)
            if samples is batches[1]:
                assert prefix_runs == []
            if samples is batches[2]:
                assert prefix_runs == [(1, 14)]


def test_of_a_shared_prefix_only_the_learnt_positions_are_kept():
    model = tiny("llama").double()
    with Recorder(model, CONFIG, "embedding_chain") as record:
        record(collate(sharing([(14, 20), (14, 22)])), 14)
        known = record._forward._prefix._known
        assert {number: tuple(kept.shape) for number, kept in known.inputs.items()} == {0: (1, 1, 32)}
    with Recorder(model, CONFIG) as record:
        record(collate(sharing([(14, 20), (14, 22)])), 14)
        assert record._forward._prefix._known.inputs == {}


# ---- models that cannot give it


@pytest.mark.parametrize("family", ["gemma3n_text", "xlm"])
def test_a_model_whose_layers_are_given_something_else_is_named(family):
    model, batch = tiny(family), collate(make_samples(3))
    before = state_of(model)
    message = "'embedding_chain' cannot be measured: its decoder layers .* Leave it out of signals"
    with pytest.raises(InputError, match=message), Recorder(model, CONFIG, "embedding_chain"):
        pass
    assert state_of(model) == before
    with Recorder(model, CONFIG, "all") as record:
        assert [*record.left_out] == ["embedding_chain"]
        assert [*record(batch).signals] == [*record.signals]


def test_one_measured_layer_has_no_vote():
    model = tiny("llama")
    message = r"'layer_vote' cannot be measured: only one layer is measured \(n_layers=1\)"
    with pytest.raises(InputError, match=message), Recorder(model, ResonanceConfig(n_layers=1), ["layer_vote"]):
        pass
    with Recorder(model, ResonanceConfig(n_layers=1), "all") as record:
        assert [*record.left_out] == ["layer_vote"]
    with Recorder(model, ResonanceConfig(n_layers=2), ["layer_vote", "rank"]) as record:
        assert (record.left_out, record.signals) == ({}, ("rank",))


# ---- the number


def test_small_angles_have_all_their_digits():
    turn = 1e-6
    states = np.array([[[1, 0], [np.cos(turn), np.sin(turn)], [np.cos(2 * turn), np.sin(2 * turn)]]])
    np.testing.assert_allclose(chain_of_embedding(states), [0.5], rtol=1e-9)  # both half of the way and of the angle


def test_a_row_that_goes_nowhere_has_zero():
    assert chain_of_embedding(np.ones((2, 4, 3))).tolist() == [0, 0]
    assert chain_of_embedding(np.zeros((1, 4, 3))).tolist() == [0]
