"""What was measured on every learnt token: losses of one or two models, and statistics. Knows arrays, no model.

The arrays are ragged: a row has a score for each learnt token, and the rows follow each other. A file is mapped into
memory, so 50 million scores take no memory until they are read. Its digest is checked first, a column at a time.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pandas as pd
import pyarrow as pa

from ..config import InputError, with_known_keywords
from ..io.files import file_at, load_arrow, save_arrow
from ..io.hub import HubPath, PushOptions, push_files, record_at
from .cards import as_block, record_card
from .provenance import Provenance
from .row_record import SHOWN, as_html, same_values

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

TOKEN_SCORES_FILE = "token_scores.arrow"
KEY = "resofilter_token_scores"  # the metadata key of the provenance
STATISTICS = ("entropy", "rank", "top_entropy")  # of the base model's distribution, where a token rule needs them
MEASURED = (*STATISTICS, "prompt_attention")  # and of its attention
MESSAGE_WEIGHT = "message_weight"  # what the user gives to a token's message
ALWAYS = {"position": np.int32, "token": np.int32, "base": np.float32}
LISTS = {**ALWAYS, "reference": np.float32, **dict.fromkeys((*MEASURED, MESSAGE_WEIGHT), np.float32)}
SCHEMA = pa.schema(
    {"sample_id": pa.int64(), **{name: pa.large_list(pa.from_numpy_dtype(kind)) for name, kind in LISTS.items()}}
)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What was measured on the N learnt tokens of R rows: losses, in nats, and statistics.

    A token's score is `base - reference`: it is high if the reference model has learnt the token and the base model has
    not (Token Cleaning, arXiv 2502.01968, section 3). The score is not stored; it is computed in float64. Where tokens
    were cleaned by a rule that needs no reference model, there is no score.

    Attributes:
        sample_id: (R,) int64, the position of each row in the user's dataset.
        offsets: (R + 1,) int64; row r has the tokens `offsets[r]:offsets[r + 1]`.
        position: (N,) int32, the position of each token in its row.
        token: (N,) int32, the token ids.
        base: (N,) float32, the losses under the base model.
        reference: (N,) float32, those under the reference model; None where there is none.
        provenance: what the base losses were made from; its `config` has the reference model's name and weights hash.
        entropy, rank, top_entropy, prompt_attention, message_weight: (N,) float32, see `TokenInputs`; None where a rule
            has not needed them.

    Raises:
        InputError: the lengths of the arrays do not fit together.
    """

    sample_id: np.ndarray
    offsets: np.ndarray
    position: np.ndarray
    token: np.ndarray
    base: np.ndarray
    reference: np.ndarray | None
    provenance: Provenance
    entropy: np.ndarray | None = None
    rank: np.ndarray | None = None
    top_entropy: np.ndarray | None = None
    prompt_attention: np.ndarray | None = None
    message_weight: np.ndarray | None = None

    def __post_init__(self) -> None:
        rows, tokens = len(self.sample_id), len(self.base)
        sound = len(self.offsets) == rows + 1 and self.offsets[0] == 0 and self.offsets[-1] == tokens
        if not sound or (np.diff(self.offsets) < 0).any():
            raise InputError(f"The offsets do not cut {tokens} tokens into {rows} rows.")
        for name in self.columns:
            if len(getattr(self, name)) != tokens:
                raise InputError(f"'{name}' has {len(getattr(self, name))} values for {tokens} tokens.")

    def __len__(self) -> int:
        return len(self.base)

    def __repr__(self) -> str:
        return f"TokenScores({len(self):,} learnt tokens of {len(self.sample_id):,} rows)"

    def _repr_html_(self) -> str:
        """The first rows as a table, for a notebook."""
        shown = slice(0, SHOWN)
        what, of_row = ("mean loss", self._losses) if self.reference is None else ("mean score", self.of_row)
        means = [float(of_row(row).mean()) if n else None for row, n in enumerate(self.num_tokens[shown])]
        first = {"sample_id": self.sample_id[shown], "tokens": self.num_tokens[shown], what: means}
        rows = len(self.sample_id)
        note = "" if rows <= SHOWN else f"The first {SHOWN} of {rows:,} rows."
        return as_html(repr(self), pd.DataFrame(first), note)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenScores):
            return NotImplemented
        if self.columns != other.columns or self.provenance != other.provenance:
            return False
        names = ("sample_id", "offsets", *self.columns)
        return all(same_values(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_tokens(self) -> np.ndarray:
        """(R,) the number of learnt tokens in each row."""
        return np.diff(self.offsets)

    @property
    def columns(self) -> list[str]:
        """The names of the arrays with a value for each token."""
        return [name for name in LISTS if name in ALWAYS or getattr(self, name) is not None]

    @property
    def reference_losses(self) -> np.ndarray:
        """(N,) the losses under the reference model. Raises InputError where there are none."""
        if self.reference is None:
            raise InputError("These tokens have no score: their losses were measured without a reference model.")
        return self.reference

    def of_row(self, row: int) -> np.ndarray:
        """The scores of one row's learnt tokens, (n,) float64. Raises InputError without a reference model."""
        span = slice(self.offsets[row], self.offsets[row + 1])
        return self._losses(row) - self.reference_losses[span]

    def _losses(self, row: int) -> np.ndarray:
        return self.base[self.offsets[row] : self.offsets[row + 1]].astype(np.float64)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to an Arrow file, or to `token_scores.arrow` in a folder; complete or not at all. Returns the file."""
        offsets = pa.array(self.offsets.astype(np.int64))
        lists = {
            name: pa.LargeListArray.from_arrays(offsets, pa.array(getattr(self, name).astype(LISTS[name], copy=False)))
            for name in self.columns
        }
        table = pa.table({"sample_id": self.sample_id.astype(np.int64), **lists})
        return save_arrow(table, file_at(path, TOKEN_SCORES_FILE), KEY, self.provenance.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, token: str | bool | None = None) -> TokenScores:
        """Map what `save` wrote or `push_to_hub` pushed into memory. Arguments and errors as for `ScoreTable.load`."""
        with record_at(path, TOKEN_SCORES_FILE, "token scores", token) as file:
            table, metadata = load_arrow(file, KEY, "token scores")
        try:
            names = [name for name in SCHEMA.names if name in table.column_names or name in ALWAYS]
            schema = pa.schema([SCHEMA.field(name) for name in names])
            if table.schema.remove_metadata() != schema or table["base"].num_chunks != 1:
                raise ValueError("other columns")
            chunks = {name: table[name].chunk(0) for name in names}  # one chunk, so nothing is copied
            if any(chunk.null_count or chunk.offset for chunk in chunks.values()):
                raise ValueError("rows without values")
            lists: dict[str, Any] = {name: chunks[name].values.to_numpy() for name in LISTS if name in chunks}
            return cls(
                chunks["sample_id"].to_numpy(),
                chunks["base"].offsets.to_numpy(),
                **{"reference": None, **lists},
                provenance=Provenance.from_json(metadata),
            )
        except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(
                f"The token scores at '{path}' were written by another version. Make them again."
            ) from error

    @classmethod
    @with_known_keywords
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> TokenScores:
        """Load what `push_to_hub` pushed. Arguments and errors as for `load`, which takes them as one path."""
        return cls.load(str(HubPath(repo_id, revision)), token=token)

    def push_to_hub(self, repo_id: str, *, licence: str | None = None, **options: Unpack[PushOptions]) -> CommitInfo:
        """Push to the hub, see `ScoreTable.push_to_hub`. The ids of the learnt tokens go with the scores: their text.

        Args:
            repo_id, licence, **options: as for `ScoreTable.push_to_hub`.

        Raises:
            InputError: as for `ScoreTable.push_to_hub`.
        """
        shared = replace(self, provenance=self.provenance.without_folders())
        card = record_card("TokenScores", TOKEN_SCORES_FILE, self.provenance, as_block(repr(self)), licence)
        return push_files(shared.save, card, repo_id, **options)
