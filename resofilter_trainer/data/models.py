"""A model and its tokenizer, from a name or a folder. Knows transformers' loading and the files of a model, no rows."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import InputError
from .files import first_line, looks_local


def load_model(
    model: str | PreTrainedModel, processing_class: PreTrainedTokenizerBase | None, args: SFTConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer; a model's name is loaded in float32, as SFTTrainer does.

    Raises:
        InputError: one of them cannot be found, reached or read.
    """
    if isinstance(model, str):
        model = load_weights(model, args)
    name = model.config.name_or_path
    try:
        tokenizer = processing_class or AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # transformers and the hub each raise their own
        raise InputError(f"The tokenizer of '{name}' cannot be loaded: {first_line(error)}") from error
    return model, tokenizer


def load_weights(name: str, args: SFTConfig) -> PreTrainedModel:
    """A model from its name or folder, in float32 unless `args.model_init_kwargs` says otherwise.

    Raises:
        InputError: it cannot be found, reached or read.
    """
    if looks_local(name) and not Path(name).is_dir():
        raise InputError(f"There is no model at '{name}'. Pass a folder, or a name on the hub.")
    safe = {"trust_remote_code": args.trust_remote_code, "use_safetensors": True}  # a pickle may run anything
    settings = {"dtype": torch.float32, **safe, **(args.model_init_kwargs or {})}
    try:
        return AutoModelForCausalLM.from_pretrained(name, **settings)
    except Exception as error:  # transformers, safetensors and the hub each raise their own
        raise InputError(f"The model '{name}' cannot be loaded: {first_line(error)}") from error
