"""Every kind of adapter that peft has, on a tiny Llama, each with weights that change what the model computes.

For every test that must hold for all kinds:

>>> @pytest.mark.parametrize("kind", SCORED)
... def test_something(kind):
...     model = adapted(kind)

A new kind is one line here and one in docs/adapters.md.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from .families import tiny
from .versions import older_than

UP = ["up_proj", "down_proj"]
CAUSAL = "CAUSAL_LM"
STACKED = "gpt_oss" if older_than("transformers", "5.0") else "mixtral"  # all experts in one weight
VOCAB = 512  # at least that of the tests' tokenizer
Build = Callable[[], nn.Module]


def config_here(name: str, **settings: Any) -> Any:
    """A configuration of peft's; the test is skipped where the installed version lacks it, or one of its settings."""
    kind = getattr(peft, name, None) or vars(peft.tuners.lora).get(name)
    lacking = [] if kind is None else sorted(settings.keys() - {each.name for each in dataclasses.fields(kind)})
    if kind is None or lacking:
        pytest.skip(f"peft {peft.__version__} has no {' '.join([name, *lacking])}")
    return kind(**settings)


def on_llama(config: str, **settings: Any) -> Build:
    """A builder of a tiny Llama with one adapter; settings may be functions that make them."""

    def build() -> nn.Module:
        made = {name: value() if isinstance(value, partial) else value for name, value in settings.items()}
        return get_peft_model(tiny("llama", vocab_size=VOCAB), config_here(config, task_type=CAUSAL, **made))

    return build


def since(version: str, build: Build) -> Build:
    """A builder of what came with a version of peft; the test is skipped before."""

    def built() -> nn.Module:
        if older_than("peft", version):
            pytest.skip(f"it came with peft {version}, and {peft.__version__} is installed")
        return build()

    return built


def lora(**settings: Any) -> Build:
    """A builder of a tiny Llama with LoRA."""
    return on_llama("LoraConfig", **({"target_modules": UP, "r": 4} | settings))


def lora_on(family: str, **settings: Any) -> Build:
    """A builder of another tiny model with LoRA."""
    return lambda: get_peft_model(tiny(family, vocab_size=VOCAB), peft.LoraConfig(task_type=CAUSAL, r=4, **settings))


def prompts(config: str, **settings: Any) -> Build:
    """A builder of a tiny Llama with virtual tokens."""
    return on_llama(config, **({"num_virtual_tokens": 3} | settings))


