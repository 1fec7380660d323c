"""Every kind of adapter: scored by the effective weight, or refused. The table of docs/adapters.md is held to peft."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from helpers.adapters import (
    BUILDERS,
    CAUSAL,
    NOT_BUILT,
    NOT_MERGED,
    ONLY_FLOAT32,
    REFUSED,
    SCORED,
    UP,
    VOCAB,
    adapted,
    in_transformers,
)
from helpers.families import HIDDEN, tiny
from helpers.samples import collate, error_over_spread, make_samples, record_all, state_of
from helpers.versions import older_than
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn
from torch.nn import functional as F

from resofilter_trainer import InputError, Recorder, Resonance, ResonanceConfig, literal
from resofilter_trainer.config import VersionError
from resofilter_trainer.config.compatibility import has
from resofilter_trainer.model import adapters
from resofilter_trainer.model.effective import effective_weight
from resofilter_trainer.model.gradients import segments_of
from resofilter_trainer.model.micro_batch import MicroBatch
from resofilter_trainer.model.modes import own_precision
from resofilter_trainer.model.step_recorder import StepRecorder
from resofilter_trainer.model.training_recorder import TrainingRecorder
from resofilter_trainer.model.up_projection import find_up_projections

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch, in FRoD
ADAMW = ResonanceConfig(n_layers=2, eps=1e-3, weight_decay=0.1)
PREFIX = {"Cartridge", "prefix tuning", "prefix tuning, prefix_projection"}
SGD = ResonanceConfig(n_layers=2, update="sgd", lr=1.0)
TABLE = Path(__file__).parents[2] / "docs" / "adapters.md"


def build(kind: str) -> tuple[nn.Module, float]:
    """A model in float64, or float32 where peft has nothing else, and the error that rounding explains."""
    model = adapted(kind)
    return (model.float(), 1e-3) if kind in ONLY_FLOAT32 else (model, 1e-6)


def by_bumps(model: nn.Module, samples: list) -> np.ndarray:
    """The mean |dL/dW| of effective weights: of zeros added to each map's output, `out + a bump^T`."""
    found = find_up_projections(model, 2)
    shapes = [each.shape[::-1] if each.kind == "conv1d" else each.shape for each in found]
    dtype = found[0].parameter.dtype
    bumps = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    handles = [
        each.module.register_forward_hook(lambda module, args, out, bump=bump: out + args[0] @ bump.T)
        for each, bump in zip(found, bumps, strict=True)
    ]
    scores = []
    with own_precision(model):
        for sample in samples:
            logits = model(input_ids=sample["input_ids"][None], use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits, sample["labels"][1:], ignore_index=-100)
            scores.append(np.mean([each.abs().mean().item() for each in torch.autograd.grad(loss, bumps)]))
    for handle in handles:
        handle.remove()
    return np.array(scores)


@pytest.mark.parametrize("kind", SCORED)
def test_the_recorder_and_the_literal_procedure_agree(kind: str) -> None:
    model, close = build(kind)
    samples = make_samples(4, longest=12)
    before, weights = state_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    for config in (ADAMW, SGD):
        if kind in ONLY_FLOAT32 and config is ADAMW:
            continue  # the literal step of a float32 weight is lost in its rounding
        truth = literal(model, samples, config)
        for size, side in ((1, "right"), (4, "right"), (3, "left")):
            if side == "left" and kind in PREFIX and not has("positions after a prefix"):
                with pytest.raises(VersionError, match=r"Padding on the left with a prefix .* needs peft 0\.19"):
                    record_all(model, samples, config, size, side)
            else:
                assert error_over_spread(record_all(model, samples, config, size, side), truth) < close
    assert state_of(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [kind for kind in SCORED if kind != "LoRA, target_parameters"])
def test_what_counts_is_the_effective_weight(kind: str) -> None:
    model, close = build(kind)
    samples = make_samples(4, longest=12)
    truth = by_bumps(model, samples)
    found = record_all(model, samples, SGD).score
    assert np.abs(found - truth).max() < close * np.ptp(truth)


