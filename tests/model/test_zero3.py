"""Parameters with the marks of DeepSpeed's ZeRO-3: what is known of them while they are empty."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.families import tiny
from helpers.training import llama
from peft import LoraConfig, get_peft_model

from resofilter_trainer import InputError, ResonanceConfig
from resofilter_trainer.model.float32 import main_dtype
from resofilter_trainer.model.sharding import is_sharded
from resofilter_trainer.model.training_recorder import TrainingRecorder
from resofilter_trainer.model.up_projection import find_up_projections
from resofilter_trainer.model.zero3 import is_absent, is_divided, present


def divided(model: torch.nn.Module, status: str = "NOT_AVAILABLE") -> torch.nn.Module:
    """A model as ZeRO-3 leaves it between the steps."""
    for each in model.parameters():
        each.ds_status, each.ds_shape = SimpleNamespace(name=status), tuple(each.shape)
        if status == "NOT_AVAILABLE":
            each.data = torch.empty(0, dtype=each.dtype)
    return model


def test_up_projections_have_the_shapes_of_whole_weights():
    model = llama(32).bfloat16()
    model.model.norm.float()
    whole, names = {}, ["name", "shape", "kind", "entries"]
    for each in find_up_projections(model):
        whole[each.name] = [getattr(each, name) for name in names]
    found = find_up_projections(divided(model))
    assert {each.name: [getattr(each, name) for name in names] for each in found} == whole
    assert is_sharded(model)
    assert main_dtype(model) == torch.bfloat16


def test_weights_that_are_whole_now_are_used_as_they_are():
    model = divided(llama(32), status="AVAILABLE")
    assert all(is_divided(each) and not is_absent(each) for each in model.parameters())
    with present(model.parameters()):  # asks DeepSpeed for nothing
        pass


def test_what_needs_several_whole_weights_is_refused_in_one_line():
    adapted = get_peft_model(llama(32), LoraConfig(r=2, target_modules=["up_proj"]))
    for model, said in (
        (adapted, "up_proj' has an adapter, and under DeepSpeed's ZeRO-3 only one weight"),
        (tiny("mixtral"), "' sees only the tokens routed to it, and under DeepSpeed's ZeRO-3 only"),
    ):
        with pytest.raises(InputError) as refused:
            TrainingRecorder(divided(model), ResonanceConfig())
        assert said in str(refused.value)
        assert str(refused.value).endswith("Use ZeRO-2, or FSDP2 (fsdp_config={'fsdp_version': 2}).")
