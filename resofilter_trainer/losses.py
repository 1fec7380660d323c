"""The loss of every learnt token and of every sample. Knows nothing of updates, files or trainers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from .modes import at_least_float32

IGNORE = -100  # the label of a position that is not learnt


def learnt_positions(labels: Tensor) -> Tensor:
    """(B, T - 1) bool: the positions whose next token is learnt. The first token never is: nothing predicts it."""
    return labels[:, 1:] != IGNORE


def sample_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Each sample's own mean token loss, in nats, whoever else is in the batch.

    Args:
        model: a causal language model.
        batch: `input_ids`, `attention_mask` and `labels`, each (B, T), padded on either side.

    Returns:
        (B,) float64, with a graph where gradients are enabled; zero for a sample without a learnt token.
    """
    return sample_means(token_losses(model, batch), learnt_positions(batch["labels"]))


def sample_means(losses: Tensor, learnt: Tensor) -> Tensor:
    """(B,) float64, the mean of each sample's (N,) token losses; `learnt` (B, T - 1) says whose they are."""
    sums = losses.new_zeros(len(learnt), dtype=torch.float64).index_add(0, learnt.nonzero()[:, 0], losses.double())
    return sums / learnt.sum(1).clamp(min=1)


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of each learnt token, (N,), sample after sample. The head runs at those positions only."""
    learnt = learnt_positions(batch["labels"])
    index = F.pad(learnt, (0, 1)).flatten().nonzero()[:, 0]
    with head_only_at(index, learnt.shape[0] * (learnt.shape[1] + 1), model):
        logits = model(**_forward_arguments(model, batch)).logits
    if logits.numel() != len(index) * logits.shape[-1]:
        logits = logits.flatten(0, 1)[index]
    return F.cross_entropy(at_least_float32(logits.flatten(0, -2)), batch["labels"][:, 1:][learnt], reduction="none")


@contextlib.contextmanager
def head_only_at(index: Tensor, positions: int, model: nn.Module) -> Iterator[None]:
    """Let the output embedding see the hidden states at `index` alone: (B, T, H) becomes (1, N, H).

    A head that is no module, or sees something else than every position, is left alone and gives every logit.
    """

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if hidden.shape[:-1].numel() != positions:
            return None
        return hidden.flatten(0, -2)[index.to(hidden.device)][None], *args[1:]

    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    handle = None if head is None else head.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _forward_arguments(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The batch without its labels. With padding on the left, positions count from each sample's first token."""
    mask = batch["attention_mask"]
    arguments = {"input_ids": batch["input_ids"], "attention_mask": mask, "use_cache": False}
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not mask[:, 0].all() and "position_ids" in inspect.signature(inner.forward).parameters:
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return arguments
