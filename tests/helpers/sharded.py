"""Run by torchrun: trainings with the callback, kind by kind: of a whole model, or sharded by FSDP2 or DeepSpeed.

On a CPU accelerate would not shard: so its state is told that it is FSDP, as it tells itself on an accelerator.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import IterableDataset
from peft import LoraConfig
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import set_seed

from helpers.families import tiny
from helpers.run_ledgers import lines, losses
from helpers.tokenizers import make_tokenizer
from helpers.training import Outcome, llama, rows, train
from helpers.versions import older_than
from resofilter_trainer import InputError, ResonanceCallback, TokenCleaning
from resofilter_trainer.model.modes import own_precision
from resofilter_trainer.model.sharding import whole_parameters

ROWS, BATCH = 48, 6  # a multiple of 2 and of 3 processes
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
LORA = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.0, init_lora_weights=False)
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
MIXTRAL: dict[str, Any] = {
    "model": lambda size: tiny("mixtral", vocab_size=size),
    "fsdp": {"transformer_layer_cls_to_wrap": ["MixtralDecoderLayer"]},
}
SIZES = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
DEEPSPEED = {
    **dict.fromkeys(SIZES, "auto"),
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,  # which is compiled when it is first used
}
ADAMW = {**dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"), "torch_adam": True}
ON_CPU = {"offload_optimizer": {"device": "cpu"}}


def rows_in_order() -> Iterator[dict[str, str]]:
    yield from rows(ROWS)


# What the kinds of run change in the arguments of `train`. "fsdp", "zero" and "deepspeed" count only with that engine,
# and "micro_batches" are of a step in one process: those of two processes, as the Trainer's loss depends on them by
# 1e-9.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "double": {"model": lambda size: llama(size).double(), "micro_batches": 2},
    "not resharded": {"fsdp": {"reshard_after_forward": False}},
    "checkpointing": {"fsdp": {"activation_checkpointing": True}},
    "the Trainer's checkpointing": {"activation_checkpointing": True},
    "offload": {"fsdp": {"cpu_offload": True}, "zero": ON_CPU},
    "bfloat16": {"bf16": True},
    "bfloat16, checkpointing": {"bf16": True, "fsdp": {"activation_checkpointing": True}},
    "accumulation": {"gradient_accumulation_steps": 3},  # the last step of an epoch has fewer
    "lora": {"peft": LORA},
    "tied": {"model": partial(llama, tie_word_embeddings=True)},
    "experts": {**MIXTRAL, "router_aux_loss_coef": 0.0},
    "token rule": {"callback": {"token_rule": lambda tokens: 1 / (1 + tokens.loss)}},
    "experts and their router's loss": {**MIXTRAL, "router_aux_loss_coef": 0.1},
    "sharded checkpoints": {"fsdp": {"state_dict_type": "SHARDED_STATE_DICT"}},
    "the engine's optimizer": {"deepspeed": {"optimizer": {"type": "AdamW", "params": ADAMW}}},
    "a schedule": {"deepspeed": {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}},
    "offload of the weights": {"zero": {**ON_CPU, "offload_param": {"device": "cpu"}}},
    "packing": {"packing": True, "max_length": 48, "dataset": rows(ROWS), "per_device_train_batch_size": 2},
    "stream": {
        "dataset": IterableDataset.from_generator(rows_in_order),
        "max_steps": 14,
        "per_device_train_batch_size": BATCH * PROCESSES,  # of all processes, each of which reads all rows
        "accelerator_config": {"split_batches": True},
    },
}
KINDS |= {
    f"ZeRO-{stage}, {kind}": {**changes, "zero": {**changes.get("zero", {}), "stage": stage}}
    for stage in range(4)
    for kind, changes in KINDS.items()
}


def shard_on_cpu() -> None:
    """Let accelerate shard models on a CPU, too."""
    own = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            if isinstance(fsdp_plugin.cpu_offload, CPUOffloadPolicy):
                fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # which needs an accelerator
            self.fsdp_plugin = fsdp_plugin
        if vars(self).get("fsdp_plugin") is not None:  # each new view of the state copies another type into it
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def without_compiling() -> None:
    """Let DeepSpeed use gloo on a CPU, and not compile a way of its own when the processes meet, for minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def by_fsdp2(**settings: Any) -> dict[str, Any]:
    """SFTConfig's arguments that shard a Llama by FSDP2."""
    new = not older_than("transformers", "5.23")
    return {"fsdp": True if new else "full_shard auto_wrap", "fsdp_config": {**FSDP, **settings}}


