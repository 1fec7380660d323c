"""Run by torchrun: measure the batches of this process on a whole model and on a sharded one, and write both down."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor

from helpers.families import tiny
from helpers.samples import Sample, collate, make_samples
from resofilter_trainer import Recorder, Resonance, ResonanceConfig
from resofilter_trainer.model.modes import bfloat16_forward
from resofilter_trainer.model.sharding import shard
from resofilter_trainer.model.up_projection import find_up_projections

CONFIGS = {
    "adamw": ResonanceConfig(n_layers=2),
    "sgd": ResonanceConfig(n_layers=2, update="sgd"),
    "l2": ResonanceConfig(n_layers=1, norm="l2"),
}
ROUNDS = 3
SHARES = {0: [(4, 24), (1, 9), (3, 16)], 1: [(2, 12), (5, 20)]}  # of each process: samples and longest of each batch


def build(family: str, adapter: bool) -> nn.Module:
    model = tiny(family)
    if not adapter:
        return model
    torch.manual_seed(1)
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["o_proj", "up_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()


def own_batches(rank: int) -> list[Sample]:
    shares = SHARES[rank]
    return [
        collate(make_samples(count, longest=longest, seed=10 * rank + i)) for i, (count, longest) in enumerate(shares)
    ]


def measure(record: Recorder, batches: list[Sample]) -> list[Resonance]:
    """Every batch; where processes go in step, as many rounds in each of them, the last of which do not count."""
    found = [record(batch) for batch in batches]
    for _ in range(ROUNDS - len(batches) if record.in_step else 0):
        record(batches[0])
    return found


def held(model: nn.Module) -> int:
    """How many numbers this process holds."""
    return sum((each.to_local() if isinstance(each, DTensor) else each).numel() for each in model.parameters())


def compare(family: str, name: str, adapter: bool, autocast: bool, rank: int) -> dict[str, np.ndarray]:
    config, batches, model = CONFIGS[name], own_batches(rank), build(family, adapter)
    batches[0]["labels"][0] = -100
    flags = [each.requires_grad for each in model.parameters()]
    with bfloat16_forward(model, autocast), Recorder(model, config) as record:
        truth = measure(record, batches)
    total, weights = held(model), {name: each.detach().clone() for name, each in model.named_parameters()}
    shard(model, config, torch.device("cpu"))
    with bfloat16_forward(model, autocast), Recorder(model, config) as record:
        assert record.in_step
        found = measure(record, batches)
        assert not record.may_share
        found += measure(record, batches)
    assert [each.requires_grad for each in model.parameters()] == flags
    for each in find_up_projections(model, config.n_layers):
        assert not isinstance(each.parameter, DTensor)
    for key, each in model.named_parameters():
        now = each.full_tensor() if isinstance(each, DTensor) else each
        assert torch.equal(now, weights[key]), key
    both = {"truth": truth + truth, "found": found, "share": held(model) / total}
    return {
        f"{name} {side}": np.concatenate([np.ravel(getattr(each, name)) for each in both[side]])
        for name in ("loss", "num_tokens", "layers")
        for side in ("truth", "found")
    } | {"share": np.array(both["share"])}


def main() -> None:
    output = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    for case in sys.argv[2:]:
        family, name, *more = case.split("-")
        outcome = compare(family, name, "lora" in more, "bfloat16" in more, rank)
        np.savez(output / f"{case}-{rank}.npz", **outcome)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # all is written; a thread of torch's now and then aborts an interpreter that ends
