"""What passes over a dataset may be called with, in words for people. Knows types and names, no value."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import SFTConfig

from ..config import ColumnMapping, InputError, ResonanceConfig, check_keywords, check_kind

ROW_OPTIONS = (*(each.name for each in dataclasses.fields(ColumnMapping)), "drop_duplicates", "drop_empty", "source")
OURS = ("told", "weights")  # what one function of this package gives another
INSTEAD = {"tokenizer": "processing_class", "batch_size": "tokens_per_batch"}  # names of other libraries
SETTINGS: dict[str, type] = {"config": ResonanceConfig, "args": SFTConfig}


def check_call(
    function: Callable[..., Any],
    options: Iterable[str],
    model: object,
    processing_class: object,
    args: object,
    config: object = None,
    more: Iterable[str] = (),
) -> None:
    """Raise InputError where a public function is called with something that it does not take.

    Args:
        function: the function, the last of whose parameters takes the options of rows and columns.
        options: the names of these options as they were given.
        model, processing_class, args, config: the arguments of these names.
        more: what the function takes beside its parameters and the options of rows and columns.
    """
    own = [name for name in inspect.signature(function).parameters if name not in ("row_options", "options")]
    known = [*own, *more]
    given = [name for name in options if name not in OURS]
    for name in given:
        place = next((each for each, kind in SETTINGS.items() if each in known and _has(kind, name)), None)
        if INSTEAD.get(name) in known:
            raise InputError(f"There is no argument {name}=. Did you mean {INSTEAD[name]}=?")
        if name not in (*known, *ROW_OPTIONS) and place is not None:
            raise InputError(f"There is no argument {name}=. Pass {place}={SETTINGS[place].__name__}({name}=...).")
    check_keywords(given, [*known, *ROW_OPTIONS])
    check_kind("model", model, (str, nn.Module), "a name, a folder as text, or a model")
    check_kind(
        "processing_class", processing_class, (PreTrainedTokenizerBase, ProcessorMixin, type(None)), "a tokenizer"
    )
    check_kind("args", args, (SFTConfig, type(None)), "an SFTConfig")
    check_kind("config", config, (ResonanceConfig, type(None)), "a ResonanceConfig")


def _has(settings: type, name: str) -> bool:
    return name in {each.name for each in dataclasses.fields(settings)}
