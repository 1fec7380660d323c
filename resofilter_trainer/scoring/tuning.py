"""Tunes a copy of a model with SFTTrainer. Knows models, adapters and the Trainer, not what the copy is for."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import inspect
import json
import random
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import GradientState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from ..config import InputError, NotFiniteError, Warmup
from ..config.compatibility import forget_adapter, set_warmup
from ..io.files import flush, read_json, remove_folder, replacing
from ..model.float32 import main_dtype
from ..model.quantised import bits_of

STATE = "trained.safetensors"  # in a checkpoint: the trained weights
MARK = "resofilter_warmup.json"  # in a checkpoint: it is complete, and what it was made from
CHECKPOINTS = 10  # in a warm-up

# What SFTTrainer would take from the user's arguments, and the warm-up does not.
OWN_ARGUMENTS: dict[str, Any] = {
    "max_steps": -1, "lr_scheduler_type": "linear", "lr_scheduler_kwargs": None, "optim": OptimizerNames.ADAMW_TORCH,
    "optim_args": None, "optim_target_modules": None, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "label_smoothing_factor": 0.0, "neftune_noise_alpha": None,
    "loss_type": "nll", "torch_compile": False, "use_liger_kernel": False, "auto_find_batch_size": False,
    "group_by_length": False, "train_sampling_strategy": "random", "average_tokens_across_devices": True,
    "dataloader_drop_last": False, "dataloader_num_workers": 0, "dataloader_prefetch_factor": None,
    "dataloader_persistent_workers": False, "remove_unused_columns": True, "dataset_num_proc": None,
    "packing": False, "padding_free": False, "shuffle_dataset": False, "max_length": None, "dataset_kwargs": None,
    "completion_only_loss": None, "assistant_only_loss": False, "chat_template_path": None, "eos_token": None,
    "eval_strategy": "no", "do_eval": False, "eval_on_start": False, "load_best_model_at_end": False,
    "save_total_limit": None, "save_only_model": False, "push_to_hub": False, "ignore_data_skip": False,
    "restore_callback_states_from_checkpoint": False, "resume_from_checkpoint": None, "model_init_kwargs": None,
    "logging_strategy": "no", "logging_first_step": False,
}  # fmt: skip


def trained_names(model: PreTrainedModel | PeftModel, settings: Warmup) -> list[str]:
    """The weights that a warm-up trains, as SFTTrainer does: those that require a gradient, or if none does, all.

    Of a `PeftModel` that was loaded for inference, they are the active adapter's. A new adapter is not among them.
    """
    if settings.method == "lora" and not isinstance(model, PeftModel):
        return []
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        _made_tunable(model, settings)
        return [name for name, each in model.named_parameters() if each.requires_grad]
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def check_tunable(model: PreTrainedModel | PeftModel, settings: Warmup, args: SFTConfig) -> None:
    """Raise InputError for a model of which no copy can be tuned as the settings say."""
    if main_dtype(model) == torch.float16 or args.fp16:
        raise InputError("A warm-up in float16 loses small gradients. Load the model in float32.")
    if settings.method == "full" and main_dtype(model) == torch.bfloat16:
        raise InputError(
            "Most steps of a full warm-up are too small for weights in bfloat16. Load the model in float32 (bf16=True "
            "still computes in bfloat16), or choose 'lora' as its method."
        )
    quantised = any(bits_of(each) is not None for each in model.parameters())
    if settings.method == "full" and (quantised or isinstance(model, PeftModel)):
        what = "The model has an adapter, which a warm-up tunes" if isinstance(model, PeftModel) else (
            "The model is quantised, and a warm-up can tune an adapter on it only"
        )  # fmt: skip
        raise InputError(f"{what}: choose 'lora' as its method.")
    if not isinstance(model, PeftModel) and any(isinstance(each, BaseTunerLayer) for each in model.modules()):
        raise InputError(
            "The model's adapter was added by transformers (add_adapter), and a warm-up knows PEFT's only: pass a "
            "PeftModel (peft.get_peft_model), or merge the adapter."
        )
    if any(each.device.type == "meta" for each in model.parameters()):
        raise InputError("Some of the model's weights are offloaded, and a warm-up tunes all: load it without that.")
    if isinstance(model, PeftModel) and not trained_names(model, settings):
        raise InputError("The model's adapter has no weight that a warm-up can tune: load it with is_trainable=True.")


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A training of a copy of a model.

    Attributes:
        settings: how to tune.
        rows: the rows as tokens, `input_ids` and `labels`.
        tokenizer: the model's tokenizer.
        args: SFTTrainer's arguments for the device, precision, memory and progress bar.
        made_from: what the tuned weights depend on.
    """

    settings: Warmup
    rows: Dataset
    tokenizer: PreTrainedTokenizerBase
    args: SFTConfig
    made_from: Mapping[str, Any]

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return -(-len(self.rows) * self.settings.epochs // self.settings.batch_size)

    def _in_order(self) -> Dataset:
        """The rows of all epochs, one after another, each in an order of its own.

        The Trainer sees one epoch: before transformers 5 it resumes a later one in another order.
        """
        draw = np.random.default_rng(self.settings.seed)
        order = [draw.permutation(len(self.rows)) for _ in range(self.settings.epochs)]
        return self.rows.select_columns(["input_ids", "labels"]).select(np.concatenate(order))

    def run(self, model: PreTrainedModel, folder: Path, checkpoint: Path | None, keep: bool) -> dict[str, Tensor]:
        """The tuned weights by name, on the CPU; the model stays as it is.

        Args:
            model: the model.
            folder: a folder for the checkpoints.
            checkpoint: the checkpoint to resume from, by default none.
            keep: whether to write checkpoints.

        Raises:
            InputError: a loss or a weight is not finite, or the processes share the weights (FSDP, DeepSpeed).
        """
        processes = PartialState().num_processes
        if self.settings.batch_size % processes:
            raise InputError(
                f"A warm-up learns {self.settings.batch_size} rows in a step, which {processes} processes cannot "
                f"share: choose a multiple of {processes} as its batch_size, or another number of processes."
            )
        with undisturbed():
            tuned = prepared_copy(model, self.settings)
            trainer = _Tuner(
                tuned, self._arguments(folder, keep), train_dataset=self._in_order(),
                processing_class=copy.deepcopy(self.tokenizer),
                callbacks=[_Progress(), _Mark(self.made_from, checkpoint)],
            )  # fmt: skip
            trainer.remove_callback(ProgressCallback)
            trainer.remove_callback(PrinterCallback)
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
                raise InputError("A warm-up trains whole copies of the model: launch it without FSDP and DeepSpeed.")
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            found = {name: each.clone() for name, each in trained_weights(tuned).items()}
            del trainer, tuned
            gc.collect()
            torch.cuda.empty_cache()
        if not all(bool(torch.isfinite(each).all()) for each in found.values()):
            raise NotFiniteError(_diverged("its weights are not finite", cast(float, self.settings.lr)))
        return found

    def _arguments(self, folder: Path, keep: bool) -> SFTConfig:
        """The user's arguments with the settings of the warm-up."""
        found, settings = copy.copy(self.args), self.settings
        known = {each.name for each in dataclasses.fields(found)}
        share = settings.batch_size // PartialState().num_processes
        most = min(share, found.per_device_train_batch_size)
        size = next(each for each in range(most, 0, -1) if share % each == 0)
        own = {
            "output_dir": str(folder), "learning_rate": settings.lr, "num_train_epochs": 1,
            "seed": settings.seed, "data_seed": None, "per_device_train_batch_size": size,
            "gradient_accumulation_steps": share // size, "accelerator_config": AcceleratorConfig(), "report_to": [],
            "save_strategy": "steps" if keep else "no", "save_steps": max(-(-self.steps // CHECKPOINTS), 1),
        }  # fmt: skip
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if name in known:
                own[name] = copy.copy(getattr(found, name))  # TRL takes entries out of it
        for name, value in {**OWN_ARGUMENTS, **own}.items():
            if name in known:
                setattr(found, name, value)
        set_warmup(found, 0)
        if found.n_gpu > 1:  # SFTTrainer refuses DataParallel; scoring takes one device, too
            found._n_gpu = 1
        return found


def prepared_copy(model: PreTrainedModel, settings: Warmup) -> PreTrainedModel:
    """A copy in which the weights to tune are those that require a gradient, with a new adapter where one is needed."""
    return _made_tunable(copied(model), settings)


def with_weights(model: PreTrainedModel, settings: Warmup, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """Put tuned weights into the model that they were tuned from, in place; returns it, or it with its adapter.

    A new adapter is merged, except into quantised weights, which merging would round.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    tuned = _made_tunable(model, settings)
    put_weights(tuned, weights)
    if isinstance(tuned, PeftModel) and not isinstance(model, PeftModel):
        if any(bits_of(each) is not None for each in tuned.parameters()):
            return cast(PreTrainedModel, tuned.eval())
        tuned = tuned.merge_and_unload()
        forget_adapter(tuned)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    return cast(PreTrainedModel, tuned.eval())


def trained_weights(model: Any) -> dict[str, Tensor]:
    """The weights that require a gradient, by name, on the CPU."""
    return {name: each.detach().cpu().contiguous() for name, each in model.named_parameters() if each.requires_grad}


@torch.no_grad()
def put_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Overwrite a model's weights, by name."""
    for name, value in weights.items():
        model.get_parameter(name).copy_(value)


def copied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares no weight with the model.

    Raises:
        InputError: a function stands in place of a forward, which would still run the original's.
    """
    found = copy.deepcopy(model)
    for name, module in found.named_modules():
        forward = vars(module).get("forward")
        if forward is None or "_hf_hook" in vars(module):  # accelerate's hooks are copied
            continue
        if not _is_own(forward, type(module).forward):
            raise InputError(
                f"The forward of '{name or type(module).__name__}' was replaced in this model, so that a copy would "
                "run the original's weights: pass a model with its own forward, or its name."
            )
        del module.forward  # left by a Trainer
    return found


def _is_own(forward: Any, own: Any) -> bool:
    """Whether a forward is that of the module's class, or TRL's or accelerate's around it."""
    function = getattr(forward, "__func__", forward)
    if function is own:
        return True
    inner = getattr(function, "__wrapped__", None)
    if inspect.isfunction(function) and str(function.__module__).startswith("trl."):
        inner = inspect.getclosurevars(function).nonlocals.get("original_forward")
    return inner is not None and _is_own(inner, own)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the random states and the Trainer's accumulation at the end, and keep transformers quiet until then."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    accumulation, loudness = vars(GradientState()), logging.get_verbosity()
    before = {name: copy.copy(value) for name, value in accumulation.items()}
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(loudness)
        if bars:
            logging.enable_progress_bar()
        accumulation.clear()
        accumulation.update(before)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus is not None:
            torch.cuda.set_rng_state_all(on_gpus)


def read_mark(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint was made from, and after how many seconds (`made_from`, `seconds`)."""
    found: dict[str, Any] = read_json(checkpoint / MARK, f"Remove '{checkpoint.parent}'.")
    return found


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a warm-up, the latest last."""
    found = [each.parent for each in folder.glob(f"checkpoint-*/{MARK}")]
    return sorted(found, key=lambda each: int(each.name.partition("-")[2]))


def _made_tunable(model: PreTrainedModel, settings: Warmup) -> PreTrainedModel:
    if isinstance(model, PeftModel):
        if not any(each.requires_grad for each in model.parameters()):  # it was loaded for inference
            for layer in model.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.set_adapter(layer.active_adapters)
        return model
    if settings.method == "lora":
        adapter = LoraConfig(
            r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            torch.manual_seed(settings.seed)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "fan_in_fan_out")  # which PEFT sets right for GPT-2's maps
                return cast(PreTrainedModel, get_peft_model(model, adapter))
    if not any(each.requires_grad for each in model.parameters()):
        model.requires_grad_(True)
    return model


def _diverged(what: str, lr: float) -> str:
    return (
        f"The warm-up has diverged, {what}: nothing was scored. Are the model's own weights sound? If so, choose a "
        f"smaller learning rate for it than {lr:g}."
    )


class _Tuner(SFTTrainer):
    """SFTTrainer that stops at a loss that is not finite, in all processes at once, and reports nothing to TRL.

    Its checkpoints hold the trained weights by their own names. The Trainer's would hold them as `save_pretrained`
    names them, and it resumes without those that have other names there, such as GPT-NeoX's head or Mixtral's experts.
    """

    def _send_telemetry(self) -> None:
        pass

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save and output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(trained_weights(self.model), Path(output_dir) / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        put_weights(self.model, load_file(Path(resume_from_checkpoint) / STATE))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(self.accelerator.gather(loss.detach().reshape(1))).all():
            what = f"the loss of step {self.state.global_step + 1} is not finite"
            raise NotFiniteError(_diverged(what, self.args.learning_rate))
        return loss


class _Mark(TrainerCallback):
    """Marks each checkpoint as complete, with what it was made from and after how many seconds; removes older ones.

    Args:
        made_from: what the tuned weights depend on.
        checkpoint: the checkpoint that the training resumes from, by default none.
    """

    def __init__(self, made_from: Mapping[str, Any], checkpoint: Path | None) -> None:
        self._made_from = dict(made_from)
        before = 0.0 if checkpoint is None else read_mark(checkpoint)["seconds"]
        self._begun = time.perf_counter() - before

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if PartialState().is_main_process:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            flush(folder)
            with replacing(folder / MARK) as temporary:
                mark = {"made_from": self._made_from, "seconds": time.perf_counter() - self._begun}
                temporary.write_text(json.dumps(mark))
            for each in checkpoints(folder.parent):
                if each != folder:
                    remove_folder(each)


class _Progress(TrainerCallback):
    """A progress bar of steps, without the Trainer's logs."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hidden = args.disable_tqdm or not PartialState().is_main_process
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="Warm-up", unit="step", disable=hidden)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
