"""What was measured, row by row, and from what. Knows nothing of models or policies: Parquet in, Parquet out."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .config import InputError
from .files import file_at, load_parquet, save_parquet

if TYPE_CHECKING:
    import pandas as pd

SCORES_FILE = "scores.parquet"
KEY = "resofilter_scores"  # the Parquet metadata that holds the provenance
LAYERS_FOLDER = "layers"  # beside the scores: of every layer, for some rows
SAME_PROMPT, EMPTY = "same prompt as row", "empty completion"  # reasons, or how they begin
OF_GROUP = " of group "  # in the reason of a row that went within its group
LAYER = "layer_"  # layer_27, layer_28, ... : the change of one layer


@dataclass(frozen=True)
class Trust:
    """How far the scores of one table can be trusted.

    Attributes:
        agreement: rank correlation (Spearman) of a random subset's scores with the same rows' scores measured alone,
            without autocast, and in other batches; the lower of the two. 1 is perfect, numerical noise lowers it. What
            bfloat16 weights lost when they were made, it cannot see. None where there are fewer than three rows.
        rows: size of that subset.
        saturation: share of the possible range (0 to lr) that lies between the smallest and the largest score; None
            where the update has no bound. Small means that the ranking rests on small differences.
        forward: what the forward ran in, `"float32"` (or the weights' own dtype) or `"bfloat16"`, by autocast.
    """

    agreement: float | None
    rows: int
    saturation: float | None
    forward: str = "float32"

    @property
    def trusted(self) -> bool:
        """Whether the agreement is at least 0.95, or unknown."""
        return self.agreement is None or self.agreement >= 0.95

    def __str__(self) -> str:
        agreement = "unknown (too few rows)" if self.agreement is None else f"{self.agreement:.4f}"
        saturation = "" if self.saturation is None else f", {self.saturation:.3%} of the possible range in use"
        text = f"rank agreement {agreement} over {self.rows} rows scored again alone and in other batches{saturation}"
        if self.forward != "float32":
            text += f"; {self.forward} forward"
        if self.trusted:
            return text
        return f"{text}; below 0.95 the ranking is partly noise: use a larger eps (1e-4), norm='l2', or float32"


@dataclass(frozen=True)
class Provenance:
    """What a table of scores was measured from. Tables are mixed or reused only where all but names agree.

    Attributes:
        model, source: the names of the model and of the dataset, as the user gave them, and a hash of its rows. Not
            compared.
        weights, tokenizer, template, dataset: hashes of the weights, the tokenizer, its chat template, and the token
            ids and labels that were scored.
        rows: number of rows in the user's dataset.
        config: the ResonanceConfig.
        preparation: how rows became tokens: column mapping, lengths, masking, precision.
        versions: of this package and of those that compute.
        trust: see `Trust`; not compared.
    """

    model: str
    weights: str
    tokenizer: str
    template: str
    dataset: str
    rows: int
    config: Mapping[str, Any]
    preparation: Mapping[str, Any]
    versions: Mapping[str, str]
    source: Mapping[str, Any] = field(default_factory=dict)
    trust: Trust | None = None

    def __post_init__(self) -> None:
        for name in ("config", "preparation", "versions", "source"):  # as JSON has them: lists, no tuples
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))

    @property
    def key(self) -> str:
        """All that is compared, as JSON: equal where scores of both belong together."""
        aside = ("model", "source", "trust")
        return json.dumps({name: value for name, value in dataclasses.asdict(self).items() if name not in aside})

    @property
    def compared(self) -> dict[str, Any]:
        """All that is compared, flat, by name."""
        hashes = {name: getattr(self, name) for name in ("weights", "tokenizer", "template", "dataset", "rows")}
        return {**hashes, **self.config, **self.preparation, **self.versions}

    def differences(self, other: Provenance) -> list[str]:
        """What keeps the two apart, in words; empty where scores of both belong together."""
        found = []
        for name in ("weights", "tokenizer", "template", "dataset", "rows", "config", "preparation", "versions"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine == theirs:
                continue
            if isinstance(mine, Mapping):
                keys = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
                found += [f"{key} ({mine.get(key)} / {theirs.get(key)})" for key in keys]
            elif name == "weights":
                found.append(f"model weights ({self.model} {mine[:8]} / {other.model} {theirs[:8]})")
            else:
                found.append(f"{name} ({str(mine)[:8]} / {str(theirs)[:8]})")
        forwards = [each.trust.forward for each in (self, other) if each.trust is not None]
        if len(set(forwards)) > 1:  # precision="auto" may choose another on another machine
            found.append(f"forward ({' / '.join(forwards)})")
        return found

    def check_same(self, here: Provenance, what: str, place: object) -> None:
        """Raise InputError where what lies at a place, whose provenance this is, is of something else.

        Args:
            here: the provenance that it should have.
            what: lies there.
            place: where.
        """
        differences = self.differences(here)
        if differences:
            raise InputError(
                f"'{place}' holds {what} of something else, they differ in {'; '.join(differences)} (there / here). "
                "Choose another folder, or remove that one."
            )

    def to_json(self) -> str:
        """As it is stored in the Parquet file's metadata."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """Undo `to_json`. Raises ValueError, TypeError or KeyError where it is of another version."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise TypeError("no mapping")
        trust = values.pop("trust")
        made = cls(**values, trust=None if trust is None else Trust(**trust))
        for each in dataclasses.fields(cls):
            kind = {"str": str, "int": int}.get(str(each.type), Mapping if "Mapping" in str(each.type) else object)
            if not isinstance(getattr(made, each.name), kind):
                raise TypeError(f"{each.name} is of another kind")
        return made


@dataclass(frozen=True)
class ScoreTable:
    """One line for every row of the user's dataset: its score, or the reason why it has none.

    Columns: `sample_id` (int64, position in the user's dataset), `score` (float64, mean absolute weight change, about
    lr), `loss` (float64, mean over the sample's learnt tokens, in nats), `num_tokens` (int64, tokens learnt), `length`
    (int64, all tokens), `layer_<i>` (float64, each measured layer's change) and `reason` (why there is no score). What
    a row does not have is null; pandas then shows whole numbers as floats.
    """

    table: pa.Table
    provenance: Provenance

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> np.ndarray:
        """A numeric column; NaN where a row has no value."""
        numeric = [column for column in self.table.column_names if column != "reason"]
        if name not in numeric:
            raise InputError(f"The scores have no column '{name}' of numbers. They have: {', '.join(numeric)}.")
        return self.table[name].to_numpy()

    @property
    def reasons(self) -> list[str | None]:
        """Why each row has no score; None where it has one."""
        return self.table["reason"].to_pylist()

    @property
    def scored(self) -> np.ndarray:
        """Bool, which rows have a score."""
        return self.table["reason"].is_null().to_numpy()

    def to_pandas(self) -> pd.DataFrame:
        """All columns, one line per row of the dataset."""
        return self.table.to_pandas()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to a Parquet file, or to `scores.parquet` in a folder; whole or not at all. Returns the file."""
        return save_parquet(self.table, file_at(path, SCORES_FILE), {KEY: self.provenance.to_json()})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScoreTable:
        """Read what `save` wrote. Raises InputError for a missing, truncated or foreign file."""
        table, metadata = load_parquet(file_at(path, SCORES_FILE), KEY, "scores")
        try:
            scores = cls(table, Provenance.from_json(metadata))
            scores._check_columns()
            return scores
        except (TypeError, KeyError, ValueError, RecursionError) as error:
            raise InputError(f"The scores at '{path}' were written by another version. Make them again.") from error

    def _check_columns(self) -> None:
        """Raise TypeError or ValueError where they are not those of the class's description."""
        for name, kind in zip(self.table.column_names, self.table.schema.types, strict=True):
            number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
            if not (text if name == "reason" else number):
                raise TypeError(f"{name} is of another kind")
        if len({*self.table.column_names}) < self.table.num_columns:
            raise ValueError("two columns have the same name")
        if not {"sample_id", "score", "reason"} <= {*self.table.column_names}:
            raise ValueError("columns are missing")
        ids = self.table["sample_id"]
        if not pa.types.is_integer(ids.type) or ids.null_count:
            raise TypeError("sample_id is of another kind")
        if len(ids) and not 0 <= ids.to_numpy().min() <= ids.to_numpy().max() < self.provenance.rows:
            raise ValueError("there are rows that the dataset has not")

    @classmethod
    def join(cls, tables: Sequence[ScoreTable]) -> ScoreTable:
        """Parts of one dataset's scores as one table, in the dataset's order.

        Raises:
            InputError: the parts come from different models, data or settings, or a row is in two of them.
        """
        if not tables:
            raise InputError("There are no scores: pass one table or more.")
        first = tables[0]
        for other in tables[1:]:
            differences = first.provenance.differences(other.provenance)
            if differences:
                raise InputError(f"These scores do not belong together, they differ in {'; '.join(differences)}.")
        table = pa.concat_tables([each.table for each in tables])
        ids = table["sample_id"].to_numpy()
        if (ids[1:] < ids[:-1]).any():
            table = table.sort_by("sample_id")
            ids = table["sample_id"].to_numpy()
        repeated = ids[1:][ids[1:] == ids[:-1]]
        if len(repeated):
            raise InputError(f"Row {repeated[0]} is scored twice: the same part was passed more than once.")
        return cls(table, first.provenance)


def count_reasons(reasons: Iterable[str], listed: int) -> list[tuple[str, int]]:
    """Why rows went, and how many for each, most first; what says which row it repeats is one reason, the rest another.

    Args:
        reasons: of the rows that went.
        listed: how many are told apart.
    """
    counts = Counter("same prompt as another row" if each.startswith(SAME_PROMPT) else each for each in reasons)
    found = counts.most_common(listed)
    left = len(counts) - len(found)
    return [*found, (f"{left:,} other reasons", counts.total() - sum(count for _, count in found))] if left else found
