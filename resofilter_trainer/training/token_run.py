"""Token cleaning inside one training run: which tokens are learnt, and since when. Knows a Trainer's data and model.

reference="path"   before the first step: all rows, base (the starting weights) against the reference
reference="self"   before the first step: the base losses of all rows; as each part of an epoch begins: its rows against
                   the weights as they are then

Masks act on the labels of a batch when it is fetched, in the main process, so workers never hold an old one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor
from transformers import Trainer

from ..config import SELF, InputError, TokenCleaning
from ..data.fingerprints import identity
from ..data.loading import check_model
from ..data.preparation import PreparedRows, learnt_tokens, prepared_already
from ..io.files import load_arrow, save_arrow
from ..io.store import PARTS, remove_parts
from ..model.gradients import Segment, segments_of
from ..model.losses import IGNORE
from ..scores.provenance import Provenance
from ..scoring.passes import Parts
from ..scoring.token_losses import measure_token_losses
from ..selecting.token_selection import TokenSelection, TokenSelector, kept_of_rows
from ..tokens.cleaned_dataset import groups_of, masked
from ..tokens.cleaning import TOKEN_LOSSES, TOKENS, against, score_tokens
from ..tokens.reference_model import check_vocabulary, is_adapter, load_reference, wearing
from .sampler import ROW

BASE_FILE, BASE_KEY = "base_token_losses.arrow", "resofilter_base_token_losses"
MASKS_FILE, MASKS_KEY = "token_masks.arrow", "resofilter_token_masks"


@dataclass(frozen=True)
class Part:
    """Of an epoch: its number, and the update that it ends before; both counted from 0."""

    number: int
    stop: int


class CleaningRun:
    """The tokens of one call of `trainer.train()`.

    Args:
        trainer: about to begin, or to go on.
        cleaning: which tokens stay.

    Raises:
        InputError: the reference is not there or has another vocabulary, or the trainer cannot train without tokens.

    Attributes:
        keep: (N,) bool, of all learnt tokens of all R rows, those that are learnt now.
        stages: what was kept each time something was cleaned, in numbers.
    """

    def __init__(self, trainer: Trainer, cleaning: TokenCleaning) -> None:
        dataset = trainer.train_dataset
        if not isinstance(dataset, Dataset):
            raise InputError(f"token_cleaning needs a datasets.Dataset, got {type(dataset).__name__}.")
        if not trainer.model_accepts_loss_kwargs:
            raise InputError(
                "token_cleaning needs a model whose loss takes num_items_in_batch: this one's is a mean over each "
                "batch, which is no number where no token is left."
            )
        self.trainer, self.cleaning = trainer, cleaning
        self.reference_args: Any = copy.copy(trainer.args)
        for name, default in (("trust_remote_code", False), ("model_init_kwargs", None)):  # of SFTConfig only
            setattr(self.reference_args, name, getattr(trainer.args, name, default))
        self.adapter = self.fixed and is_adapter(cleaning.reference, self.reference_args)
        if self.fixed:
            processor: Any = trainer.processing_class
            tokenizer = getattr(processor, "tokenizer", processor)  # a processor of pictures and text has one
            check_vocabulary(cleaning.reference, trainer.model, tokenizer, self.reference_args, self.adapter)
        self.groups = groups_of(dataset, cleaning.group_by)
        self.prepared = prepared_already(dataset, trainer.data_collator)
        self.position, _ = learnt_tokens(self.prepared.dataset)
        self.offsets = np.concatenate([[0], np.cumsum(self.prepared.num_tokens)])
        self.keep = np.ones(len(self.position), dtype=bool)
        self.stages: list[dict[str, Any]] = []
        self.base: np.ndarray | None = None

    @property
    def fixed(self) -> bool:
        """Whether the reference is another model than the one in training."""
        return self.cleaning.reference != SELF

    @property
    def emptied(self) -> np.ndarray:
        """(R,) bool, rows that keep no token for the whole run: they are left out."""
        return (kept_of_rows(self.keep, self.offsets) == 0) & (self.prepared.num_tokens > 0) & self.fixed

    def begin(self, provenance: Provenance, folder: Path, updates: int) -> None:
        """Measure the base model, which the weights still are, and with a fixed reference decide on every token.

        Args:
            provenance: of the run.
            folder: where the base losses are kept for a run that goes on, and token scores.
            updates: of the shortest epoch that is planned.

        Raises:
            InputError: it has fewer updates than parts, or a loss is not finite.
        """
        refusal = self.refusal(updates)
        if refusal is not None:
            raise refusal
        self.provenance = provenance
        key = self._base_key()
        try:
            self.base = self._load_base(folder, key)
        except InputError:  # none that are of use
            parts = self._parts(folder, "base")
            self.base = self._measure(self.prepared, "base", parts=parts)
            if not self.fixed and PartialState().is_main_process:
                save_arrow(pa.table({"loss": self.base}), folder / BASE_FILE, BASE_KEY, key)
        if self.fixed:
            self._clean_all(folder)
        if PartialState().is_main_process:
            remove_parts(folder / PARTS / TOKENS)

    def refusal(self, updates: int) -> InputError | None:
        """Why an epoch of so many updates cannot be cleaned in parts, if it cannot."""
        if self.fixed or updates >= self.cleaning.parts:
            return None
        return InputError(
            f"An epoch of {updates} updates cannot be cut into parts={self.cleaning.parts}: choose fewer parts, or "
            "smaller batches."
        )

    def part_at(self, update: int, updates: int) -> Part | None:
        """The part of an epoch that begins with an update and is cleaned then, if one does.

        Args:
            update, updates: which one of how many of the epoch, counted from 0.
        """
        if self.fixed:
            return None
        bounds = [int(part[0]) for part in np.array_split(np.arange(updates), self.cleaning.parts)] + [updates]
        number = bounds.index(update) if update in bounds else None
        return None if number is None else Part(number, bounds[number + 1])

    def clean_part(self, epoch: int, part: int, rows: np.ndarray) -> dict[str, Any]:
        """Decide on the tokens of a part by the weights as they are; those of the very first all stay.

        Args:
            epoch, part: counted from 0.
            rows: in the order in which they are trained on.

        Returns:
            What was kept, in numbers.
        """
        assert self.base is not None
        rows = rows[np.sort(np.unique(rows, return_index=True)[1])]
        tokens = np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows])
        own = self.prepared.select(rows)
        whole = epoch == 0 and part == 0
        base = self.base[tokens]
        scores = score_tokens(own, base, base if whole else self._measure(own, "latest"), self.provenance)
        selector = TokenSelector(1.0 if whole else self.cleaning.keep, self.cleaning.ranking)
        selection = selector.select(scores)
        self.keep[tokens] = selection.keep
        self.stages.append({"epoch": epoch + 1, "part": part, **self._numbers(selection, rows)})
        return self.stages[-1]

    def cleaned_batches(self, iterator: Any, enter: Callable[[CleaningRun], None]) -> Iterator[Any]:
        """The batches of an update with the labels masked that are not kept.

        Args:
            iterator: gives the batches, of which as many are taken as the update has.
            enter: called once the order of the epoch is drawn, when there is a first batch.
        """
        for number, batch in enumerate(iterator):
            if ROW in batch:
                if number == 0:
                    enter(self)
                rows = batch[ROW].cpu().numpy()
                batch["labels"] = self.masked(batch["labels"], segments_of(batch)[: len(rows)], rows)
            yield batch

    def masked(self, labels: Tensor, segments: Sequence[Segment], rows: np.ndarray) -> Tensor:
        """A batch's labels, (B, T), with those masked that are not kept.

        Args:
            labels: (B, T), as the collator makes them.
            segments: where each of the n samples is.
            rows: (n,) which rows they are; negative ones are fillers.

        Raises:
            InputError: they are not the labels of the dataset.
        """
        found = labels.cpu().numpy().copy()
        for where, row in zip(segments, rows, strict=True):
            if row < 0:
                continue
            own, span = found[where.row, where.tokens], slice(self.offsets[row], self.offsets[row + 1])
            if not np.array_equal(np.flatnonzero(own[1:] != IGNORE) + 1, self.position[span]):
                raise InputError(
                    f"Row {row} learns other tokens in its batch than in the dataset: token_cleaning needs a collator "
                    "that leaves rows and labels as they are."
                )
            own[self.position[span][~self.keep[span]]] = IGNORE
        return torch.from_numpy(found).to(labels.device)

    def cleaned(self) -> PreparedRows:
        """The rows as they are learnt now; those that keep no token are left out."""
        dataset = masked(self.prepared.dataset, self.offsets, self.position, self.keep)
        kept = dataclasses.replace(self.prepared, dataset=dataset, num_tokens=kept_of_rows(self.keep, self.offsets))
        return kept.select(np.flatnonzero(~self.emptied))

    def save(self, folder: Path) -> None:
        """Write what is needed to go on into a checkpoint's folder."""
        state = json.dumps({"tokens": len(self.keep), "stages": self.stages})
        save_arrow(pa.table({"keep": np.packbits(self.keep)}), folder / MASKS_FILE, MASKS_KEY, state)

    def load(self, folder: Path, provenance: Provenance, own: Path) -> None:
        """Undo `save`, and find the base model's losses, which the weights no longer are.

        Args:
            folder: the checkpoint's.
            provenance: of the run that goes on.
            own: the folder of the run.

        Raises:
            InputError: one of them is not there, or of something else.
        """
        self.provenance = provenance
        table, state = load_arrow(folder / MASKS_FILE, MASKS_KEY, "token masks")
        saved = json.loads(state)
        if saved["tokens"] != len(self.keep):
            raise InputError(f"'{folder}' has masks for {saved['tokens']} tokens, and the rows {len(self.keep)}.")
        self.keep = np.unpackbits(table["keep"].to_numpy(), count=len(self.keep)).astype(bool)
        self.stages[:] = saved["stages"]
        if not self.fixed:
            beside = folder.parent.parent / own.name  # of a run that goes on in another folder
            try:
                self.base = self._load_base(own, self._base_key())
            except InputError:
                if beside == own or not (beside / BASE_FILE).is_file():
                    raise
                self.base = self._load_base(beside, self._base_key())

    def _clean_all(self, folder: Path) -> None:
        assert self.base is not None
        reference = self.cleaning.reference
        with contextlib.ExitStack() as stack:
            if self.adapter:
                other = stack.enter_context(wearing(self.trainer.model, reference))
            else:
                other = load_reference(reference, self.reference_args)
            check_model(other, self.prepared)
            provenance = against(self.provenance, identity(other))
            losses = self._measure(self.prepared, "reference", other, self._parts(folder, "reference", provenance))
        del other
        scores = score_tokens(self.prepared, self.base, losses, provenance)
        if PartialState().is_main_process:
            scores.save(folder)
        selection = TokenSelector(self.cleaning.keep, self.cleaning.ranking).select(scores)
        self.keep = selection.keep
        self.stages.append(self._numbers(selection, np.arange(len(self.prepared.lengths))))

    def _numbers(self, selection: TokenSelection, rows: np.ndarray) -> dict[str, Any]:
        numbers: dict[str, Any] = {
            "tokens": len(selection.keep),
            "tokens_kept": int(selection.keep.sum()),
            "num_rows_emptied": int(selection.emptied.sum()),
        }
        if self.groups is not None:
            numbers["share_of_groups"] = selection.share_of_groups([self.groups[row] for row in rows])
        return numbers

    def _measure(self, prepared: PreparedRows, name: str, model: Any = None, parts: Parts | None = None) -> np.ndarray:
        model, label = self.trainer.model if model is None else model, f"Losses of the {name} model"
        budget = self.cleaning.tokens_per_batch
        return measure_token_losses(model, prepared, self.trainer.args, budget, label, parts)

    def _parts(self, folder: Path, name: str, provenance: Provenance | None = None) -> Parts:
        made_of = self._base_made_of() | ({} if provenance is None else dict(provenance.config))
        return Parts(folder / PARTS / TOKENS / name, TOKEN_LOSSES, made_of)

    def _load_base(self, folder: Path, key: str) -> np.ndarray:
        table, found = load_arrow(folder / BASE_FILE, BASE_KEY, "losses of the base model")
        if found != key:
            raise InputError(f"'{folder / BASE_FILE}' is of another model or other rows. Start anew.")
        return np.array(table["loss"])

    def _base_key(self) -> str:
        return json.dumps(list(self._base_made_of().values()))

    def _base_made_of(self) -> dict[str, Any]:
        """All that the base model's losses depend on."""
        return {
            "weights": self.provenance.weights,
            "rows": self.prepared.fingerprint,
            "tokens_per_batch": self.cleaning.tokens_per_batch,
            "bf16": bool(self.trainer.args.bf16),
            "versions": dict(self.provenance.versions),
        }
