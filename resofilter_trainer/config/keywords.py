"""The keywords that functions pass on, for type checkers and editors. Knows names and types, no value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from .settings import Norm, Precision, Warmup


class Columns(TypedDict, total=False):
    """The fields of `ColumnMapping`."""

    prompt_column: str | Sequence[str] | None
    completion_column: str | None
    messages_column: str | None
    text_column: str | None
    separator: str
    conversational: bool


class ColumnOptions(Columns, total=False):
    """The fields of `ColumnMapping`, and where rows come from."""

    source: Mapping[str, Any] | None


class DropOptions(TypedDict, total=False):
    """Which rows a pass leaves out."""

    drop_duplicates: bool
    drop_empty: bool


class RowOptions(ColumnOptions, DropOptions, total=False):
    """What every pass over a dataset takes to read its rows, see `score_dataset`."""


class StreamOptions(Columns, DropOptions, total=False):
    """What `score_stream` passes on to `score_dataset`."""

    precision: Precision | None
    tokens_per_batch: int | None
    sharded: bool
    signals: str | Sequence[str] | None
    warmup: int | Warmup | None
    warmup_dataset: Any


class StepOptions(TypedDict, total=False):
    """The fields of `ResonanceConfig` except `update`."""

    n_layers: int
    norm: Norm
    lr: float
    eps: float
    weight_decay: float
    up_projection: str | None
