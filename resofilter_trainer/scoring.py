"""The scoring pass: every row of a dataset, once, and how far the scores can be trusted.

Knows batches, devices and processes. The measuring is the recorder's, the tokens are TRL's.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .comparison import rank_correlation
from .config import ColumnMapping, InputError, ResonanceConfig
from .loading import check_arguments, check_model, default_arguments, load_model, placed, usable_rows
from .preparation import ROW, PreparedRows, prepare
from .provenance import describe
from .recorder import Recorder
from .resonance import Resonance
from .rows import hash_rows
from .scores import LAYER, SCORES_FILE, Provenance, ScoreTable, Trust, file_at

VANISHING = "Gradients near eps vanish in float16, and their ranking with them. Score in bf16 or float32."
TRUST_ROWS = 64  # measured again, to see how far numerical noise reaches


def score_dataset(
    model: str | PreTrainedModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    config: ResonanceConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    drop_duplicates: bool = False,
    drop_empty: bool = False,
    source: Mapping[str, Any] | None = None,
    **columns: Any,
) -> ScoreTable:
    """Score every row of a dataset by how far training on it would move W_up (ResoFilter).

    Args:
        model: a causal language model, or the name or folder of one, which is then loaded in float32.
        dataset: rows in any format that SFTTrainer takes, or any columns, with `columns` saying which is which.
        processing_class: the tokenizer; the model's own by default.
        args: SFTTrainer's: lengths, masking, batch size, device, and `bf16` for a forward in bfloat16 autocast. By
            default SFTConfig's own, without bf16.
        config: which step is measured and how; by default the paper's.
        output: a folder to write `scores.parquet` to. Scores of the same model, data and settings that lie there
            already are returned as they are.
        drop_duplicates: leave out rows whose prompt repeats an earlier one, as the paper does.
        drop_empty: leave out rows with an empty completion, which are an error otherwise.
        source: where the dataset came from, for the provenance: `dataset`, `split` and `name` as for `load_rows`.
        **columns: `prompt_column`, `completion_column` and the other fields of `ColumnMapping`.

    Returns:
        A line for every row: its score, or the reason why it has none.

    Raises:
        InputError: nothing can be scored, a row's loss is not finite, or `output` holds scores of something else.

    As in SFTTrainer, the model moves to the device of `args`, and Python's, numpy's and torch's random numbers start
    from `args.seed`.
    """
    config, mapping = config or ResonanceConfig(), ColumnMapping(**columns)
    args = args or default_arguments()
    check_arguments(args, None if output is None else file_at(output, SCORES_FILE).parent)
    if args.fp16:
        raise InputError(VANISHING)
    if args.device.type == "mps":
        raise InputError("Apple's GPU has no float64, in which scores are summed up. Pass use_cpu=True.")
    rows, reasons = usable_rows(dataset, mapping, args.dataset_text_field, drop_duplicates, drop_empty)
    model, tokenizer = load_model(model, processing_class, args)
    prepared = prepare(rows, tokenizer, args)
    reasons.update(prepared.reasons)
    check_model(model, prepared)
    if model.dtype == torch.float16:
        raise InputError(VANISHING)
    source = {**(source or {}), "content": hash_rows(dataset)}
    provenance = describe(model, tokenizer, prepared, len(dataset), args, dataclasses.asdict(config), mapping, source)
    earlier = _scores_at(output, provenance)
    if earlier is not None:
        return earlier
    measured, layers, trust = score_prepared(placed(model, args), prepared, args, config)
    table = _table(measured, layers, prepared, reasons, len(dataset))
    scores = ScoreTable(table, dataclasses.replace(provenance, trust=trust))
    if output is not None and PartialState().is_main_process:
        scores.save(output)
    return scores


def score_prepared(
    model: nn.Module, prepared: PreparedRows, args: TrainingArguments, config: ResonanceConfig
) -> tuple[Resonance, list[int], Trust]:
    """Score rows that are tokens already, where the model is.

    Returns:
        What was measured of the rows in their order, which layers, and how far it can be trusted.
    """
    with Recorder(model, config) as record:
        scoring = _Pass(record, prepared, args, autocast=bool(args.bf16))
        measured = scoring.measure_all()
        trust = scoring.trust(measured)
    if not trust.trusted:
        warnings.warn(f"Scores to be taken with care: {trust}.", stacklevel=3)
    return measured, record.layer_indices, trust


@dataclass(frozen=True)
class _Pass:
    """Batches of prepared rows, taken through the recorder."""

    record: Recorder
    prepared: PreparedRows
    args: TrainingArguments
    autocast: bool

    def measure_all(self) -> Resonance:
        """Every row, in the order in which they were prepared."""
        order = np.argsort(-self.prepared.lengths, kind="stable")  # rows of one length share a batch: little padding
        measured = self._measure(self._split(order), "Scoring")
        return _reordered(measured, np.argsort(order, kind="stable"))

    def trust(self, measured: Resonance) -> Trust:
        """Measure a random subset again, alone (without autocast) and in other batches, and compare the ranks."""
        rows = np.random.default_rng(0).permutation(len(measured.loss))[:TRUST_ROWS]
        before = measured.score[rows]
        exact = dataclasses.replace(self, autocast=False)
        alone = exact._measure([rows[i : i + 1] for i in range(len(rows))], "Scoring some again, alone")
        mixed = self._measure(self._split(rows), "Scoring some again, in other batches")
        agreements = [rank_correlation(before, again.score) for again in (alone, mixed)]
        bounded = self.record.config.update == "adamw" and self.record.config.norm == "mean_abs"
        spread = float(np.ptp(measured.score)) / self.record.config.lr
        return Trust(
            agreement=None if len(rows) < 3 else min(agreements),
            rows=len(rows),
            saturation=spread if bounded else None,
        )

    def _split(self, rows: np.ndarray) -> list[np.ndarray]:
        size = self.args.per_device_train_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _measure(self, batches: Sequence[np.ndarray], label: str) -> Resonance:
        """The rows of all batches, in the batches' order. Each process takes its share; each gets everything."""
        state = PartialState()
        mine = range(state.process_index, len(batches), state.num_processes)
        bar = tqdm(mine, desc=label, unit="batch", disable=self.args.disable_tqdm or not state.is_main_process)
        found = [(number, self._measure_batch(batches[number])) for number in bar]
        if state.num_processes > 1:
            found = sorted(gather_object(found), key=lambda each: each[0])
        return Resonance(
            loss=np.concatenate([each.loss for _, each in found]),
            num_tokens=np.concatenate([each.num_tokens for _, each in found]),
            layers=np.concatenate([each.layers for _, each in found]),
        )

    def _measure_batch(self, rows: np.ndarray) -> Resonance:
        examples = [self.prepared.dataset[int(row)] for row in rows]
        batch = DataCollatorForLanguageModeling(pad_token_id=0)(examples)
        device = next(self.record.model.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.autocast):
            measured = self.record({name: tensor.to(device) for name, tensor in batch.items()})
        broken = ~(np.isfinite(measured.loss) & np.isfinite(measured.score))
        if broken.any():
            first = int(np.flatnonzero(broken)[0])
            raise InputError(
                f"Row {examples[first][ROW]} of the dataset has loss {measured.loss[first]} and score "
                f"{measured.score[first]}: nothing was written. Are the weights sound? Try float32, or drop the row."
            )
        return measured


