"""One process reads a model that will be sharded, and every process has what it would have read itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers.families import tiny
from helpers.processes import torchrun
from helpers.processes_loading import MODELS
from helpers.versions import older_than

from resofilter_trainer.model.handing_out import has_no_numbers, structure

WITHOUT_NUMBERS = pytest.mark.skipif(
    older_than("transformers", "5.0"), reason="there, every process reads the weights: safetensors knows no meta device"
)
PROCESSES = 3  # which divides no tiny weight evenly


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("loading")
    printed = torchrun("processes_loading", folder, processes=PROCESSES)
    return printed, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@WITHOUT_NUMBERS
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_and_score_is_that_of_a_model_that_each_process_reads(model, said):
    for rank, found in enumerate(said[1]):
        sharded = found[model].pop("sharded")
        assert sharded > 20
        expected = {"apart": rank > 0, "hash": True, "names": True, "differ": [], "gathered": True, "scores": True}
        assert found[model] == expected


@WITHOUT_NUMBERS
@pytest.mark.slow
def test_where_the_structure_is_not_enough_every_process_reads_and_one_says_so(said):
    printed, found = said
    for each in found:
        assert not each["unlike"]["apart"]
        assert not each["device_map"]["apart"]
        assert each["no model"]["said"].startswith("There is no model at ")
    lines = [line for line in printed.splitlines() if line.startswith("Every process reads all weights of ")]
    assert [line.partition("for them: ")[2] for line in lines] == [
        "its structure alone lacks something (quantised weights, or tensors in a list).",
        "model_init_kwargs has device_map.",
    ]


def test_a_structure_tells_shapes_dtypes_flags_and_ties_apart():
    digests = [structure(tiny("llama")), structure(tiny("llama", tie_word_embeddings=True))]
    digests += [structure(tiny("llama").double()), structure(tiny("llama").requires_grad_(False))]
    digests += [structure(tiny("llama", num_hidden_layers=2))]
    assert len(set(digests)) == 5
    with torch.device("meta"):
        without_numbers = tiny("llama")
    assert structure(without_numbers) == digests[0]
    assert has_no_numbers(without_numbers)


def test_a_model_with_tensors_that_are_in_a_list_or_not_contiguous_is_not_handed_out():
    listed, turned = tiny("llama"), tiny("llama")
    listed.model.scales = [torch.ones(2)]
    turned.lm_head.weight.data = turned.lm_head.weight.data.T.contiguous().T
    assert structure(listed) is structure(turned) is None
