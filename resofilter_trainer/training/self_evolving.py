"""Self-evolving token cleaning in stages: every part is cleaned by what the parts before it have taught.

    part 0: train on all tokens -> part t: clean by base against latest -> train the latest on it -> ...

Token Cleaning (arXiv 2502.01968, section 3.3). Each stage is a training of its own, with its own schedule; LoRA is
merged between stages. In one run, without stages, `ResonanceCallback(token_cleaning=...)` does it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import InputError, TokenCleaning
from ..data.fingerprints import identity
from ..data.loading import load_weights, placed
from ..data.preparation import ROW, PreparedRows
from ..io.store import PARTS, remove_parts
from ..scores.token_scores import TokenScores
from ..scoring.passes import held
from ..selecting.token_selection import EMPTIED, TokenSelection, TokenSelector
from ..tokens.cleaned_dataset import SAMPLE_ID, check_output, mask_labels, save_dataset, summarise
from ..tokens.cleaning import TOKENS, CleaningTask, against, open_task, score_tokens
from .stages import check_settings, save_model, train_stage, training_settings

STAGES_FILE = "stages.json"


@dataclass(frozen=True)
class Stage:
    """One part of the data.

    Attributes:
        dataset: what was trained on: `input_ids`, `labels` and `sample_id`.
        selection: of its tokens; None for the first part, which is learnt whole.
        summary: in numbers; `share_of_groups` shows which groups lose out from stage to stage.
    """

    dataset: Dataset
    selection: TokenSelection | None
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Evolved:
    """What self-evolving cleaning leaves.

    Attributes:
        model: the last one.
        dataset: all parts as they were trained on.
        stages: one for each part.
        reasons: why the user's other rows are not in the dataset, by place.
        summary: the stages in numbers, as in `summary.json`.
    """

    model: PreTrainedModel
    dataset: Dataset
    stages: list[Stage]
    reasons: Mapping[int, str]
    summary: Mapping[str, Any]


def self_evolve(
    model: str | PreTrainedModel,
    dataset: Dataset,
    cleaning: TokenCleaning,
    args: SFTConfig,
    processing_class: PreTrainedTokenizerBase | None = None,
    peft_config: PeftConfig | None = None,
    **row_options: Any,
) -> Evolved:
    """Clean and train in turns.

    Args:
        model: the base model, or its name or folder, which is then loaded in float32. One that is passed is trained.
        dataset: rows as for `score_dataset`; parts are equal, contiguous blocks of it.
        cleaning: how many parts, how much is kept and how it is ranked.
        args: of every stage's training; `output_dir` is for everything: `stage-t/` with token scores and model, the
            cleaned dataset (`datasets.load_from_disk`) and `summary.json`. The paper trains one epoch per
            stage, unshuffled: `train_sampling_strategy="sequential"`.
        processing_class: the tokenizer; the model's own by default.
        peft_config: train a fresh adapter in every stage and merge it at its end; by default all weights are trained.
        **row_options: `drop_duplicates`, `drop_empty`, `source` and the columns, as for `score_dataset`.

    A run that was interrupted goes on after the last stage that was finished.

    Raises:
        InputError: there are fewer rows than parts, or `output_dir` holds stages of something else.
    """
    check_output(Path(str(args.output_dir)), STAGES_FILE)
    base, task = open_task(model, dataset, cleaning, processing_class, args, args.output_dir, **row_options)
    if not 0 < args.learning_rate < math.inf:
        raise InputError(f"learning_rate must be above 0 and finite, got {args.learning_rate}.")
    rows = np.arange(len(task.prepared.lengths))
    if len(rows) < cleaning.parts:
        raise InputError(
            f"{len(rows)} rows have tokens to learn, too few for parts={cleaning.parts}: choose fewer parts."
        )
    parts = [task.prepared.select(part) for part in np.array_split(rows, cleaning.parts)]
    for part in parts[1:]:
        TokenSelector(cleaning.keep, cleaning.ranking).check(part.num_tokens)
    evolution = _Evolution(task, args, peft_config, Path(str(args.output_dir)))
    with held(evolution.folder):
        return _evolve(evolution, base, parts)


def _evolve(evolution: _Evolution, base: PreTrainedModel, parts: list[PreparedRows]) -> Evolved:
    """Stage after stage; those that are done are read."""
    task, cleaning = evolution.task, evolution.task.cleaning
    evolution.check()
    losses = evolution.base_losses(base, parts)
    stages, reasons = [], dict(task.reasons)
    latest = base
    del base  # of which a run that goes on needs the losses only
    for number, (part, base_losses) in enumerate(zip(parts, losses, strict=True)):
        stage = evolution.clean(number, part, base_losses, latest)
        latest = evolution.train(number, stage, latest)
        stages.append(stage)
        if stage.selection is not None:
            reasons |= {int(row): EMPTIED for row in stage.selection.scores.sample_id[stage.selection.emptied]}
    summary = {
        "keep_tokens": cleaning.keep,
        "ranking": cleaning.ranking,
        "stages": [{"stage": number, **stage.summary} for number, stage in enumerate(stages)],
    }
    evolved = Evolved(latest, concatenate_datasets([stage.dataset for stage in stages]), stages, reasons, summary)
    evolution.finish(evolved)
    return evolved


@dataclass(frozen=True)
class _Evolution:
    """The stages of one run and the folder they lie in."""

    task: CleaningTask
    args: SFTConfig
    peft_config: PeftConfig | None
    folder: Path

    def check(self) -> None:
        """Raise InputError where the folder holds stages of other data or settings; else write these down."""
        settings = {
            "base model, dataset or preparation of the rows": self.task.provenance.key,
            "token cleaning": {**dataclasses.asdict(self.task.cleaning), "group_by": None},  # changes no stage
        }
        check_settings(self.folder / STAGES_FILE, settings | training_settings(self.args, self.peft_config))

    def base_losses(self, base: PreTrainedModel, parts: list[PreparedRows]) -> list[np.ndarray]:
        """The base model's, of every part but the first, which needs none; measured once."""
        if all(self._is_done(number) for number in range(len(parts))):
            return [np.empty(0)] * len(parts)
        cleaned = self.task.prepared.select(np.arange(len(parts[0].lengths), len(self.task.prepared.lengths)))
        losses = self.task.losses(base, "base", cleaned, self.task.provenance)
        return [np.empty(0), *np.split(losses, np.cumsum([part.num_tokens.sum() for part in parts[1:]])[:-1])]

    def clean(self, number: int, part: PreparedRows, base_losses: np.ndarray, latest: PreTrainedModel) -> Stage:
        """Mask a part by the latest model, unless it is the first; scores of a stage that is done are read."""
        if number == 0:
            tokens = int(part.num_tokens.sum())
            summary = {"tokens": tokens, "tokens_kept": tokens, "rows": len(part.lengths), "rows_emptied": []}
            groups = self.task.groups_of(part.sample_ids)
            if groups is not None:
                summary["share_of_groups"] = dict.fromkeys(map(str, groups), 1.0)
            return Stage(part.dataset.rename_column(ROW, SAMPLE_ID), None, summary)
        path = self._stage(number)
        if self._is_done(number):
            scores = TokenScores.load(path)
        else:
            provenance = against(self.task.provenance, identity(latest))
            losses = self.task.losses(latest, f"stage-{number}", part, provenance)
            scores = score_tokens(part, base_losses, losses, provenance)
            if PartialState().is_main_process:
                scores.save(path)
        selection = TokenSelector(self.task.cleaning.keep, self.task.cleaning.ranking).select(scores)
        summary = summarise(selection, self.task.tokenizer, self.task.groups_of(scores.sample_id))
        return Stage(mask_labels(part.dataset, selection), selection, summary)

    def train(self, number: int, stage: Stage, latest: PreTrainedModel) -> PreTrainedModel:
        """The latest model after this stage."""
        folder = self._stage(number) / "model"
        if self._is_done(number):
            return latest if self._is_done(number + 1) else placed(load_weights(str(folder), self.args), self.args)
        numbers, tokenizer = {"stage": number, **stage.summary}, self.task.tokenizer
        trained = train_stage(latest, stage.dataset, self.args, tokenizer, self.peft_config, folder.parent, numbers)
        save_model(trained, self.task.tokenizer, folder)
        return trained

    def finish(self, evolved: Evolved) -> None:
        """Write the dataset and the summary of the stages."""
        if not PartialState().is_main_process:
            return
        summary = {**evolved.summary, "rows_left_out": len(evolved.reasons)}
        save_dataset(evolved.dataset, summary, self.folder)
        remove_parts(self.folder / PARTS / TOKENS)

    def _is_done(self, number: int) -> bool:
        return (self._stage(number) / "model").is_dir()

    def _stage(self, number: int) -> Path:
        return self.folder / f"stage-{number}"
