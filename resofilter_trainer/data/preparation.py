"""Turns rows into the tokens and labels that SFTTrainer would train on, by TRL's own preparation, not a copy of it.

A column with each row's position in the user's dataset passes through the preparation, so that rows which it drops or
moves are noticed. Knows datasets and TRL, not what is measured.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from ..config import InputError, NothingError
from ..model.losses import IGNORE
from .columns import media_columns
from .files import first_line
from .rows import told_of
from .templates import check_template, message_columns, rows_with, unrendered_roles

ROW_POSITION = "resofilter_row"  # the column with each row's position in the user's dataset, its `sample_id`


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
    """

    dataset: Dataset
    lengths: np.ndarray
    num_tokens: np.ndarray
    largest_token: int
    fingerprint: str
    reasons: dict[int, str]
    template: str
    rendered: bool = False

    @property
    def sample_ids(self) -> np.ndarray:
        """(N,) each row's position in the user's dataset."""
        return np.array(self.dataset[ROW_POSITION])

    def select(self, rows: np.ndarray) -> PreparedRows:
        """Some of the rows, in this order; the fingerprint stays that of all rows."""
        dataset, lengths, num_tokens = self.dataset.select(rows), self.lengths[rows], self.num_tokens[rows]
        return dataclasses.replace(self, dataset=dataset, lengths=lengths, num_tokens=num_tokens)


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
    reasons = {} if args.chat_template_path else _unrendered(dataset, tokenizer)
    dataset = _without(dataset, reasons, drop_empty)
    tokens, template, failed = _by_trl(dataset, tokenizer, args)
    dataset = _without(dataset, failed, drop_empty)
    reasons |= failed
    lengths, learnt, largest, fingerprint = survey(tokens)
    usable = learnt > 0
    used = set(np.array(tokens[ROW_POSITION])[usable].tolist())
    idle = [place for place, row in enumerate(dataset[ROW_POSITION]) if row not in used]
    reasons |= _why_idle(dataset.select(idle), tokenizer, args) if idle else {}
    if not used:
        first = min(reasons)
        raise NothingError(
            f"None of the {len(reasons)} rows has a token to learn. Row {first}: {reasons[first]}.", reasons
        )
    if not usable.all():
        tokens, lengths, learnt = tokens.select(np.flatnonzero(usable)), lengths[usable], learnt[usable]
    rendered = bool(message_columns(dataset))
    return PreparedRows(tokens, lengths, learnt, largest, fingerprint, reasons, template, rendered)


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


def _without(dataset: Dataset, refused: Mapping[int, str], drop_empty: bool) -> Dataset:
    """The rows that are not refused, by position. Raises InputError where some are, and they are not to be skipped."""
    if not refused:
        return dataset
    line = told_of(refused, len(dataset), "cannot be learnt from")
    if not drop_empty:
        raise InputError(f"{line} Correct or remove them, or skip them with drop_empty=True.")
    if len(refused) == len(dataset):
        raise NothingError(line, refused)
    return dataset.select([row for row, position in enumerate(dataset[ROW_POSITION]) if position not in refused])


