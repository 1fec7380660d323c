"""The up-projection is found in every family, and it is the up-projection."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.families import (
    BERT,
    DENSE_NO_HEAD_DIM,
    FAMILIES,
    HIDDEN,
    INTERMEDIATE,
    LATENT_EXPERTS,
    LAYERS,
    MOE,
    REFUSED,
    VOCAB,
    skip_unknown,
    tiny,
)
from helpers.versions import older_than
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from resofilter_trainer.config import InputError
from resofilter_trainer.model.modes import own_precision
from resofilter_trainer.model.up_projection import NAMES, UpProjection, find_up_projections

N = 2
EXPERTS_ARE_STACKED = not older_than("transformers", "5.0")  # in most families; before, each is a module
ON_A_DEVICE = {"apertus"} if older_than("transformers", "5.2") else set()  # its activation reads its parameters
IDS = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


def _names(*lines: str) -> set[str]:
    return set(" ".join(lines).split())


# One branch only: the activation follows the up-projection.
UNGATED = _names(
    "apertus arcee bloom codegen ctrl falcon gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gptj jais2",
    "mpt nanochat nemotron nemotron_h openai-gpt persimmon phi rwkv starcoder2",
    *(family for family, settings in FAMILIES.items() if settings.items() >= BERT.items()),
)
# One branch only, and the up-projection stands in the layer without a block around it.
BARE = _names(
    "bart bigbird_pegasus biogpt blenderbot blenderbot-small marian mbart mvp opt pegasus plbart trocr whisper xglm xlm"
)
# Gated, but inside the block follows a norm (bitnet, axk1) or a softcap (inkling2), so that its output is not linear in
# the up-projection. Read in the source instead: the branch beside the activation is the one that is taken.
BENT = {"bitnet", "axk1", "inkling2_text"}
GATED = [family for family in FAMILIES if family not in UNGATED | BARE | BENT]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_resolves_without_data(family):
    with torch.device("cpu" if family in ON_A_DEVICE else "meta"):
        model = tiny(family)
    found = find_up_projections(model, N)
    owned = {id(parameter) for parameter in model.parameters()}

    assert sorted({each.layer for each in found}) == [LAYERS - 2, LAYERS - 1]
    assert [each.layer for each in found] == sorted(each.layer for each in found)
    assert len({each.name for each in found}) == len(found)
    for each in found:
        assert id(each.parameter) in owned
        assert f".{each.layer}." in each.name
        up = each.up(each.parameter)
        assert up._base is each.parameter or up.shape == each.parameter.shape
        assert up.numel() * (1 if each.outputs == slice(None) else 2) == each.parameter.numel()
        check_shape(family, each, tuple(up.shape))


def check_shape(family: str, each: UpProjection, shape: tuple[int, ...]) -> None:
    inputs = LATENT_EXPERTS if family == "nemotron_h" and each.kind == "experts" else HIDDEN
    if each.kind == "experts":
        assert inputs in shape
    else:
        outputs, into = shape if each.kind == "linear" else shape[::-1]
        assert (outputs >= 24, into) == (True, inputs)
        assert each.parameter is each.module.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_hooked_runs_once_and_matters(family):
    model = tiny(family)
    found = find_up_projections(model, N)
    calls = Calls(model, *(each.module for each in found))
    tokens = IDS.numel()
    for each in found:
        assert len(calls.of[each.module]) == 1
        args, _, output = calls.of[each.module][0]
        assert args[0].numel() == tokens * HIDDEN
        if each.kind == "experts":
            assert output.numel() == tokens * HIDDEN
        else:
            up = output.reshape(tokens, -1)[:, each.outputs]
            assert up.shape[1] == each.up(each.parameter).numel() // HIDDEN
    with torch.no_grad():
        last = found[-1]
        last.up(last.parameter).add_(torch.randn(last.up(last.parameter).shape))
        assert calls.output.loss.isfinite()
        assert (run(model).logits - calls.output.logits).abs().max() > 1e-6


@pytest.mark.parametrize("family", GATED)
def test_of_two_branches_it_is_the_one_without_activation(family):
    for k in range(len(find_up_projections(tiny(family), 1))):
        model = tiny(family)
        each = find_up_projections(model, 1)[k]
        moved, bent = bend(model, each, each.index)
        assert 0 <= bent < 1e-4 * moved, each.name
        if each.outputs != slice(None):
            model = tiny(family)
            each = find_up_projections(model, 1)[k]
            moved, bent = bend(model, each, other_half(each))
            assert bent > 1e-3 * moved > 0, each.name


@pytest.mark.parametrize("family", sorted(UNGATED))
def test_of_one_branch_it_is_the_one_before_the_activation(family):
    model = tiny(family)
    each = find_up_projections(model, 1)[-1]
    moved, bent = bend(model, each, each.index)
    assert bent > 1e-2 * moved > 0


@pytest.mark.parametrize("family", REFUSED)
def test_layers_without_feed_forward_are_refused(family):
    with torch.device("meta"):
        model = tiny(family)
    with pytest.raises(InputError, match=f"No up-projection found in '{family}'") as error:
        find_up_projections(model, 3)
    for name in NAMES:
        assert name in str(error.value)
    assert 'up_projection="<regex>"' in str(error.value)


def test_some_layers_without_feed_forward_are_named():
    model = tiny("nemotron_h", layers_block_type=["mlp", "attention", "mlp"])
    assert [each.layer for each in find_up_projections(model, 1)] == [2]
    with pytest.raises(InputError, match="looked in the last 2 of 3 layers; missing in layer 1"):
        find_up_projections(model, 2)


def test_llama_and_gpt2_by_hand():
    model = tiny("llama")
    (each,) = find_up_projections(model, 1)
    assert each.module is model.model.layers[2].mlp.up_proj
    assert each.parameter is model.model.layers[2].mlp.up_proj.weight
    assert (each.name, each.layer, each.kind) == ("model.layers.2.mlp.up_proj", 2, "linear")
    (each,) = find_up_projections(tiny("gpt2"), 1)
    assert (each.name, each.kind) == ("transformer.h.2.mlp.c_fc", "conv1d")
    assert each.parameter.shape == (HIDDEN, 4 * HIDDEN)


def test_phi3_takes_the_second_half_of_rows():
    model = tiny("phi3")
    (each,) = find_up_projections(model, 1)
    assert torch.equal(each.up(each.parameter), each.parameter[INTERMEDIATE:])
    hidden = torch.randn(2, 7, HIDDEN)
    outputs = each.module(hidden)[..., each.outputs]
    torch.testing.assert_close(outputs, hidden @ each.up(each.parameter).T)


def test_gpt_oss_is_transposed_and_interleaved_and_llama4_transposed():
    (each,) = find_up_projections(tiny("gpt_oss"), 1)
    assert torch.equal(each.up(each.parameter), each.parameter[:, :, 1::2])
    each, _ = find_up_projections(tiny("llama4_text"), 1)
    assert torch.equal(each.up(each.parameter), each.parameter[:, :, INTERMEDIATE:])
    if EXPERTS_ARE_STACKED:
        (each,) = find_up_projections(tiny("mixtral"), 1)
        assert torch.equal(each.up(each.parameter), each.parameter[:, INTERMEDIATE:, :])


def qwen3_vl_moe() -> tuple[nn.Module, UpProjection]:
    text = MOE | {"mlp_only_layers": [], "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": HIDDEN}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = AutoConfig.for_model(
        "qwen3_vl_moe", text_config=text, vision_config=vision, experts_implementation="eager"
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    return model, find_up_projections(model, 1)[0]


def test_qwen3_vl_moe_was_transposed():
    model, each = qwen3_vl_moe()
    half = each.parameter[:, 24:, :] if EXPERTS_ARE_STACKED else each.parameter[:, :, 24:]
    assert torch.equal(each.up(each.parameter), half)
    moved, bent = bend(model, each, each.index)
    assert 0 <= bent < 1e-4 * moved
    model, each = qwen3_vl_moe()
    moved, bent = bend(model, each, other_half(each))
    assert bent > 1e-3 * moved > 0


def test_moshi_holds_both_branches_in_a_map_that_elsewhere_holds_one():
    assert find_up_projections(tiny("moshi"), 1)[0].outputs == slice(INTERMEDIATE, None)
    assert find_up_projections(tiny("phi"), 1)[0].outputs == slice(None)


def test_a_layer_may_have_several():
    kinds = [(each.kind, each.name.rpartition("mlp.")[2]) for each in find_up_projections(tiny("deepseek_v3"), 1)]
    experts = ["experts.gate_up_proj"] if EXPERTS_ARE_STACKED else [f"experts.{k}.up_proj" for k in range(4)]
    assert kinds == [*(("experts", name) for name in experts), ("linear", "shared_experts.up_proj")]


def test_dense_layers_below_experts():
    found = find_up_projections(tiny("deepseek_v3"), LAYERS)
    assert [each.kind for each in found if each.layer == 0] == ["linear"]
    experts = ["experts"] if EXPERTS_ARE_STACKED else ["experts"] * 4
    assert [each.kind for each in found if each.layer == 1] == [*experts, "linear"]


def test_experts_in_a_module_list_are_replayed_with_their_block():
    model = ListOfExperts()
    found = find_up_projections(model, 1)
    assert [each.name for each in found] == [f"layers.1.mlp.experts.{k}.w3" for k in range(2)]
    assert all(each.kind == "experts" and each.module is model.layers[1].mlp for each in found)
    assert found[1].parameter is model.layers[1].mlp.experts[1].w3.weight


class ListOfExperts(nn.Module):
    """The names of Mixtral before its experts were fused."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="list_of_experts")
        self.layers = nn.ModuleList(self._layer() for _ in range(2))

    @staticmethod
    def _layer() -> nn.Module:
        experts = [nn.ModuleDict({name: nn.Linear(4, 4) for name in ("w1", "w2", "w3")}) for _ in range(2)]
        return nn.ModuleDict({"mlp": nn.ModuleDict({"gate": nn.Linear(4, 2), "experts": nn.ModuleList(experts)})})


