"""Steps of weighted tokens, once more and written out: their losses, their gradients and their updates.

Run by torchrun, too: in two processes, whose steps the first one repeats alone.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from helpers.tokenizers import make_tokenizer
from helpers.training import llama, rows, train
from resofilter_trainer import ResonanceCallback, TokenWeights

COUNT = 8


def by_loss(tokens: Any) -> Any:
    """A weight in (0, 1) of each token, from its loss alone."""
    return 1 / (1 + tokens.loss)


CALLBACKS = {
    "TokenWeights": lambda: TokenWeights(by_loss),
    "ResonanceCallback": lambda: ResonanceCallback(token_rule=by_loss),
}
RATE = 1e-1
PLAIN: dict[str, Any] = {  # steps that can be written out
    "num_train_epochs": 1,
    "optim": "sgd",
    "learning_rate": RATE,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
}


class Replay(TrainerCallback):
    """Keeps the batches of every step, and repeats the steps from the first weights on.

    Args:
        model: the model that is trained.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.start = model, copy.deepcopy(model.state_dict())
        self.steps: list[list[dict[str, Tensor]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook = self.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append([])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook.remove()

    def _see(self, model: Any, args: Any, batch: dict[str, Any]) -> None:
        self.steps[-1].append({name: copy.deepcopy(value) for name, value in batch.items()})

    def written_out(self, weigh: Any, learning_rate: float) -> dict[str, Tensor]:
        """The weights after all steps of `sum_t w_t (-log p_t) / N`, N the learnt tokens of a step, by SGD."""
        return written_out(self.model, self.start, [[step] for step in self.steps], weigh, learning_rate)


def written_out(model: Any, start: Any, steps: Any, weigh: Any, learning_rate: float) -> dict[str, Tensor]:
    """The weights after steps, each a list of the batches of each process, whose gradients add up."""
    model.load_state_dict(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for of_process in steps:
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batches in of_process for batch in batches)
        gradients = []
        for batches in of_process:
            optimizer.zero_grad()
            for batch in batches:
                log_probs, learnt = model(**batch).log_probs, batch["labels"][:, 1:] != -100
                losses = (-log_probs.detach()[learnt]).numpy()
                weights = torch.zeros_like(log_probs)
                weights[learnt] = torch.from_numpy(weigh(SimpleNamespace(loss=losses)))
                ((weights * -log_probs).sum() / torch.tensor(tokens)).backward()
            gradients.append([each.grad for each in model.parameters()])
        for parameter, *own in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = own[0] if len(own) == 1 else torch.stack(own).sum(0)
        optimizer.step()
    return model.state_dict()


def main() -> None:
    place = Path(sys.argv[1])
    for kind in sys.argv[2:]:
        model = llama(len(make_tokenizer())).double()
        replay = Replay(model)
        settings = {**PLAIN, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        settings |= {"model": model, "callbacks": [replay], "dataset": rows(COUNT)}
        train(place / kind, make_tokenizer(), CALLBACKS[kind](), **settings)
        trained = copy.deepcopy(model.state_dict())
        of_each: list[Any] = gather_object([replay.steps])
        assert len(of_each) == dist.get_world_size() == 2
        if dist.get_rank() == 0:
            steps = list(zip(*of_each, strict=True))
            assert len(steps) == COUNT // 4
            for name, value in written_out(model, replay.start, steps, by_loss, RATE).items():
                assert torch.equal(value, trained[name]), name
            (place / f"{kind}.txt").write_text("the same\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
