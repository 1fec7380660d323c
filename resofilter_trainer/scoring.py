"""The scoring pass: every row of a dataset, once, and how far the scores can be trusted.

Knows batches, devices and processes. The measuring is the recorder's, the tokens are TRL's.
"""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import SFTConfig

from .batches import arrange, collate, default_budget, of_all_processes, own_share
from .comparison import rank_correlation
from .config import InputError, NotFiniteError, Precision, ResonanceConfig, one_of
from .files import file_at
from .loading import Opened, check_arguments, default_arguments, open_pass, placed
from .modes import bfloat16_forward
from .preparation import PreparedRows
from .recorder import Recorder
from .resonance import Resonance
from .scores import LAYER, SCORES_FILE, Provenance, ScoreTable, Trust

VANISHING = "Gradients near eps vanish in float16, and their ranking with them. Score in bf16 or float32."
TRUST_ROWS = 64  # measured again, to see how far numerical noise reaches
TRUST_SHARE = 8  # every eighth row where that is fewer, so that a small dataset does not cost several times its pass
LEAST_TRIED = 16  # rows: a rank correlation of fewer says nothing
SAFE = 0.995  # rank correlation with float32 from which on bfloat16 is chosen
CLEARLY_FASTER = 0.8


def score_dataset(
    model: str | PreTrainedModel,
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase | None = None,
    args: SFTConfig | None = None,
    config: ResonanceConfig | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    precision: Precision | None = None,
    tokens_per_batch: int | None = None,
    **row_options: Any,
) -> ScoreTable:
    """Score every row of a dataset by how far training on it would move W_up (ResoFilter).

    Args:
        model: a causal language model, or the name or folder of one, which is then loaded in float32.
        dataset: rows in any format that SFTTrainer takes, or any columns, with `columns` saying which is which.
        processing_class: the tokenizer; the model's own by default.
        args: SFTTrainer's: lengths, masking, device; by default SFTConfig's own.
        config: which step is measured and how; by default the paper's.
        output: a folder to write `scores.parquet` to. Scores of the same model, data and settings that lie there
            already are returned as they are.
        precision: what the forward runs in: `"bfloat16"`, by autocast; `"float32"`, or the weights' own dtype; or
            `"auto"`: bfloat16 where this machine is faster with it and some of these rows rank alike, which is tried
            first. By default what `args.bf16` says, and `"auto"` without `args`. Products are float32, sums float64.
        tokens_per_batch: padding included; by default what suits the device.
        **row_options: `drop_duplicates`, to leave out rows whose prompt repeats an earlier one, as the paper does;
            `drop_empty`, to leave out rows with an empty completion, which are an error otherwise; `source`, where the
            dataset came from, for the provenance: `dataset`, `split` and `name` as for `load_rows`; and
            `prompt_column`, `completion_column` and the other fields of `ColumnMapping`.

    Returns:
        A line for every row: its score, or the reason why it has none.

    Raises:
        InputError: nothing can be scored, a row's loss is not finite, or `output` holds scores of something else.

    As in SFTTrainer, the model moves to the device of `args`, and Python's, numpy's and torch's random numbers start
    from `args.seed`.
    """
    config = config or ResonanceConfig()
    if precision is None and args is None:
        precision = "auto"
    args = args or default_arguments()
    precision = _checked_precision(precision, args)
    check_arguments(args, None if output is None else file_at(output, SCORES_FILE).parent)
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise InputError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}.")
    if args.fp16:
        raise InputError(VANISHING)
    if args.device.type == "mps":
        raise InputError("Apple's GPU has no float64, in which scores are summed up. Pass use_cpu=True.")
    settings = dataclasses.asdict(config)
    model, opened = open_pass(model, dataset, processing_class, args, settings, precision=precision, **row_options)
    if model.dtype == torch.float16:
        raise InputError(VANISHING)
    earlier = scores_at(output, opened.provenance)
    if earlier is not None:
        return earlier
    model = placed(model, args)
    measured, layers, trust = score_prepared(model, opened.prepared, args, config, precision, tokens_per_batch)
    columns = {"score": measured.score, "loss": measured.loss}
    columns |= {f"{LAYER}{layer}": measured.layers[:, i] for i, layer in enumerate(layers)}
    return finished(opened, columns, output, trust)


def _checked_precision(precision: Precision | None, args: TrainingArguments) -> Precision:
    """What was asked for, or else what the arguments say."""
    if precision is None:
        return "bfloat16" if args.bf16 else "float32"
    one_of("precision", precision, get_args(Precision))
    return precision