def _unrendered(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The rows with roles that the chat template leaves out, by position, each with the reason."""
    roles = unrendered_roles(dataset, tokenizer)
    positions = dataset[ROW_POSITION][:]
    return {
        positions[row]: f"the chat template does not render the role '{role}'; rename it to user, assistant or the like"
        for row, role in (rows_with(dataset, roles) if roles else {}).items()
    }


def _why_idle(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> dict[int, str]:
    """Why rows have no token to learn, by position: they are cut off, or have none without truncation either."""
    whole = copy.copy(args)
    whole.max_length = None
    tokens, _, reasons = _by_trl(dataset, tokenizer, whole)
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


def _by_trl(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig
) -> tuple[Dataset, str, dict[int, str]]:
    """The dataset as SFTTrainer prepares it; the chat template; and why it cannot prepare other rows, by position."""
    failed: dict[int, str] = {}
    try:
        trainer = _prepared_by(dataset, tokenizer, args)
    except Exception as error:  # TRL, tokenizers and templates each raise their own
        try:
            trainer = _prepared_by(_Tolerant.of(dataset, failed), tokenizer, args)
        except Exception:  # it is not, or not only, about single rows
            failed = {}
        if not failed or len(failed) == len(dataset):
            raise InputError(f"TRL cannot prepare this dataset: {first_line(error)}") from error
    template = trainer.chat_template or getattr(trainer.processing_class, "chat_template", None) or ""
    columns = [ROW_POSITION, "input_ids", "labels"]
    if not set(columns) <= set(trainer.train_dataset.column_names):
        raise InputError(
            "The rows are no tokens with labels, and dataset_kwargs={'skip_prepare_dataset': True} leaves them as they "
            "are. Leave skip_prepare_dataset out."
        )
    return trainer.train_dataset.select_columns(columns), str(template), failed


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


def survey(tokens: Dataset) -> tuple[np.ndarray, np.ndarray, int, str]:
    """Read every token of a dataset with `input_ids` and `labels`, and maybe `ROW_POSITION`.

    Returns:
        Each row's length and number of learnt tokens, (N,) each; the largest token id; and a hash of everything.
    """
    lengths, learnt, largest, digest = [np.empty(0, int)], [np.empty(0, int)], 0, xxhash.xxh3_128()
    for table in _arrow_batches(tokens):
        ids, labels = (_flat(table[name]) for name in ("input_ids", "labels"))
        length, is_learnt = _learnt(table)
        lengths.append(length)
        so_far = np.concatenate([[0], np.cumsum(is_learnt)])
        ends = np.cumsum(length)
        learnt.append(so_far[ends] - so_far[ends - length])
        largest = max(largest, int(ids.max(initial=0)))
        positions = [table[ROW_POSITION].to_numpy()] if ROW_POSITION in table.column_names else []
        for array in (*positions, length, ids, labels):
            digest.update(array.astype(np.int64).tobytes())
    return np.concatenate(lengths), np.concatenate(learnt), largest, digest.hexdigest()


def learnt_tokens(tokens: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The position in its row and the id of every learnt token, row after row; (N,) int32 each."""
    positions, ids = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    for table in _arrow_batches(tokens):
        length, is_learnt = _learnt(table)
        position = np.arange(len(is_learnt)) - np.repeat(np.cumsum(length) - length, length)
        positions.append(position[is_learnt].astype(np.int32))
        ids.append(table["input_ids"].combine_chunks().flatten().to_numpy()[is_learnt].astype(np.int32))
    return np.concatenate(positions), np.concatenate(ids)


def beginnings(tokens: Dataset) -> tuple[np.ndarray, np.ndarray, int]:
    """A hash of each row's prompt, the length of each prompt, and how many first tokens all rows have in common.

    A row has `input_ids` and `labels`; its prompt is everything before its first learnt token.
    """
    hashes, lengths, first, common = list[int](), list[int](), np.empty(0), 0
    for own, length in _with_prompts(tokens):
        if not hashes:
            first, common = own, len(own)
        differs = own[:common] != first[: len(own)][:common]
        common = int(differs.argmax()) if differs.any() else min(common, len(own))
        hashes.append(xxhash.xxh3_64_intdigest(np.ascontiguousarray(own[:length]).data))
        lengths.append(length)
    return np.array(hashes, dtype=np.uint64), np.array(lengths), common


def prompts_of(tokens: Dataset, start: int | None) -> pa.Array:
    """A hash of each row's prompt, (N,) int64, the same wherever the row stands; null for a row without a prompt.

    Args:
        tokens: rows with `input_ids` and `labels`; a prompt is everything before the first learnt token.
        start: the beginning-of-sequence token, if there is one; alone it is no prompt.
    """
    found: list[int | None] = []
    for own, length in _with_prompts(tokens):
        none = length == 0 or (length == 1 and own[0] == start)
        found.append(None if none else xxhash.xxh3_64_intdigest(own[:length].astype(np.int64).tobytes()))
    missing = np.array([each is None for each in found], dtype=bool)
    return pa.array(np.array([each or 0 for each in found], dtype=np.uint64).view(np.int64), mask=missing)


def _with_prompts(tokens: Dataset) -> Iterator[tuple[np.ndarray, int]]:
    """All tokens of each row, and how many of them come before the first learnt one."""
    for table in _arrow_batches(tokens):
        ids, labels = (table[name].combine_chunks() for name in ("input_ids", "labels"))
        ends = np.cumsum(pc.list_value_length(ids).to_numpy())
        flat, learnt = ids.flatten().to_numpy(), labels.flatten().to_numpy() != IGNORE
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            yield flat[start:end], int(learnt[start:end].argmax()) if end > start else 0


def row_hashes(tokens: Dataset) -> np.ndarray:
    """A hash of each row's `input_ids` and `labels`, (N,) uint64."""
    hashes = list[int]()
    for table in _arrow_batches(tokens):
        ids, labels = (_flat(table[name]).astype(np.int64) for name in ("input_ids", "labels"))
        ends = np.cumsum(pc.list_value_length(table["input_ids"].combine_chunks()).to_numpy())
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            hashes.append(xxhash.xxh3_64_intdigest(np.concatenate([ids[start:end], labels[start:end]]).data))
    return np.array(hashes, dtype=np.uint64)


def _learnt(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Each row's length, and for every token whether it is learnt; a row's first never is: nothing predicts it."""
    labels = table["labels"].combine_chunks()
    length = pc.list_value_length(labels).to_numpy()
    is_learnt = _flat(table["labels"]) != IGNORE
    is_learnt[(np.cumsum(length) - length)[length > 0]] = False
    return length, is_learnt


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    """All tokens of a column of lists; of lists that are all empty, too, which have no type."""
    tokens = column.combine_chunks().flatten()
    return (tokens.cast(pa.int64()) if pa.types.is_null(tokens.type) else tokens).to_numpy()


def _arrow_batches(dataset: Dataset) -> Iterator[pa.Table]:
    yield from dataset.with_format("arrow").iter(batch_size=1000)
