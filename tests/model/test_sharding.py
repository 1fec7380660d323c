"""A sharded model is measured as the whole one; and what cannot be sharded is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from helpers.families import tiny
from helpers.processes import torchrun
from helpers.samples import collate, make_samples
from helpers.training import train
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from resofilter_trainer import InputError, Recorder, ResonanceCallback, ResonanceConfig
from resofilter_trainer.data.fingerprints import hash_weights
from resofilter_trainer.model.plain import class_of
from resofilter_trainer.model.quantised import bits_of
from resofilter_trainer.model.sharding import is_sharded, own_part, shard
from resofilter_trainer.model.step_recorder import StepRecorder
from resofilter_trainer.model.up_projection import find_up_projections
from resofilter_trainer.training import run

CPU = torch.device("cpu")
# An up-projection that is plain, transposed, half of a map, among experts; a head that caps its logits (gemma2).
CASES = [
    *("llama-adamw", "llama-sgd", "llama-l2", "llama-adamw-bfloat16", "llama-adamw-lora", "llama-sgd-lora"),
    *("gpt2-adamw", "gpt2-sgd", "gpt2-adamw-lora", "phi3-adamw"),
    *("mixtral-adamw", "mixtral-sgd", "qwen2_moe-adamw", "gemma2-adamw"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    torchrun("two_processes_sharded", folder, *CASES)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_measure_what_one_measures_on_the_whole_model(case: str, outcomes: Path) -> None:
    """For batches that differ in shape and number, and a row without a learnt token."""
    for rank in range(2):
        found = dict(np.load(outcomes / f"{case}-{rank}.npz"))
        assert found["num_tokens truth"].min() == 0
        np.testing.assert_array_equal(found["num_tokens found"], found["num_tokens truth"])
        np.testing.assert_allclose(found["loss found"], found["loss truth"], rtol=1e-6)
        np.testing.assert_allclose(found["layers found"], found["layers truth"], rtol=1e-6)
        assert found["layers found"].max() > 0
        assert found["share"] < (0.85 if "moe" in case or "mixtral" in case else 0.75)  # experts are kept whole


def said_of(change, output, tokenizer, monkeypatch) -> str:
    """What the callback refuses in a trainer that `change` has changed."""
    check = run.check_trainer

    def changed(trainer, *args):
        with monkeypatch.context() as patch:
            change(trainer, patch)
            check(trainer, *args)

    monkeypatch.setattr(run, "check_trainer", changed)
    with pytest.raises(InputError) as refused:
        train(output, tokenizer, ResonanceCallback(keep=0.5))
    return str(refused.value)


def test_training_under_other_engines_is_refused_in_one_line(tmp_path, tokenizer, monkeypatch) -> None:
    def by_others(trainer, patch):  # without FSDP2's classes, as FSDP1 and tensor parallelism have none
        patch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)

    assert said_of(by_others, tmp_path, tokenizer, monkeypatch) == (
        "ResonanceCallback cannot work with a model that is sharded by other means than FSDP2, such as FSDP1, whose "
        "weights are not whole where they are used. Let the Trainer shard it, with fsdp_config={'fsdp_version': 2} or "
        "accelerate's own configuration."
    )


@pytest.mark.parametrize(
    ("configuration", "said"),
    [
        ({"fp16": {"enabled": True}}, "DeepSpeed's fp16, whose loss scale is the engine's own. Use bf16."),
        (
            {"scheduler": {"type": "WarmupLR"}},
            "a scheduler in DeepSpeed's configuration, which counts the steps of all rows. Leave it out there, and set "
            "lr_scheduler_type.",
        ),
        (
            {"tensor_parallel": {"autotp_size": 2}},
            "parallelism within a sample, of which each process sees a part only. Leave parallelism_config and "
            "DeepSpeed's tensor_parallel unset.",
        ),
    ],
)
def test_settings_of_deepspeed_are_refused_in_one_line(configuration, said, tmp_path, tokenizer, monkeypatch) -> None:
    def by_deepspeed(trainer, patch):
        patch.setattr(trainer, "is_deepspeed_enabled", True)
        patch.setattr(trainer.accelerator, "deepspeed_config", configuration, raising=False)

    found = said_of(by_deepspeed, tmp_path, tokenizer, monkeypatch)
    assert found == f"ResonanceCallback cannot work with {said}"


@pytest.fixture
def one_process(tmp_path):
    """A group of one process, in which sharding is cheap."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_is_measured_and_what_lies_outside_the_layers_stays_whole(one_process) -> None:
    model = tiny("llama")
    assert not is_sharded(model)
    shard(model, ResonanceConfig(n_layers=2), CPU)
    assert is_sharded(model)
    whole = {name for name, each in model.named_parameters() if not isinstance(each, DTensor)}
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert whole == outside | {f"model.layers.{layer}.mlp.up_proj.weight" for layer in (1, 2)}


