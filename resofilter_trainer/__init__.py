"""Measure how far each training sample moves W_up, drop the samples that move it most, and train on the rest.

A name is imported when it is first used, so everything that needs no model works without importing torch.
"""

# ruff: noqa: F401, the imports below are for type checkers
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ColumnMapping, InputError, ResonanceConfig, TokenCleaning, Warmup
    from .criteria.criterion import Criterion
    from .data.exporting import export_rows
    from .data.files import load_rows
    from .data.row_report import write_report
    from .data.rows import map_columns, unpack
    from .data.text_checks import TextChecks, check_texts
    from .ledger.ledger import Ledger
    from .model.recorder import Recorder
    from .model.resonance import Resonance, literal
    from .probe.results import ProbeResult
    from .probe.run import probe_dataset
    from .report import Report, read_contents
    from .scores.joined_file import join_scores
    from .scores.provenance import Provenance, Trust
    from .scores.score_table import ScoreTable
    from .scores.shards import Shard
    from .scores.token_scores import TokenScores
    from .scoring.criterion import score_by
    from .scoring.dataset import score_dataset
    from .scoring.layers import score_layers
    from .scoring.stream import score_stream
    from .selecting.data_selector import DataSelector
    from .selecting.named_rules import token_rule
    from .selecting.per_prompt import OnePerPrompt
    from .selecting.policies import DiverseSelector, RandomSelector, SoftPruning
    from .selecting.selection import Selection
    from .selecting.streamed import select_file
    from .selecting.token_rules import TokenInputs, TokenRule
    from .selecting.token_selection import TokenSelection, TokenSelector
    from .selecting.votes import votes_of
    from .tokens.cleaned_dataset import CleanedDataset
    from .tokens.cleaning import clean_dataset
    from .training.callback import ResonanceCallback
    from .training.self_evolving import self_evolve
    from .training.token_weighting import TokenWeights
    from .training.weighting import SampleWeights

__version__ = "0.1.0"

_NAMES = {  # the public names of each module, as above
    "config": ("ColumnMapping", "InputError", "ResonanceConfig", "TokenCleaning", "Warmup"),
    "criteria.criterion": ("Criterion",),
    "data.exporting": ("export_rows",),
    "data.files": ("load_rows",),
    "data.row_report": ("write_report",),
    "data.rows": ("map_columns", "unpack"),
    "data.text_checks": ("TextChecks", "check_texts"),
    "ledger.ledger": ("Ledger",),
    "model.recorder": ("Recorder",),
    "model.resonance": ("Resonance", "literal"),
    "probe.results": ("ProbeResult",),
    "probe.run": ("probe_dataset",),
    "report": ("Report", "read_contents"),
    "scores.joined_file": ("join_scores",),
    "scores.provenance": ("Provenance", "Trust"),
    "scores.score_table": ("ScoreTable",),
    "scores.shards": ("Shard",),
    "scores.token_scores": ("TokenScores",),
    "scoring.criterion": ("score_by",),
    "scoring.dataset": ("score_dataset",),
    "scoring.layers": ("score_layers",),
    "scoring.stream": ("score_stream",),
    "selecting.data_selector": ("DataSelector",),
    "selecting.named_rules": ("token_rule",),
    "selecting.per_prompt": ("OnePerPrompt",),
    "selecting.policies": ("DiverseSelector", "RandomSelector", "SoftPruning"),
    "selecting.selection": ("Selection",),
    "selecting.streamed": ("select_file",),
    "selecting.token_rules": ("TokenInputs", "TokenRule"),
    "selecting.token_selection": ("TokenSelection", "TokenSelector"),
    "selecting.votes": ("votes_of",),
    "tokens.cleaned_dataset": ("CleanedDataset",),
    "tokens.cleaning": ("clean_dataset",),
    "training.callback": ("ResonanceCallback",),
    "training.self_evolving": ("self_evolve",),
    "training.token_weighting": ("TokenWeights",),
    "training.weighting": ("SampleWeights",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
