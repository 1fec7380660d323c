"""A model's inputs, and the loss of every learnt token. Knows nothing of updates, files or trainers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from .adapters import check_positions
from .gradients import segments_of
from .modes import at_least_float32

IGNORE = -100  # the label of a position that is not learnt
TokenBatch = Mapping[str, Tensor]  # input_ids, attention_mask and labels, (B, T) each


def learnt_positions(labels: Tensor) -> Tensor:
    """(B, T - 1) bool: the positions whose next token is learnt. Nothing predicts the first token, so it never is."""
    return labels[:, 1:] != IGNORE


def sample_means(losses: Tensor, learnt: Tensor) -> Tensor:
    """(B,) float64, each sample's mean of the (N,) losses of its learnt tokens, which `learnt` (B, T - 1) marks."""
    sums = losses.new_zeros(len(learnt), dtype=torch.float64).index_add(0, learnt.nonzero()[:, 0], losses.double())
    return sums / learnt.sum(1).clamp(min=1)


@dataclass(frozen=True)
class Inputs:
    """A model's inputs, and the tokens to predict.

    Attributes:
        arguments: the arguments of the forward: `input_ids` (B, T), and a mask and positions if needed.
        index: (N,) the learnt positions, as indices into the flattened `input_ids`.
        targets: (N,) the tokens that follow them.
    """

    arguments: dict[str, Any]
    index: Tensor
    targets: Tensor

    @property
    def shape(self) -> torch.Size:
        """(B, T)."""
        return self.arguments["input_ids"].shape

    @property
    def ids_alone(self) -> bool:
        """Whether the only tensor is `input_ids`, without a mask or positions."""
        return self.arguments.keys() == {"input_ids", "use_cache"}


def unpacked(batch: TokenBatch) -> dict[str, Tensor]:
    """Pad a padding-free batch, one row of several samples, to one row for each sample.

    Args:
        batch: `input_ids`, `labels` and `position_ids`, (1, T) each; positions restart at 0 with every sample.

    Returns:
        `input_ids`, `labels` and `attention_mask`, (B, T') each, padded on the right. No model mixes rows.
    """
    pieces = [each.tokens for each in segments_of(batch)]
    filled = {"input_ids": (batch["input_ids"][0], 0), "labels": (batch["labels"][0], IGNORE)}
    filled["attention_mask"] = torch.ones_like(batch["input_ids"][0]), 0
    return {
        name: nn.utils.rnn.pad_sequence([row[piece] for piece in pieces], batch_first=True, padding_value=fill)
        for name, (row, fill) in filled.items()
    }


def inputs_of(model: nn.Module, batch: TokenBatch, causal: bool) -> Inputs:
    """The inputs of a language model for a batch.

    A causal model needs neither a mask for padding on the right nor the last column, which predicts nothing. With
    padding on the left, positions count from each sample's first token.

    Args:
        model: a transformers model, wrapped by PEFT or not.
        batch: `input_ids`, `attention_mask` and `labels`, each (B, T), padded on either side.
        causal: whether no position depends on a later one.

    Raises:
        VersionError: padding on the left with a prefix, of which the installed peft ignores the positions.
    """
    ids, mask, learnt = batch["input_ids"], batch["attention_mask"], learnt_positions(batch["labels"])
    targets = batch["labels"][:, 1:][learnt]
    if causal and ids.shape[1] > 1:
        ids, mask = ids[:, :-1], mask[:, :-1]
    arguments = {"input_ids": ids, "use_cache": False}
    if not (causal and mask[:, 0].all()):
        arguments["attention_mask"] = mask
    inner = unwrapped(model)
    if not mask[:, 0].all() and "position_ids" in inspect.signature(inner.forward).parameters:
        check_positions(model)
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    index = F.pad(learnt, (0, ids.shape[1] - learnt.shape[1])).flatten().nonzero()[:, 0]
    return Inputs(arguments, index, targets)


def token_losses(model: nn.Module, batch: TokenBatch) -> Tensor:
    """The loss of each learnt token, (N,), sample after sample, with a graph if gradients are enabled.

    The plain version, except that the head runs on learnt positions only; `head.py` computes the same faster.
    """
    inputs = inputs_of(model, batch, causal=False)
    return F.cross_entropy(at_least_float32(learnt_logits(model, inputs)), inputs.targets, reduction="none")


def learnt_logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """(N, V) at the learnt positions."""
    with head_only_at(inputs.index, inputs.shape.numel(), model):
        logits = model(**inputs.arguments).logits
    if logits.numel() != len(inputs.index) * logits.shape[-1]:
        logits = at_positions(logits.flatten(0, 1), inputs.index)
    return logits.flatten(0, -2)


@contextlib.contextmanager
def head_only_at(index: Tensor, positions: int, model: nn.Module) -> Iterator[None]:
    """Run the output embedding on the hidden states at `index` only: (B, T, H) becomes (1, N, H).

    A head that is not a module, or whose input is not every position, is unchanged and returns all logits.
    """

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if hidden.shape[:-1].numel() != positions:
            return None
        return at_positions(hidden.flatten(0, -2), index)[None], *args[1:]

    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    handle = None if head is None else head.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def at_positions(positions: Tensor, index: Tensor) -> Tensor:
    """`positions[index]`, with the two on any devices."""
    return positions[index.to(positions.device)]


def vocabulary_of(model: nn.Module) -> int:
    """The number of logits of a transformers model, wrapped by PEFT or not."""
    inner = unwrapped(model)
    head = inner.get_output_embeddings()
    return int(inner.config.get_text_config().vocab_size) if head is None else len(head.weight)


def unwrapped(model: nn.Module) -> Any:
    """The transformers model, without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
