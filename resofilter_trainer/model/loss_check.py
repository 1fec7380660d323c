"""What each sample weighs in the loss that is backpropagated. Knows a model's outputs and gradients, no trainer.

    model -> logits, log-probabilities -> [any loss] -> backward -> their gradient -> the weight of each token

If the loss is a sum of the tokens' cross entropies, each times a weight w, its gradient at a token's logits is
`w * (softmax - onehot)`, and at the token's log-probability `-w`. So that gradient shows w, whatever computes the loss.
Every learnt token is compared at its target, and a few tokens of each sample at all logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .float32 import HALF
from .gradients import Segment
from .losses import IGNORE
from .modes import at_least_float32

PER_SAMPLE, PER_BATCH = 4, 32  # tokens that are compared at all logits


@dataclass(frozen=True)
class TokenLoss:
    """The loss of one token, as the trainer announces it.

    Attributes:
        smoothing: the label smoothing factor.
        by_probability: whether the cross entropy is multiplied by the token's probability, as a constant (DFT).
    """

    smoothing: float = 0.0
    by_probability: bool = False


@dataclass(frozen=True)
class Verdict:
    """How the loss of one micro-batch differs from the expected one.

    Attributes:
        own: (N,) bool, the samples whose tokens have another weight than expected.
        ratio: (N,) that weight, over the expected one.
        expected: (N,) the expected weight.
        sums: (N,) the sum of the losses of each sample's tokens, in their announced form; NaN if the output of the
            model does not show them.
        fault: why the loss is no weighted sum of the samples' token losses; None where it is one.
        sample: the sample in which this was seen; None if it concerns the whole micro-batch.
    """

    own: np.ndarray
    ratio: np.ndarray
    expected: np.ndarray
    sums: np.ndarray
    fault: str | None = None
    sample: int | None = None


@dataclass(frozen=True)
class Places:
    """The M learnt tokens of a batch.

    Attributes:
        row, column: (M,) where each is predicted: the row, and the position before the token.
        sample: (M,) the sample of each.
        picked: (K,) the tokens to compare at all logits, as indices into the M: the first, the last and some between.
    """

    row: Tensor
    column: Tensor
    sample: Tensor
    picked: Tensor

    def at(self, tensor: Tensor) -> Places:
        """The same on the device of a tensor."""
        return Places(*(each.to(tensor.device) for each in (self.row, self.column, self.sample, self.picked)))

    @classmethod
    def of(cls, labels: Tensor, segments: Sequence[Segment]) -> Places:
        """The places of the learnt tokens of some samples, given `labels` (B, T)."""
        learnt = (labels != IGNORE).cpu().numpy()
        learnt[:, 0] = False
        per_sample = min(max(PER_BATCH // max(len(segments), 1), 1), PER_SAMPLE)
        found, picked, count = [np.empty((3, 0), int)], [np.empty(0, int)], 0
        for sample, where in enumerate(segments):
            tokens = learnt[where.row, where.tokens].nonzero()[0] + where.tokens.start
            found.append(np.stack([np.full_like(tokens, where.row), tokens - 1, np.full_like(tokens, sample)]))
            few = np.linspace(0, len(tokens) - 1, min(len(tokens), per_sample)).round().astype(int)
            picked.append(few + count)
            count += len(tokens)
        return cls(*(torch.from_numpy(each).to(labels.device) for each in (*np.hstack(found), np.hstack(picked))))


class LossCheck:
    """Finds what each sample of a micro-batch weighs in the loss, while it is backpropagated.

    Of the device, only the labels are read before `verdicts`.

    Args:
        input_ids: (B, T), the input of the model.
        labels: (B, T), -100 for tokens that are not learnt.
        segments: the N samples.
        expected: the expected weight of every token's loss, or (N,) of the tokens of each sample.
        form: the loss of one token.

    Attributes:
        own: (N,) bool, the samples whose tokens have another weight; None before the backward has passed the output.
        weight: (N,) float64, the weight of the tokens of each sample: the expected one unless it is another.
        aux_weight: the weight of the model's auxiliary loss (a router's); None where the loss leaves it out.
    """

    def __init__(
        self, input_ids: Tensor, labels: Tensor, segments: Sequence[Segment], expected: float | Tensor, form: TokenLoss
    ) -> None:
        self._ids, self._labels, self._form = input_ids, labels, form
        self._places, self._count = Places.of(labels, segments), len(segments)
        as_tensor = torch.as_tensor(expected, dtype=torch.float64, device=labels.device)
        self._expected = as_tensor.expand(self._count)
        self.own: Tensor | None = None
        self.weight = self._expected
        self.aux_weight: Tensor | None = None
        self._aux: Tensor | None = None
        self._found = torch.zeros(4, self._count, dtype=torch.float64, device=labels.device)
        self._outside = self._expected.new_zeros(())
        self._sums: Tensor | None = None  # (N,) of each sample's token losses
        self._backpropagated: Tensor | None = None
        self._value_tolerance = 1e-3
        self._watched = False

    def watch(
        self, output: Any, token_losses: Tensor | None, divisor: Tensor | float | None, coarse: bool = False
    ) -> None:
        """Watch the gradient at the output of the model's forward.

        Args:
            output: the output.
            token_losses: (B, T - 1) the cross entropy of every token, if the output shows it.
            divisor: the number of tokens by which the model divides its own loss; by default those of the micro-batch.
            coarse: whether a fused loss, of which the output shows no logits, was computed in half precision.
        """
        self._watched = True
        self._value_tolerance = 2e-2 if coarse else 1e-3
        places, log_probs, logits = self._places, field_of(output, "log_probs"), field_of(output, "logits")
        if not isinstance(logits, Tensor):  # unsloth's fused loss returns an object in their place
            logits = None
        losses = None if token_losses is None else token_losses[places.row, places.column]
        aux = field_of(output, "aux_loss")
        if isinstance(aux, Tensor) and aux.requires_grad:
            self._aux = aux.detach()
            _on_gradient(aux, self._at_aux)
        if losses is not None and (aux is None or self._aux is not None):  # else its weight is not to be seen
            self._sums = self._per_sample(self._form_of(losses, logits), places.sample)
        if losses is not None and log_probs is not None:
            self._value_tolerance = 2e-2 if log_probs.dtype in HALF else self._value_tolerance  # FSDP2 casts outputs
            _on_gradient(log_probs, partial(self._at_log_probs, losses))
        elif losses is not None and logits is not None:
            there = places.at(logits)
            some = logits.detach()[there.row[there.picked], there.column[there.picked]]
            _on_gradient(logits, partial(self._at_logits, some, losses))
            self._value_tolerance = 2e-2 if logits.dtype in HALF else 1e-3
        loss, counted = field_of(output, "loss"), len(places.row) if divisor is None else divisor
        if isinstance(loss, Tensor) and loss.dim() == 0:
            _on_gradient(loss, partial(self._at_loss, counted))

    def backpropagates(self, loss: Tensor) -> None:
        """Note a loss whose gradient is going to be computed; several of one micro-batch add up."""
        self._backpropagated = loss if self._backpropagated is None else self._backpropagated + loss
        if loss.dtype in HALF:
            self._value_tolerance = 2e-2

    def _form_of(self, losses: Tensor, logits: Tensor | None) -> Tensor:
        """(M,) the loss of each token in its announced form, from its cross entropy."""
        form, places = self._form, self._places
        if form.by_probability:
            return losses * (-losses).exp()
        if not form.smoothing or logits is None:
            return losses
        there = places.at(logits)
        own = at_least_float32(logits.detach()[there.row, there.column])
        above_mean = own.gather(1, self._targets.to(own.device)[:, None])[:, 0] - own.mean(1)
        return losses + form.smoothing * above_mean.to(losses)

    @property
    def _targets(self) -> Tensor:
        """(M,) the learnt tokens."""
        return self._labels[self._places.row, self._places.column + 1]

    def _at_log_probs(self, losses: Tensor, gradient: Tensor) -> None:
        """The gradient at (B, T - 1) log-probabilities."""
        there, sample, factor = self._places.at(gradient), self._places.sample, torch.ones_like(losses)
        if self._form.by_probability:
            factor = (-losses).exp()
        own, known = -gradient[there.row, there.column].to(losses), factor > 1e-25
        weight = self._pooled(own * factor, factor**2, known, sample)
        apart = _over(own / factor - weight[sample], weight[sample] * _tolerance(gradient)[0])
        self._conclude(weight, gradient, self._largest(apart.where(known, 0.0), sample))

    def _at_logits(self, logits: Tensor, losses: Tensor, gradient: Tensor) -> None:
        """The gradient at (B, T, V) logits, given the (K, V) logits of the picked tokens."""
        places, there, size = self._places, self._places.at(gradient), gradient.shape[-1]
        relative, absolute = _tolerance(gradient)
        sample, target = places.sample[places.picked], self._targets[places.picked][:, None]
        own = at_least_float32(gradient[there.row[there.picked], there.column[there.picked]]).to(losses.device)
        others = at_least_float32(logits).to(losses.device).softmax(-1) - self._form.smoothing / size
        others = others.scatter(1, target, 0.0)
        direction = others.scatter(1, target, -others.sum(1, keepdim=True))
        products, squares = (own * others).sum(1).double(), (others**2).sum(1).double()
        known = squares > 1e-24  # otherwise a token that is too certain for float32
        weight = self._pooled(products, squares, known, sample)
        of_token = (products / squares).where(known, weight[sample])
        away = (own - of_token[:, None].to(own) * direction).norm(dim=1)
        away = _over(away, of_token * (relative * direction.norm(dim=1) + absolute))
        apart = self._largest(_over(of_token - weight[sample], weight[sample] * relative), sample)

        at_target = gradient[there.row, there.column, self._targets.to(gradient.device)].to(losses)
        expected, of_all = torch.expm1(-losses) + self._form.smoothing * (1 - 1 / size), weight[places.sample]
        missed = _over(at_target - of_all * expected, of_all * (relative * expected.abs() + absolute))
        apart = torch.maximum(apart, self._largest(missed, places.sample))
        self._conclude(weight, gradient, apart, self._largest(away, sample))
        self._outside = self._not_learnt(gradient)

    def _not_learnt(self, gradient: Tensor) -> Tensor:
        """The largest gradient at the next token of a position that is not learnt, over what is tolerated."""
        following, learnt = self._ids[:, 1:, None].to(gradient.device), self._labels[:, 1:] != IGNORE
        found = gradient[:, :-1].gather(2, following)[..., 0].abs().masked_fill(learnt.to(gradient.device), 0.0)
        largest = found.max() if found.numel() else found.new_zeros(())
        return _over(largest.to(self._expected), self._expected.abs().max() * 1e-3)

    def _at_loss(self, divisor: Tensor | float, gradient: Tensor) -> None:
        """The gradient at the model's own loss, if nothing else is known; otherwise that is found after this."""
        nothing = self._expected.new_zeros(self._count)
        self._conclude((gradient.to(nothing) / divisor).expand(self._count), gradient, nothing)

    def _at_aux(self, gradient: Tensor) -> None:
        """The gradient at the model's auxiliary loss."""
        self.aux_weight = gradient.double()

    def _conclude(self, weight: Tensor, gradient: Tensor, apart: Tensor, away: Tensor | None = None) -> None:
        weight, expected = weight.to(self._expected.device), self._expected
        differs = _over(weight - expected, expected * _tolerance(gradient)[0])
        self.own = differs > 1
        self.weight = weight.where(self.own, expected)
        away = torch.zeros_like(apart) if away is None else away
        self._found = torch.stack([differs, apart, away, weight / expected])

    def _pooled(self, products: Tensor, squares: Tensor, known: Tensor, sample: Tensor) -> Tensor:
        """(N,) the weight of each sample's tokens, by least squares over those that are known."""
        products, squares = (self._per_sample(each.where(known, 0.0), sample) for each in (products, squares))
        return (products / squares).where(squares > 0, self._expected)

    def _per_sample(self, values: Tensor, sample: Tensor) -> Tensor:
        return self._expected.new_zeros(self._count).index_add(0, sample, values.to(self._expected))

    def _largest(self, values: Tensor, sample: Tensor) -> Tensor:
        zeros = self._expected.new_zeros(self._count)
        return zeros.scatter_reduce(0, sample, values.to(zeros), "amax")

    def numbers(self) -> Tensor:
        """(6 N + 4,) what `verdicts` reads: per sample, then of the whole micro-batch."""
        sums = self._expected.new_full((self._count,), torch.nan) if self._sums is None else self._sums
        value = self._expected.new_zeros(()) if self._backpropagated is None else self._backpropagated
        value, terms = value.to(self._expected), self._sums
        if self._backpropagated is None or terms is None:
            terms = value[None]
        else:
            terms = self.weight * terms
            if self._aux is not None and self.aux_weight is not None:
                terms = torch.cat([terms, (self.aux_weight * self._aux).to(terms)[None]])
        apart = _over(value - terms.sum(), terms.abs().sum() * self._value_tolerance)
        whole = [self._outside.to(value), apart, value, terms.sum()]
        return torch.cat([self._found.flatten(), self._expected, sums, torch.stack(whole)])

    def verdict(self, numbers: np.ndarray) -> Verdict:
        """The verdict, given `numbers` on the CPU."""
        differs, apart, away, ratio, announced, sums = numbers[:-4].reshape(6, -1)
        outside, off, value, expected = numbers[-4:]
        own, sample = differs > 1, None
        if not len(self._places.row) or not self._watched:  # without a forward, the recorder itself refuses
            return Verdict(np.zeros(self._count, bool), np.ones(self._count), announced, sums)
        kinds = (
            (away > 1, "the gradient at a token's logits is not that of its cross entropy"),
            (apart > 1, "tokens of one row have different weights"),
            (own & (np.abs(ratio) < 1e-6), "a row has no weight in it"),
        )
        fault = next((said for seen, said in kinds if seen.any()), None)
        if fault is not None:
            sample = int(next(seen for seen, said in kinds if said == fault).argmax())
        elif self.own is None:
            fault = "it is not computed from the logits or the loss that the model returns"
        elif outside > 1:
            fault = "tokens whose label is -100 have a loss"
        elif off > 1:
            fault = f"it is {value:.6g} where its tokens' losses make {expected:.6g}, so it has other terms"
        return Verdict(own, ratio, announced, sums, fault, sample)


