"""The entropy of the 20 most probable tokens, from the tiles of SFTTrainer's own losses. Knows TRL's kernel.

    hidden states -> [a tile of the vocabulary -> its logits -> SFTTrainer's sums | the largest logits so far] x tiles

so that a rule that needs it takes no second product with the head.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..config import InputError
from ..model.token_statistics import TOP, entropy_of

KERNEL = "trl.kernels.chunked_logprob"
FOLD, FOLD_ON_GPU = "_forward_tile", "_forward_kernel"  # what TRL does with a tile; the other one is for Triton
TILE, START = 0, 10  # the places of the tile, and of its first token in the vocabulary, among their arguments
BLOCK = 64  # logits whose largest is looked at first


class TopTiles:
    """Keeps the largest logits of each learnt token while SFTTrainer's model computes their losses.

    Args:
        vocabulary: the number of logits.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._kernel: Any = importlib.import_module(KERNEL)
        self._learnt: Tensor | None = None
        self._found: list[Tensor] = []  # (n, TOP) of each chunk of tokens
        self._seen = [0, 0]  # the tokens, and their logits

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which the tiles of a forward that `begin` has announced are seen."""
        kernel, fold, on_gpu = self._kernel, getattr(self._kernel, FOLD), getattr(self._kernel, FOLD_ON_GPU)
        setattr(kernel, FOLD, self._seeing(fold))
        setattr(kernel, FOLD_ON_GPU, _Launched(on_gpu, self._seeing))
        try:
            yield
        finally:
            setattr(kernel, FOLD, fold)
            setattr(kernel, FOLD_ON_GPU, on_gpu)
            self._learnt, self._found = None, []

    def begin(self, learnt: Tensor) -> None:
        """A forward begins, with `learnt` (B, T - 1) bool, the positions whose next token is learnt."""
        self._learnt, self._found, self._seen = learnt, [], [0, 0]

    def take(self) -> Tensor:
        """(N,) the entropy at the learnt positions, in nats, once the forward has ended.

        Raises:
            InputError: not all tiles were seen.
        """
        learnt, found, (tokens, logits) = self._learnt, self._found, self._seen
        self._learnt, self._found = None, []
        if learnt is None or not tokens or logits != tokens * self._vocabulary:
            raise InputError(
                "A token rule needs 'top_entropy', and the installed TRL computes its losses in another way than that "
                "which is known. Clean first (clean_dataset), or use TRL 1.16."
            )
        return entropy_of(torch.cat(found))[:, 0]

    def _seeing(self, fold: Callable[..., Any]) -> Callable[..., Any]:
        def see(*args: Any, **kwargs: Any) -> Any:
            if self._learnt is not None:
                self._see(self._learnt, args[TILE], args[START], kwargs)
            return fold(*args, **kwargs)

        return see

    @torch.no_grad()
    def _see(self, learnt: Tensor, tile: Tensor, start: int, transform: dict[str, Any]) -> None:
        """Look at a (n, v) tile; tiles of the same tokens follow each other, from the vocabulary's first token on."""
        first = self._seen[0] if start == 0 else self._seen[0] - len(tile)
        rows = None  # with Triton, TRL computes learnt tokens only
        if not self._kernel._use_triton(tile.device):
            rows = learnt.flatten()[first : first + len(tile)].nonzero()[:, 0].to(tile.device)
        best = _transformed(largest(tile, rows), transform)
        if start == 0:
            self._found.append(best)
            self._seen[0] += len(tile)
        else:
            both = torch.cat([self._found[-1], best], 1)
            self._found[-1] = both.topk(min(TOP, both.shape[1]), sorted=False).values
        self._seen[1] += tile.numel()


def largest(tile: Tensor, rows: Tensor | None) -> Tensor:
    """(m, k) the `TOP` largest logits, or as many as there are, of m rows of a (n, v) tile; of all where None is given.

    The largest are in the blocks whose own largest are so, and only those are sorted.
    """
    whole = tile.shape[1] // BLOCK * BLOCK
    if whole <= 2 * TOP * BLOCK:
        tile = tile if rows is None else tile[rows]
        return tile.topk(min(TOP, tile.shape[1]), sorted=False).values
    blocks = tile[:, :whole].unflatten(1, (-1, BLOCK))
    most = blocks.amax(2)
    rows = torch.arange(len(tile), device=tile.device) if rows is None else rows
    at = most[rows].topk(TOP, sorted=False).indices
    some = torch.cat([blocks[rows[:, None], at].flatten(1), tile[rows, whole:]], 1)
    return some.topk(TOP, sorted=False).values


def _transformed(logits: Tensor, transform: dict[str, Any]) -> Tensor:
    """Logits as the loss has them, from products with the head; none of these changes their order."""
    found = logits.float() * transform["logit_scale"]
    if transform["HAS_SOFTCAP"]:
        found = transform["softcap"] * torch.tanh(found / transform["softcap"])
    return found * transform["inv_t"]


class _Launched:
    """A kernel of Triton, which takes its grid in brackets, with something before it."""

    def __init__(self, kernel: Any, around: Callable[[Any], Any]) -> None:
        self._kernel, self._around = kernel, around

    def __getitem__(self, grid: Any) -> Any:
        return self._around(self._kernel[grid])
