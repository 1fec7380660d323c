"""A prefix that all rows of a batch share, run through the lower layers once instead of once for each row.

    the prefix (1, P) --lower layers--> keys, values --+
    the rest (B, T - P) --lower layers, with these ----+--> hidden (B, T, H) --> upper layers, every row in full

For example a system prompt, a chat template, a question with several answers. Only below the first measured layer,
because above it every row has its own gradients. Knows models and tokens, not what is measured.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .losses import unwrapped
from .modes import forward_replaced

WORTH = 0.1  # the least share of a batch's tokens to save, as it takes a second run


class SharedPrefix:
    """Runs a causal model on batches of rows that share a prefix.

    Args:
        model: a transformers model, wrapped by PEFT or not.
        lower: its decoder layers below `layer`.
        layer: the first decoder layer that runs on every row in full.
    """

    def __init__(self, model: nn.Module, lower: Sequence[nn.Module], layer: nn.Module) -> None:
        self._model, self._lower, self._layer = model, lower, layer
        renamed = "cache" in inspect.signature(unwrapped(model).forward).parameters  # in most since transformers 5.24
        self._cache_name = "cache" if renamed else "past_key_values"
        self._known: tuple[Tensor, Tensor, _Beginning] | None = None

    def forget(self) -> None:
        """Free the cached prefix, before the weights or the precision change."""
        self._known = None

    def length(self, ids: Tensor, lengths: Tensor, shared: int | None) -> int:
        """The length of the prefix to run through the lower layers once; 0 if it saves too little.

        A batch's results depend on this length, so it depends on the batch only and not on what is cached.

        Args:
            ids: (B, T), the tokens.
            lengths: (B,) the number of tokens of each row.
            shared: the length of the prefix that this batch shares with others, which saves work for every row; None
                if unknown.
        """
        if not self._lower:
            return 0
        alike = (ids == ids[0]).all(0).long().cumprod(0).sum()
        common = min(int(alike), int(lengths.min()) - 1, ids.shape[1] - 1)
        rows_saved = len(ids) - 1
        if shared is not None and 0 < shared <= common:
            common, rows_saved = shared, len(ids)
        return common if common * rows_saved >= WORTH * ids.numel() else 0

    @contextlib.contextmanager
    def of(self, ids: Tensor, length: int) -> Iterator[None]:
        """A context in which the model, called with `ids`, skips the lower layers, which run on entry."""
        hidden = self._hidden(ids, length)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        with contextlib.ExitStack() as stack:
            for layer in self._lower:
                stack.enter_context(forward_replaced(layer, lambda hidden_states, *args, **kwargs: hidden_states))
            stack.callback(self._layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            yield

    @torch.no_grad()
    def _hidden(self, ids: Tensor, length: int) -> Tensor:
        """(B, T, H), the layer's input."""
        if self._known is None or not torch.equal(self._known[0], ids[:1, :length]):
            cache = _Beginning()
            self._known = ids[:1, :length].clone(), self._up_to_the_layer(ids[:1, :length], cache), cache
            cache.is_whole = True
        _, prefix, cache = self._known
        return torch.cat([prefix.expand(len(ids), -1, -1), self._up_to_the_layer(ids[:, length:], cache)], 1)

    def _up_to_the_layer(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        handle = self._layer.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._model(input_ids=ids, use_cache=True, **{self._cache_name: cache})
        except _Reached as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise RuntimeError("The forward pass did not reach the first measured layer.")


class _Beginning(DynamicCache):
    """Keys and values of one prefix, for any number of rows. Those of the tokens after it are not stored."""

    is_whole = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """The keys and values of the prefix, followed by the given ones: (B, heads, P + T, width) each."""
        if not self.is_whole:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer, rows = self.layers[layer_idx], len(key_states)
        given = ((layer.keys, key_states), (layer.values, value_states))
        return tuple(torch.cat([own.expand(rows, -1, -1, -1), new], -2) for own, new in given)


class _Reached(Exception):
    """Stops a forward pass at the first measured layer."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