@pytest.mark.parametrize("kind", sorted(set(SCORED) - NOT_MERGED - ONLY_FLOAT32))
def test_a_model_scores_the_same_after_its_adapter_is_merged(kind: str) -> None:
    model, samples = adapted(kind), make_samples(4, longest=12)
    found = literal(model, samples, ADAMW)
    with own_precision(model):
        merged = copy.deepcopy(model).merge_and_unload()
    assert not any(each.adapted for each in find_up_projections(merged, 2))
    assert error_over_spread(found, record_all(merged, samples, ADAMW)) < 1e-5


@pytest.mark.parametrize("kind", SCORED)
def test_a_training_run_measures_the_same(kind: str) -> None:
    model, close = build(kind)
    samples = make_samples(4, longest=12)
    truth = record_all(model, samples, ADAMW)
    batch = collate(samples)
    state = torch.get_rng_state()
    recorder = TrainingRecorder(model, ADAMW)
    recorder.attach()
    count = int((batch["labels"][:, 1:] != -100).sum())
    recorder.expect([MicroBatch(batch["input_ids"], batch["labels"], segments_of(batch), 1 / count)])
    with own_precision(model):
        model(**batch).loss.backward()
    (found,) = recorder.take()
    recorder.detach()
    assert torch.equal(torch.get_rng_state(), state)
    assert error_over_spread(found, truth) < max(close, 1e-5)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_kind_is_named_and_the_remedy_works(kind: str) -> None:
    model, samples = adapted(kind), make_samples(3)
    for measure in (
        lambda: Recorder(model, ADAMW),
        lambda: TrainingRecorder(model, ADAMW),
        lambda: literal(model, samples, ADAMW),
    ):
        with pytest.raises(InputError, match=r"an adapter of kind \w+ cannot be scored: its? .*disable_adapter"):
            measure()
    with model.disable_adapter():
        found = record_all(model, samples, ADAMW)
    assert error_over_spread(found, record_all(tiny("llama", vocab_size=VOCAB).double(), samples, ADAMW)) < 1e-9


@pytest.mark.parametrize(
    "kind", ["LoRA", "OFT", "LoRA, modules_to_save mlp", "prefix tuning", "LoRA, target embed_tokens"]
)
def test_a_disabled_adapter_counts_as_none(kind: str) -> None:
    model, samples = adapted(kind), make_samples(3)
    plain = record_all(tiny("llama", vocab_size=VOCAB).double(), samples, ADAMW)
    with model.disable_adapter():
        assert error_over_spread(record_all(model, samples, ADAMW), plain) < 1e-9
        assert error_over_spread(literal(model, samples, ADAMW), plain) < 1e-6
    assert error_over_spread(record_all(model, samples, ADAMW), plain) > 1e-4


@pytest.mark.parametrize("kind", ["LoRA", "LoRA, use_dora", "IA3"])
def test_a_merged_adapter_counts_as_the_weight(kind: str) -> None:
    model, samples = adapted(kind), make_samples(3)
    truth = record_all(model, samples, ADAMW)
    model.merge_adapter()
    assert error_over_spread(record_all(model, samples, ADAMW), truth) < 1e-9


@pytest.mark.parametrize("kind", ["LoRA", "LoRA, use_dora", "LoRA, target_parameters", "LoRA, two adapters active"])
@pytest.mark.parametrize("off", [False, True])
def test_the_literal_procedure_of_a_merged_adapter(kind: str, off: bool) -> None:
    model, samples = adapted(kind), make_samples(3)
    with model.disable_adapter() if off else contextlib.nullcontext():
        truth = literal(model, samples, ADAMW)
    model.merge_adapter()
    if off:
        model.base_model.disable_adapter_layers()
    assert error_over_spread(literal(copy.deepcopy(model), samples, ADAMW), truth) < 1e-6
    assert error_over_spread(record_all(model, samples, ADAMW), truth) < 1e-6


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}])
def test_an_adapter_in_bfloat16_on_a_float32_model(variant: dict[str, bool]) -> None:
    model = adapted("LoRA, use_dora" if variant else "LoRA").float()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    samples = make_samples(4, longest=12)
    exact = copy.deepcopy(model).double()
    assert error_over_spread(record_all(model, samples, SGD), record_all(exact, samples, SGD)) < 0.05


