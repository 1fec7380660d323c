"""A forward pass that skips the work that no score depends on. Knows models and batches, not what is measured in them.

    a prefix that all rows share      runs through the lower layers once
    the mask and the last token       are skipped if no position depends on a later one
    positions without a label         skip the last feed-forward if nothing above it mixes positions
    logits                            are never all in memory at once

Which work can be skipped depends on the model, so each is tried on the first batch and used only if it changes nothing.
A sharded model runs in all processes at the same time. All therefore try it on the same tokens, and a shared prefix,
which differs from batch to batch, is not used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .head import PROBE, Decoded, Way, find_way, is_causal
from .hidden_means import HiddenMeans
from .losses import Inputs, inputs_of
from .modes import same_but_for
from .narrowing import Narrowing, position_by_position
from .prefixes import SharedPrefix
from .sharding import is_sharded, of_first_process

ROUNDINGS = 1000  # the rounding errors of all layers, in units of eps
IN_BFLOAT16 = 0.02  # the same for a bfloat16 forward, relative


class LeanForward:
    """Runs a causal language model as far as its losses need.

    Args:
        model: a transformers model, wrapped by PEFT or not, without dropout and with all its parameters frozen.
        lower: the decoder layers below the first measured one.
        layer: the first measured decoder layer.
        last: the measured modules of the last decoder layer.

    Attributes:
        in_step: whether the model is sharded, so that all processes must run the same number of batches together.
    """

    def __init__(
        self, model: nn.Module, lower: Sequence[nn.Module], layer: nn.Module, last: Sequence[nn.Module]
    ) -> None:
        self._model, self._last, self.in_step = model, last, is_sharded(model)
        self._prefix = SharedPrefix(model, lower, layer)
        self._way: Way | None = None  # None before the first batch
        self._causal = False
        self._narrowing = Narrowing(())
        self._sharing: bool | None = None

    @property
    def narrowed(self) -> set[nn.Module]:
        """The modules of `last` that ran on the learnt positions only, in the latest run."""
        return self._narrowing.narrowed

    @property
    def may_share(self) -> bool:
        """False once it is known that rows cannot share a prefix."""
        return not self.in_step and (self._way is None or (self._causal and self._sharing is not False))

    def inputs(self, batch: Mapping[str, Tensor]) -> Inputs:
        """The model's inputs for a batch of `input_ids`, `attention_mask` and `labels`, each (B, T)."""
        if self._way is None:
            ids = batch["input_ids"][:1, :PROBE]
            self._try_out(of_first_process(self._model, ids).to(ids.device) if self.in_step else ids)
        return inputs_of(self._model, batch, self._causal)

    def try_sharing(self, row: Mapping[str, Tensor]) -> None:
        """Test on one row, a batch of (1, T), whether rows can share a prefix.

        Called before a pass, so that its results do not depend on which batch is first.
        """
        batch = {name: torch.cat([tensor, tensor]) for name, tensor in row.items()}
        inputs = self.inputs(batch)
        self._shared_length(inputs, batch["attention_mask"].sum(1), batch["input_ids"].shape[1] // 2)

    def prepare(
        self, inputs: Inputs, lengths: Tensor, shared: int | None = None, means: HiddenMeans | None = None
    ) -> contextlib.ExitStack:
        """A context in which `run` skips what it can. The lower layers may run on entry.

        Args:
            inputs: the model's inputs, from `inputs`.
            lengths: (B,) the number of tokens of each row.
            shared: the length of the prefix that this batch shares with others, if known.
            means: what is to have the inputs of all layers.
        """
        length = self._shared_length(inputs, lengths, shared)
        with contextlib.ExitStack() as stack:
            if length:
                stack.enter_context(self._prefix.of(inputs.arguments["input_ids"], length, means))
            if means is not None:  # after the prefix, which replaces the input of a layer
                stack.enter_context(means.watching(self._prefix.layers_below if length else 0))
            stack.enter_context(self._narrowing.to(inputs.index, inputs.shape.numel()))
            return stack.pop_all()

    def run(self, inputs: Inputs) -> Decoded:
        """Run the model as far as its head."""
        assert self._way is not None, "inputs() finds the way"
        return self._way(self._model, inputs)

    def forget(self) -> None:
        """Free what is cached from earlier batches."""
        self._prefix.forget()

    def _try_out(self, ids: Tensor) -> None:
        self._causal = is_causal(self._model, ids)
        self._narrowing = Narrowing(each for each in self._last if position_by_position(self._model, each, ids))
        self._way = find_way(self._model, ids)

    def _shared_length(self, inputs: Inputs, lengths: Tensor, shared: int | None) -> int:
        """The length of the prefix that all rows share, 0 if it cannot be used."""
        if self.in_step or not self._causal or self._sharing is False or not inputs.ids_alone:
            return 0
        length = self._prefix.length(inputs.arguments["input_ids"], lengths, shared)
        if length and self._sharing is None:
            if not (inputs.index % inputs.shape[1] >= length).any():
                return 0  # no learnt position to compare
            self._sharing = self._gives_the_same(inputs, length)
        return length if self._sharing else 0

    @torch.no_grad()
    def _gives_the_same(self, inputs: Inputs, length: int) -> bool:
        apart = self.run(inputs).hidden
        try:
            with self._prefix.of(inputs.arguments["input_ids"], length):
                together = self.run(inputs).hidden
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model without such a cache, each with an error of its own
            return False
        coarse = torch.is_autocast_enabled(apart.device.type) or apart.dtype == torch.bfloat16
        return same_but_for(IN_BFLOAT16 if coarse else ROUNDINGS * torch.finfo(apart.dtype).eps, apart, together)
