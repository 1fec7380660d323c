"""Self-evolving token cleaning in stages: each stage is cleaned by the model that the stages before it have trained.

    stage 0: train on all tokens -> stage t: clean by base against latest -> train the latest on it -> ...

Token Cleaning (arXiv 2502.01968, section 3.3). Each stage is a training of its own, with its own schedule; a LoRA
adapter is merged at its end. `ResonanceCallback(token_cleaning=...)` does the same within one run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import InputError, TokenCleaning, check_kind, number
from ..config.keywords import RowOptions
from ..data.arguments import check_call
from ..data.loading import load_weights, placed
from ..data.preparation import PreparedRows
from ..data.surveys import ROW_POSITION
from ..io.files import read_json
from ..scores.token_scores import TokenScores
from ..scoring.passes import locked
from ..selecting.token_selection import EMPTIED, TokenSelection
from ..tokens.cleaned_dataset import SAMPLE_ID, check_output, mask_labels, save_dataset, summarise
from ..tokens.cleaning import CleaningTask, open_task
from ..tokens.losses import against, remove_loss_parts, score_tokens
from .fine_tuning import check_settings, fine_tune, save_model, training_settings

STAGES_FILE = "stages.json"
MADE_OF = "base model, dataset or preparation of the rows"  # a name in it
NOT_MEASURED = np.empty(0, dtype=np.float32)


@dataclass(frozen=True)
class Stage:
    """One stage of the data.

    Attributes:
        dataset: the rows that were trained on: `input_ids`, `labels` and `sample_id`.
        selection: the decision on its tokens; None for the first stage, which keeps all of them.
        summary: what was kept, in numbers; `share_of_groups` shows which groups lose out from stage to stage.
    """

    dataset: Dataset
    selection: TokenSelection | None
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Evolved:
    """The results of self-evolving cleaning.

    Attributes:
        model: the model after the last stage.
        dataset: the rows of all stages as they were trained on.
        stages: the stages, in order.
        reasons: why each of the user's other rows is left out, by position.
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
    **row_options: Unpack[RowOptions],
) -> Evolved:
    """Clean and train, stage after stage.

    Args:
        model: the base model, or its name or folder, which is then loaded in float32. A loaded model is trained in
            place.
        dataset: rows as for `score_dataset`; stages are contiguous blocks of it, of equal size.
        cleaning: the number of stages (`parts`), the share of tokens to keep and their ranking.
        args: SFTTrainer's arguments for every stage. `output_dir` receives everything: `stage-t/` with token scores
            and model, the cleaned dataset (`datasets.load_from_disk`) and `summary.json`. The paper trains one epoch
            per stage, unshuffled: `train_sampling_strategy="sequential"`. Before transformers 5.2, set the attribute
            instead: `args.train_sampling_strategy = "sequential"`.
        processing_class: the tokenizer; by default the model's own.
        peft_config: an adapter to train anew in every stage and to merge at its end; by default all weights are
            trained.
        **row_options: `drop_duplicates`, `drop_empty`, `source` and the columns, as for `score_dataset`.

    An interrupted run resumes after the last complete stage.

    Raises:
        InputError: there are fewer rows than stages, or `output_dir` holds stages made from something else.
    """
    check_call(self_evolve, row_options, model, processing_class, args)
    check_kind("args", args, SFTConfig, "an SFTConfig")
    check_kind("cleaning", cleaning, TokenCleaning, "a TokenCleaning")
    folder = Path(str(args.output_dir))
    check_output(folder, STAGES_FILE)
    latest, task = open_task(model, dataset, cleaning, processing_class, args, folder, **row_options)
    number("learning_rate", args.learning_rate, above=0)
    evolution = _Evolution(task, args, peft_config, folder, _divided(task))
    with locked(folder):
        evolution.check()
        base_losses = evolution.base_losses(latest)
        stages: list[Stage] = []
        for index, losses in enumerate(base_losses):
            stages.append(evolution.clean(index, losses, latest))
            latest = evolution.train(index, stages[index], latest)
        return evolution.finish(latest, stages)