def test_target_parameters_of_a_dense_map() -> None:
    settings = peft.LoraConfig(r=4, target_modules=[], target_parameters=["mlp.up_proj.weight"], task_type=CAUSAL)
    model = peft.get_peft_model(tiny("llama", vocab_size=VOCAB), settings)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    model, samples = model.double().eval(), make_samples(4, longest=12)
    found = record_all(model, samples, ADAMW)
    assert error_over_spread(found, literal(model, samples, ADAMW)) < 1e-6
    merged = copy.deepcopy(model).merge_and_unload()
    assert error_over_spread(found, literal(merged, samples, ADAMW)) < 1e-6


def test_the_remedy_for_an_adapter_that_transformers_added() -> None:
    samples = make_samples(3)
    model = in_transformers(alora_invocation_tokens=[5], task_type=CAUSAL)
    with pytest.raises(InputError, match=r"after `model.disable_adapters\(\)`") as error:
        Recorder(model, ADAMW)
    exec(str(error.value).split("`")[3], {"model": model})
    plain = record_all(tiny("llama", vocab_size=VOCAB), samples, ADAMW)
    assert error_over_spread(record_all(model, samples, ADAMW), plain) < 1e-6


def test_an_adapter_that_changes_nothing_gives_the_plain_weight_bit_for_bit() -> None:
    model = peft.get_peft_model(tiny("phi3"), peft.LoraConfig(r=4, target_modules=["gate_up_proj"], task_type=CAUSAL))
    for each in find_up_projections(model, 2):
        assert each.adapted
        assert torch.equal(effective_weight(each), each.plain_weight())


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}])
def test_experts_in_a_module_list(variant: dict[str, bool]) -> None:
    torch.manual_seed(0)
    plain = tiny("llama", vocab_size=VOCAB)
    for layer in plain.model.layers:
        layer.mlp = Mixture()
    config = peft.LoraConfig(r=2, target_modules=["w3"], init_lora_weights=False, task_type=CAUSAL, **variant)
    model, samples = peft.get_peft_model(plain, config).double().eval(), make_samples(4, longest=12)
    assert {each.kind for each in find_up_projections(model, 2)} == {"experts"}
    found = record_all(model, samples, ADAMW)
    assert error_over_spread(found, literal(model, samples, ADAMW)) < 1e-6
    merged = copy.deepcopy(model).merge_and_unload()
    assert error_over_spread(found, literal(merged, samples, ADAMW)) < 1e-6


