"""The norm of the gradient of the head's weight, for every row, without the gradient. Knows logits, no model or batch.

With h_t the head's input at the T learnt tokens of a row, and e_t = p_t - y_t the loss gradient at its output,

    ||mean_t e_t h_t^T||^2 = 1 / T^2 sum_st (e_s . e_t) (h_s . h_t)
    e_s . e_t = r_s r_t (q_s . q_t - q_s[y_t] - q_t[y_s] + [y_s = y_t])

where r_t = 1 - p_t[y_t], and q_t is p_t without the target, divided by r_t, so that nothing is subtracted from 1. The
products of q are summed up tile by tile while the losses are computed, in T / H of the time of the head's product. A
row of more than 2 H tokens takes a second run over the tiles instead, as does a head that caps or scales its logits:
there e_t is known, with the derivative of the cap, and the sum is that of (e_s . e_t) or of the gradient's squares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .modes import at_least_float32, forward_replaced

BLOCK_ENTRIES = 1 << 20  # of a product of a row's tokens that is in memory in float64, 8 MB
SECOND_RUN = 2  # a row of more than so many times H tokens takes one

# From the positions, (n, H), and a tile of the vocabulary to the input of the linear map there, its output for the
# tile, (n, v), and the logits of the tile, with a graph from the output to them unless they are the output.
Tile = Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor]]


def runs_of_rows(counts: Sequence[int]) -> dict[int, slice]:
    """The learnt tokens of each row, by its number, where there are any; all rows' follow each other."""
    ends = torch.tensor([0, *counts]).cumsum(0).tolist()
    return {row: slice(*ends[row : row + 2]) for row, count in enumerate(counts) if count}


class RowGrams:
    """The products of q of all pairs of a row's tokens, up to a factor for each token that keeps them from underflow.

    Args:
        runs: the tokens of each row to measure.
        like: (N, 1), a tensor of the kind to compute with.
        dtype: the precision of the products.
    """

    def __init__(self, runs: Mapping[int, slice], like: Tensor, dtype: torch.dtype) -> None:
        self._grams = {row: like.new_zeros(run.stop - run.start, run.stop - run.start) for row, run in runs.items()}
        self._runs, self._dtype = runs, dtype
        self._peak = torch.zeros_like(like)  # the largest term so far

    def shrink(self, shrunk: Tensor) -> None:
        """Let all terms so far shrink by the factors (N, 1)."""
        self._peak.mul_(shrunk)

    def add(self, terms: Tensor) -> None:
        """Add the terms of a tile, (N, v), in which the targets are 0."""
        peak = torch.maximum(self._peak, terms.amax(1, keepdim=True))
        least = peak.clamp(min=torch.finfo(peak.dtype).tiny)
        earlier = self._peak / least
        for row, run in self._runs.items():
            own, gram, shrunk = (terms[run] / least[run]).to(self._dtype), self._grams[row], earlier[run]
            gram.mul_(shrunk).mul_(shrunk.T)
            if own.dtype == gram.dtype:
                gram.addmm_(own, own.T)
            else:
                gram.add_(own @ own.T)
        self._peak = peak

    def norms(
        self, hidden: Tensor, head: nn.Linear, targets: Tensor, largest: Tensor, total: Tensor, rest: Tensor
    ) -> dict[int, Tensor]:
        """Each row's norm, a float64 scalar.

        Args:
            hidden: (N, H), the head's input.
            head: the linear map to the logits.
            targets: (N,), the target tokens.
            largest, total: (N, 1), the largest logit, and the sum of the terms below it without the target's.
            rest: (N, 1), r of each token.
        """
        total = total.clamp(min=torch.finfo(total.dtype).tiny)
        factor = (self._peak / total).double()

        def products(row: int, run: slice, part: slice) -> Tensor:
            own, y = slice(run.start + part.start, run.start + part.stop), targets[run]
            logits = hidden[own] @ head.weight.detach()[y].to(hidden.dtype).T  # [s, t]: of token s for the target of t
            logits = at_least_float32(logits if head.bias is None else logits + head.bias.detach()[y])
            of_target = ((logits - largest[own]).exp() / total[own]).double()
            same = targets[own, None] == y
            # -2 q_s[y_t] stands for both terms, which the symmetric sum takes twice
            return self._grams[row][part].double() * factor[own] * factor[run].T + torch.where(same, 1, -2 * of_target)

        return {row: norm_of(partial(products, row, run), rest[run], hidden[run]) for row, run in self._runs.items()}


