"""From a decoder's output to the loss of every learnt token and its gradient, without all logits in memory at once.

Knows models and batches, not samples, updates or files. If the head is one linear map, the vocabulary is processed in
tiles that fit the cache, with the running maximum of online softmax (Milakov and Gimelshein, arXiv 1805.02867), here
for the losses and their gradient at the same time:

    hidden (N, H) -> logits of a tile (N, V') -> m, r = sum e^(l - m), s = sum e^(l - m) W, both without the target y
    in the end, with z = r + e^(l_y - m): losses log z + m - l_y, gradient (s - r W_y) / z

The sums leave the target out because s / z - W_y cancels for a target that is almost certain.

For any other head the model's own forward runs again from the decoder's output on, a few positions at a time.
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

from .head_gradient import Tile, inner_tile, linear_tile
from .losses import Inputs, at_positions, head_only_at, learnt_logits, unwrapped
from .modes import at_least_float32, evaluating, forward_replaced, same_but_for
from .token_statistics import RANK, RunningSums, TokenStatistics, bound_of

TILE_LOGITS = {"cpu": 1 << 20}  # 4 MB of float32, which stay in the cache
TILE_LOGITS_ELSEWHERE = 1 << 26  # 256 MB, for few kernel launches
PROBE = 16  # tokens of a trial run
PIECE_LOGITS = 1 << 24  # 64 MB of float32, if each piece is a forward of its own
SMALLEST_TILE = 512  # of the vocabulary; a narrower product is slow


@dataclass(frozen=True)
class Decoded:
    """A batch after the decoder.

    Attributes:
        hidden: (N, H) the input of `head` at the N learnt positions, with a graph if gradients are enabled.
        targets: (N,) the tokens that follow.
        head: the linear map to the logits, or another function from (n, H) to (n, V).
        vocabulary: the size V of the vocabulary.
        linear: the linear map that `head` calls, if it is another function and calls one.
    """

    hidden: Tensor
    targets: Tensor
    head: nn.Linear | Callable[[Tensor], Tensor]
    vocabulary: int
    linear: nn.Linear | None = None

    def losses(self, statistics: TokenStatistics | None = None) -> Tensor:
        """(N,) in nats, at least float32. The statistics are collected on the way."""
        return self._measure(None, statistics)[0]

    def losses_and_gradient(self, weights: Tensor, statistics: TokenStatistics | None = None) -> tuple[Tensor, Tensor]:
        """The losses, (N,), and the gradient at `hidden` of their sum weighted by (N,) `weights`, (N, H).

        The statistics are collected on the way.
        """
        losses, gradient = self._measure(weights, statistics)
        return losses, gradient.to(self.hidden.dtype)

    @torch.no_grad()
    def _measure(self, weights: Tensor | None, statistics: TokenStatistics | None = None) -> tuple[Tensor, Tensor]:
        hidden, targets = self.hidden.detach(), self.targets.to(self.hidden.device)
        weights = None if weights is None else weights.to(hidden.device)
        most = TILE_LOGITS.get(hidden.device.type, TILE_LOGITS_ELSEWHERE)
        if isinstance(self.head, nn.Linear):
            found = linear_losses(hidden, self.head, targets, weights, most, statistics)
        else:
            size = max(PIECE_LOGITS // self.vocabulary, 1)
            found = losses_in_pieces(hidden, self.head, targets, weights, size, statistics)
        if statistics is not None and self.tile is not None:
            size = min(max(SMALLEST_TILE, most // max(len(hidden), 1)), self.vocabulary)
            statistics.second_run(hidden, self.tile, (self.vocabulary, size), targets)
        return found

    @property
    def tile(self) -> Tile | None:
        """How to compute the logits of a tile of the vocabulary; None if they are not those of a linear map."""
        if isinstance(self.head, nn.Linear):
            return partial(linear_tile, self.head)
        return None if self.linear is None else partial(inner_tile, self.linear, self.head)


def linear_losses(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    weights: Tensor | None,
    most_logits: int,
    statistics: TokenStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy after a linear map and its gradient before the map, a tile of the vocabulary at a time.

    Args:
        hidden: (N, H), the input of the map.
        head: the map from H to V.
        targets: (N,), the target tokens.
        weights: (N,), the weight of each loss in the gradient; None for the losses alone.
        most_logits: about how many logits to hold in memory at once.
        statistics: what to collect on the way, for which twice as many are held.

    Returns:
        The losses in nats, (N,), and the gradient, (N, H), or an empty tensor; both at least float32.
    """
    device, (rows, width) = hidden.device.type, hidden.shape
    dtype = head.weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # autocast does not apply to float64
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        hidden = hidden.to(dtype)
        largest = at_least_float32(hidden.new_full((rows, 1), -torch.inf))
        total, of_target = torch.zeros_like(largest), torch.zeros_like(largest)
        summed = largest.new_zeros(rows, 0 if weights is None else width)
        size = min(max(SMALLEST_TILE, most_logits // max(rows, 1)), head.out_features)
        buffer = hidden.new_empty(rows * size)
        sums = None
        if statistics is not None:
            bound = bound_of(hidden, head, targets) if RANK in statistics.wanted else torch.zeros_like(largest)
            sums = RunningSums(statistics.wanted, bound, statistics.grams(largest, width, dtype))
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
            if sums is not None:
                sums.count(logits, place, inside)
                sums.shrink(larger - largest, total)
            shrunk = largest.sub_(larger).exp_()
            below, largest = logits.sub_(larger), larger
            terms = below.exp_() if sums is None else below.exp()
            terms.scatter_(1, place, terms.gather(1, place).masked_fill(inside, 0))
            if sums is not None:
                sums.add(below, terms)
            total.mul_(shrunk).add_(terms.sum(1, keepdim=True))
            if weights is not None:
                summed.mul_(shrunk)
                summed = summed.addmm_(terms, weight) if terms.dtype == dtype else summed.add_(terms.to(dtype) @ weight)
        if statistics is not None and sums is not None:
            statistics.add(sums.finish(total, largest, of_target))
            if sums.grams is not None:
                rest = statistics.rest[:, None]
                statistics.add_norms(sums.grams.norms(hidden, head, targets, largest, total, rest))
        whole = total + (of_target - largest).exp()
        losses = (whole.log() + largest - of_target)[:, 0]
        if weights is None:
            return losses, summed
        summed.addcmul_(head.weight.detach()[targets].to(dtype).to(summed.dtype), total, value=-1).div_(whole)
        return losses, summed.mul_(weights.to(summed.dtype)[:, None])


def losses_in_pieces(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    weights: Tensor | None,
    size: int,
    statistics: TokenStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """Like `linear_losses`, for any `head`, `size` positions at a time."""
    losses, gradients = [at_least_float32(hidden.new_empty(0))], [hidden.new_empty(0, hidden.shape[1])]
    for start in range(0, len(hidden), size):
        piece = slice(start, start + size)
        with torch.set_grad_enabled(weights is not None):
            own = hidden[piece].requires_grad_(weights is not None)
            logits = at_least_float32(head(own))
            loss = F.cross_entropy(logits, targets[piece], reduction="none")
            if statistics is not None:
                statistics.add_logits(logits.detach(), targets[piece])
            if weights is not None:
                gradients += torch.autograd.grad(loss, own, weights[piece].to(loss.dtype))
        losses.append(loss.detach())
    return torch.cat(losses), torch.cat(gradients)


Way = Callable[[nn.Module, Inputs], Decoded]


@torch.no_grad()
def find_way(model: nn.Module, ids: Tensor) -> Way:
    """Find how far a model can run before it computes logits: to its head, to the end of its decoder, or neither.

    Args:
        model: a transformers model, wrapped by PEFT or not.
        ids: (1, T) tokens for a trial run.
    """
    inner = unwrapped(model)
    head, calls = inner.get_output_embeddings(), dict[nn.Module, tuple[Any, Any]]()

    def see(module: nn.Module, args: Any, output: Any) -> None:
        calls.pop(module, None)
        calls[module] = args, output  # the last module to return is the outermost

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
    """Run a model up to its head, if its logits are the output of one linear map, without a cap or a scale."""
    head, given = unwrapped(model).get_output_embeddings(), list[Tensor]()
    with contextlib.ExitStack() as stack:
        stack.callback(head.register_forward_pre_hook(lambda module, args: given.append(args[0])).remove)
        stack.enter_context(forward_replaced(head, lambda hidden: head.weight.new_zeros(1, 1, head.out_features)))
        model(**inputs.arguments)
    hidden = at_positions(given[0].flatten(0, -2), inputs.index).to(head.weight.device)
    return Decoded(hidden, inputs.targets, head, head.out_features)


def to_body(body: nn.Module, model: nn.Module, inputs: Inputs) -> Decoded:
    """Run a model to the end of `body`, its decoder; the head runs on one position only."""
    found: list[Any] = []
    with contextlib.ExitStack() as stack:
        stack.callback(body.register_forward_hook(lambda module, args, output: found.append(output)).remove)
        stack.enter_context(head_only_at(torch.zeros_like(inputs.index[:1]), inputs.shape.numel(), model))
        logits = model(**inputs.arguments).logits
    hidden, kind = at_positions(found[0][0].flatten(0, 1), inputs.index), type(found[0])
    logits_of = partial(_logits_of, model, body, kind, inputs.arguments["input_ids"][:1, :1])
    head = unwrapped(model).get_output_embeddings()
    linear = head if type(head) is nn.Linear and len(head.weight) == logits.shape[-1] else None
    return Decoded(hidden, inputs.targets, logits_of, logits.shape[-1], linear)


def to_logits(model: nn.Module, inputs: Inputs) -> Decoded:
    """Run a model to its logits."""
    logits = learnt_logits(model, inputs)
    return Decoded(logits, inputs.targets, lambda own: own, logits.shape[-1])


def _gives(head: nn.Linear, output: Tensor, logits: Tensor) -> bool:
    """Whether the logits are the head's output, and the whole weight of the head is in memory."""
    in_memory = head.weight.device.type != "meta" and len(head.weight) == logits.shape[-1]
    return in_memory and output.shape == logits.shape and torch.equal(output.to(logits), logits)


def _logits_of(model: nn.Module, body: nn.Module, kind: type, some_ids: Tensor, hidden: Tensor) -> Tensor:
    """The (n, V) logits of (n, H) hidden states, by the model's own forward with these as the decoder's output."""
    with forward_replaced(body, lambda *args, **kwargs: kind(last_hidden_state=hidden[None])):
        return model(input_ids=some_ids, use_cache=False).logits.flatten(0, -2)


@torch.no_grad()
def is_causal(model: nn.Module, ids: Tensor) -> bool:
    """Whether no position depends on a later token or on the number of tokens; tested on (1, T) tokens."""
    if ids.shape[1] < 2 or _positions_depend_on_length(unwrapped(model).config.to_dict()):
        return False
    other = ids.clone()
    other[0, -1] = ids[0, 0] if ids[0, 0] != ids[0, -1] else (ids[0, -1] - 1).abs()
    before, after = model(input_ids=torch.cat([ids, other]), use_cache=False).logits[:, :-1]
    return same_but_for(8 * torch.finfo(at_least_float32(before).dtype).eps, before, after)


@torch.no_grad()
def mixes_samples(model: nn.Module, tolerance: float) -> bool:
    """Whether a sample of a padding-free row sees those before it; tested on two samples.

    Args:
        model: a causal language model.
        tolerance: the relative difference from which on two outputs differ.
    """
    half = PROBE // 2
    first, other, second = torch.arange(3 * half, device=next(model.parameters()).device).view(3, half)
    position_ids = torch.arange(half, device=first.device).repeat(2)[None]
    try:
        with evaluating(model):
            alike = [
                model(input_ids=torch.cat([each, second])[None], position_ids=position_ids, use_cache=False).logits
                for each in (first, other)
            ]
    except Exception:  # a model that cannot run on this cannot train on it either, and says so better
        return False
    return not same_but_for(tolerance, *(logits[:, half:] for logits in alike))


def _positions_depend_on_length(settings: Any) -> bool:
    """Whether the configuration has rotary embeddings that change with the length of the longest row of a batch."""
    if not isinstance(settings, Mapping):
        return False
    kinds = [settings.get(name) for name in ("rope_type", "type")]
    return "dynamic" in kinds or "longrope" in kinds or any(map(_positions_depend_on_length, settings.values()))
