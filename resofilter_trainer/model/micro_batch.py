"""A forward and backward of a training run, and its tokens' losses as its output shows them. Knows no hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .gradients import Segment
from .head import PIECE_LOGITS, losses_in_pieces
from .loss_check import LossCheck, TokenLoss, field_of
from .losses import IGNORE
from .modes import at_least_float32
from .sharding import whole


@dataclass(eq=False)
class MicroBatch:
    """One expected forward and backward, and what was measured of it.

    Attributes:
        input_ids: (B, T), the input of the model.
        labels: (B, T), -100 for tokens that are not learnt.
        segments: the N samples in it.
        token_weight: the expected weight of every token's loss in the loss of the step.
        form: the expected loss of one token.
        sums: what each hooked module adds to each sample's sum, (N,).
        aside: the gradient of the model's auxiliary loss at the output of each hooked module.
        losses: (N,) each sample's mean token loss; None if the output of the model does not show it.
    """

    input_ids: Tensor
    labels: Tensor
    segments: Sequence[Segment]
    token_weight: float | Tensor
    form: TokenLoss = field(default_factory=TokenLoss)
    sums: dict[nn.Module, Tensor] = field(default_factory=dict)
    aside: dict[nn.Module, Tensor] = field(default_factory=dict)
    losses: Tensor | None = None

    @cached_property
    def num_tokens(self) -> Tensor:
        """(N,) the number of learnt tokens of each sample."""
        learnt = self.labels != IGNORE
        learnt[:, 0] = False
        return torch.stack([learnt[each.row, each.tokens].sum() for each in self.segments])

    @cached_property
    def check(self) -> LossCheck:
        """What finds the true weights of the tokens."""
        return LossCheck(self.input_ids, self.labels, self.segments, self.token_weight, self.form)

    @cached_property
    def scales(self) -> Tensor:
        """(N,) the factor from a sample's share of the loss to its own mean loss, known once the backward reaches it.

        The weights are the expected ones, exactly, unless the backward shows others.
        """
        tokens = self.num_tokens.clamp(min=1)
        expected = 1 / (self.token_weight * tokens)
        if self.check.own is None:
            return expected
        return torch.where(self.check.own, (1 / (self.check.weight * tokens)).to(expected.dtype), expected)

    def of_tokens(self, module: nn.Module, b: Tensor) -> Tensor:
        """The part of a gradient at a module's output that the tokens' losses make, without the auxiliary loss's."""
        weight, aside = self.check.aux_weight, self.aside.get(module)
        if weight is None or aside is None:
            return b
        own = (at_least_float32(b) - weight.to(aside.device) * at_least_float32(aside)).view(*self.input_ids.shape, -1)
        for each in self.segments:  # exactly zero where no learnt token follows
            learnt = (self.labels[each.row, each.tokens] != IGNORE).long()
            follows = learnt.sum() > learnt.cumsum(0)
            own[each.row, each.tokens] *= follows[:, None].to(own)
        return own.to(b.dtype).view_as(b)


@torch.no_grad()
def token_losses(output: Any, batch: MicroBatch) -> Tensor | None:
    """(B, T - 1) the cross entropy of each learnt token, from TRL's log-probabilities or from logits of all tokens.

    None where a fused loss makes no logits; unsloth's then returns an object in their place.
    """
    log_probs, logits = field_of(output, "log_probs"), field_of(output, "logits")
    if log_probs is not None:
        return -log_probs.double()
    if not isinstance(logits, Tensor) or logits.shape[:-1] != batch.labels.shape:
        return None
    learnt = (batch.labels[:, 1:] != IGNORE).to(logits.device)
    targets = batch.labels[:, 1:].to(logits.device)[learnt]
    losses = F.cross_entropy(at_least_float32(logits[:, :-1][learnt]), targets, reduction="none")
    per_token = torch.zeros(learnt.shape, dtype=torch.float64, device=losses.device)
    per_token[learnt] = losses.double()
    return per_token.to(batch.labels.device)


@torch.no_grad()
def losses_after(hidden: Tensor, model: Any, batch: MicroBatch) -> Tensor | None:
    """(B, T - 1) the cross entropy of each learnt token from the decoder's output, as TRL before 1.15 computes it."""
    if hidden.shape[:2] != batch.labels.shape:  # an adapter has added tokens
        return None
    config, head = model.config, model.get_output_embeddings()
    weight, bias = whole(head.weight), None if head.bias is None else whole(head.bias)
    scale, cap = getattr(config, "logit_scale", 1.0), getattr(config, "final_logit_softcapping", None)

    def logits(own: Tensor) -> Tensor:
        found = at_least_float32(F.linear(own.to(weight.dtype), weight, bias)) * scale
        return found if cap is None else cap * torch.tanh(found / cap)

    learnt = (batch.labels[:, 1:] != IGNORE).to(hidden.device)
    targets = batch.labels[:, 1:].to(hidden.device)[learnt]
    size = max(PIECE_LOGITS // len(weight), 1)
    losses, _ = losses_in_pieces(hidden[:, :-1][learnt], logits, targets, None, size)
    per_token = losses.double().new_zeros(learnt.shape).masked_scatter(learnt, losses.double())
    return per_token.to(batch.labels.device)


def mean_losses(per_token: Tensor, batch: MicroBatch) -> Tensor:
    """(N,) each sample's mean token loss, given (B, T - 1) token losses."""
    sums = [
        per_token[each.row, max(each.tokens.start - 1, 0) : max(each.tokens.stop - 1, 0)] for each in batch.segments
    ]
    return torch.stack([each.sum() for each in sums]) / batch.num_tokens.clamp(min=1)