SMALL = DENSE_NO_HEAD_DIM | {"hidden_size": 64, "num_key_value_heads": 4}


@pytest.mark.parametrize(
    ("family", "settings", "stack"),
    [
        ("gemma3", {"text_config": SMALL, "vision_config": SMALL}, "model.language_model.layers"),
        ("got_ocr2", {"text_config": SMALL}, "model.language_model.layers"),
        ("fuyu", {"text_config": SMALL}, "model.language_model.layers"),
        ("qwen3_5", {"text_config": SMALL}, "model.layers"),
        ("phi4_multimodal", SMALL | {"vision_config": {}, "audio_config": {}}, "model.layers"),
    ],
)
def test_vision_and_audio_are_left_alone(family, settings, stack):
    skip_unknown(family)
    config = AutoConfig.for_model(family, **copy.deepcopy(settings))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = find_up_projections(model, 1)
    assert [each.name.startswith(f"{stack}.2.") for each in found] == [True]


def test_float64():
    (each,) = find_up_projections(tiny("llama").double(), 1)
    assert each.up(each.parameter).dtype == torch.float64


@pytest.mark.parametrize(("family", "target"), [("llama", "up_proj"), ("phi3", "gate_up_proj"), ("gpt2", "c_fc")])
def test_peft_on_the_up_projection_hooks_the_wrapper(family, target):
    model = get_peft_model(tiny(family), LoraConfig(target_modules=[target], fan_in_fan_out=family == "gpt2"))
    found = find_up_projections(model, N)
    assert [each.layer for each in found] == [1, 2]
    for each, plain in zip(found, find_up_projections(tiny(family), N), strict=True):
        assert each.name == f"base_model.model.{plain.name}"
        assert each.module is model.get_submodule(each.name)
        assert each.parameter is each.module.base_layer.weight
        assert (each.kind, each.index, each.outputs) == (plain.kind, plain.index, plain.outputs)


