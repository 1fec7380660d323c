"""Run by torchrun: a model whose weights one process has read, against one that every process has read."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from helpers.families import tiny
from helpers.samples import collate, make_samples
from resofilter_trainer import InputError, Recorder, ResonanceConfig
from resofilter_trainer.data import shared_loading
from resofilter_trainer.data.fingerprints import hash_weights
from resofilter_trainer.data.models import load_weights
from resofilter_trainer.data.shared_loading import hash_of_first, load_to_shard
from resofilter_trainer.model.handing_out import has_no_numbers
from resofilter_trainer.model.sharding import shard, whole_parameters

CONFIG = ResonanceConfig(n_layers=1, eps=1e-4)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"family": "llama"},
    "tied": {"family": "llama", "tie_word_embeddings": True},
    "buffers": {"family": "llama", "rope_parameters": YARN},  # that are not saved
    "transposed": {"family": "gpt2"},
    "experts": {"family": "mixtral"},
    "halves": {"family": "llama", "dtype": torch.bfloat16},
    "adapter": {"family": "llama", "lora": True},
}


def save(folder: Path, family: str, lora: bool = False, dtype: Any = torch.float32, **settings: Any) -> None:
    model = tiny(family, **settings).to(dtype)
    model.save_pretrained(folder / "model" if lora else folder)
    if lora:
        base = AutoModelForCausalLM.from_pretrained(folder / "model")
        torch.manual_seed(1)
        adapter = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
        get_peft_model(base, adapter).save_pretrained(folder)


def here(model: nn.Module) -> dict[str, Tensor]:
    """What this process has of every tensor, and whether it is a shard."""
    found: dict[str, Tensor] = {}
    for owner, module in model.named_modules():
        for place in (module._parameters, module._buffers, vars(module)):
            for name, tensor in place.items():
                if isinstance(tensor, DTensor):
                    found[f"{owner}.{name}, sharded"] = tensor.to_local().detach()
                elif isinstance(tensor, Tensor):
                    found[f"{owner}.{name}"] = tensor.detach()
    return found


def measured(model: nn.Module) -> Any:
    with Recorder(model, CONFIG) as record:
        return record(collate(make_samples(3, longest=12, seed=PartialState().process_index))).layers.tolist()


def compare(folder: Path, args: SFTConfig) -> dict[str, Any]:
    """What differs between the two ways; nothing, if all is well."""
    truth, found = load_weights(str(folder), args), load_to_shard(str(folder), args)
    tied = len(list(truth.parameters()))
    said: dict[str, Any] = {"apart": has_no_numbers(found), "hash": hash_of_first(found) == hash_weights(truth)}
    for each in (truth, found):
        shard(each, CONFIG, torch.device("cpu"))
    one, other = here(truth), here(found)
    said["names"] = list(one) == list(other) and len(list(found.parameters())) == tied
    said["differ"] = [name for name, each in one.items() if not torch.equal(each, other[name])]
    said["sharded"] = sum(name.endswith("sharded") for name in other)
    said["gathered"] = all(
        torch.equal(a, b) for (_, a), (_, b) in zip(whole_parameters(truth), whole_parameters(found), strict=True)
    )
    said["scores"] = measured(truth) == measured(found)
    return said


def refused(name: str, args: SFTConfig) -> str:
    try:
        load_to_shard(name, args)
    except InputError as error:
        return str(error)
    return ""


def main() -> None:
    output = Path(sys.argv[1])
    state = PartialState(cpu=True, timeout=timedelta(seconds=60))
    rank, found = state.process_index, {}
    for name, settings in MODELS.items():
        dtype = settings.get("dtype", torch.float32)
        if rank == 0:
            save(output / name, **settings)
        state.wait_for_everyone()
        args = SFTConfig(str(output), use_cpu=True, report_to="none", bf16=False, model_init_kwargs={"dtype": dtype})
        found[name] = compare(output / name, args)
    found["no model"] = {"said": refused(str(output / "nothing"), args)}
    plain = shared_loading.structure
    shared_loading.structure = lambda model: None if rank == 1 else plain(model)  # a list of tensors, for one
    found["unlike"] = {"apart": has_no_numbers(load_to_shard(str(output / "plain"), args))}
    shared_loading.structure = plain
    args.model_init_kwargs = {"device_map": "cpu"}
    found["device_map"] = {"apart": has_no_numbers(load_to_shard(str(output / "plain"), args))}
    (output / f"{rank}.json").write_text(json.dumps(found))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
    os._exit(0)  # all is written; a thread of torch's now and then aborts an interpreter that ends
