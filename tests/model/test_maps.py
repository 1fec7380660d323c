"""Up-projections that are not a plain linear map that runs once on all tokens: measured right, or refused.

Where a remedy is named, it is followed, and the scores are then those of the literal procedure.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.experts import EXPERTS, Separate, Stacked
from helpers.families import HIDDEN, tiny
from helpers.samples import collate, error_over_spread, make_samples, record_all
from helpers.versions import older_than
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from resofilter_trainer import InputError, Resonance, ResonanceConfig, literal, score_dataset
from resofilter_trainer.config import UpdateName
from resofilter_trainer.model.gradients import segments_of
from resofilter_trainer.model.micro_batch import MicroBatch
from resofilter_trainer.model.modes import own_precision
from resofilter_trainer.model.training_recorder import TrainingRecorder
from resofilter_trainer.model.up_projection import find_up_projections

CONFIG = ResonanceConfig(n_layers=2, eps=1e-3, weight_decay=0.1)
SAMPLES = make_samples(4, longest=12)
Model = nn.Module


def in_training(model: Model, config: ResonanceConfig = CONFIG) -> Resonance:
    batch, recorder = collate(SAMPLES), TrainingRecorder(model, config)
    recorder.attach()
    count = int((batch["labels"][:, 1:] != -100).sum())
    recorder.expect([MicroBatch(batch["input_ids"], batch["labels"], segments_of(batch), 1 / count)])
    try:
        with own_precision(model):
            model(**batch).loss.backward()
        return recorder.take()[0]
    finally:
        recorder.detach()


def recorded(model: Model, config: ResonanceConfig = CONFIG) -> Resonance:
    return record_all(model, SAMPLES, config)


def by_the_book(model: Model, config: ResonanceConfig = CONFIG) -> Resonance:
    return literal(model, SAMPLES, config)


def assert_right(model: Model, config: ResonanceConfig = CONFIG, truth: Model | None = None) -> None:
    expected = by_the_book(truth or model, config)
    assert error_over_spread(recorded(model, config), expected) < 1e-6
    assert error_over_spread(in_training(model, config), expected) < 1e-5


def refusal(model: Model, match: str, config: ResonanceConfig = CONFIG, ways: tuple[Callable, ...] = ()) -> str:
    """The one line in which all ways of measuring refuse a model."""
    said = []
    for measure in ways or (recorded, in_training, by_the_book):
        with pytest.raises(InputError, match=match) as error:
            measure(model, config)
        said.append(str(error.value))
    assert not any("\n" in each for each in said)
    return said[0]


def with_feed_forward(forward: Callable[[nn.Module, Tensor], Tensor]) -> Model:
    """A tiny Llama in float64 with another forward in every feed-forward."""
    model = tiny("llama").double()
    for layer in model.model.layers:
        layer.mlp.forward = forward.__get__(layer.mlp)
    return model


def with_maps(make: Callable[[nn.Linear], nn.Module | None]) -> Model:
    """A tiny Llama in float64 with what `make` makes of every up-projection."""
    model = tiny("llama").double()
    for layer in model.model.layers:
        made = make(layer.mlp.up_proj)
        layer.mlp.up_proj = layer.mlp.up_proj if made is None else made
    return model


def logits_of(model: Model) -> Tensor:
    return model(input_ids=SAMPLES[0]["input_ids"][None], use_cache=False).logits


class Own(nn.Linear):
    """A map with the weight of another and a forward of its own."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.weight = plain.weight


class Product(Own):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Scaled(Own):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight)


class Normed(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight))


class Curved(Own):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x), self.weight)


class Pair(Own):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return F.linear(x, self.weight), None


class Transposed(nn.Module):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(plain.weight.detach().T.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Around(nn.Module):
    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.inner = plain

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_map_of_another_class_is_measured_if_it_is_its_weight() -> None:
    assert_right(with_maps(Product))


@pytest.mark.parametrize("kind", [Scaled, Normed, Curved, Pair, Transposed])
def test_a_map_that_is_not_its_weight_is_refused(kind: type[nn.Module]) -> None:
    cause = rf"layers\.1\.mlp\.up_proj' \({kind.__name__}, with its hooks\) does not return its input times its weight"
    said = refusal(with_maps(kind), f"{cause}.*Make it an nn.Linear")
    assert "or pass up_projection" in said
    if kind is not Pair:  # with which the model does not run
        assert_right(with_maps(kind), ResonanceConfig(n_layers=2, eps=1e-3, up_projection=r"mlp\.down_proj$"))


def test_the_remedy_for_a_map_that_is_not_its_weight() -> None:
    def plainly(plain: nn.Linear) -> None:
        plain.weight.data *= 2

    refusal(with_maps(Scaled), "Make it an nn.Linear that has this matrix as its weight")
    remedied = with_maps(plainly)
    assert_right(remedied)
    torch.testing.assert_close(logits_of(remedied), logits_of(with_maps(Scaled)))


def test_an_adapter_around_a_map_that_is_not_its_weight_is_refused() -> None:
    model = get_peft_model(with_maps(Scaled), LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False))
    refusal(model.double(), r"up_proj' \(Scaled, with its hooks\) does not return")


