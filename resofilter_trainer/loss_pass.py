"""The pass over a dataset that measures what a model loses on every learnt token. Knows batches, processes and parts.

batches of one length and a token budget -> each process its share, kept in parts on the way -> every process gets all
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import xxhash
from accelerate import PartialState
from torch import nn
from transformers import TrainingArguments

from .batches import collate, of_all_processes, own_share, split_by_tokens
from .config import NotFiniteError
from .files import load_arrow, save_arrow
from .head import PROBE, Way, find_way, to_logits
from .losses import inputs_of, learnt_positions
from .modes import bfloat16_forward, evaluating
from .preparation import PreparedRows

SAVE_EVERY = 30.0  # seconds of work that an interrupt may cost
PART, KEY = "part-{:08d}.arrow", "resofilter_token_losses"


@dataclass(frozen=True)
class Parts:
    """A folder in which each process leaves the batches that it has done, so that an interrupted pass can go on.

    Attributes:
        folder: parts of the same pass, or none.
        fingerprint: of everything that the losses depend on; parts of something else are not used.
    """

    folder: Path
    fingerprint: str

    def load(self) -> dict[int, np.ndarray]:
        """The losses of every batch that is done, by its number."""
        found: dict[int, np.ndarray] = {}
        for path in sorted(self.folder.glob("part-*.arrow")):
            if re.fullmatch(r"part-\d{8}\.arrow", path.name):
                table, fingerprint = load_arrow(path, KEY, "token losses")
                if fingerprint == self.fingerprint:
                    losses = table["loss"].to_numpy()
                    found |= {int(batch): np.array(loss) for batch, loss in zip(table["batch"], losses, strict=True)}
        return found

    def save(self, done: Sequence[tuple[int, np.ndarray]]) -> None:
        """Write some batches to a part of their own."""
        if done:
            numbers, losses = zip(*done, strict=True)
            table = pa.table({"batch": np.array(numbers), "loss": pa.array(losses, pa.list_(pa.float32()))})
            save_arrow(table, self.folder / PART.format(min(numbers)), KEY, self.fingerprint)


def measure_token_losses(
    model: nn.Module,
    prepared: PreparedRows,
    args: TrainingArguments,
    tokens_per_batch: int,
    label: str,
    parts: Parts | None = None,
) -> np.ndarray:
    """The loss of every learnt token, without dropout and without a gradient.

    The batches depend on the rows and the budget alone, neither on the number of processes nor on interruptions, so
    that the losses do not either.

    Args:
        model: a causal language model, where it is.
        prepared: rows as tokens.
        args: whether the forward runs in bfloat16 autocast (`bf16`), and whether a progress bar is shown.
        tokens_per_batch: tokens of a batch, padding included; a longer row is a batch of its own.
        label: what the progress bar says.
        parts: where to leave what is done.

    Returns:
        (N,) float32, in nats, row after row, the same in every process.

    Raises:
        InputError: a loss is not finite; names the row.
    """
    batches = split_by_tokens(prepared.lengths, tokens_per_batch)
    done: dict[int, np.ndarray] = {}
    if parts is not None:
        parts = dataclasses.replace(parts, fingerprint=f"{parts.fingerprint} {_digest(prepared, tokens_per_batch)}")
        done = parts.load()
        PartialState().wait_for_everyone()  # before any process adds to the parts: all must share out the same batches
    todo = [number for number in range(len(batches)) if number not in done]
    fresh: list[tuple[int, np.ndarray]] = []
    saved, last = 0, time.monotonic()
    try:
        with evaluating(model), torch.no_grad(), bfloat16_forward(model, bool(args.bf16)):
            way: Way = to_logits
            if todo:
                some = prepared.dataset[int(batches[0][0])]["input_ids"][:PROBE]
                way = find_way(model, torch.tensor([some], device=next(model.parameters()).device))
            for number in own_share(todo, label, args):
                fresh.append((number, _losses_of(model, prepared, batches[number], way)))
                if parts is not None and time.monotonic() - last > SAVE_EVERY:
                    parts.save(fresh[saved:])
                    saved, last = len(fresh), time.monotonic()
    finally:
        if parts is not None:
            parts.save(fresh[saved:])
    done |= of_all_processes(fresh)
    return _in_order(batches, [done[number] for number in range(len(batches))], prepared.num_tokens)


def _digest(prepared: PreparedRows, tokens_per_batch: int) -> str:
    """Of the rows of a pass and how they are batched."""
    digest = xxhash.xxh3_128(str(tokens_per_batch).encode())
    for array in (prepared.sample_ids, prepared.lengths, prepared.num_tokens):
        digest.update(np.ascontiguousarray(array, dtype=np.int64).data)
    return digest.hexdigest()


def _losses_of(model: nn.Module, prepared: PreparedRows, rows: np.ndarray, way: Way) -> np.ndarray:
    """(n,) float32, the losses of a batch's learnt tokens, in the order of its rows."""
    batch = collate(prepared, rows, next(model.parameters()).device)
    losses = way(model, inputs_of(model, batch, causal=False)).losses()
    _check_finite(losses, batch, prepared.sample_ids[rows])
    return losses.float().cpu().numpy()


def _check_finite(losses: torch.Tensor, batch: Mapping[str, torch.Tensor], places: np.ndarray) -> None:
    """Raise InputError that names the first row of a batch with a loss that is no number."""
    if not torch.isfinite(losses).all():
        row_of = learnt_positions(batch["labels"]).nonzero()[:, 0]
        raise NotFiniteError(
            f"Row {places[int(row_of[~torch.isfinite(losses)][0])]} of the dataset has a token whose loss is not "
            "finite. Are the weights sound? Try float32, or drop the row."
        )


def _in_order(batches: Sequence[np.ndarray], losses: Sequence[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """The losses of all batches, row after row."""
    offsets = np.concatenate([[0], np.cumsum(counts)])
    found = np.empty(offsets[-1], dtype=np.float32)
    for batch, values in zip(batches, losses, strict=True):
        for row, of_row in zip(batch, np.split(values, np.cumsum(counts[batch])[:-1]), strict=True):
            found[offsets[row] : offsets[row + 1]] = of_row
    return found
