"""Run by torchrun: train with the callback while accelerate shards the model by FSDP2, and print what is said.

On a CPU accelerate would leave it: so its state is told that it is FSDP, as it tells itself on an accelerator.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from trl import SFTTrainer

from helpers.tokenizers import make_tokenizer
from helpers.training import arguments, llama, rows
from resofilter_trainer import InputError, ResonanceCallback
from resofilter_trainer.model.sharding import is_sharded


def main() -> None:
    output, is_told = Path(sys.argv[1]), sys.argv[2] == "told"
    tokenizer, callback = make_tokenizer(), ResonanceCallback(keep=0.5)
    trainer = SFTTrainer(
        llama(len(tokenizer)), arguments(output), None, rows(21), processing_class=tokenizer, callbacks=[callback]
    )
    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    if is_told:  # the other state, by which the first is overwritten from time to time
        PartialState().distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    try:
        trainer.train()
    except InputError as error:
        said = trainer.accelerator.distributed_type == DistributedType.FSDP
        print(f"\nsharded {is_sharded(trainer.model)}, said {said}, refused: {error}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
