"""The settings a user can choose, as plain dataclasses, and their checks. Knows nothing of data, models or torch."""

from .checks import at_most_one, check_keywords, nearest, number, one_of, share, whole_number
from .errors import InputError, NotFiniteError, NothingError, ScoreWarning
from .settings import (
    CLEANING_MODES,
    FILE_FORMATS,
    OPTIMIZER,
    RESONANCE,
    SATURATING,
    SELF,
    ColumnMapping,
    Norm,
    Precision,
    Ranking,
    ResonanceConfig,
    TokenCleaning,
    UpdateName,
    cleaning_of_mode,
)

__all__ = [
    "CLEANING_MODES",
    "FILE_FORMATS",
    "OPTIMIZER",
    "RESONANCE",
    "SATURATING",
    "SELF",
    "ColumnMapping",
    "InputError",
    "Norm",
    "NotFiniteError",
    "NothingError",
    "Precision",
    "Ranking",
    "ResonanceConfig",
    "ScoreWarning",
    "TokenCleaning",
    "UpdateName",
    "at_most_one",
    "check_keywords",
    "cleaning_of_mode",
    "nearest",
    "number",
    "one_of",
    "share",
    "whole_number",
]
