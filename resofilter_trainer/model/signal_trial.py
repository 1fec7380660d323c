"""Whether a model can give what a signal needs, tried on a few tokens. Knows the forward's parts, no dataset."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .head import PROBE, Decoded, find_way, to_head
from .hidden_means import Decoder
from .losses import inputs_of, unwrapped
from .modes import at_least_float32, own_precision, same_but_for
from .signals import HIDDEN
from .token_statistics import HEAD_GRADIENT

NO_CHAIN = "its decoder layers do not pass on one hidden state for each token, from one to the next"
ROUNDINGS = 100  # between the logits of tiles and of all tokens, in units of eps


@torch.no_grad()
def why_not(model: nn.Module, decoder: Decoder, needs: Collection[str]) -> dict[str, str]:
    """Why a model cannot give what signals need, by the need; nothing for what it can give.

    Args:
        model: a causal language model, without dropout. All processes of a sharded model try it at the same time.
        decoder: its decoder.
        needs: what is needed (see `Signal`).
    """
    if not {HEAD_GRADIENT, HIDDEN}.intersection(needs):
        return {}
    device = next(each.device for each in model.parameters() if each.device.type != "meta")
    ids = torch.arange(PROBE, device=device)[None]
    with own_precision(model):
        with _Layers(decoder) as layers:  # one forward tells both
            way = find_way(model, ids)
        reason = None
        if HEAD_GRADIENT in needs and way is not to_head:
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
            reason = _no_gradient(model, way(model, inputs_of(model, batch, causal=False)))
    found = {HEAD_GRADIENT: reason, HIDDEN: None if layers.are_a_chain(ids.shape) else NO_CHAIN}
    return {need: why for need, why in found.items() if why is not None and need in needs}


def _no_gradient(model: nn.Module, decoded: Decoded) -> str | None:
    if decoded.tile is None:
        head = unwrapped(model).get_output_embeddings()
        return f"its logits do not come from one plain nn.Linear, but from a {type(head).__name__}"
    parts = slice(0, decoded.vocabulary // 2), slice(decoded.vocabulary // 2, decoded.vocabulary)
    whole = decoded.head(decoded.hidden)
    try:
        found = torch.cat([decoded.tile(decoded.hidden, part)[2].detach() for part in parts], dim=1)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that needs all logits at once, each with an error of its own
        found = whole[:, :0]
    same = found.shape == whole.shape and same_but_for(
        ROUNDINGS * torch.finfo(whole.dtype).eps, at_least_float32(whole), at_least_float32(found)
    )
    return None if same else "its logits are not those of one linear map, each with a cap or a scale of its own"


class _Layers(contextlib.ExitStack):
    """What a decoder's layers are given, and what they and the decoder return, in one forward."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self._layers = list(decoder.layers)
        self._order: list[nn.Module] = []
        self._given: list[Any] = []
        self._returned: list[Any] = []
        self._last: Any = None
        for layer in self._layers:
            self.callback(layer.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            self.callback(layer.register_forward_hook(self._leave).remove)
        for body in decoder.bodies:
            self.callback(body.register_forward_hook(self._end).remove)

    def are_a_chain(self, shape: torch.Size) -> bool:
        """Whether each layer is given what the one before returned, (1, T, H), and the decoder returns as much."""
        if self._order != self._layers or not isinstance(self._last, Tensor):
            return False
        states = [*self._given, *self._returned[:-1], self._last]
        if not all(isinstance(each, Tensor) and each.shape == (*shape, self._last.shape[-1]) for each in states):
            return False
        pairs = zip(self._returned[:-1], self._given[1:], strict=True)
        return all(torch.equal(one, other.to(one.device)) for one, other in pairs)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._order.append(module)
        self._given.append(args[0] if args else kwargs.get("hidden_states"))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._returned.append(output[0] if isinstance(output, (tuple, list)) else output)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last = output[0]  # the last one to return is the outermost