def test_peft_elsewhere_changes_only_the_names():
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    (each,) = find_up_projections(model, 1)
    assert each.name == "base_model.model.model.layers.2.mlp.up_proj"
    assert isinstance(each.module, nn.Linear)
    assert each.parameter is each.module.weight


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT 0.18 knows no experts
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_peft_on_fused_experts_gives_the_base_parameter(family):
    skip_separate_experts(family)
    plain = tiny(family)
    parameter = plain.model.layers[2].mlp.experts.gate_up_proj
    model = get_peft_model(plain, LoraConfig(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]))
    (each,) = find_up_projections(model, 1)
    assert each.parameter is parameter
    assert each.kind == "experts"
    assert each.module is model.base_model.model.model.layers[2].mlp
    assert each.name == "base_model.model.model.layers.2.mlp.experts.gate_up_proj"


def test_a_pattern_replaces_the_names():
    (each,) = find_up_projections(tiny("llama"), 1, pattern=r"mlp\.gate_proj$")
    assert (each.name, each.kind, each.outputs) == ("model.layers.2.mlp.gate_proj", "linear", slice(None))
    found = find_up_projections(tiny("mamba"), 2, pattern=r"mixer\.in_proj")
    assert [each.name for each in found] == ["backbone.layers.1.mixer.in_proj", "backbone.layers.2.mixer.in_proj"]


def test_a_pattern_does_not_find_adapters():
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["up_proj"]))
    (each,) = find_up_projections(model, 1, pattern="up_proj")
    assert each.parameter is each.module.base_layer.weight


