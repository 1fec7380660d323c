"""The scoring pass: measures every row of a dataset once, and how far the scores can be trusted.

Knows batches, devices and processes. The recorder measures, and TRL makes the tokens.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack, get_args

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from trl import SFTConfig

from ..config import InputError, NotFiniteError, Precision, ResonanceConfig, Warmup, one_of, whole_number
from ..config.keywords import RowOptions
from ..data.arguments import check_call
from ..data.loading import Opened, default_arguments, placed
from ..data.preparation import PreparedRows
from ..io.files import read_json, replacing
from ..model.float32 import fits_in_float32, half_tensors, in_float32
from ..model.modes import bfloat16_forward
from ..model.recorder import Recorder
from ..model.resonance import Resonance
from ..model.sharding import group_of, is_sharded
from ..model.updates import closed_form
from ..scores.full_step import full_step_of, is_saturated
from ..scores.provenance import Trust
from ..scores.score_table import LAYER, LAYER_VOTE, ScoreTable
from ..scores.statistics import layer_vote, rank_correlation
from .batches import Batch, arrange, collate, default_budget, padded_tokens
from .further_passes import FurtherPass
from .further_signals import ALL_SIGNALS, Wanted, measure_further, measured_in_the_pass
from .groups import check_group, shard_in_groups
from .output import Measured, PassOutput, say_left_out, warn_of_doubts
from .passes import Parts, from_main, measure_batches
from .run_pass import run_pass

TRUST_ROWS = 64  # measured again, to see how much of the ranking is numerical noise
TRUST_SHARE = 8  # or every eighth row where that is fewer, so that a small dataset does not take several times as long
LEAST_TRIED = 16  # rows: a rank correlation of fewer says nothing
SAFE = 0.995  # rank correlation with float32 from which on bfloat16 is chosen
CLEARLY_FASTER = 0.8
FORWARD = "tried-in-bfloat16.json"  # beside the parts


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
    sharded: bool = False,
    group_size: int | None = None,
    signals: str | Sequence[str] | None = None,
    reference: str | None = None,
    warmup: int | Warmup | None = None,
    warmup_dataset: Dataset | None = None,
    **row_options: Unpack[RowOptions],
) -> ScoreTable:
    """Score every row of a dataset by how far training on it would move W_up (ResoFilter).

    Args:
        model: a causal language model; or the name or folder of one, which is loaded in float32.
        dataset: rows in any format that SFTTrainer takes; or with any columns, and `prompt_column` and the like below.
        processing_class: the tokenizer; by default the model's own.
        args: SFTTrainer's arguments: lengths, masking, device; by default `SFTConfig`'s own values.
        config: the step to measure, and how; by default the paper's.
        output: a folder for `scores.parquet`. If it already holds scores of the same model, data and settings, these
            are returned. An interrupted pass resumes, even after a kill. From 20,000 rows on, all processes prepare
            the rows together and keep them in a folder `resofilter-*` beside the dataset's files, which may be removed.
        precision: the precision of the forward: `"bfloat16"`, by autocast; `"float32"`, or the weights' own dtype; or
            `"auto"`: bfloat16 if it is faster on this device and some of these rows rank alike in both, which is
            tried first. By default what `args.bf16` says, and `"auto"` without `args`. Products are float32, sums
            float64.
        tokens_per_batch: the tokens of a batch, padding included; by default what suits the device.
        sharded: shard the layers' weights over all processes (FSDP2), for a model that does not fit on one device.
            Of a name, one process reads the weights and sends every process its shards; a model that is passed stays
            sharded.
        group_size: with `sharded`, the number of processes that hold the model together, at best those of a machine.
            Each such group takes batches from one queue as it becomes free; the last group may have fewer processes.
            By default all processes are one group, and run in lockstep.
        signals: further signals to measure, such as `["entropy", "rank"]`, or `"all"` that can be measured here. Each
            is a column of that name, by which `DataSelector(by=...)` can select. Those in `model.signals.SIGNALS` are
            measured in the same pass; those in `scoring.further_signals.FURTHER` take a forward or two more (`ifd` and
            `loss_alone` together one), in the same precision.
        reference: the reference model of the signals `excess` and `superfiltering`: the name or folder of a model with
            the same vocabulary, or of a LoRA adapter on `model`.
        warmup: a short training first, of a copy of the model, which then scores; the passed model stays as it is. The
            number of rows, or a `Warmup` with all settings. The tuned weights are kept in `output/warmup`, and an
            interrupted warm-up resumes. It needs memory for the copy and, with `method="full"`, for a gradient and
            AdamW's two moments of each weight. The column `warmed_up` is 1 for rows that the copy has learnt, whose
            losses and scores are smaller for that.
        warmup_dataset: the rows to tune on, read like the rows to score; by default some of these, drawn at random.
            Without `warmup`, all of them.
        **row_options: `drop_duplicates`, to skip rows whose prompt repeats an earlier one, as the paper does;
            `drop_empty`, to skip rows with an empty completion, which are an error otherwise; `source`, where the
            dataset comes from, for the provenance: `dataset`, `split` and `name` as for `load_rows`; and
            `prompt_column`, `completion_column` and the other fields of `ColumnMapping`.

    Returns:
        A table with every row of the dataset: its score, or the reason why it has none.

    Raises:
        InputError: no row can be scored, a row's loss is not finite, `output` holds scores of something else or
            another run writes to it, one of several processes is lost, a signal is not known or cannot be measured,
            or the reference has another vocabulary.

    As in SFTTrainer, the model moves to the device of `args`, and the random numbers of Python, numpy and torch are
    seeded with `args.seed`.
    """
    check_call(score_dataset, row_options, model, processing_class, args, config)
    config = config or ResonanceConfig()
    closed_form(config)  # refuses an update that has none
    if precision is None and args is None:
        precision = "auto"
    args = args or default_arguments()
    forward = _checked_precision(precision, args)
    if tokens_per_batch is not None:
        tokens_per_batch = whole_number("tokens_per_batch", tokens_per_batch, least=1)
    wanted = Wanted.of(signals, reference, args, sharded)
    if not isinstance(model, str) and is_sharded(model):
        raise InputError("The model is sharded already: pass it whole, as it was loaded.")
    warms_up = not (warmup is None and warmup_dataset is None)
    if warms_up:
        wanted.check_warmup()
    if group_size is not None:
        check_group(group_size, sharded, args)
    if sharded and warms_up:
        raise InputError("A warm-up trains a whole copy of the model in every process: leave sharded=True out.")

    def place(model: PreTrainedModel, args: SFTConfig) -> PreTrainedModel:
        return shard_in_groups(model, config, args, group_size) if sharded else placed(model, args)

    def settle(model: PreTrainedModel, opened: Opened) -> Opened:
        opened = wanted.settled(model, opened)
        if warms_up:  # what cannot be measured is refused before the tuning
            with Recorder(model, config, measured_in_the_pass(opened.provenance.config.get("signals", []))):
                pass
        return opened

    def measure(model: PreTrainedModel, opened: Opened, target: PassOutput) -> Measured:
        budget = tokens_per_batch or default_budget(args.device)
        parts = target.parts(budget)
        names, prepared = opened.provenance.config.get("signals", []), opened.prepared
        in_pass = measured_in_the_pass(names)
        begun = time.perf_counter()
        found, layers, trust = score_prepared(model, prepared, args, config, forward, budget, parts, in_pass)
        seconds = dict.fromkeys(names, time.perf_counter() - begun)
        columns = {"score": found.score, "loss": found.loss}
        of_layers = {f"{LAYER}{layer}": found.layers[:, i] for i, layer in enumerate(layers)}
        further = FurtherPass(prepared, args, budget, trust.forward == "bfloat16", parts)
        more = measure_further(names, model, opened, found, further, wanted.reference, seconds)
        measured = {**found.signals, **more}
        if LAYER_VOTE in names and len(layers) > 1:
            measured[LAYER_VOTE] = layer_vote(found.layers)
        fields = {name: ALL_SIGNALS[name].metadata for name in names if name in measured}
        columns |= {**of_layers, **{name: measured[name] for name in fields}}
        return Measured(columns, trust, fields=fields, seconds=seconds)

    scores = run_pass(
        model, dataset, processing_class, args, config.to_json(), output, measure,
        place=place, settle=settle, gradients=True, precision=forward,
        warmup=warmup, warmup_dataset=warmup_dataset, to_shard=sharded, group_size=group_size,
        **row_options,
    )  # fmt: skip
    warn_of_doubts(scores, stacklevel=3)
    return scores


def measured_settings(config: ResonanceConfig, signals: Sequence[str] = ()) -> dict[str, Any]:
    """What a pass measures, for its provenance; without signals as if there were none."""
    return {**config.to_json(), "signals": list(signals)} if signals else config.to_json()


def _checked_precision(precision: Precision | None, args: TrainingArguments) -> Precision:
    """The precision that was asked for; by default that of the arguments."""
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
    parts: Parts | None = None,
    signals: Sequence[str] = (),
) -> tuple[Resonance, list[int], Trust]:
    """Score rows that are already tokens, on the model's device.

    Args:
        model, args, config, precision, tokens_per_batch: as for `score_dataset`.
        prepared: the rows.
        parts: where to save results, and to resume from.
        signals: the signals of the pass, as for a `Recorder`.

    Returns:
        What was measured, in the order of the rows; the indices of the measured layers; and how far to trust it.
    """
    precision = _checked_precision(precision, args)
    budget = tokens_per_batch or default_budget(next(model.parameters()).device)
    with Recorder(model, config, signals) as record:
        say_left_out(record.left_out)
        scoring = Pass(record, prepared, args, budget, parts)
        scoring.try_sharing()
        count = min(TRUST_ROWS, max(len(prepared.lengths) // TRUST_SHARE, LEAST_TRIED))
        rows = np.random.default_rng(0).permutation(len(prepared.lengths))[:count]
        whole = _converts(model)
        alone = scoring.measure_alone(rows, whole)
        autocast, mixed = _forward_of(scoring, rows, alone, precision)
        measured = scoring.measure_all(autocast)
    agreements = [rank_correlation(measured.score[rows], again) for again in (alone, mixed)]
    settings = config.to_json()
    trust = Trust(
        agreement=None if len(rows) < 3 else min(agreements),
        rows=len(rows),
        saturation=None if full_step_of(settings) is None else float(np.ptp(measured.score)) / config.lr,
        forward="bfloat16" if autocast else "float32",
        saturated=is_saturated(measured.score, settings),
        in_float32=whole,
    )
    return measured, record.layer_indices, trust


def _converts(model: nn.Module) -> bool:
    """Whether the weights are to be converted to float32 for measuring again: the same in every process."""
    return bool(half_tensors(model)) and all(gather_object([fits_in_float32(model)]))


def _forward_of(scoring: Pass, rows: np.ndarray, alone: np.ndarray, precision: Precision) -> tuple[bool, np.ndarray]:
    """Whether the forward runs in autocast, and with that the scores of some rows in batches of several.

    A resumed pass keeps the precision that it began with, even if the other one is faster now.
    """
    label, batches = "Scoring some in other batches", scoring.split(rows)
    weights = next(scoring.record.model.parameters())
    if precision != "auto":
        return precision == "bfloat16", scoring.measure(batches, precision == "bfloat16", label).score
    tried = len(rows) >= LEAST_TRIED and weights.dtype == torch.float32
    autocast = scoring.try_bfloat16(tried and faster_in_bfloat16(weights.device))
    mixed = scoring.measure(batches, autocast, label).score
    if autocast and not rank_correlation(alone, mixed) >= SAFE:
        autocast, mixed = False, scoring.measure(batches, False, label).score
    return autocast, mixed


@dataclass(frozen=True)
class Pass:
    """A pass of rows, as tokens, through the recorder.

    Attributes:
        record: the recorder of the model.
        prepared: the rows.
        args: as for `score_dataset`.
        budget: the tokens of a batch, padding included.
        parts: where to save results, and to resume from.
    """

    record: Recorder
    prepared: PreparedRows
    args: TrainingArguments
    budget: int
    parts: Parts | None = None

    def try_sharing(self) -> None:
        """Find out on the longest row whether rows with the same first tokens may share their computation."""
        longest = int(self.prepared.lengths.argmax())
        self.record.try_sharing(collate(self.prepared, [longest], self._device))

    def try_bfloat16(self, faster: bool) -> bool:
        """Whether to try bfloat16: as an interrupted pass did, or else if it is faster."""
        if self.parts is None:
            return faster
        path = self.parts.folder / FORWARD

        def noted() -> bool:
            if not path.exists():
                with replacing(path) as temporary:
                    temporary.write_text(json.dumps(faster))
            return bool(read_json(path, f"Remove '{path.parent}': its rows are measured again."))

        found: bool = from_main(noted)
        return found

    def measure_all(self, autocast: bool) -> Resonance:
        """Measure every row, in the order of the prepared rows."""
        batches = arrange(self.prepared, self.budget, self._device, self.record.may_share)
        measured = self.measure(batches, autocast, "Scoring")
        return measured.take(np.argsort(np.concatenate([batch.rows for batch in batches]), kind="stable"))

    def split(self, rows: np.ndarray) -> list[Batch]:
        """Batches of some rows, in this order, of a size that the longest of these rows allows."""
        size = max(self.budget // int(self.prepared.lengths[rows].max()), 1)
        return [self.batch(rows[start : start + size]) for start in range(0, len(rows), size)]

    def measure_alone(self, rows: np.ndarray, whole: bool) -> np.ndarray:
        """The scores of some rows, each in a batch of its own, without autocast; if `whole`, with float32 weights."""
        batches = [self.batch(row) for row in rows[:, None]]
        if not whole:
            return self.measure(batches, False, "Scoring some alone").score
        with in_float32(self.record.model), Recorder(self.record.model, self.record.config) as record:
            return replace(self, record=record).measure(batches, False, "Scoring some alone in float32").score

    def batch(self, rows: np.ndarray) -> Batch:
        """A batch whose rows share nothing with other batches."""
        return Batch(rows, 0, int(padded_tokens(self.prepared.lengths, [rows])[0]))

    def measure(self, batches: Sequence[Batch], autocast: bool, label: str) -> Resonance:
        """Measure the rows of all batches, in the batches' order. Every process takes a share and gets all results."""
        rows, costs = [batch.rows for batch in batches], np.array([batch.cost for batch in batches])
        name = f"{label.lower().replace(' ', '-')}-{'bfloat16' if autocast else 'float32'}"
        parts = None if self.parts is None else replace(self.parts, folder=self.parts.folder / name)
        store = None if parts is None else parts.store(self.prepared.sample_ids, rows)

        def of_batch(number: int) -> dict[str, Any]:
            found = self._measure_batch(*batches[number][:2])
            layers = dict(zip(self._layer_names, found.layers.T, strict=True))
            return {"loss": found.loss, "num_tokens": found.num_tokens, **layers, **found.signals}

        with bfloat16_forward(self.record.model, autocast, aside=self.record.parameters):
            found = measure_batches(rows, costs, of_batch, self.args, label, store, group_of(self.record.model))
        self.record.forget()  # what it cached is of this precision
        layers = np.stack([found[name].to_numpy() for name in self._layer_names], axis=1)
        signals = {name: found[name].to_numpy() for name in self.record.signals}
        return Resonance(found["loss"].to_numpy(), found["num_tokens"].to_numpy(), layers, signals)

    @property
    def _device(self) -> torch.device:
        return next(self.record.model.parameters()).device

    @property
    def _layer_names(self) -> list[str]:
        return [f"{LAYER}{layer}" for layer in self.record.layer_indices]

    def _measure_batch(self, rows: np.ndarray, shared: int) -> Resonance:
        """Measure a batch; in two halves, one after the other, where the device has too little memory."""
        measured = None
        try:
            measured = self.record(collate(self.prepared, rows, self._device), shared)
        except torch.OutOfMemoryError:
            if len(rows) == 1 or self.record.in_step:  # else all processes would have to halve theirs
                raise
        if measured is None:  # not in the except clause, where the error still refers to the batch's tensors
            self.record.forget()
            torch.cuda.empty_cache()
            half = len(rows) // 2
            halves = [self._measure_batch(rows[:half], shared), self._measure_batch(rows[half:], shared)]
            return Resonance.joined(halves)
        broken = ~(np.isfinite(measured.loss) & np.isfinite(measured.score))
        if broken.any():
            first = int(np.flatnonzero(broken)[0])
            raise NotFiniteError(
                f"Row {self.prepared.sample_ids[rows[first]]} of the dataset has loss {measured.loss[first]} and score "
                f"{measured.score[first]}: no scores were written. Are the weights sound? Try float32, or drop the row."
            )
        return measured


def faster_in_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices clearly faster than float32 ones.

    It is timed, as no flag tells; every process uses the first one's timing.
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
