"""Watch how far each training sample moves W_up, drop those that move it most, train on the rest.

Names are imported when they are first used, so that whatever needs no model needs no torch either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import ResonanceCallback
    from .cleaned_dataset import CleanedDataset
    from .config import ColumnMapping, InputError, ResonanceConfig, TokenCleaning
    from .criteria import Criterion
    from .criterion_scoring import score_by
    from .layer_pass import score_layers
    from .policies import DiverseSelector, RandomSelector, SoftPruning
    from .recorder import Recorder
    from .report import Report, read_contents, write_report
    from .resonance import Resonance, literal
    from .rows import load_rows, map_columns, unpack
    from .scores import Provenance, ScoreTable, Trust
    from .scoring import score_dataset
    from .selection import DataSelector, Selection
    from .self_evolving import self_evolve
    from .streaming import score_stream
    from .token_cleaning import clean_dataset
    from .token_scores import TokenScores
    from .token_selection import TokenSelection, TokenSelector
    from .weighting import SampleWeights

__version__ = "0.1.0"

_HOME = {
    "CleanedDataset": "cleaned_dataset",
    "ColumnMapping": "config",
    "Criterion": "criteria",
    "DataSelector": "selection",
    "DiverseSelector": "policies",
    "InputError": "config",
    "Provenance": "scores",
    "RandomSelector": "policies",
    "Recorder": "recorder",
    "Report": "report",
    "Resonance": "resonance",
    "ResonanceCallback": "callback",
    "ResonanceConfig": "config",
    "SampleWeights": "weighting",
    "ScoreTable": "scores",
    "Selection": "selection",
    "SoftPruning": "policies",
    "TokenCleaning": "config",
    "TokenScores": "token_scores",
    "TokenSelection": "token_selection",
    "TokenSelector": "token_selection",
    "Trust": "scores",
    "clean_dataset": "token_cleaning",
    "literal": "resonance",
    "load_rows": "rows",
    "map_columns": "rows",
    "read_contents": "report",
    "score_by": "criterion_scoring",
    "score_dataset": "scoring",
    "score_layers": "layer_pass",
    "score_stream": "streaming",
    "self_evolve": "self_evolving",
    "unpack": "rows",
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
