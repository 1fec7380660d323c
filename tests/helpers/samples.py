"""Random samples, batches of them, and their measurements by the recorder and by plain code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from resofilter_trainer import Recorder, Resonance, ResonanceConfig
from resofilter_trainer.model.losses import IGNORE
from resofilter_trainer.model.updates import UPDATES

Sample = dict[str, Tensor]
# The updates that `Recorder` and `literal` measure: a new one is tested as soon as it is in UPDATES.
CLOSED_FORMS = [name for name, update in UPDATES.items() if update.step is not None]


def make_samples(
    count: int = 8, vocab_size: int = 128, shortest: int = 4, longest: int = 24, seed: int = 0
) -> list[Sample]:
    """Random tokens of random lengths; a random number of the first ones is a prompt and not learnt."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        ids = torch.randint(3, vocab_size, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(0, length - 2, (), generator=generator))] = IGNORE
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def collate(samples: list[Sample], side: str = "right") -> Sample:
    """A batch, padded to the longest sample on one side."""
    shape = len(samples), max(len(sample["input_ids"]) for sample in samples)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORE),
    }
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        span = slice(0, length) if side == "right" else slice(shape[1] - length, None)
        batch["input_ids"][row, span] = sample["input_ids"]
        batch["labels"][row, span] = sample["labels"]
        batch["attention_mask"][row, span] = 1
    return batch


def record_all(
    model: torch.nn.Module, samples: list[Sample], config: ResonanceConfig, size: int = 8, side: str = "right"
) -> Resonance:
    """The recorder over all samples, in batches of `size`."""
    with Recorder(model, config) as record:
        found = [record(collate(samples[i : i + size], side)) for i in range(0, len(samples), size)]
    return Resonance(
        *(np.concatenate([getattr(each, name) for each in found]) for name in ("loss", "num_tokens", "layers"))
    )


def error_over_spread(found: Resonance, truth: Resonance) -> float:
    """The largest error of a score, as a share of the spread of the scores."""
    return float(np.abs(found.score - truth.score).max() / np.ptp(truth.score))


def plain_losses(model: torch.nn.Module, samples: list[Sample]) -> Tensor:
    """The losses of learnt tokens from one sample after another, with all logits and no padding."""
    losses = []
    for sample in samples:
        with torch.no_grad():
            logits = model(input_ids=sample["input_ids"][None], use_cache=False).logits[0, :-1].float()
        each = F.cross_entropy(logits, sample["labels"][1:], reduction="none", ignore_index=-100)
        losses.append(each[sample["labels"][1:] != -100])
    return torch.cat(losses)


def state_of(model: torch.nn.Module) -> list[object]:
    """Everything that a run could leave behind on a model."""
    found: list[object] = []
    for name, module in model.named_modules():
        hooks = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks]
        found.append((name, type(module), module.training, "forward" in vars(module), [list(each) for each in hooks]))
    return found


def watch_logits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of logits of each cross entropy, and of each product with a tile of a head."""
    seen: list[int] = []
    entropy, product = F.cross_entropy, torch.mm

    def seen_by_entropy(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(logits.numel())
        return entropy(logits, *args, **kwargs)

    def seen_by_product(*args: Any, **kwargs: Any) -> Tensor:
        logits = product(*args, **kwargs)
        seen.append(logits.numel())
        return logits

    monkeypatch.setattr(F, "cross_entropy", seen_by_entropy)
    monkeypatch.setattr(torch, "mm", seen_by_product)
    return seen
