"""Run by torchrun in two processes: clean rows, and write down which batches each process has done."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

from accelerate import PartialState

from helpers.cleaning import ARGS, data
from resofilter_trainer.config import TokenCleaning
from resofilter_trainer.scoring import passes
from resofilter_trainer.scoring import token_losses as loss_pass
from resofilter_trainer.scoring.team import LostError
from resofilter_trainer.tokens.cleaning import clean_dataset


def main() -> None:
    base, reference, output, kind = sys.argv[1:]
    rank, done, real, open_ = PartialState().process_index, [], loss_pass._losses_of, passes.open_store
    stop = [2] if kind == "interrupted" else []

    def spy(model, dataset, rows, args):
        if len(done) in stop:
            raise KeyboardInterrupt
        losses = real(model, dataset, rows, args)
        done.append([type(model).__name__, model.model.embed_tokens.weight[5, 0].item(), *rows.tolist()])
        return losses

    def slowly(store):
        if kind == "late":
            time.sleep(1.0 * rank)  # what the other process has done meanwhile is none of its business
        return open_(store)

    loss_pass._losses_of = spy
    passes.open_store = slowly
    cleaning = TokenCleaning(reference=reference, tokens_per_batch=64)
    for _ in stop:
        with contextlib.suppress(KeyboardInterrupt, LostError):  # the one that is interrupted first stops the other
            clean_dataset(base, data(), cleaning, args=ARGS, output=output)
    stop.clear()
    PartialState().wait_for_everyone()
    clean_dataset(base, data(), cleaning, args=ARGS, output=output)
    (Path(output) / f"batches-{rank}.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main()
