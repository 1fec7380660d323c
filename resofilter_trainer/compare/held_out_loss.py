"""The loss of a trained model on held-out rows. Knows rows as tokens and models, not how these were trained."""

from __future__ import annotations

import copy

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel
from trl import SFTConfig

from ..config import InputError
from ..criteria.model import loss
from ..data.loading import check_model, load_model
from ..data.preparation import PreparedRows
from ..scoring.criterion import TOKENS_PER_BATCH, measure_rows
from .method_scores import as_tokens


def held_out_tokens(rows: Dataset, model: str, args: SFTConfig) -> PreparedRows:
    """The rows as tokens, prepared as the trainer prepares the rows to train on, without rows that teach nothing.

    Args:
        rows: `prompt` and `completion` of the rows.
        model: the name or folder of the trained model.
        args: the training arguments.

    Raises:
        InputError: no row can be measured, or a row does not fit the model.
    """
    try:
        loaded, tokenizer = load_model(model, None, args)
        found = as_tokens(rows, tokenizer, args)
        check_model(loaded, found)
    except InputError as error:
        raise InputError(f"In loss_dataset: {error}") from error
    return found


def held_out_loss(model: PreTrainedModel, rows: PreparedRows, args: SFTConfig) -> float:
    """The mean of `-ln p` over the learnt tokens of all rows, in nats, without dropout.

    The forward is in the precision of the weights, also where the training was in mixed precision: its autocast around
    the model's forward is taken away for good.

    Args:
        model: the model, as the trainer leaves it.
        rows: the rows as tokens.
        args: the training arguments.

    Raises:
        NotFiniteError: the loss of a row is not finite.
    """
    plain = copy.copy(args)
    plain.bf16 = False
    vars(model).pop("forward", None)  # left by the Trainer; the class has the plain one
    means = measure_rows(loss, model, rows, plain, TOKENS_PER_BATCH, "Held-out loss")
    return float(np.average(means, weights=rows.num_tokens))
