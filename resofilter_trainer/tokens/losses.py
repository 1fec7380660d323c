"""The losses of every learnt token under the models of a cleaning, and the token scores made from them.

Knows where the parts of an interrupted pass are. Does not know which tokens are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, TrainingArguments

from ..data.fingerprints import identity
from ..data.preparation import PreparedRows, learnt_tokens
from ..io.store import PARTS, remove_parts
from ..scores.provenance import Provenance
from ..scores.token_scores import TokenScores
from ..scoring.passes import Parts
from ..scoring.token_losses import measure_token_losses

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
    parts = None
    if folder is not None:
        parts = Parts(folder / PARTS / TOKENS / name, "token losses", made_from or {})
    return measure_token_losses(model, rows, args, tokens_per_batch, f"Losses of the {name} model", parts)


def remove_loss_parts(folder: Path) -> None:
    """Remove the parts of all passes of a cleaning from its output folder."""
    remove_parts(folder / PARTS / TOKENS)


def score_tokens(rows: PreparedRows, base: np.ndarray, reference: np.ndarray, provenance: Provenance) -> TokenScores:
    """Token scores from the losses under both models.

    Args:
        rows: the rows as tokens.
        base, reference: (N,) the losses of their learnt tokens under the base and the reference model.
        provenance: the provenance of the scores.
    """
    offsets = np.concatenate([[0], np.cumsum(rows.num_tokens)])
    return TokenScores(rows.sample_ids, offsets, *learnt_tokens(rows.dataset), base, reference, provenance)


def against(base: Provenance, reference: PreTrainedModel) -> Provenance:
    """The provenance of token scores, from that of the base model's losses and the reference model."""
    return dataclasses.replace(base, config={**base.config, **identity(reference)})
