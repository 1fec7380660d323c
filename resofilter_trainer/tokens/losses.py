"""The losses of every learnt token under the models of a cleaning, and the token scores made from them.

Knows where the parts of an interrupted pass are. Does not know which tokens are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from transformers import PreTrainedModel, TrainingArguments

from ..data.fingerprints import identity
from ..data.preparation import PreparedRows
from ..data.surveys import learnt_tokens
from ..io.store import PARTS, remove_parts
from ..scores.provenance import Provenance
from ..scores.token_scores import TokenScores
from ..scoring.passes import Parts
from ..scoring.token_losses import measure_token_losses, measure_token_statistics

TOKENS = "tokens"  # the folder of these passes within the folder of all parts


def losses_under(
    model: PreTrainedModel,
    name: str,
    rows: PreparedRows,
    args: TrainingArguments,
    tokens_per_batch: int,
    folder: Path | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> np.ndarray:
    """A model's loss of every learnt token, (N,) float32 in nats, row after row. An interrupted pass is resumed.

    Args:
        model: the model, on its device.
        name: the role of the model, such as `base`, for the progress bar and for the folder of the parts.
        rows: the rows as tokens.
        args: the precision of the forward (`bf16`), and whether a progress bar is shown.
        tokens_per_batch: the tokens of a batch, padding included.
        folder: the output folder; by default no parts are kept.
        made_from: all that the losses depend on, by name; goes with `folder`.

    Raises:
        InputError: a loss is not finite, or the parts were made from something else.
    """
    parts, label = _parts(folder, name, made_from), f"Losses of the {name} model"
    return measure_token_losses(model, rows, args, tokens_per_batch, label, parts)


def statistics_under(
    model: PreTrainedModel,
    name: str,
    rows: PreparedRows,
    args: TrainingArguments,
    tokens_per_batch: int,
    statistics: Sequence[str],
    folder: Path | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """A model's loss and some statistics of every learnt token, by name, as `losses_under` measures the loss.

    Args:
        statistics: which, see `TokenScores`. The parts of other statistics are in other folders.
        model, name, rows, args, tokens_per_batch, folder, made_from: as for `losses_under`.
    """
    parts = _parts(folder, "-".join([name, *statistics]), made_from)
    label = f"Statistics of the {name} model"
    return measure_token_statistics(model, rows, args, tokens_per_batch, label, statistics, parts)


def _parts(folder: Path | None, name: str, made_from: Mapping[str, Any] | None) -> Parts | None:
    if folder is None:
        return None
    return Parts(folder / PARTS / TOKENS / name, "token losses", made_from or {})


def remove_loss_parts(folder: Path) -> None:
    """Remove the parts of all passes of a cleaning from its output folder."""
    remove_parts(folder / PARTS / TOKENS)


def score_tokens(
    rows: PreparedRows,
    base: np.ndarray,
    reference: np.ndarray | None,
    provenance: Provenance,
    statistics: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> TokenScores:
    """Token scores from what was measured under both models.

    Args:
        rows: the rows as tokens.
        base, reference: (N,) the losses of their learnt tokens under the base and the reference model, if there is one.
        provenance: the provenance of the scores.
        statistics: (N,) each, see `TokenScores`.
    """
    offsets = np.concatenate([[0], np.cumsum(rows.num_tokens)])
    tokens = learnt_tokens(rows.dataset)
    return TokenScores(rows.sample_ids, offsets, *tokens, base, reference, provenance, **statistics)


def against(base: Provenance, reference: PreTrainedModel) -> Provenance:
    """The provenance of token scores, from that of the base model's losses and the reference model."""
    return dataclasses.replace(base, config={**base.config, **identity(reference)})