def score_prepared(
    model: nn.Module,
    prepared: PreparedRows,
    args: TrainingArguments,
    config: ResonanceConfig,
    precision: Precision | None = None,
    tokens_per_batch: int | None = None,
) -> tuple[Resonance, list[int], Trust]:
    """Score rows that are tokens already, where the model is; the arguments are `score_dataset`'s.

    Returns:
        What was measured of the rows in their order, which layers, and how far it can be trusted.
    """
    precision = _checked_precision(precision, args)
    budget = tokens_per_batch or default_budget(next(model.parameters()).device)
    with Recorder(model, config) as record:
        scoring = Pass(record, prepared, args, budget)
        count = min(TRUST_ROWS, max(len(prepared.lengths) // TRUST_SHARE, LEAST_TRIED))
        rows = np.random.default_rng(0).permutation(len(prepared.lengths))[:count]
        alone = scoring.measure([rows[i : i + 1] for i in range(len(rows))], False, "Scoring some alone").score
        autocast = precision == "bfloat16" or (
            precision == "auto"
            and len(rows) >= LEAST_TRIED
            and next(model.parameters()).dtype == torch.float32
            and faster_in_bfloat16(next(model.parameters()).device)
        )
        mixed = scoring.measure(scoring.split(rows), autocast, "Scoring some in other batches").score
        if precision == "auto" and autocast and not rank_correlation(alone, mixed) >= SAFE:
            autocast = False
            mixed = scoring.measure(scoring.split(rows), autocast, "Scoring some in other batches").score
        measured = scoring.measure_all(autocast)
    agreements = [rank_correlation(measured.score[rows], again) for again in (alone, mixed)]
    bounded = config.update == "adamw" and config.norm == "mean_abs"
    trust = Trust(
        agreement=None if len(rows) < 3 else min(agreements),
        rows=len(rows),
        saturation=float(np.ptp(measured.score)) / config.lr if bounded else None,
        forward="bfloat16" if autocast else "float32",
    )
    if not trust.trusted:
        warnings.warn(f"Scores to be taken with care: {trust}.", stacklevel=3)
    return measured, record.layer_indices, trust


@dataclass(frozen=True)
class Pass:
    """Rows that are tokens, taken through the recorder in batches of a budget of tokens."""

    record: Recorder
    prepared: PreparedRows
    args: TrainingArguments
    budget: int

    def measure_all(self, autocast: bool) -> Resonance:
        """Every row, in the order in which they were prepared."""
        batches = arrange(self.prepared, self.budget, self._device, self.record.may_share)
        measured = self.measure(batches, autocast, "Scoring")
        return _reordered(measured, np.argsort(np.concatenate(batches), kind="stable"))

    def split(self, rows: np.ndarray) -> list[np.ndarray]:
        """Some rows, in this order, so many to a batch as the longest of all of them allows."""
        size = max(self.budget // int(self.prepared.lengths[rows].max()), 1)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def measure(self, batches: Sequence[np.ndarray], autocast: bool, label: str) -> Resonance:
        """The rows of all batches, in the batches' order. Each process takes its share; each gets everything."""
        with bfloat16_forward(self.record.model, autocast, aside=self.record.parameters):
            numbers = own_share(range(len(batches)), label, self.args)
            found = of_all_processes([(number, self._measure_batch(batches[number])) for number in numbers])
        self.record.forget()  # what was kept is of this precision
        return _joined([found[number] for number in range(len(batches))])

    @property
    def _device(self) -> torch.device:
        return next(self.record.model.parameters()).device

    def _measure_batch(self, rows: np.ndarray) -> Resonance:
        """One batch; in two halves, one after the other, where the device has not memory enough."""
        measured = None
        try:
            measured = self.record(collate(self.prepared, rows, self._device))
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        if measured is None:  # not in the except clause, where the error still holds the batch's tensors
            self.record.forget()
            torch.cuda.empty_cache()
            half = len(rows) // 2
            return _joined([self._measure_batch(rows[:half]), self._measure_batch(rows[half:])])
        broken = ~(np.isfinite(measured.loss) & np.isfinite(measured.score))
        if broken.any():
            first = int(np.flatnonzero(broken)[0])
            raise NotFiniteError(
                f"Row {self.prepared.sample_ids[rows[first]]} of the dataset has loss {measured.loss[first]} and score "
                f"{measured.score[first]}: nothing was written. Are the weights sound? Try float32, or drop the row."
            )
        return measured


def faster_in_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices clearly faster than float32 ones.

    Timed, as no flag says it; every process goes by the first one's clock.
    """
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x, w = (torch.ones(1024, 1024, dtype=dtype, device=device) for _ in range(2))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            _ = float((x @ w)[0, 0])  # reading a number waits for the device
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return bool(broadcast_object_list([seconds[1] < CLEARLY_FASTER * seconds[0]])[0])


def scores_at(output: str | os.PathLike[str] | None, provenance: Provenance) -> ScoreTable | None:
    """Scores that lie at `output` already; None where there are none. Raises InputError where they are of another."""
    if output is None or not file_at(output, SCORES_FILE).exists():
        return None
    there = ScoreTable.load(output)
    there.provenance.check_same(provenance, "scores", output)
    return there


def finished(
    opened: Opened,
    columns: Mapping[str, np.ndarray],
    output: str | os.PathLike[str] | None,
    trust: Trust | None = None,
) -> ScoreTable:
    """What was measured of the prepared rows, an (N,) array for each column, as a line for every row of the user's.

    Written to `output` by the main process, where there is one.
    """
    prepared, names = opened.prepared, list(columns)
    ids, missing = prepared.sample_ids, np.ones(opened.rows, dtype=bool)
    missing[ids] = False
    columns = {**columns, "num_tokens": prepared.num_tokens, "length": prepared.lengths}
    found: dict[str, Any] = {"sample_id": np.arange(opened.rows)}
    for name in ("score", "loss", "num_tokens", "length", *(each for each in names if each not in ("score", "loss"))):
        if name in columns:
            spread = np.zeros(opened.rows, dtype=columns[name].dtype)
            spread[ids] = columns[name]
            found[name] = pa.array(spread, mask=missing)
    found["reason"] = pa.array([opened.reasons.get(row) for row in range(opened.rows)], pa.string())
    scores = ScoreTable(pa.table(found), dataclasses.replace(opened.provenance, trust=trust))
    if output is not None and PartialState().is_main_process:
        scores.save(output)
    return scores


def _joined(parts: Sequence[Resonance]) -> Resonance:
    return Resonance(
        loss=np.concatenate([each.loss for each in parts]),
        num_tokens=np.concatenate([each.num_tokens for each in parts]),
        layers=np.concatenate([each.layers for each in parts]),
    )


def _reordered(measured: Resonance, order: np.ndarray) -> Resonance:
    return Resonance(measured.loss[order], measured.num_tokens[order], measured.layers[order])
