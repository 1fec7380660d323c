"""What scores are made from, as hashes and settings. Knows models and tokenizers, not what they are used for."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
import xxhash
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import SFTConfig

from ..config import ColumnMapping, Precision, ResonanceConfig
from ..config.compatibility import sampling_strategy
from ..io.digest import hash_rows
from ..model.float32 import main_dtype
from ..model.quantised import bits_of, stored_tensors
from ..model.sharding import whole_parameters
from ..scores.provenance import Provenance
from .preparation import PreparedRows
from .surveys import survey

PACKAGES = ("resofilter_trainer", "torch", "transformers", "trl")


def describe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: PreparedRows,
    rows: int,
    args: SFTConfig,
    config: Mapping[str, Any],
    columns: ColumnMapping,
    source: Mapping[str, Any],
    precision: Precision | None = None,
    weights: str | None = None,
) -> Provenance:
    """The provenance of scores of these rows by this model.

    Args:
        model, tokenizer: what measures the rows.
        prepared: the rows as tokens.
        rows: the number of rows in the user's dataset.
        args: lengths and masking.
        config: what is measured and with which settings.
        columns: which columns became prompt and completion.
        source: where the dataset comes from.
        precision: the forward's precision; by default what `args.bf16` says.
        weights: the hash of the model's weights, where it is known already.
    """
    precision = precision or ("bfloat16" if args.bf16 else "float32")
    preparation = {
        **dataclasses.asdict(columns),
        "prompt_column": columns.prompt_columns,
        "max_length": args.max_length,
        "completion_only_loss": args.completion_only_loss,
        "assistant_only_loss": args.assistant_only_loss,
        "model_config": _hash_text(json.dumps(_settings(model), sort_keys=True, default=str)),
        "attention": model.config._attn_implementation,
        "dtype": str(main_dtype(model)).removeprefix("torch."),
        "autocast": None if precision == "float32" else precision,
    }
    return Provenance(
        model=str(model.config.name_or_path or type(model).__name__),
        weights=hash_weights(model) if weights is None else weights,
        tokenizer=hash_tokenizer(tokenizer),
        template=_hash_text(prepared.template),
        dataset=prepared.fingerprint,
        rows=rows,
        config=config,
        preparation=preparation,
        versions={package: importlib.metadata.version(package) for package in PACKAGES},
        source=dict(source),
    )


def describe_training(
    trainer: Trainer,
    rows: int,
    config: ResonanceConfig,
    settings: Mapping[str, Any],
) -> Provenance:
    """The provenance of scores that are measured while a trainer trains, with its weights as they are now.

    Args:
        trainer: the trainer, before its first step.
        rows: the number of rows in the user's dataset.
        config: the step to measure, and how.
        settings: what must be the same for a run to resume: what is dropped and when, batches, seeds, the dataset's
            fingerprint. From the second epoch on, scores depend on all of it.
    """
    args, model, tokenizer = trainer.args, cast(Any, trainer.model), trainer.processing_class
    known = isinstance(tokenizer, PreTrainedTokenizerBase)
    preparation = {
        "max_length": getattr(args, "max_length", None),
        "completion_only_loss": getattr(args, "completion_only_loss", None),
        "assistant_only_loss": getattr(args, "assistant_only_loss", None),
        "model_config": _hash_text(json.dumps(_settings(model), sort_keys=True, default=str)),
        "attention": model.config._attn_implementation,
        "dtype": str(main_dtype(model)).removeprefix("torch."),
        "autocast": "bfloat16" if args.bf16 else "float16" if args.fp16 and settings.get("when") != "before" else None,
        "run": dict(settings),
    }
    return Provenance(
        model=str(model.config.name_or_path or type(model).__name__),
        weights=hash_weights(model),
        tokenizer=hash_tokenizer(tokenizer) if known else "",
        template=_hash_text(str(getattr(tokenizer, "chat_template", None) or "")),
        dataset=str(settings["dataset"]),
        rows=rows,
        config=config.to_json(),
        preparation=preparation,
        versions={package: importlib.metadata.version(package) for package in PACKAGES},
    )


def run_settings(trainer: Trainer, **settings: Any) -> dict[str, Any]:
    """What must be the same for a run to resume: the given settings, and the trainer's for its rows and order."""
    args = trainer.args
    own = {
        "seed": args.seed,
        "data_seed": args.data_seed,
        "train_sampling_strategy": sampling_strategy(args),
        "dataset": fingerprint(trainer.train_dataset),
    }
    plain: dict[str, Any] = json.loads(json.dumps({**settings, **own}))
    return plain


def fingerprint(dataset: Any, like: str | None = None) -> str:
    """Hash of a trainer's tokens, or else of all columns; empty for anything but a `datasets.Dataset`.

    Args:
        dataset: the trainer's rows.
        like: an earlier fingerprint to compare with; one of version 0.1.0 is computed as that version does.
    """
    if not isinstance(dataset, Dataset):
        return ""
    if {"input_ids", "labels"} <= set(dataset.column_names):
        return survey(dataset.select_columns(["input_ids", "labels"]))[3]
    return hash_rows(dataset, like)


def identity(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    """Hashes of the weights and of the settings that losses depend on, those of the active adapter included."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    settings: dict[str, Any] = {"model": _settings(inner)}
    if isinstance(model, PeftModel):
        adapter = model.peft_config[model.active_adapter].to_dict()
        settings["adapter"] = {name: adapter[name] for name in adapter if name != "base_model_name_or_path"}
    text = json.dumps(
        settings, sort_keys=True, default=lambda each: sorted(each) if isinstance(each, set) else str(each)
    )
    return {"reference_weights": hash_weights(model), "reference_settings": _hash_text(text)}


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    """The model's configuration without its path and the version that wrote it."""
    ignored = ("name_or_path", "_name_or_path", "transformers_version", "use_cache")
    return {name: value for name, value in model.config.to_dict().items() if name not in ignored}


def hash_weights(model: nn.Module) -> str:
    """Hash of every parameter's name, shape, dtype and bytes, in order; tied parameters count once.

    For a quantised parameter it includes the tensors that its bytes are decoded with. All processes that share a
    sharded model must call this.
    """
    digest = xxhash.xxh3_128()
    for name, parameter in whole_parameters(model):
        if bits_of(parameter) is None:
            add_tensor(digest, name, parameter)
            continue
        owner = name.rpartition(".")[0]
        for key, value in stored_tensors(model.get_submodule(owner)).items():
            add_tensor(digest, f"{owner}.{key}", value)
    return digest.hexdigest()


def add_tensor(digest: xxhash.xxh3_128, name: str, tensor: Tensor) -> None:
    """Add a tensor's name, shape, dtype and bytes to a hash."""
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary and the special tokens."""
    return _hash_text(json.dumps([sorted(tokenizer.get_vocab().items()), repr(tokenizer.special_tokens_map)]))


def _hash_text(text: str) -> str:
    return xxhash.xxh3_128(text.encode()).hexdigest()
