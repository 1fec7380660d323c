"""A warm-up before a pass: which rows it tunes on, what its weights are made from, and where they are kept.

    the user's model -> copy -> SFTTrainer on some rows -> tuned weights ==kept in a folder==> a copy that is scored

Scores after a warm-up are those of the model and this recipe, so that they are known again without tuning again. Knows
rows, files and processes; the training is in `tuning`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from accelerate import PartialState
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from ..config import ColumnMapping, InputError, NotFiniteError, Warmup, check_kind, warmup_settings
from ..data.fingerprints import add_tensor
from ..data.loading import Opened, check_model, usable_rows
from ..data.preparation import PreparedRows, prepare
from ..data.surveys import row_hashes, survey
from ..io.files import remove_folder, replacing
from ..io.made_from import as_json, check_made_from
from ..scores.provenance import Provenance
from ..scores.score_table import WARMED_UP
from .output import Measured
from .passes import from_main, locked
from .tuning import Tuning, check_tunable, checkpoints, copied, read_mark, trained_names, with_weights

FOLDER = "warmup"  # beside the scores
WEIGHTS = "tuned.safetensors"
TRAINING = "training"  # the Trainer's own files, until the weights are there
COLUMN_FIELDS = {
    "unit": "1 or 0",
    "formula": "whether the warm-up has learnt the same tokens, so that their loss and gradient are smaller",
}


@dataclass(frozen=True)
class WarmupPlan:
    """A warm-up of which everything is known but the tuned weights.

    Attributes:
        settings: how to tune.
        rows: the rows to tune on.
        tokenizer: the model's tokenizer.
        args: as for `score_dataset`.
        trained: which weights are tuned: `"all"`, those of a new adapter too, or a hash of their names.
    """

    settings: Warmup
    rows: PreparedRows
    tokenizer: PreTrainedTokenizerBase
    args: SFTConfig
    trained: str

    @classmethod
    def of(
        cls,
        settings: Warmup,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: SFTConfig,
        prepared: PreparedRows,
        what: str,
    ) -> WarmupPlan:
        """The warm-up of a model on some of its rows.

        Args:
            settings, model, tokenizer, args: as for the attributes.
            prepared: the rows to draw from.
            what: where they come from, for an error.

        Raises:
            InputError: the model cannot be tuned, or there are fewer rows than the warm-up needs.
        """
        check_tunable(model, settings, args)
        names = trained_names(model, settings)
        whole = len(names) in (0, len(list(model.parameters())))
        trained = "all" if whole else xxhash.xxh3_128_hexdigest("\n".join(names).encode())
        return cls(settings, drawn(prepared, settings, what), tokenizer, args, trained)

    @property
    def recipe(self) -> dict[str, Any]:
        """What scores depend on besides the model and their own rows, by name."""
        own = {
            **self.settings.to_json(),
            "rows": len(self.rows.lengths),
            "bf16": bool(self.args.bf16),
            "trained": self.trained,
        }
        own["tokens"] = survey(self.rows.dataset.select_columns(["input_ids", "labels"]))[3]
        return {f"warmup_{name}": value for name, value in own.items()}

    def told(self, provenance: Provenance) -> Provenance:
        """The provenance of a pass, with the recipe."""
        return dataclasses.replace(provenance, config={**provenance.config, **self.recipe})

    def described(self, opened: Opened) -> Opened:
        """The opened pass, with the recipe in its provenance."""
        return dataclasses.replace(opened, provenance=self.told(opened.provenance))

    def warmed(
        self, model: PreTrainedModel, provenance: Provenance, folder: Path | None, in_place: bool = False
    ) -> tuple[PreTrainedModel, Provenance]:
        """The tuned model, and the provenance with the cost of tuning it.

        The tuned weights are read where they are kept, or an interrupted warm-up resumes.

        Args:
            model: the model.
            provenance: the provenance of the scores, by which the model is known.
            folder: the folder of the scores, beside which the weights are kept; None to keep them nowhere, unless
                the settings name a folder.
            in_place: whether the model itself may be changed; else its copy is.

        Raises:
            InputError: the model cannot be tuned, or the folder holds a warm-up of something else.
        """
        kept = self.settings.cache or (None if folder is None else folder / FOLDER)
        made_from = _made_from(provenance, self.recipe)
        with contextlib.ExitStack() as stack:
            if kept is None:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                place = Path(kept)
                stack.enter_context(locked(place))
            found = None if kept is None else _read(place, made_from)
            weights, cost = found or self._tuned(model, place, made_from, kept is not None)
        tuned = with_weights(model if in_place else copied(model), self.settings, weights)
        return tuned, dataclasses.replace(provenance, warmup=cost)

    def marked(self, measured: Measured, prepared: PreparedRows) -> Measured:
        """What was measured, with a column that tells which rows the warm-up has learnt.

        Args:
            measured: what was measured.
            prepared: the rows of the pass.
        """
        seen = np.isin(row_hashes(prepared.dataset), row_hashes(self.rows.dataset)).astype(np.int64)
        seen = seen if measured.rows is None else seen[measured.rows]
        columns, fields = {**measured.columns, WARMED_UP: seen}, {**measured.fields, WARMED_UP: COLUMN_FIELDS}
        return dataclasses.replace(measured, columns=columns, fields=fields)

    def _tuned(
        self, model: PreTrainedModel, place: Path, made_from: Mapping[str, Any], keep: bool
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tune, resume where there is a checkpoint, and keep the weights in its place."""
        checkpoint = from_main(lambda: _checkpoint(place, made_from)) if keep else None
        before = 0.0 if checkpoint is None else read_mark(checkpoint)["seconds"]
        tuning = Tuning(self.settings, self.rows.dataset, self.tokenizer, self.args, made_from)
        start = time.perf_counter()
        try:
            weights = tuning.run(model, place / TRAINING, checkpoint, keep)
        except NotFiniteError:  # it would end so every time
            if PartialState().is_main_process:
                remove_folder(place / TRAINING)
            raise
        cost = {
            "rows": len(self.rows.lengths),
            "tokens": int(self.rows.lengths.sum()) * self.settings.epochs,
            "steps": tuning.steps,
            "seconds": round(before + time.perf_counter() - start, 1),
            "processes": PartialState().num_processes,
            "weights": _hash(weights),
        }
        if keep:
            if PartialState().is_main_process:
                _write(place, weights, made_from, cost)
            PartialState().wait_for_everyone()
        return weights, cost


