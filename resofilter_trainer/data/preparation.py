"""Turns rows into the tokens and labels that SFTTrainer would train on, by TRL's own preparation, not a copy of it.

A column with each row's position in the user's dataset passes through the preparation, so that rows which it drops or
moves are noticed. Knows datasets and TRL, not what is measured.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ..config import InputError, NothingError
from .columns import media_columns
from .files import first_line
from .surveys import BLOCKS, ROW_POSITION, Prompts, fingerprint_of, positions_of, survey
from .templates import check_template, message_columns, rows_with, unrendered_roles
from .usable import check_refused


@dataclass(frozen=True)
class PreparedRows:
    """The rows that can be scored, as tokens.

    Attributes:
        dataset: `input_ids`, `labels` and `ROW_POSITION`, the position in the user's dataset; every row has a learnt
            token.
        lengths: (N,) the tokens of each row.
        num_tokens: (N,) the learnt tokens of each row.
        largest_token: the largest token id.
        fingerprint: hash of all token ids, labels and positions.
        reasons: why the user's other rows cannot be scored, by position.
        template: the chat template, or an empty string.
        rendered: whether the chat template rendered the rows.
        whole: the rows as TRL prepares them, of which `fingerprint` is; None where no file tells of them.
        known_prompts, known_positions: the rows' prompts and positions, where they were kept.
    """

    dataset: Dataset
    lengths: np.ndarray
    num_tokens: np.ndarray
    largest_token: int
    fingerprint: str
    reasons: dict[int, str]
    template: str
    rendered: bool = False
    whole: Dataset | None = None
    known_prompts: Prompts | None = None
    known_positions: np.ndarray | None = None

    @cached_property
    def sample_ids(self) -> np.ndarray:
        """(N,) each row's position in the user's dataset."""
        return positions_of(self.dataset) if self.known_positions is None else self.known_positions

    @cached_property
    def prompts(self) -> Prompts:
        """The rows' prompts."""
        return Prompts.of(self.dataset) if self.known_prompts is None else self.known_prompts

    def select(self, rows: np.ndarray) -> PreparedRows:
        """Some of the rows, in this order; the fingerprint stays that of all rows."""
        dataset, lengths, num_tokens = self.dataset.select(rows), self.lengths[rows], self.num_tokens[rows]
        changed = {"dataset": dataset, "lengths": lengths, "num_tokens": num_tokens}
        return dataclasses.replace(self, **changed, known_prompts=None, known_positions=None)

    def fingerprint_like(self, other: str) -> str:
        """The fingerprint, computed as that of an earlier version if the other one was."""
        if self.whole is None or other.startswith(BLOCKS) or not self.fingerprint.startswith(BLOCKS):
            return self.fingerprint
        return survey(self.whole)[3]


def prepare(
    dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: SFTConfig, drop_empty: bool = False
) -> PreparedRows:
    """Tokenise, mask and truncate as SFTTrainer does.

    Args:
        dataset: the user's rows, or some of them, under TRL's column names and with a `ROW_POSITION` column.
        processing_class: the tokenizer; it is copied, and may lack a pad token.
        args: lengths and masking. Packing, padding-free batches and shuffling, which change no sample, are ignored.
        drop_empty: whether to skip rows that TRL cannot prepare.

    Raises:
        InputError: TRL refuses the dataset, or a row of it and `drop_empty` is False; or no row has a learnt token.
    """
    tokenizer = copy.deepcopy(processing_class)
    check_template(dataset, tokenizer, args.chat_template_path)
    reasons = {} if args.chat_template_path else unrendered(dataset, tokenizer)
    check_refused(reasons, len(dataset), drop_empty)
    dataset = without(dataset, reasons)
    found = by_trl(dataset, tokenizer, args)
    check_failed(found.failed, len(dataset), found.why)
    check_refused(found.failed, len(dataset), drop_empty)
    dataset = without(dataset, found.failed)
    tokens, reasons = found.tokens, reasons | found.failed
    lengths, learnt, largest, digest = survey(tokens)
    usable = learnt > 0
    reasons |= why_idle(dataset, positions_of(tokens)[usable], tokenizer, args)
    if not usable.any():
        raise nothing_to_learn(reasons)
    fingerprint, whole = fingerprint_of(tokens, digest), tokens
    if not usable.all():
        tokens, lengths, learnt = tokens.select(np.flatnonzero(usable)), lengths[usable], learnt[usable]
    rendered = bool(message_columns(dataset))
    return PreparedRows(tokens, lengths, learnt, largest, fingerprint, reasons, found.template, rendered, whole)


