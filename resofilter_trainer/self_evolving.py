"""Self-evolving token cleaning in stages: every part is cleaned by what the parts before it have taught.

    part 0: train on all tokens -> part t: clean by base against latest -> train the latest on it -> ...

Token Cleaning (arXiv 2502.01968, section 3.3). Each stage is a training of its own, with its own schedule; LoRA is
merged between stages. In one run, without stages, `ResonanceCallback(token_cleaning=...)` does it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from .cleaned_dataset import EMPTIED, SAMPLE_ID, check_output, mask_labels, save_dataset, summarise
from .config import InputError, TokenCleaning
from .preparation import ROW, PreparedRows
from .provenance import hash_weights
from .token_cleaning import PARTS, CleaningTask, against, open_task, score_tokens
from .token_scores import TokenScores
from .token_selection import TokenSelection, TokenSelector

STAGES_FILE = "stages.json"
TRAINING = (  # those of SFTConfig's settings on which the weights depend
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "optim", "seed", "data_seed", "train_sampling_strategy", "bf16", "packing", "padding_free", "loss_type",
)  # fmt: skip


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
    rows = np.arange(len(task.prepared.lengths))
    if len(rows) < cleaning.parts:
        raise InputError(
            f"{len(rows)} rows have tokens to learn, too few for parts={cleaning.parts}: choose fewer parts."
        )
    parts = [task.prepared.select(part) for part in np.array_split(rows, cleaning.parts)]
    for part in parts[1:]:
        TokenSelector(cleaning.keep, cleaning.ranking).check(part.num_tokens)
    evolution = _Evolution(task, args, peft_config, Path(str(args.output_dir)))
    cleaned = {name: value for name, value in dataclasses.asdict(cleaning).items() if name != "group_by"}
    settings = {"base model, dataset or preparation of the rows": task.provenance.key, "token cleaning": cleaned}
    check_settings(evolution.folder / STAGES_FILE, settings | training_settings(args, peft_config))
    losses = evolution.base_losses(base, parts)
    stages, reasons = [], dict(task.reasons)
    latest = base
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

    def base_losses(self, base: PreTrainedModel, parts: list[PreparedRows]) -> list[np.ndarray]:
        """The base model's, of every part but the first, which needs none; measured once."""
        cleaned = self.task.prepared.select(np.arange(len(parts[0].lengths), len(self.task.prepared.lengths)))
        if all(self._is_done(number) for number in range(len(parts))):
            return [np.empty(0)] * len(parts)
        losses = self.task.losses(base, "base", cleaned, self.task.provenance)
        return [np.empty(0), *np.split(losses, np.cumsum([part.num_tokens.sum() for part in parts[1:]])[:-1])]

    def clean(self, number: int, part: PreparedRows, base_losses: np.ndarray, latest: PreTrainedModel) -> Stage:
        """Mask a part by the latest model, unless it is the first; scores of a stage that is done are read."""
        if number == 0:
            tokens = int(part.num_tokens.sum())
            summary = {"tokens": tokens, "tokens_kept": tokens, "rows": len(part.lengths), "rows_emptied": []}
            return Stage(part.dataset.rename_column(ROW, SAMPLE_ID), None, summary)
        path = self._stage(number)
        if self._is_done(number):
            scores = TokenScores.load(path)
        else:
            provenance = against(self.task.provenance, hash_weights(latest))
            losses = self.task.losses(latest, f"stage-{number}", part, provenance)
            scores = score_tokens(part, base_losses, losses, provenance)
            if PartialState().is_main_process:
                scores.save(path)
        selection = TokenSelector(self.task.cleaning.keep, self.task.cleaning.ranking).select(scores)
        summary = summarise(selection, self.task.tokenizer, self.task.groups_of(scores))
        return Stage(mask_labels(part.dataset, selection), selection, summary)

    def train(self, number: int, stage: Stage, latest: PreTrainedModel) -> PreTrainedModel:
        """The latest model after this stage."""
        folder = self._stage(number) / "model"
        if self._is_done(number):
            return latest if self._is_done(number + 1) else self._load(folder, latest)
        trained = train_stage(latest, stage.dataset, self.args, self.task.tokenizer, self.peft_config, folder.parent)
        save_model(trained, self.task.tokenizer, folder)
        return trained

    def finish(self, evolved: Evolved) -> None:
        """Write the dataset and the summary of the stages."""
        if not PartialState().is_main_process:
            return
        summary = {**evolved.summary, "rows_left_out": len(evolved.reasons)}
        save_dataset(evolved.dataset, summary, self.folder)
        shutil.rmtree(self.folder / PARTS, ignore_errors=True)

    def _load(self, folder: Path, like: PreTrainedModel) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=like.dtype)
        return model.to(self.args.device)

    def _is_done(self, number: int) -> bool:
        return (self._stage(number) / "model").is_dir()

    def _stage(self, number: int) -> Path:
        return self.folder / f"stage-{number}"


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write down with what settings something was made; raise InputError where it was made with others.

    Args:
        path: a JSON file beside what is made.
        settings: by the names that people know them by.
    """
    mine = json.loads(json.dumps(settings, default=lambda each: sorted(each) if isinstance(each, set) else str(each)))
    if path.exists():
        theirs = json.loads(path.read_text())
        names = [name for name in mine if mine[name] != theirs.get(name)]
        if names:
            raise InputError(
                f"What lies in '{path.parent}' was made with other settings: {', '.join(names)}. Choose another "
                "output_dir, or remove that one."
            )
    elif PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(mine, indent=2))
        os.replace(part, path)


def training_settings(args: SFTConfig, peft_config: PeftConfig | None) -> dict[str, Any]:
    """What a training's weights depend on, beside its model and rows."""
    return {
        "training": {name: getattr(args, name) for name in TRAINING},
        "LoRA": None if peft_config is None else peft_config.to_dict(),
    }


def train_stage(
    model: PreTrainedModel,
    rows: Dataset,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None,
    output: Path,
) -> PreTrainedModel:
    """Train with SFTTrainer on rows that are tokens already, with a schedule of its own; LoRA is merged at the end."""
    args = copy.copy(args)
    args.output_dir, args.model_init_kwargs = str(output), None  # the model is there already
    trainer = SFTTrainer(
        model, args, train_dataset=rows, processing_class=tokenizer, peft_config=copy.deepcopy(peft_config)
    )  # PEFT fills it in
    trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    return trained.merge_and_unload() if isinstance(trained, PeftModel) else trained


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write both beside the target, then rename: the folder is whole or not there."""
    if PartialState().is_main_process:
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        try:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    PartialState().wait_for_everyone()
