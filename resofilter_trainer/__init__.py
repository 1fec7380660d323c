"""Watch how far each training sample moves W_up, drop those that move it most, train on the rest.

Names are imported when they are first used, so that whatever needs no model needs no torch either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ColumnMapping, InputError, ResonanceConfig, TokenCleaning
    from .criteria.criterion import Criterion
    from .data.rows import load_rows, map_columns, unpack
    from .model.recorder import Recorder
    from .model.resonance import Resonance, literal
    from .report import Report, read_contents, write_report
    from .scores.provenance import Provenance, Trust
    from .scores.score_table import ScoreTable
    from .scores.token_scores import TokenScores
    from .scoring.criterion import score_by
    from .scoring.dataset import score_dataset
    from .scoring.layers import score_layers
    from .scoring.stream import score_stream
    from .selecting.policies import DiverseSelector, RandomSelector, SoftPruning
    from .selecting.selection import DataSelector, Selection
    from .selecting.token_selection import TokenSelection, TokenSelector
    from .tokens.cleaned_dataset import CleanedDataset
    from .tokens.cleaning import clean_dataset
    from .training.callback import ResonanceCallback
    from .training.self_evolving import self_evolve
    from .training.weighting import SampleWeights

__version__ = "0.1.0"

_HOME = {
    "CleanedDataset": "tokens.cleaned_dataset",
    "ColumnMapping": "config",
    "Criterion": "criteria.criterion",
    "DataSelector": "selecting.selection",
    "DiverseSelector": "selecting.policies",
    "InputError": "config",
    "Provenance": "scores.provenance",
    "RandomSelector": "selecting.policies",
    "Recorder": "model.recorder",
    "Report": "report",
    "Resonance": "model.resonance",
    "ResonanceCallback": "training.callback",
    "ResonanceConfig": "config",
    "SampleWeights": "training.weighting",
    "ScoreTable": "scores.score_table",
    "Selection": "selecting.selection",
    "SoftPruning": "selecting.policies",
    "TokenCleaning": "config",
    "TokenScores": "scores.token_scores",
    "TokenSelection": "selecting.token_selection",
    "TokenSelector": "selecting.token_selection",
    "Trust": "scores.provenance",
    "clean_dataset": "tokens.cleaning",
    "literal": "model.resonance",
    "load_rows": "data.rows",
    "map_columns": "data.rows",
    "read_contents": "report",
    "score_by": "scoring.criterion",
    "score_dataset": "scoring.dataset",
    "score_layers": "scoring.layers",
    "score_stream": "scoring.stream",
    "self_evolve": "training.self_evolving",
    "unpack": "data.rows",
    "write_report": "report",
}

__all__ = [
    "CleanedDataset",
    "ColumnMapping",
    "Criterion",
    "DataSelector",
    "DiverseSelector",
    "InputError",
    "Provenance",
    "RandomSelector",
    "Recorder",
    "Report",
    "Resonance",
    "ResonanceCallback",
    "ResonanceConfig",
    "SampleWeights",
    "ScoreTable",
    "Selection",
    "SoftPruning",
    "TokenCleaning",
    "TokenScores",
    "TokenSelection",
    "TokenSelector",
    "Trust",
    "clean_dataset",
    "literal",
    "load_rows",
    "map_columns",
    "read_contents",
    "score_by",
    "score_dataset",
    "score_layers",
    "score_stream",
    "self_evolve",
    "unpack",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
