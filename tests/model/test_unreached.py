"""Up-projections that a forward does not call: the error names the cause that can be seen, and its remedy works."""

from __future__ import annotations

import functools
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers.families import tiny
from helpers.samples import collate, make_samples, record_all
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from resofilter_trainer import InputError, ResonanceConfig
from resofilter_trainer.model.gradients import segments_of
from resofilter_trainer.model.micro_batch import MicroBatch
from resofilter_trainer.model.training_recorder import TrainingRecorder

CONFIG = ResonanceConfig(n_layers=2, eps=1e-3)


def fused(mlp: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """A feed-forward that reads the weights and calls no module, as fused kernels do."""
    gate, up = F.linear(hidden, mlp.gate_proj.weight), F.linear(hidden, mlp.up_proj.weight)
    return F.linear(F.silu(gate) * up, mlp.down_proj.weight)


def fused_lora(mlp: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The same with an adapter."""

    def map_of(name: str, given: torch.Tensor) -> torch.Tensor:
        each = mlp.get_submodule(name)
        adapter = F.linear(F.linear(given, each.lora_A["default"].weight), each.lora_B["default"].weight)
        return F.linear(given, each.base_layer.weight) + adapter * each.scaling["default"]

    return map_of("down_proj", F.silu(map_of("gate_proj", hidden)) * map_of("up_proj", hidden))


def fuse(model: nn.Module, *layers: int) -> None:
    for layer in layers:
        mlp = model.get_submodule(f"model.layers.{layer}.mlp")
        mlp.forward = fused.__get__(mlp)


def in_training(model: nn.Module) -> np.ndarray:
    """The scores of one step."""
    batch, recorder = collate(make_samples(3)), TrainingRecorder(model, CONFIG)
    recorder.attach()
    recorder.expect([MicroBatch(batch["input_ids"], batch["labels"], segments_of(batch), 1.0)])
    try:
        model(**batch).loss.backward()
        return recorder.take()[0].score
    finally:
        recorder.detach()


def scored(model: nn.Module) -> np.ndarray:
    return record_all(model, make_samples(3), CONFIG).score


@pytest.mark.parametrize("measure", [scored, in_training])
@pytest.mark.parametrize("layers", [(0, 1, 2), (2,), (1,)])
def test_a_replaced_forward_is_named_and_its_own_forward_is_the_remedy(measure, layers):
    model = tiny("llama")
    truth = measure(model)
    fuse(model, *layers)
    layer = max(layers) if layers == (2,) else 1
    cause = rf"did not call 'model\.layers\.{layer}\.mlp\.up_proj': the forward of 'model\.layers\.{layer}\.mlp' was "
    with pytest.raises(InputError, match=rf"{cause}replaced by .*test_unreached\.fused, which") as error:
        measure(model)
    exec(str(error.value).split("`")[1], {"model": model})
    np.testing.assert_array_equal(measure(model), truth)


@pytest.mark.parametrize("measure", [scored, in_training])
@pytest.mark.parametrize(
    ("module", "bound", "said"),
    [
        ("unsloth.kernels.fast_lora", fused_lora, r"as unsloth's fused LoRA kernels do\."),
        ("unsloth.kernels.fast_lora", functools.partial(fused_lora), r"as unsloth's fused LoRA kernels do\."),
        ("axolotl.kernels.lora", fused_lora, r"as axolotl's LoRA kernels do unless lora_mlp_kernel is false\."),
    ],
)
def test_whose_kernel_it_is_is_named(measure, module, bound, said, monkeypatch):
    """Both bind a function to each feed-forward of a model with LoRA; without it, PEFT's own forward runs."""
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["up_proj", "gate_proj", "down_proj"]))
    truth = measure(model)
    monkeypatch.setattr(fused_lora, "__module__", module)
    for layer in model.get_submodule("base_model.model.model.layers"):
        layer.mlp.forward = types.MethodType(bound, layer.mlp)
    with pytest.raises(InputError, match=rf"was replaced by {module}\.fused_lora, which .*, {said}") as error:
        measure(model)
    exec(str(error.value).split("`")[1], {"model": model})
    np.testing.assert_array_equal(measure(model), truth)


