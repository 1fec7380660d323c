"""The attention that each learnt token pays to the prompt in the last attention layer. Knows models and batches.

    forward -> queries and keys of the latest attention  ->  blocks of queries -> weights -> summed over the prompt

Kernels such as SDPA give no weights. So the arguments of the attention function are kept, those of one layer at a time,
and the model family's own eager function computes the weights again from them, for a few queries at a time.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..config import InputError
from .losses import IGNORE, learnt_positions, unwrapped

PROMPT_ATTENTION = "prompt_attention"
EAGER, SDPA = "eager", "sdpa"
FUNCTION = "eager_attention_forward"  # of a model family's file
BLOCK = 1 << 24  # attention weights in memory at once: 64 MB of float32


@dataclass
class PromptAttention:
    """Keeps the arguments of the latest attention of a model, while `watching`.

    Args:
        model: a causal language model.

    Raises:
        InputError: the model's attention gives no weights and takes no arguments that they could be computed from.
    """

    model: nn.Module
    _latest: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self._implementation not in (EAGER, SDPA):
            raise InputError(
                f"There is no attention to the prompt with attn_implementation='{self._implementation}', whose kernels "
                f"give no weights: load the model with '{SDPA}' or '{EAGER}', or use a rule that needs no attention."
            )

    @property
    def _implementation(self) -> str:
        return str(unwrapped(self.model).config.get_text_config()._attn_implementation)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which the forward's attention is watched; what is computed does not change."""
        with contextlib.ExitStack() as stack:
            if self._implementation == SDPA:
                own = ALL_ATTENTION_FUNCTIONS._local_mapping.get(SDPA)
                ALL_ATTENTION_FUNCTIONS[SDPA] = self._watched(ALL_ATTENTION_FUNCTIONS[SDPA])
                stack.callback(_restore, own)
            else:
                for file in {sys.modules[type(each).__module__] for each in self.model.modules()}:
                    if hasattr(file, FUNCTION):
                        stack.callback(setattr, file, FUNCTION, getattr(file, FUNCTION))
                        setattr(file, FUNCTION, self._watched(getattr(file, FUNCTION)))
            yield

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._latest = module, args, kwargs
            return function(module, *args, **kwargs)

        return attend

    @torch.no_grad()
    def of(self, labels: Tensor) -> Tensor:
        """The attention of each learnt token to the prompt in the latest forward: (N,), at least float32, in [0, 1].

        `a_t = 1/H sum_h sum_j A_h[t, j]`, over the H heads and the tokens j before t that are not learnt   (ssToken,
        arXiv 2510.18250, with the last layer's attention)

        Args:
            labels: (B, T) those of the batch, padded on the right.

        Raises:
            InputError: the model computes its attention in a way that cannot be watched.
        """
        if self._latest is None:
            raise self._refusal()
        module, args, kwargs = self._latest
        self._latest = None
        named = dict(zip(("query", "key", "value", "attention_mask"), args, strict=False)) | kwargs
        query, key, mask = named.pop("query"), named.pop("key"), named.pop("attention_mask", None)
        value, length = named.pop("value"), query.shape[2]
        function = getattr(sys.modules[type(module).__module__], FUNCTION, None)
        if function is None or query.shape[::2] != labels.shape or key.shape[2] != length:
            raise self._refusal()
        named = {name: each for name, each in named.items() if name not in ("dropout", "is_causal")}
        prompt = (labels == IGNORE)[:, None].to(query.device)  # (B, 1, T)
        found = query.new_zeros(labels.shape, dtype=torch.promote_types(query.dtype, torch.float32))
        size = max(1, BLOCK // max(query.shape[0] * query.shape[1] * length, 1))
        for start in range(0, length, size):
            rows = slice(start, start + size)
            block = mask_of(mask, rows, length, query)
            _, weights = function(module, query[:, :, rows], key, value, block, dropout=0.0, **named)
            if weights is None:
                raise self._refusal()
            weights = weights[..., :length].to(found.dtype)  # (B, H, q, T); some families have sinks beside the tokens
            found[:, rows] = weights.mean(1).mul_(prompt).sum(-1)
        return cast(Tensor, found[:, 1:][learnt_positions(labels).to(found.device)])

    def _refusal(self) -> InputError:
        return InputError(
            f"The attention of {type(unwrapped(self.model)).__name__} to the prompt cannot be had: it computes "
            "attention in a way of its own. Use a rule that needs no attention, such as sstoken with gamma=1."
        )


def mask_of(mask: Tensor | None, rows: slice, length: int, query: Tensor) -> Tensor:
    """What is added to the scores of some queries, (1 or B, 1, q, T): 0 where a token may be attended to.

    Args:
        mask: the mask of all queries, bool or added to the scores; None for a causal one.
        rows: which queries.
        length: the number T of tokens.
        query: (B, H, T, D), all queries, of whose kind the mask is.
    """
    if mask is None:
        places = torch.arange(length, device=query.device)
        mask = (places <= places[rows, None])[None, None]
    else:
        mask = mask[:, :, rows, :length]
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, lowest)


def _restore(own: Callable[..., Any] | None) -> None:
    if own is None:
        del ALL_ATTENTION_FUNCTIONS[SDPA]
    else:
        ALL_ATTENTION_FUNCTIONS[SDPA] = own
