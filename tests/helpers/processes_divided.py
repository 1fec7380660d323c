"""Run by torchrun in one to three processes: train on a ragged number of rows, twelve in a step, whole or resumed.

Each argument after the folder is `kind` for a whole run, or `kind:processes:step` to resume from the checkpoint that
another number of processes made at a step.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from helpers.tokenizers import make_tokenizer
from helpers.training import arguments, llama, rows
from resofilter_trainer import InputError, ResonanceCallback

ROWS = 29  # 3 steps: the last of 5 rows, which no number of processes divides
KINDS = {"dropped": {"keep": [1.0, 0.7, 0.4]}, "all": {"keep": 1.0}, "without": None}


def main() -> None:
    place, processes = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    for name in sys.argv[2:]:
        kind, *checkpoint = name.split(":")
        resume = None
        if checkpoint:
            resume = place / f"{kind}-{checkpoint[0]}" / f"checkpoint-{checkpoint[1]}"
        run(kind, place / f"{name.replace(':', '-')}-{processes}", processes, resume)


def run(kind: str, output: Path, processes: int, resume: Path | None) -> None:
    from trl import SFTTrainer

    changes = {"per_device_train_batch_size": 6 // processes, "gradient_accumulation_steps": 2}
    tokenizer = make_tokenizer()
    settings = KINDS[kind]
    callback = None if settings is None else ResonanceCallback(eps=1e-4, **settings)
    trainer = SFTTrainer(
        llama(len(tokenizer)).double(),
        arguments(output, save_strategy="steps", save_steps=1, lr_scheduler_type="constant", **changes),
        train_dataset=rows(ROWS),
        processing_class=tokenizer,
        callbacks=[] if callback is None else [callback],
    )
    said = ""
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    except InputError as error:
        said = str(error)
    if trainer.args.process_index == 0:
        output.mkdir(parents=True, exist_ok=True)
        found = {"said": np.array(said)}
        if callback is not None and not said:
            found["score"] = callback.scores.column("score")
            found["keep"] = np.array([selection.keep for selection in callback.selections])
        np.savez(output / "outcome.npz", **found)
        save_file({name: each.clone() for name, each in trainer.model.state_dict().items()}, output / "end.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