def test_a_sharded_model_is_measured_in_step_and_shares_nothing(one_process) -> None:
    model, batch, config = tiny("llama"), collate(make_samples(3)), ResonanceConfig(n_layers=2)
    with Recorder(model, config) as record:
        assert not record.in_step
        truth = record(batch)
    shard(model, config, CPU)
    with Recorder(model, config) as record:
        found = record(batch)
        assert (record.in_step, record.may_share) == (True, False)
    np.testing.assert_allclose(found.layers, truth.layers, rtol=1e-6)


def test_layers_that_share_weights_stay_whole_there(one_process) -> None:
    model = tiny("llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    shard(model, ResonanceConfig(n_layers=1), CPU)
    assert not any(isinstance(each, DTensor) for each in model.model.layers[0].self_attn.parameters())
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)


def test_a_model_that_another_has_sharded_is_refused(one_process) -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        fully_shard(layer)
    with pytest.raises(InputError, match=r"'model\.layers\.0\.mlp\.up_proj' is sharded, .* Pass the model as it was"):
        Recorder(model, ResonanceConfig())
    with pytest.raises(InputError, match="sharded already: pass it whole"):
        shard(model, ResonanceConfig(), CPU)


def test_what_cannot_be_sharded_is_refused(one_process) -> None:
    model = tiny("llama").to("meta")
    with pytest.raises(InputError, match=r"'model\.embed_tokens\.weight' is offloaded, and cannot be sharded"):
        shard(model, ResonanceConfig(), CPU)
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="a quantised model needs bitsandbytes")
    model = tiny("llama")
    quantised = bitsandbytes.nn.Linear8bitLt(32, 48, bias=False, has_fp16_weights=False).to("cpu")
    assert bits_of(quantised.weight) == 8
    model.model.layers[0].mlp.up_proj = quantised
    with pytest.raises(InputError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' is quantised, and a quantised"):
        shard(model, ResonanceConfig(), CPU)


def test_one_process_alone_shards_nothing() -> None:
    with pytest.raises(InputError, match="over several processes, and there is one"):
        shard(tiny("llama"), ResonanceConfig(), CPU)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])  # whole, the second half of the rows, transposed
@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_has_its_own_part_of_a_sharded_weight(family: str, processes: int) -> None:
    truth = [each.plain_weight().clone() for each in find_up_projections(tiny(family), 2)]
    parts: list[list[torch.Tensor]] = [[] for _ in truth]
    for rank in range(processes):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
        try:
            name = f"of process {rank}"  # else torch takes it for that of the last process, which it has cached
            mesh = DeviceMesh("cpu", range(processes), mesh_dim_names=(name,))
            for found, each in zip(parts, find_up_projections(tiny(family), 2), strict=True):
                stored = each.parameter.detach()
                local = stored.chunk(processes)[rank]
                sharded = DTensor.from_local(local, mesh, [Shard(0)], shape=stored.shape, stride=stored.stride())
                each.owner._parameters[each.leaf] = torch.nn.Parameter(sharded)
                found.append(own_part(each))
        finally:
            dist.destroy_process_group()
    for found, whole in zip(parts, truth, strict=True):
        assert torch.equal(torch.cat(found), whole)


@pytest.mark.parametrize("norm", ["mean_abs", "l2"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_optimizers_step_on_a_sharded_model_has_the_size_of_that_on_the_whole_one(family, norm, one_process):
    config, sizes = ResonanceConfig(n_layers=2, update="optimizer", norm=norm), []
    for sharded in (False, True):
        model = tiny(family)
        if sharded:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        recorder = StepRecorder(model, config)
        recorder.before()
        with torch.no_grad():
            for i, (_, parameter) in enumerate(model.named_parameters()):
                parameter.add_(1e-3 * (i + 1))
        sizes.append(recorder.after())
    assert sizes[0].min() > 1e-3
    np.testing.assert_allclose(sizes[1], sizes[0], rtol=1e-12)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_checkpointing_by_a_wrapper_hides_nothing(family: str) -> None:
    plain, wrapped = tiny(family), tiny(family)
    for i, layer in enumerate(wrapped.model.layers):
        wrapped.model.layers[i] = checkpoint_wrapper(layer)
    for one, other in zip(find_up_projections(plain, 2), find_up_projections(wrapped, 2), strict=True):
        assert (one.name, one.kind, one.entries) == (other.name, other.kind, other.entries)
        assert type(one.module) is type(other.module)
        assert torch.equal(one.plain_weight(), other.plain_weight())
    assert hash_weights(plain) == hash_weights(wrapped)


def test_the_class_that_fsdp2_derives_is_seen_through(one_process) -> None:
    experts = torch.nn.Linear(2, 2)
    fully_shard(experts)
    assert type(experts) is not torch.nn.Linear
    assert class_of(experts) is torch.nn.Linear
