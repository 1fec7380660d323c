"""What a model's distribution at every learnt token says beyond the loss, from the vocabulary's tiles.

Knows logits, not models, samples or files. With m the largest logit so far and d = l - m, these sums leave the target y
out, as those of `head.py` do, and shrink when m rises by s:

    r = sum e^d           the loss's own
    u = sum e^d d         becomes e^-s (u - s r)
    q = sqrt(sum e^2d)    becomes e^-s q

The largest logits so far, the target's among them, are kept as they are. In the end, with z = r + e^d_y: entropy
log z - (u + e^d_y d_y) / z, and ||p - y|| = sqrt(r^2 + q^2) / z. Nothing is subtracted from 1, so these are accurate
for a target that is almost certain. The gradient of the head's weight, of which a row has one, is in
`head_gradient.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from .head_gradient import SECOND_RUN, RowGrams, Tile, norms_in_tiles, runs_of_rows
from .modes import at_least_float32

ENTROPY, ERROR, RANK = "entropy", "error", "rank"
TOP_ENTROPY = "top_entropy"
TOP = 20  # of so many most probable tokens is TOP_ENTROPY
HEAD_GRADIENT = "head_gradient"
OTHERS = "others"  # the logarithm of the sum of e^l without the target, where HEAD_GRADIENT is wanted
LOWEST = -1e4  # stands for a logit of -inf below the largest: its exponential is 0 in every precision
ROUNDINGS = 2  # of a product, in units of eps times the norms of its factors


class TokenStatistics:
    """Collects statistics of N learnt tokens while `Decoded` computes their losses.

    Args:
        wanted: the statistics to compute: `"entropy"`, `"error"`, `"rank"`, `"top_entropy"`, `"head_gradient"`.
        counts: the number of learnt tokens of each of the B rows, for `"head_gradient"`.

    They are, (N,) each but the last:
        losses: as the loss, but with all digits of a small one; always there.
        entropy: in nats.
        error: the L2 norm of `p - y`, with y one-hot.
        rank: 1 plus the number of more probable tokens; equally probable ones do not count.
        top_entropy: the entropy of the 20 most probable tokens, their probabilities scaled to the sum 1, in nats.
        head_gradient: (B,), the norm of the gradient of a row's mean loss with respect to the head's weight.
    """

    def __init__(self, wanted: Collection[str], counts: Sequence[int] = ()) -> None:
        self.wanted = frozenset(wanted)
        self._found: dict[str, list[Tensor]] = {}
        self._counts = counts
        self._norms: dict[int, Tensor] = {}

    def of(self, name: str) -> Tensor:
        """The statistic of this name; empty if it is not wanted."""
        if name == HEAD_GRADIENT in self.wanted:
            zero = torch.zeros((), dtype=torch.float64)
            return torch.stack([self._norms.get(row, zero).cpu() for row in range(len(self._counts))])
        return torch.cat(self._found.get(name, [torch.empty(0)]))

    def add(self, found: dict[str, Tensor]) -> None:
        """Add further tokens: each statistic, (n,)."""
        for name, values in found.items():
            self._found.setdefault(name, []).append(values)

    @torch.no_grad()
    def add_logits(self, logits: Tensor, targets: Tensor) -> None:
        """Add tokens whose logits are all there.

        Args:
            logits: (n, V), at least float32.
            targets: (n,), the target tokens.
        """
        place = targets[:, None]
        of_target, largest = logits.gather(1, place), logits.amax(1, keepdim=True)
        sums = RunningSums(self.wanted, of_target)
        sums.count(logits, place, torch.ones_like(place, dtype=torch.bool))
        below = logits - largest
        terms = below.exp().scatter_(1, place, 0)
        total = terms.sum(1, keepdim=True)
        sums.add(below, terms)
        self.add(sums.finish(total, largest, of_target))

    def grams(self, like: Tensor, width: int, dtype: torch.dtype) -> RowGrams | None:
        """What sums up the products of a row's tokens along the tiles; None if it is not needed.

        Args:
            like: (N, 1), a tensor of the kind to compute with.
            width: H; a row of far more tokens is left to `second_run`.
            dtype: the precision of the products.
        """
        runs = runs_of_rows(self._counts) if HEAD_GRADIENT in self.wanted else {}
        short = {row: run for row, run in runs.items() if run.stop - run.start <= SECOND_RUN * width}
        return RowGrams(short, like, dtype) if short else None

    @torch.no_grad()
    def second_run(self, hidden: Tensor, tile: Tile, sizes: tuple[int, int], targets: Tensor) -> None:
        """Run over the tiles again for the norms of the rows that have none yet, if any.

        Args:
            hidden: (N, H), the input of the head, in whose losses the others were collected.
            tile, sizes, targets: as for `norms_in_tiles`, for all N tokens.
        """
        runs = runs_of_rows(self._counts) if HEAD_GRADIENT in self.wanted else {}
        runs = {row: run for row, run in runs.items() if row not in self._norms}
        if not runs:
            return
        index = torch.cat([torch.arange(run.start, run.stop) for run in runs.values()]).to(hidden.device)
        counts = [run.stop - run.start for run in runs.values()]
        others, rest = self.of(OTHERS)[index, None], self.rest[index, None]
        norms = norms_in_tiles(hidden[index], tile, sizes, targets[index], others, rest, counts)
        self.add_norms(dict(zip(runs, norms, strict=True)))

    def add_norms(self, norms: dict[int, Tensor]) -> None:
        """Add the norms of some rows, by their numbers."""
        self._norms |= norms

    @property
    def rest(self) -> Tensor:
        """1 minus the probability of each token, (N,), with all digits of a small one."""
        return -torch.expm1(-self.of("losses"))


class RunningSums:
    """The sums over the vocabulary, a tile at a time.

    Args:
        wanted: as for `TokenStatistics`.
        bound: (n, 1), the logit above which a token is more probable than the target.
        grams: what sums up the products of a row's tokens, if that is needed.
    """

    def __init__(self, wanted: Collection[str], bound: Tensor, grams: RowGrams | None = None) -> None:
        self._wanted, self._bound, self.grams = wanted, bound, grams
        self._above, self._weighted, self._norm = (torch.zeros_like(bound) for _ in range(3))
        self._top = bound.new_empty(len(bound), 0)

    def count(self, logits: Tensor, place: Tensor, inside: Tensor) -> None:
        """Count the tokens above the bound, without the target, and remember the largest logits.

        Args:
            logits: (n, v), those of a tile.
            place: (n, 1), the position of the target in the tile.
            inside: (n, 1) bool, whether it is there.
        """
        if RANK in self._wanted:
            above = torch.gt(logits, self._bound, out=torch.empty_like(logits))  # numbers add up faster than bools
            above.scatter_(1, place, above.gather(1, place).masked_fill(inside, 0))
            self._above += above.sum(1, keepdim=True)
        if TOP_ENTROPY in self._wanted:
            best = torch.cat([self._top, logits.topk(min(TOP, logits.shape[1]), sorted=False).values], 1)
            self._top = best.topk(min(TOP, best.shape[1]), sorted=False).values

    def shrink(self, risen: Tensor, total: Tensor) -> None:
        """Let the largest logit rise.

        Args:
            risen: (n, 1), how far; infinite before the first tile.
            total: (n, 1), the sum of the terms until then.
        """
        shrunk = (-risen).exp()
        if ENTROPY in self._wanted:
            moved = torch.where(total > 0, risen * total, torch.zeros_like(total))
            self._weighted = (self._weighted - moved).mul_(shrunk)
        self._norm.mul_(shrunk)
        if self.grams is not None:
            self.grams.shrink(shrunk)

    def add(self, below: Tensor, terms: Tensor) -> None:
        """Add a tile: its logits below the largest, which are overwritten, and their exponentials, (n, v) each.

        The exponential of the target is 0.
        """
        if ENTROPY in self._wanted:
            self._weighted += torch.linalg.vecdot(terms, below.clamp_(min=LOWEST))[:, None]
        if ERROR in self._wanted:
            self._norm = torch.hypot(self._norm, torch.linalg.vector_norm(terms, dim=1, keepdim=True))
        if self.grams is not None:
            self.grams.add(terms)

    def finish(self, total: Tensor, largest: Tensor, logit: Tensor) -> dict[str, Tensor]:
        """Each statistic, (n,).

        Args:
            total: (n, 1), the sum of all terms without the target's.
            largest: (n, 1), the largest logit.
            logit: (n, 1), the target's.
        """
        target_below = logit - largest
        of_target = target_below.exp()
        whole = total + of_target
        log_whole = torch.where(target_below == 0, total.log1p(), whole.log())
        found = {"losses": log_whole - target_below}
        if ENTROPY in self._wanted:
            found[ENTROPY] = log_whole - (self._weighted + of_target * target_below) / whole
        if ERROR in self._wanted:
            found[ERROR] = torch.hypot(total, self._norm) / whole
        if RANK in self._wanted:
            found[RANK] = 1 + self._above
        if TOP_ENTROPY in self._wanted:
            found[TOP_ENTROPY] = entropy_of(self._top)
        if HEAD_GRADIENT in self._wanted:
            found[OTHERS] = total.clamp(min=torch.finfo(total.dtype).tiny).log() + largest
        return {name: values[:, 0] for name, values in found.items()}


def entropy_of(logits: Tensor) -> Tensor:
    """The entropy of the distribution of (n, k) logits, (n, 1) in nats, with all digits of a small one."""
    below = logits.sort(1, descending=True).values
    below = (below - below[:, :1]).clamp_(min=LOWEST)
    terms = below.exp()
    rest = terms[:, 1:].sum(1, keepdim=True)
    return rest.log1p() - torch.linalg.vecdot(terms, below)[:, None] / (1 + rest)


def bound_of(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """The target's logit, (N, 1), as a tile of the vocabulary has it, and a rounding above that.

    Tokens that only the rounding of different tiles tells from the target are not above it.

    Args:
        hidden: (N, H), the input of the head, in the precision of the product.
        head: the linear map to the logits.
        targets: (N,), the target tokens.
    """
    own, weight = hidden.double(), head.weight.detach()[targets].to(hidden.dtype).double()
    logit = torch.linalg.vecdot(own, weight).to(hidden.dtype)
    if head.bias is not None:
        logit += head.bias.detach()[targets]
    logit = at_least_float32(logit)
    sizes = torch.linalg.vector_norm(own, dim=1) * torch.linalg.vector_norm(weight, dim=1)
    return (logit + ROUNDINGS * torch.finfo(logit.dtype).eps * sizes.to(logit.dtype))[:, None]
