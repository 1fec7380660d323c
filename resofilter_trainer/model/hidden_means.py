"""The mean hidden state of each row before every decoder layer and after the last. Keeps no hidden state itself.

Knows layers and positions. These are the hidden states that transformers returns with `output_hidden_states=True` (not
of rwkv and cpmant, where the first is missing); the last is after the final norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import InputError
from .losses import Inputs, at_positions, unwrapped
from .up_projection import decoder_layers


@dataclass(frozen=True)
class Decoder:
    """The decoder of a language model.

    Attributes:
        layers: its L layers.
        bodies: the modules that return what the head is given; of those that run, the outermost does.
    """

    layers: Sequence[nn.Module]
    bodies: frozenset[nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> Decoder:
        """The decoder of a transformers model, wrapped by PEFT or not."""
        path, layers = decoder_layers(model)
        inner = unwrapped(model)
        around = model.get_submodule(path.rpartition(".")[0])
        bodies = {around, inner.base_model, inner.get_decoder()} - {inner, inner.get_output_embeddings(), None}
        return cls(list(layers), frozenset(bodies))


class HiddenMeans:
    """Sums up what each decoder layer is given, and the decoder returns, at every row's learnt positions.

    Args:
        decoder: the decoder.
        inputs: the model's inputs for the batch.
        counts: (B,) the number of learnt positions of each row.
    """

    def __init__(self, decoder: Decoder, inputs: Inputs, counts: Sequence[int]) -> None:
        self._decoder, self._counts, self._index, self._width = decoder, counts, inputs.index, inputs.shape[1]
        self._sums: list[list[Tensor]] = [[] for _ in range(len(decoder.layers) + 1)]
        self._places: dict[tuple[int, ...], tuple[Tensor, list[int]]] = {}

    @contextlib.contextmanager
    def watching(self, first: int = 0) -> Iterator[None]:
        """Take what the layers from number `first` on are given, each in one call, and what the decoder returns."""
        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(self._decoder.layers[first:], first):
                see = partial(self._see, number)
                stack.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
            for body in self._decoder.bodies:
                stack.callback(body.register_forward_hook(self._see_last).remove)
            yield

    def add(self, number: int, hidden: Tensor, start: int = 0) -> None:
        """Add what a layer is given at the positions from `start` on.

        Args:
            number: the number of the layer; L for what the last one returns.
            hidden: (B, T, H); or (1, T, H), if all rows have the same there.
            start: the first of these positions.
        """
        index, counts = self._within(start, *hidden.shape[:2])
        self._sums[number].append(_sums_of_rows(hidden.detach().flatten(0, 1), index, counts))

    def first_before(self, stop: int) -> int:
        """The first learnt position of any row before `stop`; `stop` if there is none."""
        places = self._index % self._width
        return min(int(places.min()), stop) if len(places) else stop

    def means(self) -> np.ndarray:
        """(B, L + 1, H) float64; 0 without a learnt position.

        Raises:
            InputError: a layer did not run.
        """
        if not all(self._sums):
            number = next(number for number, sums in enumerate(self._sums) if not sums)
            raise InputError(f"Decoder layer {number} did not run, so 'embedding_chain' is unknown: leave it out.")
        whole = torch.stack([sum(sums[1:], sums[0]).cpu() for sums in self._sums], dim=1)
        return whole.numpy() / np.maximum(self._counts, 1)[:, None, None]

    def _see(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.add(number, hidden_of(args, kwargs))

    def _see_last(self, module: nn.Module, args: Any, output: Any) -> None:
        self._sums[-1].clear()  # the last one to return is the outermost
        self.add(len(self._decoder.layers), output[0])

    def _within(self, start: int, rows: int, width: int) -> tuple[Tensor, list[int]]:
        """The learnt positions in a piece of the batch, as indices into the flattened piece, and their number a row."""
        if (start, rows, width) not in self._places:
            row, place = self._index // self._width, self._index % self._width - start
            inside = (place >= 0) & (place < width)
            counts = row[inside].bincount(minlength=len(self._counts)).tolist()
            index = (row * width if rows > 1 else 0) + place
            self._places[start, rows, width] = index[inside], counts
        return self._places[start, rows, width]


def hidden_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among the arguments of a decoder layer."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _sums_of_rows(hidden: Tensor, index: Tensor, counts: list[int]) -> Tensor:
    """(B, H) float64: the sums of (P, H) over each row's indices, (N,) one row after another."""
    return torch.stack([own.sum(0, dtype=torch.float64) for own in at_positions(hidden, index).split(counts)])
