"""The model that tokens are cleaned against: a whole one, or a LoRA adapter on a base that is there already.

Knows transformers and PEFT, not what is measured.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file
from trl import SFTConfig

from ..config import InputError
from ..data.loading import load_weights, placed
from ..data.rows import first_line, looks_local

ADAPTER = "resofilter_reference"


def is_adapter(reference: str, args: SFTConfig) -> bool:
    """Whether a name or a folder holds an adapter and no whole model.

    Raises:
        InputError: it holds neither, or cannot be reached.
    """
    if looks_local(reference) and not Path(reference).is_dir():
        raise InputError(f"There is no reference model at '{reference}'. Pass a folder, or a name on the hub.")
    adapter = False
    with contextlib.suppress(Exception):  # of the hub, and then the next line fails, too
        adapter = find_adapter_config_file(reference) is not None
    if not adapter:
        _config(reference, args)
    elif Path(reference).is_dir() and not list(Path(reference).glob("adapter_model.*")):
        raise InputError(f"The reference '{reference}' holds an adapter_config.json, but no adapter_model to it.")
    return adapter


def check_vocabulary(
    reference: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: SFTConfig, adapter: bool
) -> None:
    """Raise InputError where a reference has another vocabulary: losses of tokens that differ cannot be compared.

    Special tokens may be added or missing: a pad token is often added for tuning. Where one side brings no
    tokenizer, the sizes of the vocabularies are compared, unless the reference is an adapter, which has none.
    """
    own = None
    if tokenizer is not None:
        with contextlib.suppress(Exception):  # it brings none
            own = AutoTokenizer.from_pretrained(reference, trust_remote_code=args.trust_remote_code)
    if tokenizer is None or own is None:
        if adapter:
            return
        theirs = _config(reference, args).get_text_config().vocab_size
        size = base.config.get_text_config().vocab_size
        what = None if theirs == size else f"{theirs} tokens against {size}"
    else:
        mine, theirs = tokenizer.get_vocab(), own.get_vocab()
        special = {*tokenizer.all_special_tokens, *own.all_special_tokens}
        differing = sum(mine.get(token) != theirs.get(token) for token in mine.keys() & theirs.keys())
        differing += len((mine.keys() ^ theirs.keys()) - special)
        what = f"{len(theirs)} tokens against {len(mine)}, {differing} differ" if differing else None
    if what is not None:
        raise InputError(
            f"The reference '{reference}' has another vocabulary than the base model ({what}): losses of its tokens "
            "cannot be compared. Choose a reference that was tuned from the same base."
        )


def load_reference(reference: str, args: SFTConfig) -> PreTrainedModel:
    """A whole reference model, on the device of `args`. Raises InputError where it cannot be loaded."""
    args = copy.copy(args)
    args.model_init_kwargs = {k: v for k, v in (args.model_init_kwargs or {}).items() if k != "revision"}  # the base's
    return placed(load_weights(reference, args), args).eval()


@contextlib.contextmanager
def wearing(model: PreTrainedModel | PeftModel, adapter: str) -> Iterator[PeftModel]:
    """The model with a LoRA adapter on it, for a while; no second copy of its weights is made.

    Afterwards modules and their modes, weights, trainable parameters and the active adapter are as they were.

    Raises:
        InputError: the adapter cannot be loaded, or does not fit.
    """
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modules = dict(model.named_modules(remove_duplicate=False))
    attributes = {each: dict(vars(each)) for each in model.modules()}  # their modes among them
    embeddings = model.get_input_embeddings()
    hooks = dict(embeddings._forward_hooks)  # checkpointing adds one, and forgets the one that was there
    active = model.active_adapter if isinstance(model, PeftModel) else None
    try:
        try:
            worn = _put_on(model, adapter)
        except Exception as error:  # peft, safetensors and torch each raise their own
            raise InputError(f"The reference adapter '{adapter}' cannot be used: {first_line(error)}") from error
        yield worn
    finally:
        if isinstance(model, PeftModel):
            model.set_adapter(active)
            if ADAPTER in model.peft_config:
                model.delete_adapter(ADAPTER)
        for name, module in modules.items():
            if name and model.get_submodule(name) is not module:  # it was wrapped
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module)
        for each, own in attributes.items():
            vars(each).clear()
            vars(each).update(own)
        embeddings._forward_hooks.clear()
        embeddings._forward_hooks.update(hooks)
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


def _put_on(model: PreTrainedModel | PeftModel, adapter: str) -> PeftModel:
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # PEFT draws what it then overwrites
        return _loaded(model, adapter)


def _loaded(model: PreTrainedModel | PeftModel, adapter: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, adapter, ADAPTER)
    model.load_adapter(adapter, ADAPTER, is_trainable=False)
    model.set_adapter(ADAPTER)
    return model


def _config(reference: str, args: SFTConfig) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(reference, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # transformers and the hub each raise their own
        raise InputError(f"The reference model '{reference}' cannot be loaded: {first_line(error)}") from error
