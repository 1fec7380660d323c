"""The attention to the prompt against the weights that eager models return, whatever runs and in whatever blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.families import tiny
from helpers.samples import collate, make_samples
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from resofilter_trainer import InputError
from resofilter_trainer.model import prompt_attention
from resofilter_trainer.model.losses import inputs_of
from resofilter_trainer.model.modes import own_precision
from resofilter_trainer.model.prompt_attention import PromptAttention

WINDOW = 6


def settings(family: str) -> dict[str, int]:
    return {"sliding_window": WINDOW} if family.startswith("gemma") else {}


def plain(model: torch.nn.Module, samples) -> list[float]:
    """Of each row alone, in loops, from the weights of the last layer."""
    found = []
    for sample in samples:
        with torch.no_grad():
            output = model(input_ids=sample["input_ids"][None], use_cache=False, output_attentions=True)
        heads = output.attentions[-1][0]  # (H, T, T)
        labels = sample["labels"].tolist()
        for place in range(1, len(labels)):
            if labels[place] != -100:
                prompt = [before for before in range(place) if labels[before] == -100]
                found.append(sum(float(head[place, before]) for head in heads for before in prompt) / len(heads))
    return found


@pytest.mark.parametrize("block", [1, 10_000_000])
@pytest.mark.parametrize(
    ("family", "running"),
    [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gemma3_text", "sdpa"), ("gemma2", "eager")],
)
def test_it_is_that_of_the_weights_that_an_eager_model_returns(family, running, block, monkeypatch):
    monkeypatch.setattr(prompt_attention, "BLOCK", block)
    samples = make_samples(4, longest=20)
    samples[0]["labels"][len(samples[0]["labels"]) // 2 + 1] = -100  # a second turn
    model = tiny(family, **settings(family)).double()
    model.set_attn_implementation("eager")
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with own_precision(model):
        expected = plain(model, samples)
        model.set_attn_implementation(running)
        batch, attention = collate(samples), PromptAttention(model)
        inputs = inputs_of(model, batch, causal=False)
        with torch.no_grad():
            unwatched = model(**inputs.arguments).logits
            with attention.watching():
                watched = model(**inputs.arguments).logits
            found = attention.of(batch["labels"])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert 0 < min(expected) < max(expected) <= 1
    assert torch.equal(watched, unwatched)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_models_whose_attention_cannot_be_had_are_refused():
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="attn_implementation='flash_attention_2', whose kernels give no weights"):
        PromptAttention(model)
    bloom = tiny("bloom")  # has a function of its own
    bloom.set_attn_implementation("eager")
    batch, attention = collate(make_samples(2)), PromptAttention(bloom)
    with torch.no_grad(), attention.watching():
        bloom(**inputs_of(bloom, batch, causal=False).arguments)
    with pytest.raises(InputError, match="attention of BloomForCausalLM to the prompt cannot be had"):
        attention.of(batch["labels"])
