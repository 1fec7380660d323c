"""Small stores of parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from resofilter_trainer.io.store import Store

MADE_OF = {"weights": "0123456789abcdef0123", "rows": 40, "max_length": None, "columns": ["a", "b"]}


def new(folder: Path, **changes: Any) -> Store:
    made = Store(folder / "parts", "scores", {**MADE_OF, **changes})
    made.open()
    return made


def measured(units: Sequence[int], rows: int = 3) -> pa.Table:
    """Some lines for each unit, with values that depend on unit and line."""
    unit = np.repeat(np.array(units, dtype=np.int64), rows)
    value = unit * 10 + np.tile(np.arange(rows), len(units))
    return pa.table({"unit": unit, "value": value / 3, "losses": [[each / 7] * (each % 3) for each in value.tolist()]})


def filled(folder: Path, parts: int, units: int = 2) -> Store:
    made = new(folder)
    for part in range(parts):
        made.append(measured(range(part * units, (part + 1) * units)))
    return made