def norm_of(products: Callable[[slice], Tensor], rest: Tensor, inputs: Tensor) -> Tensor:
    """A row's norm, a float64 scalar.

    Args:
        products: a function to some rows of e_s . e_t / (r_s r_t), (n, T) float64.
        rest: (T, 1), r.
        inputs: (T, H), the head's input.
    """
    inputs, rest, count = at_least_float32(inputs), rest.double(), len(inputs)
    squared, size = rest.new_zeros(()), max(BLOCK_ENTRIES // count, 1)
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        squared += (products(part) * rest[part] * rest.T * (inputs[part] @ inputs.T).double()).sum()
    return squared.clamp(min=0).sqrt() / count


def norms_in_tiles(
    hidden: Tensor,
    tile: Tile,
    sizes: tuple[int, int],
    targets: Tensor,
    others: Tensor,
    rest: Tensor,
    counts: Sequence[int],
) -> list[Tensor]:
    """The norms of rows by a second run over the vocabulary, a float64 scalar each.

    Args:
        hidden: (n, H), the positions of these rows, one row after another.
        tile: a function to the logits of a tile.
        sizes: the sizes of the vocabulary and of a tile.
        targets: (n,), the target tokens.
        others: (n, 1), the logarithm of the sum of the exponentials of all logits but the target's.
        rest: (n, 1), r of each token.
        counts: the number of tokens of each row.
    """
    vocabulary, size = sizes
    sums: list[Tensor] = [hidden.new_zeros((), dtype=torch.float64) for _ in counts]
    inputs, tiny = hidden, torch.finfo(rest.dtype).tiny
    by_gram = [count <= hidden.shape[1] for count in counts]
    for start in range(0, vocabulary, size):
        inputs, output, logits = tile(hidden, slice(start, start + size))
        error = (at_least_float32(logits.detach()) - others).exp()  # over r
        place = targets[:, None] - start
        inside, place = (place >= 0) & (place < error.shape[1]), place.clamp(0, error.shape[1] - 1)
        error.scatter_(1, place, error.gather(1, place).masked_fill(inside, -1))
        if logits is not output:
            (error,) = torch.autograd.grad(logits, output, error.to(logits.dtype))
            error = at_least_float32(error).flatten(0, -2)
        rows = zip(error.split(counts), rest.split(counts), at_least_float32(inputs).split(counts), strict=True)
        for row, (own, own_rest, own_inputs) in enumerate(rows):
            if by_gram[row]:
                sums[row] = sums[row] + (own @ own.T).double()
            else:
                gradient = (own * (own_rest / own_rest.max().clamp(min=tiny))).T @ own_inputs
                sums[row] += gradient.double().square().sum()
    found = []
    for row, (own_rest, own_inputs) in enumerate(zip(rest.split(counts), inputs.split(counts), strict=True)):
        whole = sums[row].sqrt() * own_rest.max() / len(own_rest)
        found.append(norm_of(sums[row].__getitem__, own_rest, own_inputs) if by_gram[row] else whole)
    return found


def linear_tile(head: nn.Linear, hidden: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """A `Tile` of logits that are the output of a linear map."""
    logits = _linear(head, hidden, part)
    return hidden, logits, logits


@torch.enable_grad()
def inner_tile(
    head: nn.Linear, logits_of: Callable[[Tensor], Tensor], hidden: Tensor, part: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """A `Tile` of logits that a model computes from the output of a linear map, one by one, as a cap or a scale does.

    Args:
        head: the linear map.
        logits_of: a function from (n, H) to all logits, (n, V), that calls the map.
        hidden, part: as for `Tile`.
    """
    seen: list[Tensor] = []

    def forward(inputs: Tensor) -> Tensor:
        output = _linear(head, inputs.detach(), part).detach().requires_grad_()
        seen.extend((inputs.detach(), output))
        return output.view_as(output)

    with forward_replaced(head, forward):
        logits = logits_of(hidden)
    inputs, output = seen
    return inputs.flatten(0, -2), output, logits


def _linear(head: nn.Linear, inputs: Tensor, part: slice) -> Tensor:
    bias = None if head.bias is None else head.bias.detach()[part]
    return F.linear(inputs, head.weight.detach()[part], bias)
