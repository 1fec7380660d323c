"""Quantised models against the same models with the dequantised weights in plain linear maps."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.families import tiny
from helpers.samples import collate, error_over_spread, make_samples, record_all
from helpers.training import arguments
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from resofilter_trainer import InputError, ResonanceConfig, ScoreTable, Warmup, literal, score_dataset, score_layers
from resofilter_trainer.data.fingerprints import hash_weights
from resofilter_trainer.data.loading import load_weights, placed
from resofilter_trainer.model.gradients import segments_of
from resofilter_trainer.model.micro_batch import MicroBatch
from resofilter_trainer.model.modes import evaluating
from resofilter_trainer.model.quantised import bits_of, plain_matrix
from resofilter_trainer.model.step_recorder import StepRecorder
from resofilter_trainer.model.training_recorder import TrainingRecorder
from resofilter_trainer.model.up_projection import find_up_projections

bitsandbytes = pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
from transformers import BitsAndBytesConfig  # noqa: E402

FAMILIES = ["llama", "gpt2", "phi3", "mixtral"]  # plain, transposed, gate and up in one map, experts that stay plain
KINDS = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4 bits twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "4 bits fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8 bits": {"load_in_8bit": True},
}
CONFIGS = {"adamw": ResonanceConfig(eps=1e-4), "sgd": ResonanceConfig(update="sgd")}
ROWS = [{"prompt": f"what is {i} + {i % 5} ?", "completion": " so" * (i % 4) + f" {i + i % 5}"} for i in range(20)]


def works_here() -> str:
    """Why bitsandbytes cannot do without a GPU on this machine, or nothing."""
    x = torch.ones(2, 64, requires_grad=True)
    for kind in (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt):
        settings = {"has_fp16_weights": False} if "8bit" in kind.__name__ else {"compute_dtype": torch.float32}
        try:
            kind(64, 64, **settings).to("cpu").eval()(x).sum().backward()
        except Exception as error:
            return f"bitsandbytes cannot do {kind.__name__} on this CPU: {error}"
    return ""


pytestmark = pytest.mark.skipif(bool(works_here()), reason=works_here() or "works")


class Rounded(torch.autograd.Function):
    """Linear8bitLt's own output, which rounds inputs to 8 bits and itself to float16; a plain map's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, quantised: nn.Module) -> Tensor:
        ctx.save_for_backward(weight)
        return quantised(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.saved_tensors[0], None, None


class Rounding(nn.Linear):
    quantised: tuple[nn.Module, ...] = ()  # in a tuple, so that it is no part of the model

    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(x, self.weight, *self.quantised) if self.quantised else super().forward(x)


def plain_copy(model: nn.Module) -> nn.Module:
    """The model with every quantised map replaced by a plain one that has the dequantised weight."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if not isinstance(module, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
            continue
        weight = plain_matrix(module, module.weight).float()
        kind = Rounding if isinstance(module, bitsandbytes.nn.Linear8bitLt) else nn.Linear
        plain = kind(weight.shape[1], weight.shape[0], bias=module.bias is not None)
        plain.weight.data = weight
        if module.bias is not None:
            plain.bias.data = module.bias.detach().float()
        if isinstance(plain, Rounding):
            plain.quantised = (module,)
        model.set_submodule(name, plain)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family in FAMILIES:
        found[family] = tmp_path_factory.mktemp(family)
        tiny(family).save_pretrained(found[family])
    return found


def load(folder: Path, kind: str) -> Any:
    settings = {"quantization_config": BitsAndBytesConfig(**KINDS[kind])}
    return load_weights(str(folder), arguments(folder, model_init_kwargs=settings))


def with_adapter(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    targets = ["c_attn", "c_fc"] if "gpt2" in type(model).__name__.lower() else ["o_proj", "up_proj", "gate_up_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return adapted.eval()


def by_the_book(weight: Any) -> Tensor:
    """A weight as bitsandbytes dequantises it."""
    if bits_of(weight) == 4:
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_is_what_bitsandbytes_says(family: str, kind: str, folders: dict[str, Path]) -> None:
    model = load(folders[family], kind)
    plain = find_up_projections(tiny(family))
    for each, own in zip(find_up_projections(model), plain, strict=True):
        weight = each.plain_weight()
        assert weight.shape == (own.plain_weight().T if own.kind == "conv1d" else own.plain_weight()).shape
        assert each.entries == weight.numel() == own.entries
        if family == "mixtral":  # experts in one parameter are left as they are
            assert weight.data_ptr() == each.up(each.parameter).data_ptr()
            continue
        assert (each.kind, bits_of(each.parameter)) == ("linear", 8 if kind == "8 bits" else 4)
        torch.testing.assert_close(weight, each.up(by_the_book(each.parameter)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("update", CONFIGS)
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_dequantised_weights(
    family: str, kind: str, adapter: bool, update: str, folders: dict[str, Path]
) -> None:
    if adapter and family == "mixtral":
        pytest.skip("an adapter's targets are linear maps")
    model, samples = load(folders[family], kind), make_samples()
    plain = plain_copy(model)
    if adapter:
        model, plain = with_adapter(model), with_adapter(plain)
        set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    truth = record_all(plain, samples, CONFIGS[update], size=3)
    found = record_all(model, samples, CONFIGS[update], size=3)
    assert error_over_spread(found, truth) < 1e-5
    np.testing.assert_allclose(found.loss, truth.loss, rtol=1e-5)
    assert sum(bits_of(each) is not None for each in model.parameters()) > 0  # still quantised


def test_scores_are_the_literal_procedures_on_the_dequantised_weights(folders: dict[str, Path]) -> None:
    model, samples = load(folders["llama"], "4 bits"), make_samples()
    truth = literal(plain_copy(model).double(), samples, CONFIGS["adamw"])
    assert error_over_spread(record_all(model, samples, CONFIGS["adamw"]), truth) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_ran_without_gradients_can_be_measured(kind: str, tmp_path: Path) -> None:
    """On some processors bitsandbytes then switches weights to a layout without a backward, for good."""
    tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    model, samples = load(tmp_path, kind), make_samples()
    truth = record_all(model, samples, CONFIGS["adamw"])
    with torch.no_grad():
        model.eval()(input_ids=samples[0]["input_ids"][None])
    found = record_all(model, samples, CONFIGS["adamw"])
    assert error_over_spread(found, truth) < 0.05  # the other layout rounds scales to bfloat16
    np.testing.assert_array_equal(found.layers, record_all(model, samples, CONFIGS["adamw"]).layers)


def test_the_layout_is_allowed_again_afterwards(folders: dict[str, Path]) -> None:
    model = load(folders["llama"], "4 bits")
    up = model.model.layers[0].mlp.up_proj
    up.support_avx512bf16_for_cpu = True
    with evaluating(model):
        assert not up.support_avx512bf16_for_cpu
    assert up.support_avx512bf16_for_cpu


@pytest.mark.parametrize("kind", ["4 bits twice", "8 bits"])
def test_training_is_measured_and_so_is_its_step(kind: str, folders: dict[str, Path]) -> None:
    model = load(folders["llama"], kind)
    plain = plain_copy(model)
    if kind == "8 bits":  # which on a CPU, while it trains, does not round its inputs
        for module in plain.modules():
            vars(module).pop("quantised", None)
    model, plain = with_adapter(model).train(), with_adapter(plain).train()
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    batch = collate(make_samples(4))
    found, truth = (trained(each, batch) for each in (model, plain))
    np.testing.assert_allclose(found[0], truth[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], truth[1], rtol=1e-4)


def trained(model: nn.Module, batch: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """One step as the recorder of samples and the recorder of the optimizer's step measure it."""
    record, step = TrainingRecorder(model, CONFIGS["adamw"]), StepRecorder(model, CONFIGS["adamw"])
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    record.attach()
    coming = MicroBatch(batch["input_ids"], batch["labels"], segments_of(batch), 1.0)
    record.expect([coming])
    step.before()
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
    optimizer.step()
    (measured,) = record.take()
    record.detach()
    return measured.layers, step.after()


@pytest.mark.filterwarnings("ignore::resofilter_trainer.config.ScoreWarning")
@pytest.mark.parametrize("kind", ["4 bits twice", pytest.param("8 bits", marks=pytest.mark.slow)])
def test_a_model_that_was_saved_quantised_is_scored_from_its_folder(
    kind: str, tiny_model_dir: Path, tokenizer, tmp_path: Path
) -> None:
    model = load(tiny_model_dir, kind)
    model.save_pretrained(tmp_path / "quantised")
    dataset, args = Dataset.from_list(ROWS), arguments(tmp_path)
    settings = {"quantization_config": BitsAndBytesConfig(**KINDS[kind])}
    loading = arguments(tmp_path, model_init_kwargs=settings)
    ways = [(model, args), (str(tmp_path / "quantised"), args), (str(tiny_model_dir), loading)]
    found = [score_dataset(each, dataset, tokenizer, own, precision="float32") for each, own in ways]
    for each in found[1:]:
        np.testing.assert_allclose(each.column("score"), found[0].column("score"), rtol=1e-6)
        assert each.provenance.weights == found[0].provenance.weights
    assert placed(model, args) is model
    score_dataset(model, dataset, tokenizer, args, precision="bfloat16")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::resofilter_trainer.config.ScoreWarning")
@pytest.mark.parametrize("kind", ["4 bits twice", "8 bits"])
def test_a_warm_up_tunes_an_adapter_on_a_copy_of_a_quantised_model(
    kind: str, tiny_model_dir: Path, tokenizer, tmp_path: Path
) -> None:
    model, dataset = load(tiny_model_dir, kind), Dataset.from_list(ROWS)
    settings = Warmup(rows=8, batch_size=2, lr=1e-2, method="lora")

    def score(name: str, warmup: Warmup | None) -> ScoreTable:
        args = arguments(tmp_path)
        return score_dataset(
            model, dataset, tokenizer, args, output=tmp_path / name, precision="float32", warmup=warmup
        )

    before, cold = hash_weights(model), score("cold", None)
    warm = score("warm", settings)
    assert hash_weights(model) == before
    assert (warm.column("loss") < cold.column("loss")).all()
    kept = score("kept", replace(settings, cache=tmp_path / "warm" / "warmup"))
    assert kept.table.equals(warm.table)
    with pytest.raises(InputError, match=r"is quantised, and a warm-up can tune an adapter on it only: choose 'lora'"):
        score("full", Warmup(rows=8))


def test_hashes_tell_quantised_models_apart(folders: dict[str, Path]) -> None:
    names = [*KINDS, "4 bits"]
    hashes = [hash_weights(load(folders["llama"], kind)) for kind in names]
    assert hashes[0] == hashes[-1]
    assert len(set(hashes)) == len(KINDS)
    model = load(folders["llama"], "8 bits")
    model.model.layers[0].mlp.up_proj.weight.SCB[0] *= 2
    assert hash_weights(model) not in hashes
    model = load(folders["llama"], "4 bits")
    model.model.layers[0].mlp.up_proj.weight.quant_state.absmax[0] *= 2
    assert hash_weights(model) not in hashes


def test_what_needs_plain_weights_refuses_quantised_ones(folders: dict[str, Path], tokenizer, tmp_path: Path) -> None:
    model = load(folders["llama"], "8 bits")
    with pytest.raises(InputError, match=r"literal procedure needs .* 'model\.layers\.0\.\S+' is quantised to 8 bits"):
        literal(model, make_samples(2), ResonanceConfig())
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}])
    with pytest.raises(InputError, match=r"Measuring all layers needs the gradients of the weights themselves"):
        score_layers(model, rows, tokenizer, arguments(tmp_path))


class Packed(nn.Module):
    """A map that stores its weight as GPTQ does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 48, dtype=torch.int32))


def test_other_quantisations_are_refused_by_their_names() -> None:
    model = tiny("llama")
    up = model.model.layers[2].mlp.up_proj
    plain = up.weight.detach()
    for weight, kind in [
        (plain.to(torch.float8_e4m3fn), r"torch\.float8_e4m3fn"),
        (TwoTensor(plain, plain), "TwoTens"),
    ]:
        up.weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(
            InputError, match=rf"layers\.2\.mlp\.up_proj' is quantised to {kind}\w*, in a Linear\. Load"
        ):
            find_up_projections(model, 1)
    model.model.layers[2].mlp.up_proj = Packed()
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj' is a Packed, which has no weight to read\. Load"):
        find_up_projections(model, 1)
