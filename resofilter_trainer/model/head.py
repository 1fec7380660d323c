"""From a decoder's output to the loss of every learnt token and its gradient, never holding all logits at once.

Knows models and batches, not samples, updates or files. Where the head is one linear map, the vocabulary is taken a
tile at a time, each while it is in the cache, with the running maximum of online softmax (Milakov and Gimelshein,
arXiv 1805.02867), here for the losses and their gradient in one pass:

    hidden (N, H) -> logits of a tile (N, V') -> m, r = sum e^(l - m), s = sum e^(l - m) W, both without the target y
    in the end, with z = r + e^(l_y - m): losses log z + m - l_y, gradient (s - r W_y) / z

The target is left out of the sums because s / z - W_y would cancel where it is all but certain.

Elsewhere the model's own forward runs again from the decoder's output on, a few positions at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .losses import Inputs, at_positions, head_only_at, learnt_logits, unwrapped
from .modes import at_least_float32, instead, same_but_for

TILE_LOGITS = {"cpu": 1 << 20}  # 4 MB of float32: stays in the cache
TILE_LOGITS_ELSEWHERE = 1 << 26  # few launches, 256 MB
PROBE = 16  # tokens on which a model is tried
PIECE_LOGITS = 1 << 24  # 64 MB of float32, where each piece is a forward of its own
SMALLEST_TILE = 512  # of the vocabulary: below, a product is too narrow to be fast


@dataclass(frozen=True)
class Decoded:
    """A batch that has been through the decoder.

    Attributes:
        hidden: (N, H) what the logits are made of at the N learnt positions, with a graph where gradients are enabled.
        targets: (N,) the tokens that follow.
        head: the linear map to the logits, or whatever else makes (n, V) of (n, H).
        vocabulary: V.
    """

    hidden: Tensor
    targets: Tensor
    head: nn.Linear | Callable[[Tensor], Tensor]
    vocabulary: int

    def losses(self) -> Tensor:
        """(N,) in nats, at least float32."""
        return self._measure(None)[0]

    def losses_and_gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The losses, (N,), and the gradient at `hidden` of their sum weighted by (N,) `weights`, (N, H)."""
        losses, gradient = self._measure(weights)
        return losses, gradient.to(self.hidden.dtype)

    @torch.no_grad()
    def _measure(self, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden, targets = self.hidden.detach(), self.targets.to(self.hidden.device)
        weights = None if weights is None else weights.to(hidden.device)
        if isinstance(self.head, nn.Linear):
            most = TILE_LOGITS.get(hidden.device.type, TILE_LOGITS_ELSEWHERE)
            return linear_losses(hidden, self.head, targets, weights, most)
        return losses_in_pieces(hidden, self.head, targets, weights, max(PIECE_LOGITS // self.vocabulary, 1))


def linear_losses(
    hidden: Tensor, head: nn.Linear, targets: Tensor, weights: Tensor | None, most_logits: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy behind a linear map and its gradient before it, a tile of the vocabulary at a time.

    Args:
        hidden: (N, H).
        head: from H to V.
        targets: (N,).
        weights: (N,) what each loss counts in the gradient; None for the losses alone.
        most_logits: about how many to hold at once.

    Returns:
        Losses in nats, (N,), and the gradient, (N, H), or an empty one; both at least float32.
    """
    device, (rows, width) = hidden.device.type, hidden.shape
    dtype = head.weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        hidden = hidden.to(dtype)
        largest = at_least_float32(hidden.new_full((rows, 1), -torch.inf))
        total, of_target = torch.zeros_like(largest), torch.zeros_like(largest)
        summed = largest.new_zeros(rows, 0 if weights is None else width)
        size = min(max(SMALLEST_TILE, most_logits // max(rows, 1)), head.out_features)
        buffer = hidden.new_empty(rows * size)
        for start in range(0, head.out_features, size):
            weight = head.weight.detach()[start : start + size].to(dtype)
            logits = torch.mm(hidden, weight.T, out=buffer[: rows * len(weight)].view(rows, len(weight)))
            if head.bias is not None:
                logits += head.bias.detach()[start : start + size]
            logits = at_least_float32(logits)
            place = targets[:, None] - start
            inside, place = (place >= 0) & (place < len(weight)), place.clamp(0, len(weight) - 1)
            of_target = torch.where(inside, logits.gather(1, place), of_target)
            larger = torch.maximum(largest, logits.amax(1, keepdim=True))
            shrunk = largest.sub_(larger).exp_()
            terms, largest = logits.sub_(larger).exp_(), larger
            terms.scatter_(1, place, terms.gather(1, place).masked_fill(inside, 0))
            total.mul_(shrunk).add_(terms.sum(1, keepdim=True))
            if weights is not None:
                summed.mul_(shrunk)
                summed = summed.addmm_(terms, weight) if terms.dtype == dtype else summed.add_(terms.to(dtype) @ weight)
        whole = total + (of_target - largest).exp()
        losses = (whole.log() + largest - of_target)[:, 0]
        if weights is None:
            return losses, summed
        summed.addcmul_(head.weight.detach()[targets].to(dtype).to(summed.dtype), total, value=-1).div_(whole)
        return losses, summed.mul_(weights.to(summed.dtype)[:, None])


def losses_in_pieces(
    hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, weights: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """As `linear_losses`, for any `head`, `size` positions at a time."""
    losses, gradients = [at_least_float32(hidden.new_empty(0))], [hidden.new_empty(0, hidden.shape[1])]
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        with torch.set_grad_enabled(weights is not None):
            own = hidden[part].requires_grad_(weights is not None)
            loss = F.cross_entropy(at_least_float32(head(own)), targets[part], reduction="none")
            if weights is not None:
                gradients += torch.autograd.grad(loss, own, weights[part].to(loss.dtype))
        losses.append(loss.detach())
    return torch.cat(losses), torch.cat(gradients)


Way = Callable[[nn.Module, Inputs], Decoded]


@torch.no_grad()
def find_way(model: nn.Module, ids: Tensor) -> Way:
    """How far a language model can be run before its logits are formed: to its head, to its decoder's end, or not.

    Args:
        model: of transformers, wrapped by PEFT or not.
        ids: (1, T) some tokens to try it on.
    """
    inner = unwrapped(model)
    head, calls = inner.get_output_embeddings(), dict[nn.Module, tuple[Any, Any]]()

    def see(module: nn.Module, args: Any, output: Any) -> None:
        calls.pop(module, None)
        calls[module] = args, output  # what gives its output last is the outermost

    with contextlib.ExitStack() as stack:
        for module in {inner.base_model, inner.get_decoder(), head} - {inner, None}:
            stack.callback(module.register_forward_hook(see).remove)
        logits = model(input_ids=ids, use_cache=False).logits
    args, output = calls.pop(head, ((), None))
    if type(head) is nn.Linear and args and args[0].shape[:-1] == ids.shape and _gives(head, output, logits):
        return to_head
    if head is not None and calls:
        body, (_, output) = list(calls.items())[-1]
        if output[0].shape[:2] == ids.shape:
            return partial(to_body, body)
    return to_logits


def to_head(model: nn.Module, inputs: Inputs) -> Decoded:
    """Run a model whose logits are what its head, one linear map, gives: no cap, no scale."""
    head, given = unwrapped(model).get_output_embeddings(), list[Tensor]()
    with contextlib.ExitStack() as stack:
        stack.callback(head.register_forward_pre_hook(lambda module, args: given.append(args[0])).remove)
        stack.enter_context(instead(head, lambda hidden: head.weight.new_zeros(1, 1, head.out_features)))
        model(**inputs.arguments)
    hidden = at_positions(given[0].flatten(0, -2), inputs.index).to(head.weight.device)
    return Decoded(hidden, inputs.targets, head, head.out_features)


def to_body(body: nn.Module, model: nn.Module, inputs: Inputs) -> Decoded:
    """Run a model to the end of `body`, its decoder; the head sees one position only."""
    found: list[Any] = []
    with contextlib.ExitStack() as stack:
        stack.callback(body.register_forward_hook(lambda module, args, output: found.append(output)).remove)
        stack.enter_context(head_only_at(torch.zeros_like(inputs.index[:1]), inputs.shape.numel(), model))
        logits = model(**inputs.arguments).logits
    hidden, kind = at_positions(found[0][0].flatten(0, 1), inputs.index), type(found[0])
    logits_of = partial(_logits_of, model, body, kind, inputs.arguments["input_ids"][:1, :1])
    return Decoded(hidden, inputs.targets, logits_of, logits.shape[-1])


def to_logits(model: nn.Module, inputs: Inputs) -> Decoded:
    """Run a model to the logits themselves."""
    logits = learnt_logits(model, inputs)
    return Decoded(logits, inputs.targets, lambda own: own, logits.shape[-1])


def _gives(head: nn.Linear, output: Tensor, logits: Tensor) -> bool:
    """Whether the logits are what the head gave, from weights that are all at hand."""
    at_hand = head.weight.device.type != "meta" and len(head.weight) == logits.shape[-1]
    return at_hand and output.shape == logits.shape and torch.equal(output.to(logits), logits)


def _logits_of(model: nn.Module, body: nn.Module, kind: type, some_ids: Tensor, hidden: Tensor) -> Tensor:
    """(n, V), by the model's own forward with (n, H) in the place of what the decoder would give."""
    with instead(body, lambda *args, **kwargs: kind(last_hidden_state=hidden[None])):
        return model(input_ids=some_ids, use_cache=False).logits.flatten(0, -2)


@torch.no_grad()
def is_causal(model: nn.Module, ids: Tensor) -> bool:
    """Whether no position sees a later one: nor another last token, tried on (1, T) tokens, nor how many there are."""
    if ids.shape[1] < 2 or _positions_depend_on_length(unwrapped(model).config.to_dict()):
        return False
    other = ids.clone()
    other[0, -1] = ids[0, 0] if ids[0, 0] != ids[0, -1] else (ids[0, -1] - 1).abs()
    before, after = model(input_ids=torch.cat([ids, other]), use_cache=False).logits[:, :-1]
    return same_but_for(8 * torch.finfo(at_least_float32(before).dtype).eps, before, after)


def _positions_depend_on_length(settings: Any) -> bool:
    """Whether a configuration asks for rotary embeddings that change when the longest row of a batch is long."""
    if not isinstance(settings, Mapping):
        return False
    kinds = [settings.get(name) for name in ("rope_type", "type")]
    return "dynamic" in kinds or "longrope" in kinds or any(map(_positions_depend_on_length, settings.values()))
