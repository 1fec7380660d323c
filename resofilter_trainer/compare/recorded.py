"""How rows are learnt, from the ledger of one training on all of them. Knows the callback; does not know selectors.

    rows as tokens -> a training with a ledger, saved after every epoch -> criteria of learning dynamics, as scores

The training is that of the selector `full`, and its ledger stays in the folder of the scores, in `trainer/`.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import xxhash
from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import SaveStrategy
from trl import SFTConfig, SFTTrainer

from ..config import NotFiniteError
from ..data.loading import Opened
from ..io.made_from import as_json
from ..ledger.dynamics import RANKED
from ..ledger.ledger import Ledger
from ..scores.score_table import ScoreTable
from ..scoring.output import Measured, PassOutput
from ..scoring.run_pass import run_pass
from ..training.callback import ResonanceCallback
from ..training.checkpoints import last_complete
from ..training.fine_tuning import to_train, training_settings
from .method_scores import Request

TRAINER = "trainer"  # the folder of the training, in that of the scores


def by_dynamics(request: Request) -> ScoreTable:
    """All criteria of learning dynamics, each a column."""
    settings = json.dumps(as_json(training_settings(request.args, request.adapter)), sort_keys=True)
    config = {"criterion": "dynamics", "training": xxhash.xxh3_64_hexdigest(settings.encode())}

    def measure(model: PreTrainedModel, opened: Opened, target: PassOutput) -> Measured:
        rows = opened.prepared.dataset.select_columns(["input_ids", "labels"])
        folder = request.folder / TRAINER
        trained = train_with_ledger(model, rows, request.tokenizer, request.args, folder, request.adapter)
        found = measured(trained)
        for checkpoint in folder.glob(
            "checkpoint-*"
        ):  # that of a training that has diverged stays: it ends again there
            shutil.rmtree(checkpoint)
        return found

    return run_pass(
        request.model, request.dataset, request.tokenizer, request.args, config, request.folder, measure,
        place=None, drop_empty=True,
    )  # fmt: skip


def train_with_ledger(
    model: PreTrainedModel,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    args: SFTConfig,
    folder: Path,
    adapter: PeftConfig | None = None,
) -> Ledger:
    """The ledger of a training on all rows. A training that was killed resumes after its last whole epoch.

    Args:
        model: the model to train, in place.
        rows: the rows as tokens.
        tokenizer: the model's tokenizer.
        args: the training arguments.
        folder: the folder of the training, with its last checkpoint.
        adapter: the adapter to train; by default all weights are trained.
    """
    args = copy.copy(args)
    args.output_dir, args.assistant_only_loss = str(folder), False  # the labels are set already
    args.save_strategy, args.save_total_limit, args.save_only_model = SaveStrategy.EPOCH, 1, False
    callback = ResonanceCallback(keep=1.0, dataset=rows)
    trainer = SFTTrainer(
        model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[callback],
        peft_config=to_train(adapter, args),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=last_complete(folder))
    return Ledger.load(folder)


def measured(ledger: Ledger) -> Measured:
    """The criteria of each row that the ledger has. Raises NotFiniteError where the training has diverged."""
    for lines in ledger.batches(["loss", "num_tokens"]):
        learnt = lines["num_tokens"].to_numpy() > 0
        if not np.isfinite(lines["loss"].to_numpy()[learnt]).all():
            raise NotFiniteError("Training on all rows gave losses that are not finite: try a smaller learning_rate.")
    found = ledger.dynamics()
    trained = np.flatnonzero(found.column("visits") > 0)
    columns = {name: found.column(name)[trained] for name in RANKED}
    return Measured(
        {"score": columns["mean_loss"], **columns},
        rows=trained,
        others="not trained in the training that tells how rows are learnt",
        fields={name: each.metadata for name, each in {"score": RANKED["mean_loss"], **RANKED}.items()},
    )
