"""The beginning of every pass: the model and its tokenizer, the usable rows, and whether they fit.

Knows the user's rows, not what is measured.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import SFTConfig

from ..config import (
    ColumnMapping,
    InputError,
    NothingError,
    Precision,
    check_keywords,
    check_kind,
    number,
    together,
    whole_number,
)
from ..config.compatibility import loss_type
from ..io.digest import hash_rows
from ..io.files import check_folder
from ..model.adapters import refuse_adapters
from ..scores.provenance import Provenance
from ..selecting.weighted_rows import TOKEN_WEIGHTS
from .arguments import ROW_OPTIONS
from .fingerprints import describe
from .models import OF_TOKENIZER, check_causal, check_name, check_on_hub
from .models import load_model as load_model
from .models import load_weights as load_weights
from .preparation import PreparedRows, prepare
from .shared_loading import hash_of_first, load_to_shard
from .sharing import sharing_of
from .templates import TEMPLATES
from .usable import check_columns
from .usable import usable_rows as usable_rows


@dataclass(frozen=True)
class Opened:
    """The rows of a pass and their provenance.

    Attributes:
        tokenizer: the model's tokenizer.
        prepared: the rows that can be measured, as tokens.
        reasons: why the user's other rows cannot be measured, by position.
        rows: the number of rows in the user's dataset.
        provenance: the provenance of the scores.
    """

    tokenizer: PreTrainedTokenizerBase
    prepared: PreparedRows
    reasons: dict[int, str]
    rows: int
    provenance: Provenance

    def provenance_like(self, fingerprint: str) -> Provenance:
        """The provenance to compare with an earlier one.

        Args:
            fingerprint: that of the rows there (`Provenance.dataset`); an earlier version computed it in another way.
        """
        return dataclasses.replace(self.provenance, dataset=self.prepared.fingerprint_like(fingerprint))


def open_pass(
    model: str | PreTrainedModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase | None,
    args: SFTConfig,
    config: Mapping[str, Any],
    *,
    precision: Precision | None = None,
    drop_duplicates: bool = False,
    drop_empty: bool = False,
    source: Mapping[str, Any] | None = None,
    told: set[str] | None = None,
    to_shard: bool = False,
    group_size: int | None = None,
    weights: str | None = None,
    output: Path | None = None,
    **columns: Any,
) -> tuple[PreTrainedModel, Opened]:
    """The model, not yet on its device, and the rows of a pass.

    Args:
        model, dataset, processing_class, args, drop_duplicates, drop_empty, source, **columns: as for `score_dataset`.
        config: what is measured and with which settings, for the provenance.
        precision: the forward's precision; by default what `args.bf16` says.
        told: notes on the rows that were printed already, which is extended; by default none were.
        to_shard: whether the model will be sharded: a name is then loaded by the first process of each group alone,
            and the others get the model without numbers.
        group_size: the processes of a group; by default all.
        weights: the hash of the model's weights, if it is known.
        output: the folder of the scores, where the prepared rows are kept if they cannot be beside the dataset.

    Raises:
        InputError: no row can be measured, or model, tokenizer and rows do not fit.
    """
    check_keywords(columns, ROW_OPTIONS)
    check_kind("source", source, (Mapping, type(None)), "a mapping, such as {'dataset': 'me/rows'}")
    mapping = ColumnMapping(**columns)
    told = set() if told is None else told
    if isinstance(model, str):
        together(partial(check_name, model, args), partial(check_columns, dataset, mapping, args))
    sharing = sharing_of(dataset, mapping, args, drop_duplicates, drop_empty, output)
    if sharing is None:
        notes: list[str] = []
        rows, reasons = usable_rows(dataset, mapping, args, drop_duplicates, drop_empty, notes)
    else:
        shared = sharing.rows()
        reasons, notes = shared.skipped, shared.notes
    tell(notes, told)
    _warn_of_weights(dataset, told)
    handed_out = to_shard and isinstance(model, str)
    load = partial(load_to_shard, group_size=group_size) if handed_out else None
    model, tokenizer = load_model(model, processing_class, args, load)
    try:
        if sharing is None:
            prepared, content = prepare(rows, tokenizer, args, drop_empty), hash_rows(dataset)
        else:
            prepared, content = sharing.prepared(shared, tokenizer), shared.content
    except NothingError as error:
        error.reasons = reasons | error.reasons
        raise
    check_model(model, prepared)
    source = {**(source or {}), "content": content}
    if args.chat_template_path:
        source["chat_template_path"] = str(args.chat_template_path)
    if args.trust_remote_code:
        source["trust_remote_code"] = True
    weights = hash_of_first(model) if handed_out else weights
    provenance = describe(model, tokenizer, prepared, len(dataset), args, config, mapping, source, precision, weights)
    return model, Opened(tokenizer, prepared, reasons | prepared.reasons, len(dataset), provenance)


def tell(notes: Iterable[str], told: set[str]) -> None:
    """Print what was read as something else, once, on the main process.

    Args:
        notes: what was read as something else.
        told: what was said already, which is extended.
    """
    new = [note for note in notes if note not in told]
    told.update(new)
    if new and PartialState().is_main_process:
        print(f"Rows were read as TRL's format: {'; '.join(new)}. map_columns gives SFTTrainer the same rows.")


def _warn_of_weights(dataset: Dataset, told: set[str]) -> None:
    """Warn once, in the main process, of weights of tokens, which no pass knows."""
    if TOKEN_WEIGHTS not in dataset.column_names or TOKEN_WEIGHTS in told:
        return
    told.add(TOKEN_WEIGHTS)
    if PartialState().is_main_process:
        warnings.warn(
            f"The rows have weights of their tokens ('{TOKEN_WEIGHTS}'), and are measured without: each learnt token "
            "counts alike in their losses and scores, as it does not where TokenWeights trains on them. Measure rows "
            "before they are cleaned, or clean by a mask, which is measured.",
            stacklevel=4,
        )


def default_arguments() -> SFTConfig:
    """SFTConfig's own values, in float32."""
    return SFTConfig(output_dir="unused", bf16=False, use_cpu=not torch.cuda.is_available(), report_to="none")


