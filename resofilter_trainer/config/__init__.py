"""What a user can choose, as plain dataclasses, and how it is checked. Knows nothing of data, models or torch."""

from .checks import one_of, token_share
from .errors import InputError, NotFiniteError, NothingError
from .settings import (
    CLEANING_MODES,
    CRITERION_NAMES,
    FILE_FORMATS,
    RESONANCE,
    SELF,
    ColumnMapping,
    Norm,
    Precision,
    Ranking,
    ResonanceConfig,
    TokenCleaning,
    Update,
    cleaning_of_mode,
)

__all__ = [
    "CLEANING_MODES",
    "CRITERION_NAMES",
    "FILE_FORMATS",
    "RESONANCE",
    "SELF",
    "ColumnMapping",
    "InputError",
    "Norm",
    "NotFiniteError",
    "NothingError",
    "Precision",
    "Ranking",
    "ResonanceConfig",
    "TokenCleaning",
    "Update",
    "cleaning_of_mode",
    "one_of",
    "token_share",
]