def _scores_at(output: str | os.PathLike[str] | None, provenance: Provenance) -> ScoreTable | None:
    """Scores that lie at `output` already, if they are of the same; None where there are none."""
    if output is None or not file_at(output, SCORES_FILE).exists():
        return None
    there = ScoreTable.load(output)
    there.provenance.check_same(provenance, "scores", output)
    return there


def _reordered(measured: Resonance, order: np.ndarray) -> Resonance:
    return Resonance(measured.loss[order], measured.num_tokens[order], measured.layers[order])


def _table(
    measured: Resonance, layers: Sequence[int], prepared: PreparedRows, reasons: Mapping[int, str], rows: int
) -> pa.Table:
    """One line for every row of the user's dataset."""
    ids = prepared.sample_ids
    missing = np.ones(rows, dtype=bool)
    missing[ids] = False

    def column(values: np.ndarray) -> pa.Array:
        spread = np.zeros(rows, dtype=values.dtype)
        spread[ids] = values
        return pa.array(spread, mask=missing)

    return pa.table(
        {
            "sample_id": np.arange(rows),
            "score": column(measured.score),
            "loss": column(measured.loss),
            "num_tokens": column(measured.num_tokens),
            "length": column(prepared.lengths),
            **{f"{LAYER}{layer}": column(measured.layers[:, i]) for i, layer in enumerate(layers)},
            "reason": pa.array([reasons.get(row) for row in range(rows)], pa.string()),
        }
    )
