"""Modules that run on some positions of a batch only, because their output at the others is not used.

After a decoder's last attention no position affects another, so the last feed-forward can skip positions whose next
token is not learnt. Knows modules and positions, not what is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .losses import at_positions


class Narrowing:
    """Runs modules on a subset of the positions. A module that is called with further tensors runs on all.

    Attributes:
        narrowed: the modules that ran on a subset in the latest forward.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.narrowed: set[nn.Module] = set()
        self._modules = list(modules)
        self._shapes: dict[nn.Module, torch.Size] = {}
        self._index: Tensor | None = None
        self._positions = 0

    @contextlib.contextmanager
    def to(self, index: Tensor, positions: int) -> Iterator[None]:
        """Run the modules on the (N,) positions `index` out of `positions`."""
        self.narrowed, self._index, self._positions = set(), index, positions
        with contextlib.ExitStack() as stack:
            for module in self._modules if 0 < len(index) < positions else ():
                stack.callback(module.register_forward_pre_hook(self._select, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._spread).remove)
            yield

    def _select(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        hidden = _only_tensor(args, kwargs)
        if self._index is None or hidden is None or hidden.shape[:-1].numel() != self._positions:
            return None
        self.narrowed.add(module)
        self._shapes[module] = hidden.shape[:-1]
        return (at_positions(hidden.flatten(0, -2), self._index)[None], *args[1:]), kwargs

    def _spread(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Restore the number of positions, with zeros for those that were skipped."""
        if self._index is None or module not in self.narrowed:
            return None
        found, *others = output if isinstance(output, tuple) else (output,)
        whole = found.new_zeros(self._positions, found.shape[-1]).index_copy(
            0, self._index.to(found.device), found.flatten(0, -2)
        )
        whole = whole.view(*self._shapes[module], -1)
        return (whole, *others) if isinstance(output, tuple) else whole


def position_by_position(model: nn.Module, module: nn.Module, ids: Tensor) -> bool:
    """Whether the logits at a position depend on the module's input and output at that position only.

    Tested with gradients, which are then exactly zero at all other positions.

    Args:
        model: a language model.
        module: a module of it.
        ids: (1, T) tokens for a trial run.
    """
    seen: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        hidden = _only_tensor(args, kwargs)
        if hidden is None:
            return None
        seen.append(hidden.detach().requires_grad_())
        return (seen[-1].view_as(hidden), *args[1:]), kwargs

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    with contextlib.ExitStack() as stack, torch.enable_grad():
        stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(leave).remove)
        logits = model(input_ids=ids, use_cache=False).logits
        if len(seen) != 2 or any(each.shape[:-1].numel() != ids.numel() for each in seen):
            return False
        gradients = torch.autograd.grad(logits[:, 1::2].sum(), seen, allow_unused=True)
    moved = [each is not None and each.flatten(0, -2).ne(0).any(-1) for each in gradients]
    return all(each is not False and bool(each[1::2].any()) and not each[::2].any() for each in moved)


def _only_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first argument, if it is the only tensor among the arguments of a module."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 and args and tensors[0] is args[0] else None
