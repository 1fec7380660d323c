"""How a comparison trains a model, for how long, and how it tests it. Knows SFTTrainer; does not know selectors."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..config import InputError, TokenCleaning, number
from ..config.compatibility import training_arguments
from ..data.files import first_line
from ..data.loading import load_model
from ..data.models import load_weights
from ..data.shared_loading import CHANGES
from ..demo.run import BASE, TRAINING
from ..evaluation.generate import exact_match
from ..evaluation.tasks import evaluate_tasks
from ..selecting.weighted_rows import TOKEN_WEIGHTS
from ..training.callback import ResonanceCallback
from ..training.fine_tuning import to_train
from ..training.token_weighting import TokenWeights
from .config import DEMO, ComparisonConfig
from .data import Data


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        model, tokenizer: as the trainer leaves them; the tokenizer has a pad token.
        tokens, epochs: how many tokens and epochs it was trained on.
        seconds: the duration of the training.
        loss: the last training loss, in nats; NaN if a logged loss or a weight is not finite.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens: float
    epochs: float
    seconds: float
    loss: float


def model_path(model: str) -> str:
    """The folder or the name that a model is loaded from."""
    return str(BASE) if model == DEMO else model


def sft_config(config: ComparisonConfig, model: str, seed: int) -> SFTConfig:
    """The training arguments for one model and seed.

    The defaults are the demo's for the demo's model, and SFTConfig's in float32 for any other model.

    Raises:
        InputError: SFTConfig does not have a field, or refuses a value.
    """
    defaults = TRAINING if model == DEMO else {"bf16": False}
    settings = {
        **training_arguments(defaults),
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        **training_arguments(config.training),
        "output_dir": str(Path(config.output) / "trainer"),
        "seed": seed,
    }
    unknown = sorted(set(settings) - {each.name for each in dataclasses.fields(SFTConfig)})
    if unknown:
        raise InputError(f"In training, '{unknown[0]}' is not a field of SFTConfig.")
    try:
        args = SFTConfig(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"SFTConfig refuses these training settings: {first_line(error)}") from error
    for name in ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"):
        number(f"In training, {name}", getattr(args, name))
    if args.max_steps <= 0:
        number("In training, num_train_epochs", args.num_train_epochs, above=0)
    if args.eval_strategy != "no":
        raise InputError("In training, leave eval_strategy out: a comparison tests each model once, at the end.")
    return args


def lora_config(config: ComparisonConfig) -> LoraConfig | None:
    """The adapter that is trained; None where all weights are. Raises InputError for what peft.LoraConfig refuses."""
    if config.lora is None:
        return None
    known = {each.name for each in dataclasses.fields(LoraConfig)}
    unknown = sorted(set(config.lora) - known)
    if unknown:
        raise InputError(f"In lora, '{unknown[0]}' is not a field of peft.LoraConfig.")
    if "task_type" in config.lora:
        raise InputError("In lora, leave task_type out: a comparison trains language models.")
    try:
        return LoraConfig(task_type="CAUSAL_LM", **config.lora)
    except (ImportError, TypeError, ValueError) as error:
        raise InputError(f"peft.LoraConfig refuses these settings of lora: {first_line(error)}") from error


def check_adapter(config: ComparisonConfig, model: str) -> None:
    """Raise InputError, before anything is trained, where PEFT or SFTTrainer refuses the adapter for a model."""
    adapter = lora_config(config)
    if adapter is None:
        return
    name, args = model_path(model), sft_config(config, model, config.seeds[0])
    changing = any(each in CHANGES for each in args.model_init_kwargs or {})
    try:
        adapted = _adapted(load_weights(name, args, without_numbers=not changing), adapter, model)
    except InputError:  # some models and adapters cannot be had without numbers, nor any model before transformers 5
        adapted = _adapted(load_weights(name, args), adapter, model)
    if isinstance(adapted.get_output_embeddings(), BaseTunerLayer):
        raise InputError(
            f"In lora, leave the output layer of '{model}' out of target_modules, as SFTTrainer trains no adapter of "
            "it; or name it in modules_to_save, which trains all of it."
        )


def _adapted(model: PreTrainedModel, adapter: LoraConfig, name: str) -> PeftModel:
    """A model with the adapter. Raises InputError where PEFT refuses it."""
    try:
        return cast(PeftModel, get_peft_model(model, copy.deepcopy(adapter)))
    except Exception as error:  # PEFT and the model's own code each raise their own
        raise InputError(f"PEFT refuses the settings of lora for '{name}': {first_line(error)}") from error


def steps_per_epoch(args: SFTConfig, rows: int) -> int:
    """The number of steps of an epoch on all rows, in one process."""
    return math.ceil(rows / (args.per_device_train_batch_size * args.gradient_accumulation_steps))


def epochs_of(args: SFTConfig, rows: int) -> float:
    """The length of a training in epochs on all rows, also where it is set in steps."""
    return args.max_steps / steps_per_epoch(args, rows) if args.max_steps > 0 else float(args.num_train_epochs)


def lengthened(args: SFTConfig, factor: float, rows: int, in_stages: bool) -> SFTConfig:
    """The arguments of a training that is `factor` times as long, in epochs or, with `max_steps`, in steps.

    Args:
        args: the arguments of the original training.
        factor: the new length over the original one.
        rows: the number of rows of the dataset.
        in_stages: whether each epoch is divided into stages. An incomplete last epoch with fewer steps than stages is
            then left out.
    """
    args = copy.copy(args)
    if args.max_steps > 0:
        args.max_steps = max(1, round(factor * args.max_steps))
        return args
    args.num_train_epochs *= factor
    incomplete = args.num_train_epochs % 1
    too_short = incomplete * steps_per_epoch(args, rows) < TokenCleaning().parts
    if in_stages and args.num_train_epochs > 1 and too_short:
        args.num_train_epochs -= incomplete
    return args


def train(
    model: str,
    rows: Dataset,
    callback: ResonanceCallback | None,
    args: SFTConfig,
    adapter: LoraConfig | None = None,
) -> Trained:
    """Train a fresh copy of a model.

    Args:
        model: the model's name in the comparison.
        rows: the rows to train on, as text or as tokens.
        callback: the callback that selects rows or tokens during the training; None to train on all of them.
        args: the training arguments.
        adapter: the adapter to train; by default all weights are trained.
    """
    started = time.perf_counter()
    shutil.rmtree(str(args.output_dir), ignore_errors=True)  # or the callback would resume from what it finds there
    loaded, tokenizer = load_model(model_path(model), None, args)
    if "input_ids" in rows.column_names:
        args = copy.copy(args)
        args.assistant_only_loss = False  # the labels are set already
    callbacks: list[TrainerCallback] = [] if callback is None else [callback]
    if TOKEN_WEIGHTS in rows.column_names:
        callbacks.append(TokenWeights())
    trainer = SFTTrainer(
        loaded, args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks,
        peft_config=to_train(adapter, args),
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    logged = [entry[name] for name in ("train_loss", "loss") for entry in history if name in entry]
    sums = [float(each.detach().sum()) for each in loaded.parameters()]
    tokens = max(entry.get("num_tokens", 0) for entry in history)
    loss = logged[-1] if np.isfinite([*logged, *sums]).all() else math.nan
    seconds = time.perf_counter() - started
    processor = cast(PreTrainedTokenizerBase, trainer.processing_class)
    return Trained(loaded, processor, float(tokens), float(trainer.state.epoch or 0), seconds, float(loss))


def held_out_metrics(trained: Trained, config: ComparisonConfig, data: Data, args: SFTConfig) -> dict[str, float]:
    """The metric of each task or, without tasks, the exact match on the held-out rows."""
    model, tokenizer, batch_size = trained.model, trained.tokenizer, args.per_device_eval_batch_size
    if config.tasks:
        where = (config.task_folder, config.task_limit, config.unsafe_code)
        return evaluate_tasks(model, tokenizer, config.tasks, batch_size, *where)
    held_out = (data.prompts, data.answers)
    length = config.max_new_tokens
    return {"exact_match": exact_match(model, tokenizer, *held_out, length, batch_size, bf16=bool(args.bf16))}


def try_tasks(config: ComparisonConfig, model: str, args: SFTConfig) -> None:
    """Run one document of each task with the untrained model, so that an error comes before anything is trained."""
    loaded, tokenizer = load_model(model_path(model), None, args)
    evaluate_tasks(loaded, tokenizer, config.tasks, 1, config.task_folder, 1, config.unsafe_code)
