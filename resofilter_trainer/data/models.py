"""A model and its tokenizer, from a name or a folder. Knows transformers' loading and the files of a model, no rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.quantizers import AutoQuantizationConfig
from trl import SFTConfig

from ..config import InputError
from ..config.compatibility import names_of_mismatched
from ..io.hub import check_reachable
from ..model.plain import refuse_wrapper
from .files import first_line, looks_local

ON_THE_HUB = "revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code"
CONFIG, ADAPTER = "config.json", "adapter_config.json"
OF_TOKENIZER = "tokenizer_config.json", CONFIG
A_FOLDER = "a folder with config.json and *.safetensors, or a name on the hub"
LISTED = 3  # names in a message
CONVERT = (  # for weights in another format, whose tokenizer has to follow
    "and save_pretrained of the model and of its tokenizer to a new folder"
)


def load_model(
    model: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | None,
    args: SFTConfig,
    load: Callable[[str, SFTConfig], PreTrainedModel] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer; a model's name is loaded in float32, as SFTTrainer does.

    Args:
        model, processing_class, args: as for `score_dataset`.
        load: a function that loads a model by its name; by default `load_weights`.

    Raises:
        InputError: one of them cannot be found, reached or read, or the files lack some of the model's weights.
    """
    if isinstance(processing_class, ProcessorMixin):
        raise InputError(
            f"Only text can be scored, which needs a tokenizer: got {type(processing_class).__name__}. Pass "
            "processing_class=processor.tokenizer."
        )
    if isinstance(model, str):
        model = (load or load_weights)(model, args)
    refuse_wrapper(model)
    name = model.config.name_or_path
    if not name and processing_class is None:
        raise InputError(
            "The model has no name by which its tokenizer is found. Pass processing_class=, the tokenizer."
        )
    try:
        if processing_class is None:
            check_on_hub(name, "tokenizer", OF_TOKENIZER)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # transformers and the hub each raise their own
        raise InputError(
            f"The tokenizer of '{name}' cannot be loaded: {first_line(error).rstrip(':.')}. Save it beside the model "
            f"(tokenizer.save_pretrained('{name}')), or in Python, pass it as processing_class=."
        ) from error
    return model, tokenizer


def load_weights(name: str, args: SFTConfig, *, without_numbers: bool = False) -> PreTrainedModel:
    """A model from its name or folder, in float32 unless `args.model_init_kwargs` says otherwise.

    Args:
        name: the name or folder.
        args: SFTTrainer's arguments.
        without_numbers: whether to read only the structure, and leave every tensor on the meta device.

    Raises:
        InputError: it cannot be found, reached or read, or its files lack some of its weights, which transformers would
            fill with random numbers.
    """
    given = args.model_init_kwargs or {}
    check_name(name, args)
    safe = {"trust_remote_code": args.trust_remote_code, "use_safetensors": True}  # a pickle may run anything
    settings = {"dtype": torch.float32, **safe, **given, "output_loading_info": True}
    if without_numbers:
        settings["device_map"] = {"": "meta"}
    try:
        if isinstance(given.get("quantization_config"), Mapping):  # which no model takes that is quantised already
            settings["quantization_config"] = AutoQuantizationConfig.from_dict(dict(given["quantization_config"]))
        model, found = _class_of(name, settings).from_pretrained(name, **settings)
    except Exception as error:  # transformers, safetensors and the hub each raise their own
        _refuse(name, error)
    _check_whole(name, model, found)
    loaded: PreTrainedModel = model
    return loaded


def _class_of(name: str, settings: Mapping[str, Any]) -> Any:
    """The class that SFTTrainer loads: the one that the configuration names, if it is a language model's.

    Models with vision or audio are no `AutoModelForCausalLM`. An adapter alone has no configuration of a model.
    """
    where = {key: settings[key] for key in ON_THE_HUB if key in settings}
    try:
        config = settings.get("config") or AutoConfig.from_pretrained(name, **where)
    except (OSError, ValueError):  # an adapter; or no model, which the class says better
        return AutoModelForCausalLM
    if config.is_encoder_decoder:
        return AutoModelForCausalLM
    named = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if isinstance(named, type) and issubclass(named, GenerationMixin):
        return named
    own = AutoModelForImageTextToText.__name__ in (getattr(config, "auto_map", None) or {})
    return AutoModelForImageTextToText if own else AutoModelForCausalLM