def plan_warmup(
    warmup: int | Warmup | None,
    warmup_dataset: Dataset | None,
    model: PreTrainedModel,
    opened: Opened,
    args: SFTConfig,
    options: Mapping[str, Any],
) -> WarmupPlan | None:
    """The warm-up of an opened pass; None for none.

    Args:
        warmup, warmup_dataset: as for `score_dataset`.
        model: the model.
        opened: the rows of the pass.
        args: as for `score_dataset`.
        options: how the rows of the pass were read, as `score_dataset` takes it: columns, `drop_duplicates`,
            `drop_empty`.

    Raises:
        InputError: the model cannot be tuned, or there are fewer rows than the warm-up needs.
    """
    settings = warmup_settings(warmup, warmup_dataset is not None)
    if settings is None:
        return None
    prepared, what = opened.prepared, "the rows to score"
    if warmup_dataset is not None:
        prepared, what = _prepared(warmup_dataset, model, opened.tokenizer, args, options), "warmup_dataset"
    return WarmupPlan.of(settings, model, opened.tokenizer, args, prepared, what)


def kept_at(
    warmup: int | Warmup | None, warmup_dataset: Dataset | None, output: str | os.PathLike[str] | None
) -> Warmup | None:
    """The settings of a warm-up that several passes share, each in a folder within `output`; None for none."""
    settings = warmup_settings(warmup, warmup_dataset is not None)
    if settings is None or settings.cache is not None or output is None:
        return settings
    return dataclasses.replace(settings, cache=Path(output) / FOLDER)


