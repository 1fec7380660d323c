"""A whole training with SFTTrainer: what its weights depend on, the training itself, and the saved model.

Knows SFTTrainer. Does not know what the model is trained for.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from ..config import InputError
from ..config.compatibility import forget_adapter, sampling_strategy
from ..io.files import read_json, replacing
from ..io.made_from import as_json, differences, refuse_differences
from .log import RunLog

# Arguments of SFTConfig that no weight depends on.
WITHOUT_EFFECT = {
    "bf16_full_eval", "dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_num_proc",
    "ddp_timeout", "debug", "disable_tqdm", "do_eval", "do_predict", "do_train", "fp16_full_eval", "greater_is_better",
    "load_best_model_at_end", "local_rank", "metric_for_best_model", "model_init_kwargs", "output_dir",
    "per_device_eval_batch_size", "prediction_loss_only", "project", "push_to_hub", "report_to",
    "resume_from_checkpoint", "run_name", "skip_memory_metrics", "use_cpu",
}  # fmt: skip
WITHOUT_EFFECT_PREFIXES = ("eval_", "hub_", "include_", "log_", "logging_", "save_", "trackio_")


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of a training beside its results, or compare them with those recorded before.

    Args:
        path: a JSON file in the folder of the results.
        settings: the settings by name; a value may be a mapping, or a mapping as JSON text.

    Raises:
        InputError: the results were made with other settings, or the file is damaged.
    """
    remedy = f"Choose another output_dir, or remove '{path.parent}'."
    if path.exists():
        there = read_json(path, remedy)
        if not isinstance(there, dict):
            raise InputError(f"'{path}' is damaged, it holds no mapping. {remedy}")
        refuse_differences(_nested_differences(there, as_json(settings)), f"'{path.parent}' holds results", remedy)
    elif PartialState().is_main_process:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(as_json(settings), indent=2))


def training_settings(args: SFTConfig, peft_config: PeftConfig | None) -> dict[str, Any]:
    """What the weights of a training depend on, besides its model and rows."""
    training = {
        name: value
        for name, value in args.to_dict().items()
        if name not in WITHOUT_EFFECT and not name.startswith(WITHOUT_EFFECT_PREFIXES)
    }
    training["train_sampling_strategy"] = sampling_strategy(args)
    return {"training": training, "LoRA": None if peft_config is None else peft_config.to_dict()}


def to_train(adapter: PeftConfig | None, args: SFTConfig) -> PeftConfig | None:
    """The settings of an adapter for an SFTTrainer that is made next: a copy, which PEFT fills in.

    Sets the seed, by which the adapter's first weights are drawn: TRL before 1.15 does so only after drawing them.
    """
    if adapter is not None:
        set_seed(args.seed)
    return copy.deepcopy(adapter)


def fine_tune(
    model: PreTrainedModel,
    rows: Dataset,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None,
    output: Path,
    kept_tokens: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Train with SFTTrainer from the first step of its schedule to the last; a LoRA adapter is merged at the end.

    Args:
        model: the model to train, in place.
        rows: the rows, as text or as tokens.
        args: SFTTrainer's arguments; nothing is evaluated.
        tokenizer: the tokenizer of the model.
        peft_config: the adapter to train; by default all weights are trained.
        output: the folder for the trainer's own files.
        kept_tokens: what a cleaning kept of the rows' tokens, for the logs.

    Returns:
        The model in evaluation mode, with every weight trainable if an adapter was merged, but those that are
        quantised.
    """
    args = copy.copy(args)
    args.output_dir, args.model_init_kwargs = str(output), None  # the model is loaded already
    args.eval_strategy, args.do_eval, args.load_best_model_at_end = "no", False, False
    if "input_ids" in rows.column_names:
        args.assistant_only_loss = False  # the labels are masked already
    report = _ReportKeptTokens(kept_tokens)
    trainer = _InOrder(
        model, args, train_dataset=rows, processing_class=tokenizer, peft_config=to_train(peft_config, args),
        callbacks=[report],
    )  # fmt: skip
    report.trainer = trainer
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(trained, PeftModel):
        trained = trained.merge_and_unload()
        forget_adapter(trained)
        for each in trained.parameters():
            each.requires_grad_(each.is_floating_point())
    return trained.eval()


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer to a new folder, which appears only once it is complete."""
    if PartialState().is_main_process:
        with replacing(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    PartialState().wait_for_everyone()


def _nested_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs, by dotted names such as `training.learning_rate`."""
    both = {name: (_as_mapping(there[name]), _as_mapping(here[name])) for name in sorted(there.keys() & here.keys())}
    nested = {name: (theirs, mine) for name, (theirs, mine) in both.items() if theirs is not None and mine is not None}
    found = differences(there, here, {*there, *here} - {*nested})
    for name, (theirs, mine) in nested.items():
        found += [f"{name}.{each}" for each in _nested_differences(theirs, mine)]
    return found


def _as_mapping(value: Any) -> Mapping[str, Any] | None:
    """A mapping, or one as JSON text (a provenance); None for any other value."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


class _InOrder(SFTTrainer):
    """SFTTrainer that takes rows in their order where the arguments say so, which before transformers 5.2 it cannot."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if sampling_strategy(self.args) == "sequential":
            return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)
        return super()._get_train_sampler(train_dataset)


class _ReportKeptTokens(TrainerCallback):
    """Logs what was kept of the tokens once the trackers are set up."""

    def __init__(self, kept_tokens: Mapping[str, Any] | None) -> None:
        self.kept_tokens = kept_tokens
        self.trainer: Trainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.kept_tokens is not None and self.trainer is not None:
            RunLog(self.trainer, self.trainer.state.log_history).tokens(self.kept_tokens)
