"""Trainings one after another: each whole or not there, and of the settings it should be of. Knows SFTTrainer."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..config import InputError
from ..io.files import read_json, replacing
from .log import report_tokens

# Of SFTConfig, what no weight depends on.
ASIDE = {
    "bf16_full_eval", "dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_num_proc",
    "ddp_timeout", "debug", "disable_tqdm", "do_eval", "do_predict", "do_train", "fp16_full_eval", "greater_is_better",
    "load_best_model_at_end", "local_rank", "metric_for_best_model", "model_init_kwargs", "output_dir",
    "per_device_eval_batch_size", "prediction_loss_only", "project", "push_to_hub", "report_to",
    "resume_from_checkpoint", "run_name", "skip_memory_metrics", "use_cpu",
}  # fmt: skip
ASIDE_PREFIXES = ("eval_", "hub_", "include_", "log_", "logging_", "save_", "trackio_")


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write down with what settings something was made; raise InputError where it was made with others.

    Args:
        path: a JSON file beside what is made.
        settings: by the names that people know them by.
    """
    mine = json.loads(json.dumps(settings, default=lambda each: sorted(each) if isinstance(each, set) else str(each)))
    if path.exists():
        way_out = f"Choose another output_dir, or remove '{path.parent}'."
        theirs = read_json(path, way_out)
        if not isinstance(theirs, dict):
            raise InputError(f"'{path}' is damaged, it holds no mapping. {way_out}")
        names = [name for name in mine if mine[name] != theirs.get(name)]
        if names:
            raise InputError(
                f"What lies in '{path.parent}' was made with other settings: {', '.join(names)}. Choose another "
                "output_dir, or remove that one."
            )
    elif PartialState().is_main_process:
        with replacing(path) as part:
            part.write_text(json.dumps(mine, indent=2))


def training_settings(args: SFTConfig, peft_config: PeftConfig | None) -> dict[str, Any]:
    """What a training's weights depend on, beside its model and rows."""
    training = {
        name: value
        for name, value in args.to_dict().items()
        if name not in ASIDE and not name.startswith(ASIDE_PREFIXES)
    }
    return {"training": training, "LoRA": None if peft_config is None else peft_config.to_dict()}


def train_stage(
    model: PreTrainedModel,
    rows: Dataset,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None,
    output: Path,
    numbers: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Train with SFTTrainer, with a schedule of its own; LoRA is merged at the end.

    Args:
        model: what is trained, in place.
        rows: as text or as tokens.
        args: SFTTrainer's; nothing is evaluated.
        tokenizer: the model's.
        peft_config: train a fresh adapter.
        output: a folder for the trainer.
        numbers: what was kept of the tokens, for the logs.

    Returns:
        The model, in evaluation mode, every weight of it trainable if an adapter was merged.
    """
    args = copy.copy(args)
    args.output_dir, args.model_init_kwargs = str(output), None  # the model is there already
    args.eval_strategy, args.do_eval, args.load_best_model_at_end = "no", False, False
    if "input_ids" in rows.column_names:
        args.assistant_only_loss = False  # the labels say it
    tell = _TellTokens(numbers)
    peft_config = copy.deepcopy(peft_config)  # which PEFT fills in
    trainer = SFTTrainer(
        model, args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config, callbacks=[tell]
    )
    tell.trainer = trainer
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(trained, PeftModel):
        trained = trained.merge_and_unload().requires_grad_(True)
    return trained.eval()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write both to a folder that is not there yet; whole or not at all."""
    if PartialState().is_main_process:
        with replacing(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    PartialState().wait_for_everyone()


class _TellTokens(TrainerCallback):
    """Says at the beginning, when the trackers are there, what was kept of the tokens."""

    def __init__(self, numbers: Mapping[str, Any] | None) -> None:
        self.numbers = numbers
        self.trainer: Trainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.numbers is not None and self.trainer is not None:
            report_tokens(self.trainer, self.numbers)
