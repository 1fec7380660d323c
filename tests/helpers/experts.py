"""A small mixture of experts in both forms that transformers has had."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPERTS, INSIDE = 6, 24


class Separate(nn.Module):
    """Experts as modules, of which those without tokens do not run, as in most families before transformers 5.0.

    Args:
        width: the size of a token's hidden state.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, EXPERTS, bias=False)
        self.experts = nn.ModuleList()
        for _ in range(EXPERTS):
            maps = {"gate_proj": (width, INSIDE), "up_proj": (width, INSIDE), "down_proj": (INSIDE, width)}
            self.experts.append(nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in maps.items()}))
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.flatten(0, 1)
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        output = torch.zeros_like(flat)
        for index in chosen.unique().tolist():
            tokens = (chosen == index).nonzero()[:, 0]
            output = output.index_add(0, tokens, weight[tokens, None] * self.expert(index, flat[tokens]))
        return output.view_as(hidden_states)

    def expert(self, index: int, x: Tensor) -> Tensor:
        own = self.experts[index]
        return own["down_proj"](F.silu(own["gate_proj"](x)) * own["up_proj"](x))


class Stacked(Separate):
    """The same experts in one tensor for each map."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        plain, self.experts = self.experts, nn.Module()
        for name in ("gate_proj", "up_proj", "down_proj"):
            stack = torch.stack([each[name].weight.detach() for each in plain])
            self.experts.register_parameter(name, nn.Parameter(stack))

    def expert(self, index: int, x: Tensor) -> Tensor:
        gate, up, down = (each[index] for each in self.experts.parameters())
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