def two_adapters() -> PeftModel:
    """Two LoRA adapters, both active."""
    model = lora()()
    model.add_adapter("second", peft.LoraConfig(task_type=CAUSAL, r=2, target_modules=["up_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def in_transformers(**settings: Any) -> nn.Module:
    """LoRA by transformers' `add_adapter`, without PEFT's own model around it."""
    if not older_than("transformers", "5.24") and older_than("peft", "0.22"):
        pytest.skip("transformers 5.24 adds adapters with peft 0.22 or later only")
    model = tiny("llama", vocab_size=VOCAB)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=UP, **settings))
    return model


def mixed() -> nn.Module:
    """LoRA and LoHa together."""
    model = peft.PeftMixedModel(
        tiny("llama", vocab_size=VOCAB), peft.LoraConfig(r=4, target_modules=["up_proj"]), "default"
    )
    model.add_adapter("second", peft.LoHaConfig(r=2, target_modules=["up_proj"]))
    model.set_adapter(["default", "second"])
    return model


def adapted(kind: str) -> nn.Module:
    """A tiny model of a kind in float64 and eval mode; its adapters are not what they start as."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on settings, and on kernels that are not there
        model = BUILDERS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.double().eval()


LORA: dict[str, Build] = {
    "LoRA": lora(),
    "LoRA, use_rslora": lora(use_rslora=True),
    "LoRA, use_dora": lora(use_dora=True),
    "LoRA, lora_bias": lora(lora_bias=True),
    "LoRA, rank_pattern and alpha_pattern": lora(rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 3}),
    "LoRA, exclude_modules": lora(target_modules="all-linear", exclude_modules=["up_proj"]),
    "LoRA, layer_replication": lora(layer_replication=[[0, 3], [1, 3]]),
    "LoRA, layer_replication without up_proj": lora(target_modules=["q_proj"], layer_replication=[[0, 3], [1, 3]]),
    "LoRA, trainable_token_indices": lora(trainable_token_indices=[3, 4]),
    "LoRA, target embed_tokens": lora(target_modules=["embed_tokens", "up_proj"]),
    "LoRA, target lm_head": lora(target_modules=["lm_head", "up_proj"]),
    "LoRA, modules_to_save mlp": lora(target_modules=["q_proj"], modules_to_save=["mlp"]),
    "LoRA, modules_to_save up_proj": lora(target_modules=["q_proj"], modules_to_save=["up_proj"]),
    "LoRA, modules_to_save lm_head": lora(modules_to_save=["lm_head"]),
    "LoRA, modules_to_save embed_tokens": lora(modules_to_save=["embed_tokens"]),
    "LoRA, init pissa": lora(init_lora_weights="pissa"),
    "LoRA, init olora": lora(init_lora_weights="olora"),
    "LoRA, init orthogonal": lora(init_lora_weights="orthogonal"),
    "LoRA, init gaussian": lora(init_lora_weights="gaussian"),
    "LoRA, init mica": since("0.20", lora(init_lora_weights="mica")),
    "LoRA, init eva": lora(init_lora_weights="eva", eva_config=partial(config_here, "EvaConfig")),
    "LoRA, init lora_ga": since("0.19", lora(init_lora_weights="lora_ga")),
    "LoRA, use_bdlora": lora(use_bdlora=partial(config_here, "BdLoraConfig", nblocks=2, target_modules_bd_a=UP)),
    "LoRA, kasa": lora(kasa_config=partial(config_here, "KasaConfig")),
    "LoRA, monteclora": lora(monteclora_config=partial(config_here, "MontecloraConfig")),
    "LoRA, velora": lora(velora_config=partial(config_here, "VeloraConfig")),
    "LoRA, use_qalora": lora(use_qalora=True, qalora_group_size=4),
    "LoRA, target_parameters": lora_on(STACKED, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]),
    "LoRA on GPT-2's Conv1D": lora_on("gpt2", target_modules=["c_fc"], fan_in_fan_out=True),
    "LoRA, two adapters active": two_adapters,
    "LoRA by add_adapter of transformers": in_transformers,
    "mixed model": mixed,
    "aLoRA": lora(alora_invocation_tokens=[5]),
}
BUILDERS: dict[str, Build] = LORA | {
    "AdaLoRA": on_llama("AdaLoraConfig", target_modules=UP, init_r=4, total_step=10),
    "ADAMSS": on_llama("AdamssConfig", target_modules=UP, r=4, num_subspaces=2),
    "adaption prompt": on_llama("AdaptionPromptConfig", adapter_len=3, adapter_layers=2),
    "BEFT": on_llama("BeftConfig", target_modules=UP),
    "Bone": on_llama("BoneConfig", target_modules=UP, r=4),
    "Bone, bat": on_llama("BoneConfig", target_modules=UP, r=4, init_weights="bat"),
    "BOFT": on_llama("BOFTConfig", target_modules=UP, boft_block_size=4),
    "C3A": on_llama("C3AConfig", target_modules=UP, block_size=16),
    "Cartridge": prompts("CartridgeConfig"),
    "CPT": on_llama("CPTConfig", cpt_token_ids=[3, 4, 5], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]),
    "DEFT": on_llama("DeftConfig", target_modules=UP, r=4),
    "DELoRA": on_llama("DeloraConfig", target_modules=UP, r=4),
    "FourierFT": on_llama("FourierFTConfig", target_modules=UP, n_frequency=20),
    "FRoD": on_llama("FrodConfig", target_modules=UP),
    "GLoRA": on_llama("GloraConfig", target_modules=UP, r=4),
    "GraLoRA": on_llama("GraloraConfig", target_modules=UP, r=4),
    "HiRA": on_llama("HiraConfig", target_modules=UP, r=4),
    "HRA": on_llama("HRAConfig", target_modules=UP, r=4),
    "IA3": on_llama("IA3Config", target_modules=UP, feedforward_modules=["down_proj"]),
    "IA3, feedforward up_proj": on_llama("IA3Config", target_modules=UP, feedforward_modules=UP),
    "Lily": on_llama("LilyConfig", target_modules=UP, r=4),
    "LN tuning": on_llama("LNTuningConfig"),
    "LoHa": on_llama("LoHaConfig", target_modules=UP, r=4),
    "LoKr": on_llama("LoKrConfig", target_modules=UP, r=4),
    "MiSS": on_llama("MissConfig", target_modules=UP, r=4),
    "MiSS, bat": on_llama("MissConfig", target_modules=UP, r=4, init_weights="bat"),
    "MiSS, mini": on_llama("MissConfig", target_modules=UP, r=4, init_weights="mini", mini_r=4),
    "multitask prompt tuning": prompts("MultitaskPromptTuningConfig", num_tasks=2),
    "OFT": on_llama("OFTConfig", target_modules=UP, oft_block_size=4),
    "OSF": on_llama("OSFConfig", target_modules=UP, effective_rank=4),
    "P-tuning": prompts("PromptEncoderConfig", encoder_hidden_size=16),
    "PEANuT": on_llama("PeanutConfig", target_modules=UP, r=4),
    "Poly": on_llama("PolyConfig", target_modules=UP, r=4, n_tasks=2, n_skills=2),
    "prefix tuning": prompts("PrefixTuningConfig"),
    "prefix tuning, prefix_projection": prompts("PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=8),
    "prompt tuning": prompts("PromptTuningConfig"),
    "PSOFT": on_llama("PsoftConfig", target_modules=UP, r=4),
    "PVeRA": on_llama("PveraConfig", target_modules=["up_proj"], r=4),
    "RandLoRA": on_llama("RandLoraConfig", target_modules=UP, r=4),
    "RoAd": on_llama("RoadConfig", target_modules=UP, group_size=4),
    "Shadow": on_llama("ShadowConfig", r=4, shadow_dropout=0.0),
    "SHiRA": on_llama("ShiraConfig", target_modules=UP, r=4),
    "Super-Tuning": on_llama("SupertuningConfig", target_modules=UP, sparsity=0.9),
    "TinyLoRA": on_llama("TinyLoraConfig", target_modules=UP, u=8),
    "trainable tokens": on_llama("TrainableTokensConfig", token_indices=[3, 4]),
    "UniLoRA": on_llama("UniLoraConfig", target_modules=UP, theta_d_length=16),
    "VB-LoRA": on_llama("VBLoRAConfig", target_modules=UP, r=2, num_vectors=8, vector_length=4),
    "VeRA": on_llama("VeraConfig", target_modules=["up_proj"], r=4),
    "WaveFT": on_llama("WaveFTConfig", target_modules=UP, n_frequency=20),
}


# Kinds that are refused, kinds that have no float64, and kinds that cannot be merged, by peft itself.
REFUSED = [
    *("aLoRA", "CPT", "Lily", "multitask prompt tuning", "P-tuning", "Poly", "prompt tuning"),
]
SCORED = [kind for kind in BUILDERS if kind not in REFUSED]
ONLY_FLOAT32 = {"FourierFT"}
NOT_MERGED = {
    *("LoRA, lora_bias", "LoRA by add_adapter of transformers", "BEFT", "Shadow", "adaption prompt"),
    *("Cartridge", "prefix tuning", "prefix tuning, prefix_projection"),
    *("LoRA, layer_replication", "LoRA, layer_replication without up_proj"),  # all layers' adapters into one weight
    "C3A",  # the backward that peft wrote for it is not that of its forward
}
if older_than("peft", "0.21"):
    NOT_MERGED.add("trainable tokens")  # peft fails on it
# In docs/adapters.md, but built in a test of its own, or not at all.
NOT_BUILT = {
    "LoRA, init corda": "needs a pass over calibration data",
    "LoRA, init loftq": "needs scipy and quantises the model; it starts LoRA only",
    "LoRA, arrow": "needs adapters on disk: a test of its own",
    "X-LoRA": "needs adapters on disk: a test of its own",
}
