"""Run by torchrun in one or two processes: train with the callback and write down what it decided, kind by kind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from helpers.tokenizers import make_tokenizer
from helpers.training import rows, train
from resofilter_trainer import ResonanceCallback, TokenCleaning
from resofilter_trainer.io.files import load_arrow
from resofilter_trainer.training.token_masks import MASKS_FILE, MASKS_KEY


def main() -> None:
    place, processes = Path(sys.argv[1]), int(sys.argv[2])
    for kind in sys.argv[3:]:
        run(place / f"{kind}-{processes}", processes, kind)


def run(output: Path, processes: int, kind: str) -> None:
    changes = {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 2}
    changes |= {"save_strategy": "steps", "save_steps": 2}
    if kind in ("sequential", "group_by_length"):
        changes["train_sampling_strategy"] = kind
    if "dispatched" in kind or "split" in kind:
        how = {"dispatch_batches": "dispatched" in kind or None, "split_batches": "split" in kind}
        changes |= {"accelerator_config": how, "pad_to_multiple_of": 64}  # accelerate joins batches of the same length
        changes["per_device_train_batch_size"] *= processes if "split" in kind else 1
    if "resumed" in kind:
        of = kind.replace("resumed", "").strip() or "plain"
        changes["resume"] = str(output.parent / f"{of}-{processes}" / "checkpoint-6")
    settings = {"when": "before"} if kind == "before" else {}
    if "tokens" in kind:
        settings = {"token_cleaning": TokenCleaning(0.6, parts=2)}
    dataset: Any = rows(45 if "ragged" in kind else 44)
    if kind == "packed":
        changes["packing"], settings["dataset"] = True, dataset
    callback = ResonanceCallback(keep=[0.6 if kind == "before" else 1.0, 0.5, 0.25], eps=1e-4, **settings)
    if "stream" in kind:
        dataset = rows(50 if "ragged" in kind else 48).to_iterable_dataset(num_shards=2 if "split" in kind else 1)
        changes |= {"max_steps": 10}
    outcome = train(output, make_tokenizer(), callback, dataset=dataset, **changes)
    if outcome.trainer.args.process_index == 0:
        steps = sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
        masks = [output / f"checkpoint-{step}" / "resofilter" / MASKS_FILE for step in steps]
        masks = [path for path in masks if path.exists()]
        np.savez(
            output / "outcome.npz",
            measured=callback.scores.column("measured"),
            score=callback.scores.column("score"),
            epoch=callback.scores.column("epoch"),
            keep=np.array([selection.keep for selection in callback.selections]),
            processes=outcome.trainer.args.world_size,
            masks=np.array([load_arrow(path, MASKS_KEY, "masks")[0]["keep"].to_numpy() for path in masks]),
            steps=outcome.trainer.state.global_step,
        )


if __name__ == "__main__":
    main()
