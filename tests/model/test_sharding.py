"""A sharded model is measured as the whole one; and what cannot be sharded is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from helpers.families import tiny
from helpers.processes import torchrun
from helpers.samples import collate, make_samples
from helpers.training import train
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from resofilter_trainer import InputError, Recorder, ResonanceCallback, ResonanceConfig
from resofilter_trainer.model.quantised import bits_of
from resofilter_trainer.model.sharding import is_sharded, shard

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


@pytest.mark.slow
@pytest.mark.parametrize("told", ["told", "untold"])
def test_training_under_fsdp2_is_refused_in_one_line(told: str, tmp_path: Path) -> None:
    said = torchrun("two_processes_refused", tmp_path, told)
    lines = [line for line in said.splitlines() if "refused:" in line]
    expected = (
        f"sharded True, said {told == 'told'}, refused: ResonanceCallback cannot work with FSDP, which shards weights "
        "and gradients. Score first (resofilter score), then train on the selection."
    )
    assert lines == [expected] * 2


def test_training_under_deepspeed_is_refused_in_one_line(tmp_path, tokenizer, monkeypatch) -> None:
    from accelerate import Accelerator

    from resofilter_trainer.training import run

    check = run.check_trainer

    def under_deepspeed(*args):
        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
            check(*args)

    monkeypatch.setattr(run, "check_trainer", under_deepspeed)
    with pytest.raises(InputError) as refused:
        train(tmp_path, tokenizer, ResonanceCallback(keep=0.5))
    assert str(refused.value) == (
        "ResonanceCallback cannot work with DeepSpeed, which computes gradients in an engine of its own. Score first "
        "(resofilter score), then train on the selection."
    )


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
