"""One of the two trainings of `callback.py`, which starts it: makes each step when it is its turn, and times it.

Reads a line for every turn, and writes a line that begins with `>` and goes on in JSON after every step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from scoring_samples import as_rows, build_model, make_samples, peak_memory
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from resofilter_trainer import ResonanceCallback, TokenWeights

LENGTH = 160  # tokens of every row for torch.compile, which compiles anew for other lengths
PACK = 512  # tokens
SHARE = 0.6  # of the tokens, as random weights find none probable
ROWS_PER_PACK = 4  # at most, on average: GSM8K's rows have 175 tokens
ON_GPU = torch.cuda.is_available()


class Turns(TrainerCallback):
    """Waits for its turn before each step, and says how long it took; added last.

    Args:
        turns: where the lines come from, in the first process; None in the others, which wait for it.
    """

    def __init__(self, turns: TextIO | None) -> None:
        self._turns = turns
        self._begun = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The callback has attached its recorder."""
        self.say("ready")
        self.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped, and the callback has recorded."""
        self.say(self.passed())
        self.wait()

    def wait(self) -> None:
        """Wait until it is this training's turn."""
        if self._turns is not None and not self._turns.readline():
            sys.exit("callback.py has ended")
        self._together()
        self._begun = time.perf_counter()

    def passed(self) -> float:
        """The seconds since the turn began."""
        if ON_GPU:
            torch.cuda.synchronize()
        self._together()
        return time.perf_counter() - self._begun

    def say(self, what: Any) -> None:
        """Write a line for callback.py."""
        if self._turns is not None:
            print(">" + json.dumps(what), flush=True)

    def _together(self) -> None:
        if dist.is_initialized():
            dist.barrier()


def main() -> None:
    kind, configuration, place, settings = *sys.argv[1:4], json.loads(sys.argv[4])
    torch.set_num_threads(settings["threads"])
    if configuration == "sharded" and not ON_GPU:
        shard_on_cpu()
    model = build_model(settings["shape"])
    rows = make_rows(configuration, settings, model.config.vocab_size)
    config = SFTConfig(**arguments(configuration, settings))
    first = config.process_index == 0
    with opened(place) as turns:
        clock = Turns(turns if first else None)
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=rows,
            processing_class=_tokenizer(),
            callbacks=[*compared(kind, configuration, settings, rows), clock],
        )
        loss = trainer.train().training_loss
        peak = torch.cuda.max_memory_allocated() if ON_GPU else peak_memory()
        clock.say({"end": clock.passed(), "loss": loss, "peak_mb": peak / 2**20})
        if dist.is_initialized():
            dist.destroy_process_group()


def opened(pipe: str) -> TextIO:
    """A named pipe, which ends at once where callback.py, which writes it, has ended."""
    number = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # otherwise opening waits for it
    os.set_blocking(number, True)
    return os.fdopen(number)


def compared(kind: str, configuration: str, settings: dict[str, Any], rows: Dataset) -> list[TrainerCallback]:
    """What is compared, with or without it."""
    compare, rule = settings["compare"], settings["rule"]
    if rule is not None:
        return [TokenWeights(rule, keep=None if rule == "eaft" else SHARE)] if kind == "with" else []
    if compare == "nothing" or (compare == "callback" and kind == "without"):
        return []
    own: dict[str, Any] = {"ledger": False} if kind == "without" else {}
    return [ResonanceCallback(dataset=rows if configuration == "packing" else None, **own)]


def make_rows(configuration: str, settings: dict[str, Any], vocabulary: int) -> Dataset:
    """Enough rows for all steps."""
    count = settings["steps"] * settings["batch_size"] * (ROWS_PER_PACK if configuration == "packing" else 1)
    return Dataset.from_list(as_rows(make_samples(Path(settings["gsm8k"]), count, vocabulary)))


def arguments(configuration: str, settings: dict[str, Any]) -> dict[str, Any]:
    """SFTConfig's arguments."""
    own: dict[str, dict[str, Any]] = {
        "sharded": {
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        },
        "packing": {"packing": True, "max_length": PACK},
        "compile": {"torch_compile": True, "max_length": LENGTH, "pad_to_multiple_of": LENGTH},
    }
    size = settings["batch_size"] // (ROWS_PER_PACK if configuration == "packing" else settings["processes"])
    return {
        "output_dir": settings["folder"],
        "per_device_train_batch_size": max(1, size),
        "max_steps": settings["steps"],
        "bf16": settings["bf16"],
        "activation_checkpointing": settings["checkpointing"],
        "use_cpu": not ON_GPU,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": ON_GPU,
        **own.get(configuration, {}),
    }


def shard_on_cpu() -> None:
    """Let accelerate, which shards on accelerators only, do so on a CPU."""
    own = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
        if vars(self).get("fsdp_plugin") is not None:  # each new view of the state copies another type into it
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for SFTTrainer; the rows are tokens already."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1})), pad_token="<pad>", eos_token="<eos>"
    )


if __name__ == "__main__":
    main()