class Mixture(nn.Module):
    """A feed-forward of two experts, each token in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 2)
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(HIDDEN, HIDDEN, bias=False) for name in ("w1", "w2", "w3")}) for _ in "ab"
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat, out = hidden.flatten(0, -2), torch.zeros_like(hidden).flatten(0, -2)
        to = self.router(flat).argmax(-1)
        for number, each in enumerate(self.experts):
            own = flat[to == number]
            out = out.index_add(
                0, (to == number).nonzero()[:, 0], each["w2"](F.silu(each["w1"](own)) * each["w3"](own))
            )
        return out.view_as(hidden)


def arrow(folder: Path, target: list[str]) -> nn.Module:
    """Two LoRA adapters between which a router chooses for every token."""
    for seed in (0, 1):
        plain = tiny("llama", vocab_size=VOCAB)
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=target, task_type=CAUSAL, init_lora_weights=False)
        peft.get_peft_model(plain, config).save_pretrained(folder / str(seed))
    folders = [str(folder / str(seed)) for seed in (0, 1)]
    settings = peft.tuners.lora.ArrowConfig(top_k=1)
    return peft.create_arrow_model(tiny("llama", vocab_size=VOCAB), folders, settings).double().eval()


def test_a_map_that_is_no_matrix_is_refused_whatever_its_kind(tmp_path: Path) -> None:
    model, samples = arrow(tmp_path / "up", UP), make_samples(4)
    for config in (ADAMW, SGD):
        with pytest.raises(
            InputError, match=r"layers\.1\.mlp\.up_proj' has an adapter .* not a matrix times its input"
        ):
            Recorder(model, config)
        with pytest.raises(InputError, match="not a matrix times its input"):
            literal(model, samples, config)
    with pytest.raises(InputError, match="not a matrix times its input"):
        StepRecorder(model, ADAMW)
    elsewhere = arrow(tmp_path / "q", ["q_proj"])
    assert error_over_spread(record_all(elsewhere, samples, SGD), literal(elsewhere, samples, SGD)) < 1e-6


def test_xlora_is_refused(tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=4, target_modules=UP, task_type=CAUSAL)
    peft.get_peft_model(tiny("llama"), lora).save_pretrained(tmp_path)
    config = peft.XLoraConfig(task_type=CAUSAL, hidden_size=HIDDEN, adapters={"0": str(tmp_path)}, xlora_size=16)
    model = peft.get_peft_model(tiny("llama", use_cache=False), config)
    with pytest.raises(InputError, match="kind XLORA cannot be scored: it runs every batch twice"):
        Recorder(model, ADAMW)
    samples = make_samples(3)
    with model.disable_adapter():
        found = record_all(model, samples, ADAMW)
    assert error_over_spread(found, record_all(tiny("llama"), samples, ADAMW)) < 1e-6


STEPS = ["LoRA", "LoRA, use_dora", "LoRA, modules_to_save mlp", "LoRA, target_parameters"]


@pytest.mark.parametrize("kind", [*STEPS, "IA3", "OFT", "BOFT", "HRA", "VeRA", "LoHa", "SHiRA", "VB-LoRA", "UniLoRA"])
def test_a_step_of_the_runs_own_optimizer_is_the_change_of_the_merged_weight(kind: str) -> None:
    model = adapted(kind)
    recorder = StepRecorder(model, ADAMW)

    def merged() -> list[torch.Tensor]:
        plain = copy.deepcopy(model).merge_and_unload()
        return [each.plain_weight().clone() for each in find_up_projections(plain, 2)]

    before = merged()
    recorder.before()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    batch = collate(make_samples(2))
    with own_precision(model):
        model(**batch).loss.backward()
    optimizer.step()
    changes = [(old - new).abs().mean().item() for old, new in zip(before, merged(), strict=True)]
    assert min(changes) > 0
    np.testing.assert_allclose(recorder.after(), changes, rtol=1e-6)


def test_a_step_without_a_trained_up_projection_is_refused() -> None:
    with pytest.raises(InputError, match="no measured up-projection is trained"):
        StepRecorder(adapted("prefix tuning"), ADAMW)


def test_a_weight_of_replicated_layers_counts_in_each_by_itself() -> None:
    model, samples = adapted("LoRA, layer_replication without up_proj"), make_samples(3)
    config = ResonanceConfig(n_layers=5, update="sgd", lr=1.0)
    found = find_up_projections(model, 5)
    assert len({each.parameter for each in found}) == 3
    truth: Resonance = literal(model, samples, config)
    np.testing.assert_allclose(record_all(model, samples, config).layers, truth.layers, rtol=1e-9)
    assert len({each.parameter for each in find_up_projections(model, 5)}) == 3


def rows_of_table() -> list[list[str]]:
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_the_table_has_every_kind_that_peft_has() -> None:
    types = {name for row in rows_of_table() for name in re.findall(r"`([A-Z0-9_]+)`", row[1])}
    there = {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert there <= types if older_than("peft", "0.21") else there == types - {"BONE"}


def test_the_table_says_what_the_tests_find() -> None:
    rows = rows_of_table()
    assert all(len(row) == 5 for row in rows)
    kinds = [row[0] for row in rows]
    assert len(set(kinds)) == len(kinds)
    assert set(kinds) == BUILDERS.keys() | NOT_BUILT.keys()
    scored = {row[0]: row[2] for row in rows}
    assert set(scored.values()) == {"yes", "no"}
    assert {kind for kind, answer in scored.items() if answer == "no"} == {*REFUSED, "X-LoRA", "LoRA, arrow"}
    types = {row[0]: row[1].strip("`") for row in rows}
    assert {types[kind] for kind in (*REFUSED, "X-LoRA")} - {"LORA"} == adapters.REFUSED.keys() - {"aLoRA"}