def engine() -> str:
    """What shards the model: `"fsdp"`, `"deepspeed"` or `"nothing"`."""
    return sys.argv[3]


def run(output: Path, kind: str, callback: ResonanceCallback | None, **more: Any) -> Outcome:
    """One training of a kind, on the same rows in steps of the same size in any number of processes."""
    changes, tokenizer = {**KINDS[kind], **more}, make_tokenizer()
    fsdp, make = changes.pop("fsdp", {}), changes.pop("model", llama)
    changes.pop("callback", None)  # its settings
    zero, deepspeed = changes.pop("zero", {}), changes.pop("deepspeed", {})
    size, parts = changes.pop("per_device_train_batch_size", BATCH), changes.pop("micro_batches", 1)
    if PROCESSES == 1 and parts > 1:
        changes["gradient_accumulation_steps"], size = parts, size // parts
    if engine() == "fsdp":
        changes |= by_fsdp2(**fsdp)
    if engine() == "deepspeed":
        zero = {"stage3_param_persistence_threshold": 0, **zero}  # otherwise it divides no parameter of a tiny model
        changes["deepspeed"] = {**DEEPSPEED, **deepspeed, "zero_optimization": zero}
    set_seed(0)
    model = make(len(tokenizer))
    with own_precision(model):
        return train(
            output,
            tokenizer,
            callback,
            model=model,
            dataset=changes.pop("dataset", rows(ROWS)),
            per_device_train_batch_size=size // PROCESSES,
            **changes,
        )


def filtering(**settings: Any) -> ResonanceCallback:
    return ResonanceCallback(**{"keep": [1.0, 0.5, 0.25], "eps": 1e-4, "weight_decay": 0.5, **settings})


def numbers(outcome: Outcome) -> dict[str, np.ndarray]:
    """What the callback found, and all weights, in every process."""
    weights = {name: value.detach().double().flatten() for name, value in whole_parameters(outcome.trainer.model)}
    found: dict[str, np.ndarray] = {"weights": torch.cat([weights[name] for name in sorted(weights)]).numpy()}
    if outcome.callback is not None:
        scores = outcome.callback.scores
        found |= {name: scores.column(name) for name in ("measured", "score", "loss", "epoch")}
        found |= {"keep": np.array([each.keep for each in outcome.callback.selections])}
        found |= {"provenance": np.array(scores.provenance.weights)}
    return {**found, "steps": np.array(outcome.trainer.state.global_step)}


def scores(output: Path, kind: str) -> dict[str, np.ndarray]:
    """A run that drops rows; and each step's loss and gradient norm, in the ledger and as the Trainer logs them.

    Where DeepSpeed's engine tells the Trainer no norm to log, it is NaN.
    """
    settings = {"dataset": rows(ROWS)} if "packing" in kind else KINDS[kind].get("callback", {})
    outcome = run(output / "scores", kind, filtering(**settings))
    if dist.is_initialized():
        dist.barrier()  # all have written their lines
    found = lines(output / "scores", PROCESSES)
    recorded = np.stack([losses(found), found.groupby("step")["grad_norm"].first()])
    logged = np.array([[each.get(name, np.nan) for each in outcome.logs] for name in ("loss", "grad_norm")])
    return {**numbers(outcome), "recorded": recorded, "logged": logged}


