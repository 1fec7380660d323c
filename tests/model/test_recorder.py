"""The recorder against the literal procedure, which is slow and plain."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES, tiny
from helpers.samples import CLOSED_FORMS, collate, error_over_spread, make_samples, record_all
from peft import LoraConfig, get_peft_model

from resofilter_trainer import InputError, Recorder, ResonanceConfig, literal
from resofilter_trainer.config import Norm, UpdateName
from resofilter_trainer.model.updates import UPDATES
from resofilter_trainer.scores.statistics import rank_correlation

# The families and settings that the promise is made for.
PROMISED = ["llama", "qwen3", "gemma2", "gpt2", "phi3", "opt", "mixtral"]
NORMS = get_args(Norm)
SETTINGS = {
    f"{update}, {norm}, eps {eps:g}": ResonanceConfig(update=update, norm=norm, eps=eps)
    for update in CLOSED_FORMS
    for norm in NORMS
    for eps in ((1e-8, 1e-4) if UPDATES[update].saturates else (1e-8,))
}


# Wide enough that the float32 rounding of each weight, in the literal procedure's w - w', averages out.
WIDE = {"gpt2": {"n_embd": 64}, "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}}


def build(family: str, dtype: torch.dtype, **overrides: int) -> torch.nn.Module:
    # grouped_mm, the default for experts, has no float64
    return tiny(family, experts_implementation="eager", **overrides).to(dtype)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", PROMISED)
def test_float64_agrees_with_the_literal_procedure_in_every_batch(family: str, setting: str) -> None:
    model, samples, config = build(family, torch.float64), make_samples(), SETTINGS[setting]
    truth = literal(model, samples, config)
    for size in (1, 3, 8):
        for side in ("right", "left"):
            found = record_all(model, samples, config, size, side)
            assert error_over_spread(found, truth) < 1e-6
            assert rank_correlation(found.score, truth.score) == 1
            np.testing.assert_allclose(found.loss, truth.loss, rtol=1e-12)
            np.testing.assert_array_equal(found.num_tokens, truth.num_tokens)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("family", PROMISED)
def test_float32_agrees_at_eps_1e_4(family: str, norm: str) -> None:
    model = build(family, torch.float32, **WIDE.get(family, {"hidden_size": 64, "intermediate_size": 128}))
    samples, config = make_samples(), ResonanceConfig(eps=1e-4, norm=norm)
    truth = literal(model, samples, config)
    for size in (1, 3, 8):
        for side in ("right", "left"):
            assert error_over_spread(record_all(model, samples, config, size, side), truth) < 1e-4


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("update", [name for name in CLOSED_FORMS if not UPDATES[name].saturates])
@pytest.mark.parametrize("family", PROMISED)
def test_float32_agrees_with_the_float64_literal_procedure(family: str, update: UpdateName, norm: Norm) -> None:
    # In float32 a literal step such as SGD's lr * g, about 1e-9, is lost in the rounding of weights near 0.02.
    samples, config = make_samples(), ResonanceConfig(update=update, norm=norm)
    truth = literal(build(family, torch.float64), samples, config)
    assert error_over_spread(record_all(build(family, torch.float32), samples, config), truth) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees(family: str) -> None:
    model, samples, config = (
        build(family, torch.float64),
        make_samples(count=3, longest=12),
        ResonanceConfig(n_layers=2),
    )
    truth = literal(model, samples, config)
    found = record_all(model, samples, config, size=2, side="left" if family == "cpmant" else "right")
    assert error_over_spread(found, truth) < 1e-6
    assert found.layers.shape == (3, 2)


def test_a_sample_alone_scores_as_in_any_company() -> None:
    model, samples = build("llama", torch.float64), make_samples()
    alone = record_all(model, samples, ResonanceConfig(), size=1).layers
    backwards = record_all(model, samples[::-1], ResonanceConfig(), size=5).layers[::-1]
    np.testing.assert_allclose(backwards, alone, rtol=1e-12)


def test_two_equal_samples_in_one_batch_score_alike() -> None:
    model, sample = build("llama", torch.float32), make_samples(1)[0]
    score = record_all(model, [sample, *make_samples(3, seed=1), sample], ResonanceConfig(eps=1e-4)).score
    assert score[0] == pytest.approx(score[-1], rel=1e-6)


def test_the_model_is_left_as_it_was_found() -> None:
    model = build("llama", torch.float32).train()
    model.lm_head.weight.requires_grad_(False)
    model.model.layers[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    record_all(model, make_samples(), ResonanceConfig())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_literal_procedure_puts_the_weights_back() -> None:
    model = build("gpt2", torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    literal(model, make_samples(2), ResonanceConfig())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_parameter_below_the_lowest_measured_layer_is_asked_for_a_gradient() -> None:
    model = build("llama", torch.float32)
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    record_all(model, make_samples(2), ResonanceConfig(n_layers=1))
    handle.remove()
    assert set(seen) == {False}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_literal_refuses_weights_too_coarse_for_the_step(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"needs float32 or float64 .* use the recorder"):
        literal(build("llama", dtype), make_samples(1), ResonanceConfig())


def test_bfloat16_weights_are_recorded_with_their_noise_and_no_more() -> None:
    samples, config = make_samples(24), ResonanceConfig(eps=1e-4)
    rounded = build("llama", torch.bfloat16)
    exact = record_all(build("llama", torch.float32), samples, config)
    assert rank_correlation(record_all(rounded, samples, config).score, exact.score) > 0.99


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_sample_without_a_learnt_token_has_no_loss_and_spoils_nothing(family: str) -> None:
    model, samples = build(family, torch.float64), make_samples(3)
    truth = record_all(model, samples, ResonanceConfig())
    masked = {"input_ids": samples[1]["input_ids"], "labels": torch.full_like(samples[1]["labels"], -100)}
    found = record_all(model, [samples[0], masked, samples[2]], ResonanceConfig())
    np.testing.assert_allclose(found.score[[0, 2]], truth.score[[0, 2]], rtol=1e-12)
    assert (found.loss[1], found.num_tokens[1]) == (0, 0)


def test_a_layer_that_the_loss_does_not_depend_on_is_not_changed() -> None:
    model, samples = build("llama", torch.float64), make_samples(3)
    model.model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states  # skipped, as layerdrop does
    for config in SETTINGS.values():
        found, truth = record_all(model, samples, config), literal(model, samples, config)
        np.testing.assert_allclose(found.layers, truth.layers, rtol=1e-9)
        assert (found.layers[:, 1] == 0).all()


def test_a_forward_that_bypasses_the_hooks_is_an_error() -> None:
    model = build("llama", torch.float32)
    with Recorder(model, ResonanceConfig()) as record:
        for layer in model.model.layers:
            layer.mlp.up_proj._forward_hooks.clear()  # what compiling without hook guards amounts to
        with pytest.raises(InputError, match=r"did not call 'model\.layers\.0\.mlp\.up_proj'"):
            record(collate(make_samples(2)))


def test_weights_that_two_layers_share_are_refused() -> None:
    model = build("llama", torch.float32)
    model.model.layers[2].mlp = model.model.layers[1].mlp
    with pytest.raises(InputError, match="layers that share it"):
        record_all(model, make_samples(2), ResonanceConfig())


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_adapter_that_changes_nothing_yet_changes_no_score(side: str) -> None:
    samples, config = make_samples(5), ResonanceConfig()
    truth = record_all(build("gpt2", torch.float64), samples, config)
    lora = LoraConfig(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    wrapped = get_peft_model(build("gpt2", torch.float64), lora).double()
    assert error_over_spread(record_all(wrapped, samples, config, side=side), truth) < 1e-6