def test_a_hook_that_changes_what_a_map_returns_is_refused() -> None:
    def hooked(plain: nn.Linear) -> None:
        plain.register_forward_hook(lambda module, args, output: 2 * output)

    refusal(with_maps(hooked), r"\(Linear, with its hooks\) does not return its input times its weight")


def test_a_hook_that_only_watches_is_no_matter() -> None:
    def hooked(plain: nn.Linear) -> None:
        plain.register_forward_hook(lambda module, args, output: None)

    assert_right(with_maps(hooked))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


COMPUTED = {
    "parametrize": lambda plain: parametrize.register_parametrization(plain, "weight", Doubled(), unsafe=True),
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda plain: prune.l1_unstructured(plain, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_is_refused_and_the_remedy_works(kind: str, adapted: bool) -> None:
    model = with_maps(COMPUTED[kind]).eval()
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"])).double().eval()
    logits = logits_of(model)
    layer = r"layers\.1\.mlp\.up_proj' is computed from other parameters"
    remedy = refusal(model, rf"{layer}.*Make it plain, in every layer: `.*`").split("`")[1]
    other = ResonanceConfig(n_layers=2, eps=1e-3, weight_decay=0.1, up_projection=r"up_proj")
    assert refusal(model, layer, other).split("`")[1] == remedy
    for index in range(3):
        exec(remedy.replace("layers.1.", f"layers.{index}."), {"model": model, "torch": torch})
    torch.testing.assert_close(logits_of(model), logits)
    assert_right(model, truth=rebuilt(model))


def rebuilt(model: Model) -> Model:
    """A copy with new maps that have the weights of the up-projections; hooks of spectral_norm outlive its removal."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if re.search(r"up_proj(\.base_layer)?$", name) and isinstance(module, nn.Linear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = module.weight
            model.set_submodule(name, plain)
    return model


def test_a_map_inside_a_module_of_a_known_name_is_the_one_suggested() -> None:
    said = refusal(with_maps(Around), r'such as up_projection=r"mlp\\\.up_proj\\\.inner\$"')
    pattern = said.split('such as up_projection=r"')[1].split('"')[0]
    config = ResonanceConfig(n_layers=2, eps=1e-3, weight_decay=0.1, up_projection=pattern)
    assert_right(with_maps(Around), config)
    plain = recorded(tiny("llama").double())
    assert error_over_spread(recorded(with_maps(Around), config), plain) < 1e-9


def test_a_compiled_map_is_named() -> None:
    refusal(with_maps(lambda plain: torch.compile(plain, backend="eager")), "up_proj' is compiled.*model uncompiled")


def test_the_model_inside_a_wrapper_is_the_remedy() -> None:
    model = nn.DataParallel(tiny("llama").double())
    said = refusal(model, "The model is wrapped in DataParallel")
    with pytest.raises(InputError, match="wrapped in DataParallel"):
        score_dataset(model, Dataset.from_dict({"text": ["a"]}))
    assert_right(eval(said.split("`")[1], {"model": model}))


def test_layers_that_share_a_module_are_refused_and_copies_are_the_remedy() -> None:
    for lower in (0, 1):
        model = tiny("llama").double()
        model.model.layers[2].mlp = model.model.layers[lower].mlp
        refusal(model, "used twice in a forward pass.*If layers share it, give each its own with copy.deepcopy")
        model.model.layers[2].mlp = copy.deepcopy(model.model.layers[lower].mlp)
        assert_right(model)


def test_layers_that_share_a_weight_count_each_by_itself() -> None:
    model = tiny("llama").double()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    apart = copy.deepcopy(model)
    weight = apart.model.layers[2].mlp.up_proj.weight
    apart.model.layers[2].mlp.up_proj.weight = nn.Parameter(weight.detach().clone())
    assert_right(model, truth=apart)


def test_a_feed_forward_in_chunks_is_refused_and_the_remedy_works() -> None:
    model = tiny("bert", chunk_size_feed_forward=1).double()
    refusal(model, "(used twice in a forward pass|runs on tokens of).*config has chunk_size_feed_forward, set it to 0")
    assert_right(tiny("bert", chunk_size_feed_forward=0).double())


def by_keyword(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(input=x))


def in_place(mlp: nn.Module, x: Tensor) -> Tensor:
    up = mlp.up_proj(x)
    up *= F.silu(mlp.gate_proj(x))
    return mlp.down_proj(up.mul_(2).tanh_())


def flattened(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x.flatten(0, 1)).view(*x.shape[:2], -1))


@pytest.mark.parametrize("forward", [by_keyword, in_place, flattened])
def test_ways_to_call_a_map(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = with_feed_forward(forward)
    assert_right(model)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)).double()
    if forward is not by_keyword:  # PEFT has another name for the argument
        assert_right(model)


def test_one_layer_that_works_in_place_above_others() -> None:
    model = tiny("llama").double()
    model.model.layers[2].mlp.forward = in_place.__get__(model.model.layers[2].mlp)
    assert_right(model)


def time_first(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x.transpose(0, 1)).transpose(0, 1))


def some_tokens(mlp: nn.Module, x: Tensor) -> Tensor:
    up = torch.cat([mlp.up_proj(x[:, :-2]), x.new_zeros(len(x), 2, mlp.up_proj.out_features)], 1)
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * up)


@pytest.mark.parametrize("forward", [time_first, some_tokens])
@pytest.mark.parametrize("update", ["adamw", "sgd"])
def test_a_map_that_does_not_run_on_all_tokens_in_order_is_refused(forward: Callable, update: str) -> None:
    config = ResonanceConfig(n_layers=2, update=update)
    refusal(
        with_feed_forward(forward), r"up_proj' cannot be measured: it runs on tokens of shape \(", config,
        (recorded, in_training),
    )  # fmt: skip
    if forward is time_first:  # the other's zeros depend on the length of the batch
        assert_right(with_feed_forward(forward), ResonanceConfig(n_layers=2, eps=1e-3, up_projection="down_proj"))


def detached(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x).detach())


def test_a_forward_without_gradients_is_named() -> None:
    refusal(with_feed_forward(detached), "loss has no gradient at any measured up-projection", CONFIG, (recorded,))
    refusal(with_feed_forward(detached), "loss has no gradient at any measured up-projection", CONFIG, (in_training,))


@pytest.mark.parametrize(
    ("family", "pattern"),
    [("mamba", "A_log"), ("mamba", "conv1d"), ("qwen3_next", "conv1d"), ("rwkv", "feed_forward.time_mix_key")],
)
def test_a_weight_in_a_block_that_mixes_tokens_is_refused(family: str, pattern: str) -> None:
    config = ResonanceConfig(n_layers=1, eps=1e-3, up_projection=pattern)
    model = tiny(family).double()
    refusal(model, "cannot be measured: it is in a .* which mixes tokens", config, (recorded, in_training))


@pytest.mark.parametrize(("family", "router"), [("mixtral", r"mlp\.gate$"), ("gpt_oss", r"mlp\.router$")])
def test_a_router_is_no_map(family: str, router: str) -> None:
    if family == "mixtral" and older_than("transformers", "5.0"):
        pytest.skip("the router of mixtral is a plain linear map before transformers 5.0")
    refusal(tiny(family).double(), "does not return its input", ResonanceConfig(up_projection=router))


@pytest.mark.parametrize("update", ["adamw", "sgd"])
def test_experts_without_tokens_count_alike_as_modules_and_in_one_tensor(update: UpdateName) -> None:
    config, routed, found = ResonanceConfig(n_layers=2, update=update, weight_decay=0.1), [], []
    for kind in (Separate, Stacked):
        model = tiny("llama")
        for layer in model.model.layers:
            layer.mlp = kind(HIDDEN)
            layer.mlp.gate.register_forward_hook(lambda module, args, output: routed.append(output.argmax(-1)))
        model.double()
        assert_right(model, config)
        found.append(recorded(model, config))
    assert any(1 < len(each.unique()) < EXPERTS for each in routed)
    np.testing.assert_allclose(found[0].layers, found[1].layers, rtol=1e-12)


@pytest.mark.parametrize("family", ["mixtral", "nemotron_h"])
def test_experts_by_a_regex_are_measured_as_by_their_name(family: str) -> None:
    model = tiny(family).double()
    (found,) = find_up_projections(model, 1)[:1]
    config = ResonanceConfig(n_layers=1, eps=1e-3, up_projection=f"{re.escape(found.name)}$")
    assert error_over_spread(recorded(model, config), by_the_book(model, config)) < 1e-6


@pytest.mark.parametrize("family", ["mamba", "zamba"])
def test_the_name_suggested_for_a_model_without_a_known_one_works(family: str) -> None:
    model = tiny(family).double()
    with pytest.raises(InputError, match="No up-projection found") as error:
        find_up_projections(model, 1)
    pattern = str(error.value).split('such as up_projection=r"')[1].split('"')[0]
    config = ResonanceConfig(n_layers=1, eps=1e-3, up_projection=pattern)
    assert error_over_spread(recorded(model, config), by_the_book(model, config)) < 1e-6