def untouched(output: Path, kind: str) -> dict[str, np.ndarray]:
    """A run with the callback that drops nothing, and one without it."""
    with_callback = run(output / "with", kind, filtering(keep=1.0))
    without = run(output / "without", kind, None)
    assert with_callback.logs == without.logs
    return {"with": numbers(with_callback)["weights"], "without": numbers(without)["weights"]}


def resumed(output: Path, kind: str) -> dict[str, np.ndarray]:
    """A run that is resumed from each of its checkpoints; whether its end differs."""
    whole = run(output / "whole", kind, filtering(), save_strategy="steps", save_steps=3)
    truth, checkpoints = numbers(whole), sorted((output / "whole").glob("checkpoint-*"))
    for checkpoint in checkpoints:
        again = run(output / "resumed", kind, filtering(), resume=str(checkpoint))
        found = numbers(again)
        for name, value in truth.items():
            assert np.array_equal(found[name], value, equal_nan=value.dtype.kind == "f"), (checkpoint.name, name)
    return {**truth, "checkpoints": np.array(len(checkpoints))}


def elsewhere(output: Path, kind: str) -> dict[str, np.ndarray]:
    """A run resumed from a checkpoint of another engine, or of another number of processes; or what is said of it."""
    checkpoint = min((output / "whole").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    try:
        return numbers(run(output / "elsewhere", kind, filtering(), resume=str(checkpoint)))
    except (ValueError, OSError) as error:  # the Trainer's own
        return {"said": np.array(str(error))}


def optimizer(output: Path, kind: str) -> dict[str, np.ndarray]:
    """A run that measures the optimizer's own steps, each on one row."""
    callback = filtering(update="optimizer")
    return numbers(run(output / "optimizer", kind, callback, per_device_train_batch_size=PROCESSES))


def refused(output: Path, kind: str) -> dict[str, np.ndarray]:
    """What is said of the uses of the callback that are refused."""
    uses: dict[str, dict[str, Any]] = {"in training": {}, "before": {"when": "before"}}
    if engine() == "deepspeed":
        uses |= {"cleaning": {"token_cleaning": TokenCleaning(keep=0.5)}, "optimizer": {"update": "optimizer"}}
    said = {}
    for name, settings in uses.items():
        try:
            run(output / name, kind, filtering(**settings))
        except InputError as error:
            said[name] = np.array(str(error))
    return said


def load(place: Path, what: str, kind: str) -> dict[str, np.ndarray]:
    return dict(np.load(place / f"{what} {kind}.npz", allow_pickle=True))


def assert_same(found: dict[str, np.ndarray], truth: dict[str, np.ndarray], tolerance: float) -> None:
    """The same rows in every epoch, and the same scores to a share of their spread."""
    assert truth["keep"].sum(1).tolist() == [ROWS, ROWS // 2, ROWS // 4]
    assert np.array_equal(found["keep"], truth["keep"])
    assert np.array_equal(found["epoch"], truth["epoch"])
    assert found["steps"] == truth["steps"]
    assert found["provenance"] == truth["provenance"]
    for name in ("measured", "score", "loss"):
        assert np.abs(found[name] - truth[name]).max() <= tolerance * np.ptp(truth[name]), name


WHAT: dict[str, Callable[[Path, str], dict[str, np.ndarray]]] = {
    each.__name__: each for each in (scores, untouched, resumed, elsewhere, optimizer, refused)
}


def main() -> None:
    place, what = Path(sys.argv[1]), sys.argv[2]
    warnings.filterwarnings("error", "The loss of .* weighs rows in its own way")  # it does not
    warnings.filterwarnings("error", ".* lacks the .*save_only_model")  # a checkpoint has all
    if engine() == "fsdp":
        shard_on_cpu()
    if engine() == "deepspeed":
        without_compiling()
    for kind in sys.argv[4:]:
        if kind in WHAT:  # the kinds after it are of another function
            what = kind
            continue
        found = WHAT[what](place / kind, kind)
        if not dist.is_initialized() or dist.get_rank() == 0:
            np.savez(place / f"{what} {kind}.npz", **found)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
