"""A forward pass without what no score depends on. Knows models and batches, not what is measured in them.

    what all rows begin with          through the lower layers once
    the mask, the last token          not needed where no position sees a later one
    positions without a label         not through the last feed-forward, where nothing above it crosses positions
    logits                            never all at once

What can be left out depends on the model, so it is tried on the first batch, and not done where it changes anything.
A model that is sharded over processes runs in all of them at the same time. So all try it on the same tokens, and what
depends on a batch, its prefix, is not left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .head import PROBE, Decoded, Way, find_way, is_causal
from .losses import Inputs, inputs_of
from .modes import same_but_for
from .narrowing import Narrowing, position_by_position
from .prefixes import SharedPrefix
from .sharding import is_sharded, of_first_process

ROUNDINGS = 1000  # through all layers
IN_BFLOAT16 = 0.02


class LeanForward:
    """Runs a causal language model as far as its losses need.

    Args:
        model: of transformers, wrapped by PEFT or not, without dropout and with all its parameters frozen.
        lower: the decoder layers in which nothing is measured.
        layer: the one above them.
        last: the parts of the last decoder layer in which something is measured.

    Attributes:
        in_step: whether the model is sharded: each process must see as many batches, at the same time.
    """

    def __init__(
        self, model: nn.Module, lower: Sequence[nn.Module], layer: nn.Module, last: Sequence[nn.Module]
    ) -> None:
        self._model, self._last, self.in_step = model, last, is_sharded(model)
        self._prefix = SharedPrefix(model, lower, layer)
        self._way: Way | None = None  # None until it was tried
        self._causal = False
        self._narrowing = Narrowing(())
        self._sharing: bool | None = None

    @property
    def narrowed(self) -> set[nn.Module]:
        """Those of `last` that have seen, in the last run, the learnt positions only."""
        return self._narrowing.narrowed

    @property
    def may_share(self) -> bool:
        """False where it is known that a prefix cannot be taken once."""
        return not self.in_step and (self._way is None or (self._causal and self._sharing is not False))

    def inputs(self, batch: Mapping[str, Tensor]) -> Inputs:
        """What the model has to see of a batch of `input_ids`, `attention_mask` and `labels`, each (B, T)."""
        if self._way is None:
            ids = batch["input_ids"][:1, :PROBE]
            self._try_out(of_first_process(self._model, ids).to(ids.device) if self.in_step else ids)
        return inputs_of(self._model, batch, self._causal)

    def try_sharing(self, row: Mapping[str, Tensor]) -> None:
        """Find out on one row, a batch of (1, T), whether rows that begin alike may share the work of their beginning.

        Done before a pass, so that what comes of its batches does not depend on which of them comes first.
        """
        batch = {name: torch.cat([tensor, tensor]) for name, tensor in row.items()}
        inputs = self.inputs(batch)
        self._shared_length(inputs, batch["attention_mask"].sum(1), batch["input_ids"].shape[1] // 2)

    def prepare(self, inputs: Inputs, lengths: Tensor, shared: int | None = None) -> contextlib.ExitStack:
        """Within what this returns, `run` leaves out what it can; the lower layers may have run already.

        Args:
            inputs: see `inputs`.
            lengths: (B,) tokens of each row.
            shared: how many first tokens the batch shares with others, where that is known.
        """
        length = self._shared_length(inputs, lengths, shared)
        with contextlib.ExitStack() as stack:
            if length:
                stack.enter_context(self._prefix.of(inputs.arguments["input_ids"], length))
            stack.enter_context(self._narrowing.to(inputs.index, inputs.shape.numel()))
            return stack.pop_all()

    def run(self, inputs: Inputs) -> Decoded:
        """The model as far as its head."""
        assert self._way is not None, "inputs() finds the way"
        return self._way(self._model, inputs)

    def forget(self) -> None:
        """Let go of what was kept of earlier batches."""
        self._prefix.forget()

    def _try_out(self, ids: Tensor) -> None:
        self._causal = is_causal(self._model, ids)
        self._narrowing = Narrowing(each for each in self._last if position_by_position(self._model, each, ids))
        self._way = find_way(self._model, ids)

    def _shared_length(self, inputs: Inputs, lengths: Tensor, shared: int | None) -> int:
        """How many first tokens all rows share, if they can be taken together."""
        if self.in_step or not self._causal or self._sharing is False or not inputs.ids_alone:
            return 0
        length = self._prefix.length(inputs.arguments["input_ids"], lengths, shared)
        if length and self._sharing is None:
            if not (inputs.index % inputs.shape[1] >= length).any():
                return 0  # nothing to tell it by
            self._sharing = self._comes_to_the_same(inputs, length)
        return length if self._sharing else 0

    @torch.no_grad()
    def _comes_to_the_same(self, inputs: Inputs, length: int) -> bool:
        apart = self.run(inputs).hidden
        try:
            with self._prefix.of(inputs.arguments["input_ids"], length):
                together = self.run(inputs).hidden
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model without such a cache; each raises its own
            return False
        coarse = torch.is_autocast_enabled(apart.device.type) or apart.dtype == torch.bfloat16
        return same_but_for(IN_BFLOAT16 if coarse else ROUNDINGS * torch.finfo(apart.dtype).eps, apart, together)