def drawn(prepared: PreparedRows, settings: Warmup, what: str) -> PreparedRows:
    """The rows of a warm-up, in their order.

    Args:
        prepared: the rows to draw from.
        settings: how many, and the seed.
        what: where they come from, for the error.

    Raises:
        InputError: there are fewer than the warm-up needs.
    """
    usable = np.flatnonzero(prepared.num_tokens > 0)
    count = len(usable) if settings.rows is None else settings.rows
    if not 0 < count <= len(usable):
        raise InputError(
            f"The warm-up needs {max(count, 1)} rows, and {len(usable)} of {what} can be learnt: ask for fewer, or "
            "choose another dataset for it."
        )
    return prepared.select(np.sort(np.random.default_rng(settings.seed).permutation(usable)[:count]))


def _prepared(
    dataset: Dataset,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    options: Mapping[str, Any],
) -> PreparedRows:
    """The usable rows of a dataset as tokens, read as those of the pass."""
    check_kind("warmup_dataset", dataset, Dataset, "a datasets.Dataset")
    columns = {each.name: options[each.name] for each in dataclasses.fields(ColumnMapping) if each.name in options}
    duplicates, empty = bool(options.get("drop_duplicates")), bool(options.get("drop_empty"))
    try:
        rows, _ = usable_rows(dataset, ColumnMapping(**columns), args, duplicates, empty)
        prepared = prepare(rows, tokenizer, args, empty)
        check_model(model, prepared)
    except InputError as error:
        raise InputError(f"In the warm-up's dataset: {error}") from error
    return prepared


def _made_from(provenance: Provenance, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What tuned weights depend on: the model, how it computes, the recipe and the versions."""
    model = {name: provenance.preparation[name] for name in ("model_config", "attention", "dtype")}
    return as_json({"weights": provenance.weights, **model, **recipe, **provenance.versions})


def _hash(weights: Mapping[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(weights):
        add_tensor(digest, name, weights[name])
    return digest.hexdigest()


def _check(place: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    remedy = "Choose another output, or remove that folder."
    check_made_from(there, here, f"'{place}' holds a warm-up", remedy)


def _checkpoint(place: Path, made_from: Mapping[str, Any]) -> Path | None:
    """The latest checkpoint of an interrupted warm-up. Raises InputError where it is one of something else."""
    complete = checkpoints(place / TRAINING)
    for each in (place / TRAINING).glob("checkpoint-*"):
        if each not in complete:  # the process was killed while it wrote
            shutil.rmtree(each)
    if not complete:
        return None
    _check(place, read_mark(complete[-1])["made_from"], made_from)
    return complete[-1]


def _write(place: Path, weights: Mapping[str, Tensor], made_from: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
    """Keep tuned weights, and remove the checkpoints that led there."""
    with replacing(place / WEIGHTS) as temporary:
        contiguous = {name: each.contiguous() for name, each in weights.items()}
        save_file(contiguous, temporary, {"made_from": json.dumps(dict(made_from)), "cost": json.dumps(dict(cost))})
    remove_folder(place / TRAINING)


def _read(place: Path, made_from: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tuned weights that are kept, with their cost; None if there are none. In every process the same answer.

    Raises:
        InputError: they were made from something else, or are damaged.
    """
    path = place / WEIGHTS
    if not from_main(path.exists):
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name != "format"}
            there, cost = metadata["made_from"], metadata["cost"]
            _check(place, there, made_from)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        damaged = _hash(weights) != cost["weights"]
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        damaged = True
    if damaged:
        raise InputError(f"'{path}' is damaged. Remove it: the warm-up is made again.")
    return weights, cost