def check_loss(args: TrainingArguments) -> None:
    """Raise InputError for arguments by which a trainer would learn by another loss than the mean token loss."""
    for name, value, plain in (
        ("loss_type", loss_type(args), (None, "nll")),
        ("label_smoothing_factor", args.label_smoothing_factor, (0,)),
    ):
        if value not in plain:
            raise InputError(
                f"A pass over the rows measures the mean token loss, and {name}={value!r} trains by another. Leave it "
                "out, or measure while training, with ResonanceCallback(when='training')."
            )


def check_arguments(args: SFTConfig, output: Path | None) -> None:
    """Raise InputError for arguments that cannot work, a chat template that cannot be had, or a folder to write to."""
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        whole_number(name, getattr(args, name), least=1)
    number("ddp_timeout", args.ddp_timeout, least=1)
    if args.max_length is not None:
        whole_number("max_length", args.max_length, least=1)
    template = args.chat_template_path
    if template is not None and not Path(template).exists() and Path(template).suffix not in TEMPLATES:
        check_on_hub(str(template), "chat template", OF_TOKENIZER)
    if output is not None:
        check_folder(output)


def check_model(model: PreTrainedModel, prepared: PreparedRows) -> None:
    """Raise InputError for a model that predicts no token, an adapter that needs more, or rows with unknown tokens."""
    check_causal(model)
    refuse_adapters(model)
    size = len(model.get_input_embeddings().weight)  # PEFT's wrappers have no `num_embeddings`
    if prepared.largest_token >= size:
        raise InputError(
            f"The rows have token {prepared.largest_token}, and the model knows {size} tokens: tokenizer and model do "
            "not belong together. Pass the model's own tokenizer, or resize the model's embeddings first."
        )


def placed(model: PreTrainedModel, args: SFTConfig) -> PreTrainedModel:
    """The model on the device that training would use; a model with a device map stays where it is."""
    if getattr(model, "hf_device_map", None) is None:
        model.to(args.device)
    return model