@dataclass(frozen=True)
class _Evolution:
    """The stages of one run, and their folder.

    Attributes:
        task, args, peft_config: the rows, and how they are cleaned and trained on.
        folder: the output folder.
        rows: the rows of each stage.
    """

    task: CleaningTask
    args: SFTConfig
    peft_config: PeftConfig | None
    folder: Path
    rows: list[PreparedRows]

    def check(self) -> None:
        """Record the settings, or raise InputError where the folder holds stages of other data or settings."""
        here = self.task.opened.provenance_like(self._rows_there())
        settings = {
            MADE_OF: here.key,
            "token cleaning": {**dataclasses.asdict(self.task.cleaning), "group_by": None},  # changes no stage
        }
        check_settings(self.folder / STAGES_FILE, settings | training_settings(self.args, self.peft_config))

    def _rows_there(self) -> str:
        """The fingerprint of the rows of the stages that are there; of these rows where there are none."""
        with contextlib.suppress(FileNotFoundError, InputError, LookupError, TypeError, ValueError):  # refused later
            return str(json.loads(read_json(self.folder / STAGES_FILE, "")[MADE_OF])["dataset"])
        return self.task.opened.provenance.dataset

    def base_losses(self, base: PreTrainedModel) -> list[np.ndarray]:
        """The base model's losses for each stage, measured in one pass. The first stage needs none."""
        first, *others = self.rows
        if all(self._is_done(stage) for stage in range(len(self.rows))):
            return [NOT_MEASURED] * len(self.rows)
        opened = self.task.opened
        to_measure = opened.prepared.select(np.arange(len(first.lengths), len(opened.prepared.lengths)))
        losses = self.task.losses(base, "base", to_measure, opened.provenance)
        return [NOT_MEASURED, *np.split(losses, np.cumsum([rows.num_tokens.sum() for rows in others])[:-1])]

    def clean(self, stage: int, base_losses: np.ndarray, latest: PreTrainedModel) -> Stage:
        """Mask the tokens of a stage by the latest model. The first stage keeps all; complete stages are loaded."""
        rows, path = self.rows[stage], self._path(stage)
        if stage == 0:
            return self._uncleaned(rows)
        if self._is_done(stage):
            scores = TokenScores.load(path)
        else:
            provenance = against(self.task.opened.provenance, latest)
            losses = self.task.losses(latest, f"stage-{stage}", rows, provenance)
            scores = score_tokens(rows, base_losses, losses, provenance)
            if PartialState().is_main_process:
                scores.save(path)
        selection = self.task.selector.select(scores)
        summary = summarise(selection, self.task.opened.tokenizer, self.task.groups_of(scores.sample_id))
        return Stage(mask_labels(rows.dataset, selection), selection, summary)

    def train(self, stage: int, cleaned: Stage, latest: PreTrainedModel) -> PreTrainedModel:
        """The latest model after a stage; of complete stages only the last is loaded."""
        folder, tokenizer = self._path(stage) / "model", self.task.opened.tokenizer
        if self._is_done(stage):
            return latest if self._is_done(stage + 1) else placed(load_weights(str(folder), self.args), self.args)
        kept_tokens = {"stage": stage, **cleaned.summary}
        trained = fine_tune(latest, cleaned.dataset, self.args, tokenizer, self.peft_config, folder.parent, kept_tokens)
        save_model(trained, tokenizer, folder)
        return trained

    def finish(self, model: PreTrainedModel, stages: list[Stage]) -> Evolved:
        """Put the stages together, and write their dataset and summary."""
        reasons = dict(self.task.opened.reasons)
        for selection in [stage.selection for stage in stages if stage.selection is not None]:
            reasons |= {int(row): EMPTIED for row in selection.scores.sample_id[selection.emptied]}
        summary = {
            "keep_tokens": self.task.cleaning.keep,
            "ranking": self.task.cleaning.ranking,
            "stages": [{"stage": index, **stage.summary} for index, stage in enumerate(stages)],
        }
        evolved = Evolved(model, concatenate_datasets([stage.dataset for stage in stages]), stages, reasons, summary)
        if PartialState().is_main_process:
            save_dataset(evolved.dataset, {**summary, "rows_left_out": len(reasons)}, self.folder)
            remove_loss_parts(self.folder)
        return evolved

    def _uncleaned(self, rows: PreparedRows) -> Stage:
        """A stage that keeps all its tokens."""
        tokens = int(rows.num_tokens.sum())
        summary = {"tokens": tokens, "tokens_kept": tokens, "rows": len(rows.lengths), "rows_emptied": []}
        groups = self.task.groups_of(rows.sample_ids)
        if groups is not None:
            summary["share_of_groups"] = dict.fromkeys(map(str, groups), 1.0)
        return Stage(rows.dataset.rename_column(ROW_POSITION, SAMPLE_ID), None, summary)

    def _is_done(self, stage: int) -> bool:
        return (self._path(stage) / "model").is_dir()

    def _path(self, stage: int) -> Path:
        return self.folder / f"stage-{stage}"


def _divided(task: CleaningTask) -> list[PreparedRows]:
    """The rows of each stage. Raises InputError where there are too few rows, or a stage would keep no token."""
    rows, parts = task.opened.prepared, task.cleaning.parts
    if len(rows.lengths) < parts:
        raise InputError(
            f"{len(rows.lengths)} rows have tokens to learn, too few for parts={parts}: choose fewer parts."
        )
    stages = [rows.select(block) for block in np.array_split(np.arange(len(rows.lengths)), parts)]
    for stage in stages[1:]:
        task.selector.check(stage.num_tokens)
    return stages
