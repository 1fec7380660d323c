"""Tiny models of the causal families, each built offline from its configuration.

For every test that must hold for all families:

>>> @pytest.mark.parametrize("family", FAMILIES)
... def test_something(family):
...     model = tiny(family)

FAMILIES resolve and run forward and backward on the CPU; a new family is one line. REFUSED do not resolve, each with
its reason.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .versions import older_than

Settings = dict[str, Any]

VOCAB = 128
HIDDEN = 32
LAYERS = 3
INTERMEDIATE = 48
LATENT_EXPERTS = 16  # the hidden size inside nemotron_h's experts

# The same small size in the dialects of the configurations.
TOKENS: Settings = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DENSE_NO_HEAD_DIM: Settings = TOKENS | {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DENSE: Settings = DENSE_NO_HEAD_DIM | {"head_dim": 8}
MOE: Settings = DENSE | {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: Settings = {  # latent attention, and the indexer of sparse attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
}
MOE_LATENT: Settings = MOE | LATENT
LINEAR_ATTENTION: Settings = {  # the gated delta rule of qwen3_next and its kin
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MAMBA2: Settings = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
}
PER_LAYER_INPUT: Settings = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
SLIDING: Settings = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 16}
BERT: Settings = DENSE_NO_HEAD_DIM | {"is_decoder": True, "num_key_value_heads": 4}
GPT2: Settings = TOKENS | {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
BART: Settings = TOKENS | {
    "d_model": HIDDEN,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": INTERMEDIATE,
    "max_position_embeddings": 64,
}


def _all(families: str, settings: Settings) -> dict[str, Settings]:
    return dict.fromkeys(families.split(), settings)


FAMILIES: dict[str, Settings] = {
    # one feed-forward per layer, gated or not
    **_all("apertus arcee biogpt bitnet cohere cohere2 cwm diffllama doge ernie4_5 exaone4 gemma gemma2", DENSE),
    **_all("gemma3_text glm glm4 gpt_neox gpt_neox_japanese granite granite_swa helium hunyuan_v1_dense", DENSE),
    **_all("hyperclovax internlm3 iquestcoder jais2 lfm2 lfm3 llama ministral ministral3 mistral nanochat", DENSE),
    **_all("modernbert-decoder nemotron olmo olmo2 olmo3 olmo_hybrid persimmon phi phi3 qwen2 qwen3", DENSE),
    **_all("recurrent_gemma rwkv seed_oss smollm3 stablelm starcoder2 vaultgemma", DENSE),
    **_all("minicpm3 youtu", DENSE | LATENT),
    **_all("falcon xlm", DENSE_NO_HEAD_DIM),
    **_all("gpt2 gpt-sw3 gpt_bigcode openai-gpt", GPT2),
    **_all("codegen gptj", GPT2 | {"rotary_dim": 8}),
    **_all("bart bigbird_pegasus blenderbot blenderbot-small marian mbart mvp pegasus plbart trocr whisper", BART),
    **_all("bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert roberta", BERT),
    **_all("roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl", BERT),
    "rembert": BERT | {"input_embedding_size": 16, "output_embedding_size": 16},
    "roc_bert": BERT | {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xmod": BERT | {"default_language": "en_XX"},
    "bloom": TOKENS | {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4},
    # its mask needs padding on the left; its own prompt would make sequences longer inside than outside
    "cpmant": DENSE | {"dim_ff": INTERMEDIATE, "dim_head": 8, "prompt_length": 0},
    "ctrl": GPT2 | {"dff": INTERMEDIATE},
    "gpt_neo": TOKENS
    | {"hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": 4, "attention_types": [[["global"], LAYERS]]},
    "mpt": TOKENS | {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64},
    "opt": DENSE | {"ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN},
    "xglm": TOKENS | {"d_model": HIDDEN, "ffn_dim": INTERMEDIATE, "num_layers": LAYERS, "attention_heads": 4},
    "moshi": DENSE | {"ffn_dim": 2 * INTERMEDIATE},
    "xlstm": DENSE | {"num_heads": 4},
    # with a state-space or linear attention beside or instead of the attention
    "bamba": DENSE | MAMBA2 | {"attn_layer_indices": [1]},
    "falcon_h1": DENSE | MAMBA2,
    "qwen3_5_text": DENSE | LINEAR_ATTENTION,
    # with embeddings per layer, or caches shared between layers
    "gemma3n_text": DENSE | PER_LAYER_INPUT | {"num_kv_shared_layers": 0},
    "gemma4_unified_text": DENSE | {"global_head_dim": 8, "num_global_key_value_heads": 2},
    "cohere_compass_text": DENSE
    | {
        "layer_types": ["full_attention"] * LAYERS,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    },
    # experts, some of them beside shared ones and above dense layers
    **_all("afmoe aria_text cohere2_moe dots1 ernie4_5_moe exaone_moe flex_olmo flint glm4_moe gpt_oss", MOE),
    **_all("granitemoe granitemoe_swa hunyuan_v1_moe hy_v3 jetmoe kolibri1 laguna llama4_text mellum", MOE),
    **_all("mimo_v2_flash minimax minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe solar_open", MOE),
    **_all("axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v4", MOE_LATENT),
    **_all("qwen3_5_moe_text qwen3_next", MOE | LINEAR_ATTENTION),
    "qwen4_exp_text": MOE | LINEAR_ATTENTION | {"layer_types": ["linear_attention"] * LAYERS, "hc_lowrank": 8},
    "jamba": MOE | {"use_mamba_kernels": False},
    "beam": MOE | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "bailing_hybrid": MOE_LATENT | {"layer_group_size": 2},
    "dbrx": TOKENS
    | {
        "d_model": HIDDEN,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}
        | ({} if older_than("transformers", "5.0") else {"hidden_size": HIDDEN}),  # before, d_model says it
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    },
    "deepseek_v4": MOE | {"q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2, "index_head_dim": 8, "index_n_heads": 2},
    "gemma4_text": MOE | PER_LAYER_INPUT | {"global_head_dim": 8, "enable_moe_block": True, "top_k_experts": 2},
    "dots3_note_text": MOE_LATENT
    | {"shared_experts_intermediate_size": 24}
    | {f"swa_{name}": value for name, value in LATENT.items()}
    | {"swa_head_dim": 16, "swa_num_attention_heads": 4},
    "granitemoeshared": MOE | {"shared_intermediate_size": 24},
    "granitemoehybrid": MOE | MAMBA2 | {"shared_intermediate_size": 24, "layer_types": ["mamba", "attention", "mamba"]},
    "inkling_text": MOE | SLIDING,
    "inkling2_text": MOE | SLIDING,
    "kimi_linear": MOE_LATENT | {"linear_head_dim": 8, "linear_num_heads": 2},
    "lfm2_moe": MOE | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": MOE_LATENT
    | {"num_hidden_layers": 2 * LAYERS, "expert_ffn_hidden_size": 24, "zero_expert_num": 2, "moe_topk": 2},
    "minimax_m3_vl_text": MOE | {"shared_intermediate_size": 24, "dense_intermediate_size": INTERMEDIATE},
    "nemotron_h": MOE
    | {"layers_block_type": ["attention", "mlp", "moe"], "moe_shared_expert_intermediate_size": 24}
    | {"moe_latent_size": LATENT_EXPERTS},
    "zaya": MOE | {"num_experts_per_tok": 1, "router_hidden_size": 8},
}

ZAMBA: Settings = DENSE_NO_HEAD_DIM | {"num_hidden_layers": 12, "use_mamba_kernels": False}
REFUSED: dict[str, tuple[str, Settings]] = {
    "zamba": ("mamba layers have no feed-forward, the others share one", ZAMBA),
    "mamba": ("has no feed-forward", DENSE),
    "falcon_mamba": ("has no feed-forward", DENSE),
    "mamba2": ("has no feed-forward", DENSE | {"num_heads": 4, "head_dim": 16, "state_size": 8}),
}


DIFFERENT_BEFORE = {  # a version, and what is different before it; in the first that was tried, not the first that is
    "doge": ("5.23", "depends on padding that is masked"),
    "longcat_flash": ("5.23", "has two numbers of layers"),
    "recurrent_gemma": ("5.0", "keeps the state of the last batch"),
}


def skip_unknown(family: str) -> None:
    """Skip the test where the installed version has no such family."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")


def tiny(family: str, **overrides: Any) -> PreTrainedModel:
    """A randomly initialised model, always the same, in eval mode and float32.

    Experts run one by one, because the faster implementations have no float64; `experts_implementation` overrides that.
    """
    if family in DIFFERENT_BEFORE and older_than("transformers", DIFFERENT_BEFORE[family][0]):
        pytest.skip(f"{family} {DIFFERENT_BEFORE[family][1]} before transformers {DIFFERENT_BEFORE[family][0]}")
    skip_unknown(family)
    settings = FAMILIES[family] if family in FAMILIES else REFUSED[family][1]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **({"experts_implementation": "eager"} | settings | overrides))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.is_meta and not parameter.any():
                parameter.normal_(std=0.02)  # some start at zero, which hides mistakes
    return model