@pytest.mark.parametrize(
    ("family", "up", "down"),
    [
        ("mixtral", (4, INTERMEDIATE, HIDDEN), (4, HIDDEN, INTERMEDIATE)),
        ("gpt_oss", (4, HIDDEN, INTERMEDIATE), (4, INTERMEDIATE, HIDDEN)),
    ],
)
def test_a_pattern_finds_parameters_of_experts_and_halves_known_names(family, up, down):
    skip_separate_experts(family)
    (each,) = find_up_projections(tiny(family), 1, pattern=r"experts\.gate_up_proj$")
    assert (each.kind, each.up(each.parameter).shape) == ("experts", up)
    (each,) = find_up_projections(tiny(family), 1, pattern=r"experts\.down_proj$")
    assert (each.kind, each.up(each.parameter).shape) == ("experts", down)


def test_a_pattern_that_matches_nothing_shows_names():
    with pytest.raises(InputError, match=r"'nope' matches nothing in 'llama'.*model\.layers\.2\.self_attn\.q_proj"):
        find_up_projections(tiny("llama"), 2, pattern="nope")


def test_a_pattern_must_be_a_regex():
    with pytest.raises(InputError, match=r"'\(' is not a regular expression: missing \)"):
        find_up_projections(tiny("llama"), 1, pattern="(")


@pytest.mark.parametrize("n_layers", [-1, 0, 4])
def test_n_layers_must_fit_the_depth(n_layers):
    with pytest.raises(InputError, match=f"between 1 and 3, the depth of 'llama'; got {n_layers}"):
        find_up_projections(tiny("llama"), n_layers)


def test_a_model_needs_decoder_layers():
    model = nn.Sequential(nn.Linear(2, 2))
    model.config = SimpleNamespace(model_type="flat")  # type: ignore[assignment]
    with pytest.raises(InputError, match="'flat' has no decoder layers"):
        find_up_projections(model, 1)


def test_quantised_weights_are_refused():
    model = tiny("llama")
    up = model.model.layers[2].mlp.up_proj
    up.weight = nn.Parameter(torch.zeros(up.weight.shape, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match=r"'model\.layers\.2\.mlp\.up_proj' is quantised to torch\.uint8"):
        find_up_projections(model, 1)


class Calls:
    """The arguments and outputs of modules in one run of the model."""

    def __init__(self, model: nn.Module, *modules: nn.Module) -> None:
        self.of: dict[nn.Module, list[tuple[Any, Any, Tensor]]] = {module: [] for module in modules}
        handles = [module.register_forward_hook(self._catch, with_kwargs=True) for module in self.of]
        self.output = run(model)
        for handle in handles:
            handle.remove()

    def _catch(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.of[module].append((args, kwargs, first(output)))


def bend(model: nn.Module, each: UpProjection, part: tuple[slice, ...]) -> tuple[float, float]:
    """How far `f(W + d)` is from `f(W)`, and `f(W + 2 d)` from the straight line through both, at the feed-forward.

    `d` is zero outside `part` of the parameter. The block runs in float64.
    """
    block = feed_forward(model, each)
    args, kwargs, _ = Calls(model, block).of[block][0]
    block.double()
    args = [double(value) for value in args]
    kwargs = {name: double(value) for name, value in kwargs.items()}
    step = 0.05 * torch.randn(each.parameter[part].shape, generator=torch.Generator().manual_seed(1))
    outputs = []
    for _ in range(3):
        with torch.no_grad(), own_precision(block):
            outputs.append(first(block(*args, **kwargs)).clone())
            each.parameter[part] += step
    at_0, at_1, at_2 = outputs
    return (at_1 - at_0).abs().max().item(), (at_2 - 2 * at_1 + at_0).abs().max().item()


def skip_separate_experts(family: str) -> None:
    """Skip the test where the experts of mixtral are modules."""
    if family == "mixtral" and not EXPERTS_ARE_STACKED:
        pytest.skip("the experts of mixtral are modules before transformers 5.0")


def feed_forward(model: nn.Module, each: UpProjection) -> nn.Module:
    """The child of the decoder layer that contains the up-projection."""
    before, _, after = each.name.partition(f".{each.layer}.")
    module = model.get_submodule(f"{before}.{each.layer}")
    for child in after.split("."):
        module = module.get_submodule(child)
        if not isinstance(module, nn.ModuleList):
            return module
    raise AssertionError(each.name)


def other_half(each: UpProjection) -> tuple[slice, ...]:
    """The gate's entries of a parameter that has both."""
    gate = slice(0, each.outputs.start) if each.outputs.step is None else slice(0, None, 2)
    return tuple(gate if one == each.outputs else one for one in each.index)


@torch.no_grad()
def run(model: nn.Module) -> Any:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS, use_cache=False)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