class EmptyLogits:
    """What unsloth's fused loss returns for logits: every attribute is a function that raises."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.refuse

    def refuse(self, *args, **kwargs):
        raise NotImplementedError("Logits are empty.")

    __getitem__ = refuse


class Offloaded(torch.autograd.Function):
    """Checkpointing as unsloth's: the forward keeps no graph, and the backward runs it again inside."""

    @staticmethod
    def forward(ctx, run, hidden):
        ctx.save_for_backward(hidden)
        ctx.run = run
        with torch.no_grad():
            return run(hidden)

    @staticmethod
    def backward(ctx, gradient):
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.run(hidden)
        torch.autograd.backward(output, gradient)
        return None, hidden.grad


def test_what_unsloth_changes_beside_the_kernels_changes_no_score(monkeypatch):
    """A loss without logits, and its gradient checkpointing."""
    model = tiny("llama")
    truth, plain = in_training(model), type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda *args, **kwargs: CausalLMOutput(plain(*args, **kwargs).loss, EmptyLogits())
    )
    np.testing.assert_allclose(in_training(model), truth, rtol=1e-6)
    model.config.use_cache = False
    for layer in model.model.layers:
        own = layer.forward
        layer.forward = lambda hidden, own=own, **kwargs: Offloaded.apply(lambda given: own(given, **kwargs), hidden)
    np.testing.assert_allclose(in_training(model), truth, rtol=1e-6)


@pytest.mark.parametrize("measure", [scored, in_training])
def test_a_class_that_computes_by_itself_is_named(measure, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", fused)
    with pytest.raises(InputError, match=r"LlamaMLP\.forward \('model\.layers\.1\.mlp'\) computes without calling it"):
        measure(model)


def test_a_fused_adapter_is_refused_too():
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["up_proj", "gate_proj", "down_proj"]))
    mlp = model.get_submodule("base_model.model.model.layers.2.mlp")

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        up = mlp.up_proj
        delta = F.linear(F.linear(hidden, up.lora_A["default"].weight), up.lora_B["default"].weight)
        return mlp.down_proj(F.silu(mlp.gate_proj(hidden)) * (F.linear(hidden, up.base_layer.weight) + delta))

    mlp.forward = forward
    for measure in (scored, in_training):
        with pytest.raises(InputError, match=r"the forward of 'base_model\.model\.model\.layers\.2\.mlp' was replaced"):
            measure(model)


def test_a_layer_that_is_left_out_is_not_changed():
    model = tiny("llama")
    model.model.layers[2].forward = lambda hidden_states, **kwargs: hidden_states
    found = record_all(model, make_samples(3), CONFIG)
    assert (found.layers[:, 1] == 0).all()
    assert (found.layers[:, 0] > 0).all()


@pytest.mark.parametrize("measure", [scored, in_training])
def test_a_compiled_model_is_named(measure):
    model = tiny("llama")
    model.model.layers[1].mlp._compiled_call_impl = model.model.layers[1].mlp._call_impl  # as `compile` sets it
    for layer in model.model.layers[1:]:
        layer.mlp.up_proj.register_forward_hook = lambda *args, **kwargs: SimpleNamespace(remove=lambda: None)
    with pytest.raises(InputError, match=r"a compiled model drops hooks\. Pass the model uncompiled, and"):
        measure(model)


def test_a_hook_of_accelerate_is_not_the_cause():
    model = tiny("llama")
    truth = scored(model)
    for layer in model.model.layers:
        add_hook_to_module(layer.mlp, ModelHook())
    np.testing.assert_array_equal(scored(model), truth)
    for layer in model.model.layers:
        layer.mlp._old_forward = fused.__get__(layer.mlp)
    with pytest.raises(InputError, match=r"either LlamaMLP\.forward \('model\.layers\.1\.mlp'\)"):
        scored(model)


def test_a_model_that_is_called_with_other_tokens_is_named():
    model, batch = tiny("llama"), collate(make_samples(3))
    recorder = TrainingRecorder(model, CONFIG)
    recorder.attach()
    recorder.expect([MicroBatch(batch["input_ids"], batch["labels"], segments_of(batch), 1.0)])
    model(**{**batch, "input_ids": batch["input_ids"].flip(1)}).loss.backward()
    with pytest.raises(InputError, match="was not called with the batch's input_ids"):
        recorder.take()


def test_a_loss_without_gradient_is_named():
    model, batch = tiny("llama"), collate(make_samples(3))
    recorder = TrainingRecorder(model, CONFIG)
    recorder.attach()
    recorder.expect([MicroBatch(batch["input_ids"], batch["labels"], segments_of(batch), 1.0)])
    model(**batch)
    with pytest.raises(InputError, match="its loss has no gradient at any measured up-projection"):
        recorder.take()