def check_causal(model: Any) -> None:
    """Raise InputError for a model that predicts no next token: one without a language model's head, or with another.

    Args:
        model: any model; one that is not of transformers is left to whoever runs it.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(plain, PreTrainedModel) and plain.get_output_embeddings() is None:
        raise InputError(
            f"{type(plain).__name__} predicts no next token: it has no language model's head, from whose loss a row is "
            "scored. Load the model with AutoModelForCausalLM."
        )


def check_path(name: str) -> None:
    """Raise InputError for a file, or a folder without a model, with what to pass instead; the hub is not asked."""
    path = Path(name)
    if path.is_file():
        if path.suffix == ".gguf":
            raise InputError(f"'{name}' is a GGUF file. {_of_gguf(path.name, path.parent)}")
        beside = (path.parent / CONFIG).is_file()
        instead = f"Pass its folder: '{path.parent}'." if beside else f"Pass {A_FOLDER}."
        raise InputError(f"'{name}' is a file, and a model is a folder of several. {instead}")
    if not path.is_dir():
        if looks_local(name):
            raise InputError(f"There is no model at '{name}'. Pass {A_FOLDER}.")
        return
    if (path / CONFIG).is_file() or (path / ADAPTER).is_file():
        return
    quantised = sorted(path.glob("*.gguf"))
    if quantised:
        raise InputError(f"'{name}' holds a model as GGUF ({quantised[0].name}). {_of_gguf(quantised[0].name, path)}")
    inside = sorted({each.parent for each in path.glob(f"*/{CONFIG}")}, key=lambda each: each.stat().st_mtime)
    instead = f"Did you mean '{inside[-1]}'?" if inside else f"Pass {A_FOLDER}."
    raise InputError(f"The model '{name}' cannot be loaded: the folder has no {CONFIG}. {instead}")


def check_name(name: str, args: SFTConfig) -> None:
    """Raise InputError, within seconds, where there is no model of this name; arguments as for `load_weights`."""
    given = args.model_init_kwargs or {}
    if "gguf_file" not in given:
        check_path(name)
        check_on_hub(name, **given)


def check_on_hub(name: str, what: str = "model", files: Sequence[str] = (CONFIG, ADAPTER), **settings: Any) -> None:
    """Raise InputError, within seconds, for a name that is no folder here, and cannot be had from the hub either.

    Args:
        name: a name on the hub, or a folder.
        what: the content in words, for errors.
        files: names of files, of which a repository on the hub has one.
        **settings: those of `from_pretrained`; where to find a model is taken from them.
    """
    if not Path(name).is_dir() and not settings.get("local_files_only"):
        where = {key: settings[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in settings}
        check_reachable(what, name, files, **where)


def _of_gguf(file: str, folder: Path) -> str:
    return (
        "Its weights are quantised for llama.cpp, and scores need the model's own: pass the model that it was made "
        f"from, {A_FOLDER}. If there is only this file, convert it once: "
        f"AutoModelForCausalLM.from_pretrained('{folder}', gguf_file='{file}') {CONVERT}."
    )


def _refuse(name: str, error: Exception) -> NoReturn:
    """Raise InputError for what could not be loaded, with a remedy where the folder shows one."""
    path, remedy = Path(name), ""
    pickled = [each.name for each in (*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth"))]
    if _is_adapter(path):
        remedy = f" {_of_adapter(name)}"
    elif pickled and not any(path.glob("*.safetensors")):
        remedy = (
            f" Its weights are a pickle ({pickled[0]}), which may run any code when it is loaded. If you trust it, "
            f"convert it once: AutoModelForCausalLM.from_pretrained('{name}') {CONVERT}."
        )
    raise InputError(f"The model '{name}' cannot be loaded: {first_line(error)}{remedy}") from error


def _is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter without its model."""
    return (folder / ADAPTER).is_file() and not (folder / CONFIG).is_file()


def _of_adapter(name: str) -> str:
    return (
        "It is an adapter: pass the model with it, AutoPeftModelForCausalLM.from_pretrained"
        f"('{name}'), and its tokenizer as processing_class; or the folder of the merged model: merge_and_unload(), "
        f"{CONVERT}."
    )


def _check_whole(name: str, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raise InputError where transformers made weights up, because the files lack them or hold others."""
    lacking = sorted({*found["missing_keys"], *names_of_mismatched(found)})
    if not lacking:
        return
    unused = sorted(found["unexpected_keys"])
    what = f"The files of '{name}' lack {_listed(lacking)} of {type(model).__name__}"
    if unused:
        what += f", and hold {_listed(unused)} instead"
    path = Path(name)
    if _is_adapter(path):
        remedy = _of_adapter(name)
    else:
        remedy = (
            "Pass the causal language model itself, not its layers alone, nor one tuned for classification or as a "
            "reward model."
        )
    raise InputError(f"{what}: they would be random numbers, and so would the scores. {remedy}")


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(list(names)[:LISTED]) + more
