"""A prefix that all rows of a batch share, run through the lower layers once instead of once for each row.

    the prefix (1, P) --lower layers--> keys, values --+
    the rest (B, T - P) --lower layers, with these ----+--> hidden (B, T, H) --> upper layers, every row in full

For example a system prompt, a chat template, a question with several answers. Only below the first measured layer,
because above it every row has its own gradients. Knows models and tokens, not what is measured.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .hidden_means import HiddenMeans, hidden_of
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
        self._known: _Known | None = None

    @property
    def layers_below(self) -> int:
        """The number of lower layers."""
        return len(self._lower)

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
    def of(self, ids: Tensor, length: int, means: HiddenMeans | None = None) -> Iterator[None]:
        """A context in which the model, called with `ids`, skips the lower layers, which run on entry.

        Args:
            ids: (B, T), the tokens.
            length: the length of the prefix.
            means: what is to have the inputs of the lower layers.
        """
        hidden = self._hidden(ids, length, means)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        with contextlib.ExitStack() as stack:
            for layer in self._lower:
                stack.enter_context(forward_replaced(layer, lambda hidden_states, *args, **kwargs: hidden_states))
            stack.callback(self._layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            yield

    @torch.no_grad()
    def _hidden(self, ids: Tensor, length: int, means: HiddenMeans | None) -> Tensor:
        """(B, T, H), the layer's input."""
        prefix, first = ids[:1, :length], length if means is None else means.first_before(length)
        known = self._known
        if known is None or not torch.equal(known.ids, prefix) or known.first > first:
            known = _Known(prefix.clone(), _Beginning(), first)
            known.hidden = self._up_to_the_layer(prefix, known.cache, known.keep)
            known.cache.is_whole = True
            self._known = known
        see = None
        if means is not None:
            for number, kept in known.inputs.items():
                means.add(number, kept, known.first)
            see = partial(means.add, start=length)
        rest = self._up_to_the_layer(ids[:, length:], known.cache, see)
        return torch.cat([known.hidden.expand(len(ids), -1, -1), rest], 1)

    def _up_to_the_layer(self, ids: Tensor, cache: DynamicCache, see: Callable[[int, Tensor], None] | None) -> Tensor:
        """The layer's input; `see` is called with the number of each lower layer and its input."""

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(hidden_of(args, kwargs))

        def show(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert see is not None
            see(number, hidden_of(args, kwargs))

        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(self._lower if see is not None else ()):
                stack.callback(layer.register_forward_pre_hook(partial(show, number), with_kwargs=True).remove)
            stack.callback(self._layer.register_forward_pre_hook(stop, with_kwargs=True).remove)
            try:
                self._model(input_ids=ids, use_cache=True, **{self._cache_name: cache})
            except _Reached as reached:
                return reached.hidden
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


@dataclass
class _Known:
    """A prefix that has run through the lower layers.

    Attributes:
        ids: (1, P), its tokens.
        cache: its keys and values.
        first: the first position at which the inputs of the lower layers are kept, for `HiddenMeans`.
        hidden: (1, P, H), the first measured layer's input.
        inputs: (1, P - first, H) for each lower layer, by its number; none if no position is kept.
    """

    ids: Tensor
    cache: _Beginning
    first: int
    hidden: Tensor = field(init=False)
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, number: int, hidden: Tensor) -> None:
        """Keep the input of a lower layer."""
        if self.first < hidden.shape[1]:
            self.inputs[number] = hidden[:, self.first :].clone()


class _Reached(Exception):
    """Stops a forward pass at the first measured layer."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
