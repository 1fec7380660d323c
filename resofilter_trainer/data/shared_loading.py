"""A model that will be sharded: one process reads its weights. Knows files and processes, not how a model is sharded.

first process: reads the weights  -> hashes them  -> shards, and sends every process its shards
the others:    read the structure -> are told it  -> receive them                (`model.sharding.shard`)
"""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel
from trl import SFTConfig

from ..config import InputError
from ..model.handing_out import structure
from .fingerprints import hash_weights
from .models import load_weights
from .together import from_main

CHANGES = ("device_map", "gguf_file", "quantization_config")  # settings under which weights are more than read
UNLIKE = "its structure alone lacks something (quantised weights, or tensors in a list)."


def load_to_shard(name: str, args: SFTConfig, group_size: int | None = None) -> PreTrainedModel:
    """A model with its weights in the first process of each group, and without numbers in all others, for `shard`.

    Where the others' model would not be the first one's to the last tensor, or cannot be had without its numbers
    (transformers before 5), every process reads the weights, and the main one says so in a line.

    Args:
        name, args: as for `load_weights`; every process calls this with the same.
        group_size: the processes of a group (`model.sharding.neighbours`); by default all.

    Raises:
        InputError: a first process cannot load the model, or another one that has to.
    """
    state = PartialState()
    size = group_size or state.num_processes
    reads = state.process_index % size == 0
    if state.num_processes == 1:
        return load_weights(name, args)
    model, said = None, None
    changing = [setting for setting in CHANGES if setting in (args.model_init_kwargs or {})]
    if not changing or reads:
        try:
            model = load_weights(name, args, without_numbers=not reads)
        except InputError as error:
            said = str(error)
    found = gather_object([(said, None if model is None else structure(model))])
    for refused, _ in found[::size]:
        if refused is not None:
            raise InputError(refused)
    if model is not None and found[0][1] is not None and found.count(found[0]) == len(found):
        return model
    if state.is_main_process:
        why = f"model_init_kwargs has {changing[0]}." if changing else next((said for said, _ in found if said), UNLIKE)
        print(f"Every process reads all weights of '{name}', and needs memory for them: {why}")
    return model if model is not None and reads else load_weights(name, args)


def hash_of_first(model: PreTrainedModel) -> str:
    """The first process's hash of its weights, in every process; each must call this."""
    return from_main(lambda: hash_weights(model))
