"""Run by torchrun in two processes: train with a ledger, kind by kind, and write down what the Trainer logs."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from trl import SFTTrainer

from helpers.run_ledgers import Unrounded
from helpers.tokenizers import make_tokenizer
from helpers.training import InOrder, arguments, llama, rows
from resofilter_trainer import ResonanceCallback

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"gradient_accumulation_steps": 2},
    "apart": {"average_tokens_across_devices": False},
    "stream": {"max_steps": 14},
    "packed": {"packing": True, "max_length": 32},
}
GARBAGE, SPIKING = 50, {"num_train_epochs": 1, "learning_rate": 3e-2, "per_device_train_batch_size": 1}


def main() -> None:
    place = Path(sys.argv[1])
    for kind in sys.argv[2:]:
        if kind == "spikes":
            leave_out(place / kind)
            continue
        run(place / kind, kind.removesuffix(" resumed"), kind.endswith(" resumed"))


def run(output: Path, kind: str, resumes: bool) -> None:
    """Two epochs on a number of rows that fills no step at their end, or the rest of them."""
    tokenizer, dataset = make_tokenizer(), rows(23)
    changes = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, **KINDS[kind]}
    callback = ResonanceCallback(keep=[1.0, 0.5], dataset=dataset if kind == "packed" else None)
    given: Any = dataset.to_iterable_dataset() if kind == "stream" else dataset
    args, model = arguments(output, **changes), llama(len(tokenizer))
    trainer = SFTTrainer(model, args, None, given, processing_class=tokenizer, callbacks=[callback])
    seen = Unrounded(trainer)
    warnings.simplefilter("ignore")
    trainer.train(resume_from_checkpoint=str(output / "checkpoint-2") if resumes else None)
    if args.process_index == 0 and not resumes:
        np.savez(output / "logged.npz", **{name: seen.column(name) for name in seen.steps[0]})


def leave_out(output: Path) -> None:
    """One epoch on a row again and again, with another one in it, whose update is left out in both processes."""
    row = {"prompt": "question: what is 1 + 1 ?", "completion": " answer: 2 fox fox fox"}
    other = {**row, "completion": " lazy jumps dog over brown"}
    dataset = Dataset.from_list([other if number == GARBAGE else row for number in range(60)])
    seen: list[Any] = []
    callback = ResonanceCallback(keep=1.0, on_spike=seen.append, skip_update=True)
    args, tokenizer = arguments(output, **SPIKING), make_tokenizer()
    model = llama(len(tokenizer))
    trainer = InOrder(model, args, None, dataset, processing_class=tokenizer, callbacks=[callback])
    trainer.train()
    assert len(seen) == (args.process_index == 0)
    left_out = [each for each in callback.log_history if "resofilter/updates_left_out" in each]
    state = [each.detach().clone() for each in model.parameters()]
    state += [each["exp_avg"] for each in trainer.optimizer.state.values()]
    for each in state:
        both = trainer.accelerator.gather(each.reshape(1, -1))
        assert (both[0] == both[1]).all()
    assert gather_object([left_out]) == [left_out] * 2
    if args.process_index == 0:
        (spike,) = seen
        rows = [each.sample_id for each in spike.rows]
        np.savez(output / "spike.npz", step=spike.step, loss=spike.loss, rows=rows, left_out=left_out[0]["step"])


if __name__ == "__main__":
    main()