def verdicts(checks: Sequence[LossCheck]) -> list[Verdict]:
    """How the losses of some micro-batches differ from what is expected; reads from the device once."""
    if not checks:
        return []
    numbers = [each.numbers() for each in checks]
    read = np.split(torch.cat(numbers).cpu().numpy(), np.cumsum([len(each) for each in numbers])[:-1])
    return [each.verdict(own) for each, own in zip(checks, read, strict=True)]


def field_of(output: Any, name: str) -> Any:
    """A field of a model's output, which may be a dict; None where it has none."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _over(value: Tensor, tolerated: Tensor) -> Tensor:
    """How many times the tolerated difference a difference is; NaN, which is above nothing, where either is."""
    return value.abs() / tolerated.abs()


def _tolerance(gradient: Tensor) -> tuple[float, float]:
    """The relative error of a weight, and the absolute one of a probability, from which on they differ."""
    return (5e-2, 1e-2) if gradient.dtype in HALF else (2e-3, 1e-5)


def _on_gradient(tensor: Tensor, hook: Callable[[Tensor], None]) -> None:
    """Call a function with the gradient at a tensor, or at what it was converted from.

    Under autocast, a model's output is a float32 copy, and the model's own loss may be computed from the original.
    """
    node, place = tensor.grad_fn, tensor.output_nr
    while node is not None and node.name() == "ToCopyBackward0":
        node, place = node.next_functions[0]
    if node is None:
        return
    dtype = tensor.dtype  # a hook that knew the tensor would keep its graph: a cycle that Python cannot see

    @torch.no_grad()
    def see(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[place]
        if gradient is not None:
            hook(gradient.to(dtype) if dtype in HALF else gradient)  # it is no finer than the tensor's

    node.register_prehook(see)
