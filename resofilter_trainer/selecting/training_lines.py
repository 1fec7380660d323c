"""The lines of Python that train on saved rows as they were scored. Knows names and settings, no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import ColumnMapping
from ..scores.provenance import OF_SOURCE
from .weighted_rows import TOKEN_WEIGHTS, WEIGHT

TOKENS = "input_ids"
TRAINED = "trained"  # the folder of the model that the lines train, beside the rows
LENGTH = 1024  # SFTConfig's `max_length`
LEARNT: dict[str, bool | None] = {"assistant_only_loss": False, "completion_only_loss": None}  # its other defaults


def training_lines(
    model: str,
    rows: Path,
    output: Path,
    preparation: Mapping[str, Any],
    column_names: list[str],
    source: Mapping[str, Any] | None = None,
) -> list[str]:
    """Lines that run as they are, on a GPU or without one, and train with SFTTrainer.

    Args:
        model: the name or folder of the model to train.
        rows: the folder of the rows.
        output: the folder of everything, in which the trained model gets one of its own.
        preparation: how rows became tokens, as in the provenance of their scores.
        column_names: the columns of the rows.
        source: the source in the provenance of their scores, which has the arguments in `OF_SOURCE` that were passed.
    """
    tokens, weighted = TOKENS in column_names, WEIGHT in column_names
    columns = {each.name: preparation.get(each.name) for each in dataclasses.fields(ColumnMapping)}
    columns = {name: value for name, value in columns.items() if value not in (None, [], False)}
    if columns.get("separator") == ColumnMapping().separator:
        del columns["separator"]
    prompt = columns.get("prompt_column")
    if isinstance(prompt, list) and len(prompt) == 1:
        columns["prompt_column"] = prompt[0]
    config = {"bf16": "gpu", "use_cpu": "not gpu"}
    if preparation.get("max_length", LENGTH) != LENGTH:
        config["max_length"] = repr(preparation["max_length"])
    for name, usual in LEARNT.items():
        if preparation.get(name, usual) != usual:
            config[name] = repr(preparation[name])
    passed = {name: (source or {}).get(name) for name in OF_SOURCE}
    config |= {name: repr(value) for name, value in passed.items() if value}
    names = ["load_rows"] if tokens else ["ColumnMapping", "load_rows", "map_columns"]
    names += ["SampleWeights"] if weighted else []
    names += ["TokenWeights"] if TOKEN_WEIGHTS in column_names else []
    read = f"load_rows({str(rows)!r})"
    mapped = read if tokens else f"map_columns({read}, ColumnMapping({_keywords(columns)}))"
    callbacks = f", callbacks=[SampleWeights(rows[{WEIGHT!r}])]" if weighted else ""
    callbacks = ", callbacks=[TokenWeights()]" if TOKEN_WEIGHTS in column_names else callbacks
    trained = str(output / TRAINED)
    return [
        "import torch",
        f"from resofilter_trainer import {', '.join(sorted(names))}",
        "from trl import SFTConfig, SFTTrainer",
        f"rows = {mapped}",
        "gpu = torch.cuda.is_available()",
        f"args = SFTConfig({trained!r}, {', '.join(f'{name}={value}' for name, value in config.items())})",
        f"SFTTrainer({model!r}, args, train_dataset=rows{callbacks}).train()",
    ]


def _keywords(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
