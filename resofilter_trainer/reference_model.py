"""The model that tokens are cleaned against: a whole one, or a LoRA adapter on a base that is there already.

Knows transformers and PEFT, not what is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file
from trl import SFTConfig

from .config import InputError
from .loading import load_weights, placed
from .rows import first_line, looks_local

ADAPTER = "resofilter_reference"


def is_adapter(reference: str, args: SFTConfig) -> bool:
    """Whether a name or a folder holds an adapter and no whole model.

    Raises:
        InputError: it holds neither, or cannot be reached.
    """
    if looks_local(reference) and not Path(reference).is_dir():
        raise InputError(f"There is no reference model at '{reference}'. Pass a folder, or a name on the hub.")
    with contextlib.suppress(Exception):  # of the hub, and then the next line fails, too
        if find_adapter_config_file(reference) is not None:
            return True
    _config(reference, args)
    return False


def check_vocabulary(
    reference: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, args: SFTConfig
) -> None:
    """Raise InputError where a whole reference model has another vocabulary: losses of other tokens cannot be compared.

    Where one side brings no tokenizer, the sizes of the vocabularies are compared.
    """
    own = None
    if tokenizer is not None:
        with contextlib.suppress(Exception):  # it brings none
            own = AutoTokenizer.from_pretrained(reference, trust_remote_code=args.trust_remote_code).get_vocab()
    if tokenizer is None or own is None:
        theirs = _config(reference, args).get_text_config().vocab_size
        size = base.config.get_text_config().vocab_size
        what = None if theirs == size else f"{theirs} tokens against {size}"
    else:
        mine = tokenizer.get_vocab()
        differing = sum(own.get(token) != number for token, number in mine.items())
        what = None if own == mine else f"{len(own)} tokens against {len(mine)}, {differing} differ"
    if what is not None:
        raise InputError(
            f"The reference '{reference}' has another vocabulary than the base model ({what}): losses of its tokens "
            "cannot be compared. Choose a reference that was tuned from the same base."
        )


def load_reference(reference: str, args: SFTConfig) -> PreTrainedModel:
    """A whole reference model, on the device of `args`. Raises InputError where it cannot be loaded."""
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
    modes = {module: module.training for module in model.modules()}
    attributes = set(vars(model))
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
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)


def _put_on(model: PreTrainedModel | PeftModel, adapter: str) -> PeftModel:
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