def nothing_to_learn(reasons: dict[int, str]) -> NothingError:
    """The error of rows none of which has a token to learn, each with its reason."""
    first = min(reasons)
    return NothingError(
        f"None of the {len(reasons)} rows has a token to learn. Row {first}: {reasons[first]}.", reasons
    )


def prepared_already(dataset: Dataset, collate: Callable[[list[Any]], Any]) -> PreparedRows:
    """A trainer's rows as it trains on them; their positions are those in the trainer's dataset.

    Args:
        dataset: rows with `input_ids` and `labels`, or with columns that the collator makes these from; a transform
            (`with_transform`) is applied to each row, once.
        collate: the trainer's collator.

    Raises:
        InputError: the rows have images, videos or sound, which a pass over their tokens would leave out.
    """
    for name, row in media_columns(dataset).items():
        raise InputError(
            f"Column '{name}' is not empty (row {row}), and a pass before the training measures text alone, without "
            "images, videos or sound. Measure while training, with when='training'."
        )
    shown = dataset.format
    if shown["type"] == "custom":
        plain, kwargs = dataset.with_format(None), {"dataset": dataset, "collate": collate}
        tokens = plain.map(
            _transformed, with_indices=True, fn_kwargs=kwargs, remove_columns=plain.column_names,
            load_from_cache_file=False, desc="Reading transformed rows",
        )  # fmt: skip
    elif {"input_ids", "labels"} <= set(dataset.column_names if shown["output_all_columns"] else shown["columns"]):
        tokens = dataset.select_columns(["input_ids", "labels"]).with_format(None)
    else:
        tokens = dataset.map(_collated, fn_kwargs={"collate": collate}, remove_columns=dataset.column_names)
    lengths, learnt, largest, fingerprint = survey(tokens)
    tokens = tokens.add_column(ROW_POSITION, np.arange(len(tokens)))
    return PreparedRows(tokens, lengths, learnt, largest, fingerprint, {}, "")


