"""A model that the scored model's losses are compared with: a whole model, or a LoRA adapter on the base model.

Knows transformers and PEFT. Does not know what is measured.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file
from trl import SFTConfig

from ..config import InputError
from .files import first_line, looks_local
from .loading import load_weights, placed
from .models import check_on_hub, check_path

ADAPTER = "resofilter_reference"


@dataclass(frozen=True)
class Reference:
    """A reference model that was found, and is loaded only while it is needed.

    Attributes:
        name: its name on the hub, or its folder.
        is_adapter: whether it is a LoRA adapter on the base model rather than a whole model.
        args: how it is loaded (`model_init_kwargs`, `trust_remote_code`), and its device.
    """

    name: str
    is_adapter: bool
    args: SFTConfig

    @classmethod
    def find(cls, name: str, args: SFTConfig) -> Reference:
        """Look for a reference without loading its weights.

        Raises:
            InputError: there is neither a model nor an adapter of this name, or it cannot be reached.
        """
        if looks_local(name) and not Path(name).is_dir():
            raise InputError(f"There is no reference model at '{name}'. Pass a folder, or a name on the hub.")
        check_on_hub(name, "reference model")
        is_adapter = False
        with contextlib.suppress(Exception):  # an error of the hub, which `_config` reports
            is_adapter = find_adapter_config_file(name) is not None
        found = cls(name, is_adapter, args)
        if not is_adapter:
            found._config()
        elif Path(name).is_dir() and not list(Path(name).glob("adapter_model.*")):
            raise InputError(f"The reference '{name}' has an adapter_config.json, but no adapter_model beside it.")
        return found

    def check_vocabulary(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Raise InputError where the vocabularies differ: losses of different tokens cannot be compared.

        Special tokens may differ: a pad token is often added for tuning. Where one side has no tokenizer, the sizes of
        the vocabularies are compared; an adapter has no vocabulary of its own.

        Args:
            base: the base model.
            tokenizer: its tokenizer, if it has one.
        """
        own = None
        if tokenizer is not None:
            with contextlib.suppress(Exception):  # the reference has no tokenizer
                own = AutoTokenizer.from_pretrained(self.name, trust_remote_code=self.args.trust_remote_code)
        if tokenizer is not None and own is not None:
            difference = _tokenizer_difference(own, tokenizer)
        elif self.is_adapter:
            return
        else:
            sizes = [each.get_text_config().vocab_size for each in (self._config(), base.config)]
            difference = None if sizes[0] == sizes[1] else f"{sizes[0]} tokens against {sizes[1]}"
        if difference is not None:
            raise InputError(
                f"The reference '{self.name}' has another vocabulary than the base model ({difference}): the losses of "
                "their tokens cannot be compared. Choose a reference that was tuned from the same base."
            )

    @contextlib.contextmanager
    def loaded(self, base: PreTrainedModel | None) -> Iterator[PreTrainedModel]:
        """The reference model, on the device of `args`.

        Args:
            base: the base model, which carries an adapter meanwhile; a whole reference needs none.

        Raises:
            InputError: the reference cannot be loaded, or its adapter does not fit.
        """
        if self.is_adapter:
            assert base is not None, "an adapter needs its base model"
            with adapted(base, self.name) as model:
                yield model
        else:
            args = without_revision(self.args)
            yield placed(load_weights(self.name, args), args).eval()

    def _config(self) -> Any:
        check_path(self.name)
        try:
            return AutoConfig.from_pretrained(self.name, trust_remote_code=self.args.trust_remote_code)
        except Exception as error:  # transformers and the hub each raise their own
            raise InputError(f"The reference model '{self.name}' cannot be loaded: {first_line(error)}") from error


def without_revision(args: SFTConfig) -> SFTConfig:
    """A copy of the arguments for the reference model: `revision` is the base model's."""
    found, given = copy.copy(args), args.model_init_kwargs or {}
    found.model_init_kwargs = {name: given[name] for name in given if name != "revision"}
    return found


@contextlib.contextmanager
def adapted(model: PreTrainedModel | PeftModel, adapter: str) -> Iterator[PeftModel]:
    """The model with a LoRA adapter, without a second copy of its weights.

    On exit the modules and their modes, the weights, the trainable parameters and the active adapter are restored.

    Raises:
        InputError: the adapter cannot be loaded, or does not fit.
    """
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modules = dict(model.named_modules(remove_duplicate=False))
    attributes = {each: dict(vars(each)) for each in model.modules()}  # their modes among them
    embeddings = model.get_input_embeddings()
    hooks = dict(embeddings._forward_hooks)  # gradient checkpointing adds one, and loses the one from before
    active = model.active_adapter if isinstance(model, PeftModel) else None
    try:
        try:
            with_adapter = _add_adapter(model, adapter)
        except Exception as error:  # peft, safetensors and torch each raise their own
            raise InputError(f"The reference adapter '{adapter}' cannot be used: {first_line(error)}") from error
        yield with_adapter
    finally:
        if isinstance(model, PeftModel):
            model.set_adapter(active)
            if ADAPTER in model.peft_config:
                model.delete_adapter(ADAPTER)
        for name, module in modules.items():
            if name and model.get_submodule(name) is not module:  # PEFT wrapped it
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module)
        for each, before in attributes.items():
            vars(each).clear()
            vars(each).update(before)
        embeddings._forward_hooks.clear()
        embeddings._forward_hooks.update(hooks)
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)


def _add_adapter(model: PreTrainedModel | PeftModel, adapter: str) -> PeftModel:
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # PEFT draws weights, then overwrites them
        found = model if isinstance(model, PeftModel) else PeftModel.from_pretrained(model, adapter, ADAPTER)
        keys = found.load_adapter(adapter, ADAPTER, is_trainable=False)
        found.set_adapter(ADAPTER)
    if found.active_peft_config.peft_type == PeftType.LORA:  # other kinds have weights that layers share
        _check_fit(keys)
    return found


def _check_fit(keys: Any) -> None:
    """Raise ValueError where PEFT left out weights of an adapter, or drew some at random, which it does not refuse."""
    for names, fault in (
        (keys.unexpected_keys, "the base model has no place for its"),
        (keys.missing_keys, "its files lack"),
    ):
        if names:
            raise ValueError(f"{fault} '{names[0].replace(f'.{ADAPTER}', '')}'")


def _tokenizer_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """How the vocabularies of two tokenizers differ, special tokens aside; None where they do not."""
    mine, theirs = one.get_vocab(), other.get_vocab()
    special = {*one.all_special_tokens, *other.all_special_tokens}
    differing = sum(mine[token] != theirs[token] for token in mine.keys() & theirs.keys())
    differing += len((mine.keys() ^ theirs.keys()) - special)
    return f"{len(mine)} tokens against {len(theirs)}, {differing} differ" if differing else None