def _transformed(example: Any, row: int, dataset: Dataset, collate: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """A row as the dataset's transform and then the collator make it."""
    return _collated(dataset[row], collate)


def _collated(example: dict[str, Any], collate: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """An example as the collator makes it, without padding."""
    batch = collate([example])
    mask = batch["attention_mask"][0].bool() if "attention_mask" in batch else slice(None)
    return {name: batch[name][0][mask].tolist() for name in ("input_ids", "labels")}


def without(dataset: Dataset, refused: Mapping[int, str]) -> Dataset:
    """The rows that are not refused, by position."""
    return dataset.select(np.flatnonzero(~np.isin(positions_of(dataset), list(refused)))) if refused else dataset


def check_failed(failed: Mapping[int, str], rows: int, why: str) -> None:
    """Raise InputError where TRL can prepare none of these rows."""
    if failed and len(failed) == rows:
        raise InputError(f"TRL cannot prepare this dataset: {why}")


def unrendered(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The rows with roles that the chat template leaves out, by position, each with the reason."""
    roles = unrendered_roles(dataset, tokenizer)
    positions = dataset[ROW_POSITION][:]
    return {
        positions[row]: f"the chat template does not render the role '{role}'; rename it to user, assistant or the like"
        for row, role in (rows_with(dataset, roles) if roles else {}).items()
    }


def why_idle(dataset: Dataset, used: np.ndarray, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> dict[int, str]:
    """Why the rows without a token to learn have none, by position: they are cut off, or have none at full length.

    Args:
        dataset: rows that TRL can prepare.
        used: the positions of those that have a token to learn.
        tokenizer, args: as for `prepare`.
    """
    idle = np.flatnonzero(~np.isin(positions_of(dataset), used))
    if not len(idle):
        return {}
    dataset = dataset.select(idle)
    whole = copy.copy(args)
    whole.max_length = None
    found = by_trl(dataset, tokenizer, whole)
    tokens, reasons = found.tokens, found.failed
    check_failed(reasons, len(dataset), found.why)
    lengths, learnt, *_ = survey(tokens)
    messages = bool(message_columns(dataset))
    for position, length, number in zip(tokens[ROW_POSITION], lengths, learnt, strict=True):
        if number:
            reasons[position] = f"no token to learn within max_length {args.max_length}"
        elif messages:
            part = "of its messages" if length == 0 else "to learn of its messages"
            reasons[position] = f"the chat template renders nothing {part}"
        elif length == 1:
            reasons[position] = "no token to learn: its only token follows no other"
        else:
            reasons[position] = "no token to learn: every label is masked"
    return reasons


class _Preparer(SFTTrainer):
    """An SFTTrainer that only prepares its dataset; as it trains nothing, it reports nothing to TRL's statistics."""

    def _send_telemetry(self) -> None:
        pass


class _Tolerant(Dataset):
    """A dataset that leaves out the rows on which a mapped function fails, and remembers why.

    Attributes:
        failed: the error of each of these rows, by `ROW_POSITION`.
    """

    failed: dict[int, str]

    @classmethod
    def of(cls, dataset: Dataset, failed: dict[int, str]) -> _Tolerant:
        """The rows of a dataset; what fails is added to `failed`."""
        made = cls(dataset.data, dataset.info.copy(), dataset.split, dataset._indices, dataset._fingerprint)
        made.failed = failed
        return made

    def map(self, function: Any = None, *args: Any, **settings: Any) -> Any:
        """As `Dataset.map`, over the rows on which the function does not fail."""
        if args or settings.get("batched") or settings.get("with_indices"):
            return super().map(function, *args, **settings)
        sound = [row for row, example in enumerate(self) if self._works(function, example, settings)]
        rows = Dataset.select(self, sound) if len(sound) < len(self) else self
        return _Tolerant.of(Dataset.map(rows, function, **settings), self.failed) if sound else rows

    def _works(self, function: Callable[..., Any], example: dict[str, Any], settings: Mapping[str, Any]) -> bool:
        try:
            function(copy.deepcopy(example), **(settings.get("fn_kwargs") or {}))
        except Exception as error:  # tokenizers and templates each raise their own
            self.failed[example[ROW_POSITION]] = f"SFTTrainer cannot prepare it: {first_line(error)}"
            return False
        return True


@dataclass(frozen=True)
class ByTrl:
    """Rows as SFTTrainer prepares them.

    Attributes:
        tokens: the rows that it can prepare.
        template: the chat template.
        failed: why it cannot prepare the others, by position.
        why: the first error.
    """

    tokens: Dataset
    template: str
    failed: dict[int, str]
    why: str = ""


def by_trl(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> ByTrl:
    """The rows as SFTTrainer prepares them. Raises InputError where it refuses them, not just single ones."""
    failed: dict[int, str] = {}
    why = ""
    try:
        trainer = _prepared_by(dataset, tokenizer, args)
    except Exception as error:  # TRL, tokenizers and templates each raise their own
        why = first_line(error)
        try:
            trainer = _prepared_by(_Tolerant.of(dataset, failed), tokenizer, args)
        except Exception:  # it is not, or not only, about single rows
            if len(failed) < len(dataset):
                failed = {}
        if len(failed) == len(dataset):
            return ByTrl(dataset.select([]), "", failed, why)
        if not failed:
            raise InputError(f"TRL cannot prepare this dataset: {why}") from error
    template = trainer.chat_template or getattr(trainer.processing_class, "chat_template", None) or ""
    columns = [ROW_POSITION, "input_ids", "labels"]
    if not set(columns) <= set(trainer.train_dataset.column_names):
        raise InputError(
            "The rows are no tokens with labels, and dataset_kwargs={'skip_prepare_dataset': True} leaves them as they "
            "are. Leave skip_prepare_dataset out."
        )
    return ByTrl(trainer.train_dataset.select_columns(columns), str(template), failed, why)


def _prepared_by(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> SFTTrainer:
    """An SFTTrainer with the prepared dataset, and a stand-in for the model."""
    args = copy.copy(args)
    args.packing = args.padding_free = args.shuffle_dataset = False
    args.gradient_checkpointing = args.activation_offloading = args.use_liger_kernel = args.push_to_hub = False
    args.report_to, args.eval_strategy, args.disable_tqdm = [], "no", True
    args.model_init_kwargs = args.router_aux_loss_coef = args.gradient_checkpointing_kwargs = None
    stand_in = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=2, intermediate_size=2, num_hidden_layers=1,
                    num_attention_heads=1, num_key_value_heads=1)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        return _Preparer(stand_in, args=args, train_dataset=dataset, processing_class=tokenizer)
