"""The weight that the forward uses: the stored one with its adapters. Knows up-projections, not what is measured.

    W_eff    the matrix of the adapted map, read from the map's own outputs:

        d(x) = adapted(x) - stored(x)        W_eff = W + d(1) - d(0)        (1 the identity, 0 the map's bias)

This holds for every kind of adapter whose map is a matrix and a bias, and some other inputs show whether it is.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..config import InputError
from .adapters import REMEDY
from .gradients import input_of
from .modes import at_least_float32, evaluating, own_precision
from .quantised import PLAIN, bits_of, plain_matrix
from .sharding import gathered
from .up_projection import UpProjection, find_up_projections, is_map
from .zero3 import is_divided

PROBES = 4  # inputs on which a map is compared with its matrix
CLOSE = 1e-3  # of the largest output, in float32; coarser weights have more rounding
COARSE = 3e-2


def effective_weight(each: UpProjection) -> Tensor:
    """The weights of the up-projection that the forward uses, adapters included, detached.

    Without an adapter the plain weight; with one that changes nothing yet, equal to it bit for bit.

    Raises:
        InputError: the adapted map is not a matrix and a bias.
    """
    return each.up(effective_matrix(each)) if each.adapted else each.plain_weight()


def check_maps(up_projections: Sequence[UpProjection]) -> None:
    """Raise InputError for a map that is not its weight and a bias, or an adapted one that is not any matrix."""
    for each in up_projections:
        if each.parameter.device.type == "meta":
            continue
        if is_map(each) and not (_is_plain(each) or _acts_plainly(each)):
            raise InputError(
                f"'{each.name}' ({type(each.owner).__name__}, with its hooks) does not return its input times its "
                "weight, so its weight is not the matrix that the forward uses. Make it an nn.Linear that has this "
                'matrix as its weight, or pass up_projection="<regex>" that finds another map.'
            )
        if each.adapted:
            with gathered(each.outer):
                effective_matrix(each)


@torch.no_grad()
def effective_matrix(each: UpProjection) -> Tensor:
    """Like `effective_weight`, of the whole stored matrix, which may have the gate too."""
    if not is_map(each):
        return at_least_float32(plain_matrix(each.owner, each.parameter)) + _delta_of_stack(each)
    inputs = each.shape[0 if each.kind == "conv1d" else -1]
    given = _probes(each, torch.eye(inputs))
    with _on_probes(each):
        adapted = at_least_float32(each.outer(given[None])[0])  # first: a merged adapter that is off is undone here
        stored = at_least_float32(each.owner(given[None])[0])
    weight = at_least_float32(plain_matrix(each.owner, each.parameter))
    d = adapted - stored
    change = d[1 : 1 + inputs] - d[0]
    error = (d[1 + inputs :] - d[0] - at_least_float32(given[1 + inputs :]) @ change).abs().max()
    if not error <= _rounding(each) * adapted.abs().max():
        raise InputError(
            f"'{each.name}' has an adapter ({type(each.outer).__name__} of {type(each.outer).__module__}) whose output "
            f"is not a matrix times its input, so it has no one weight to score. {REMEDY}."
        )
    return weight + (change if each.kind == "conv1d" else change.T)


def _is_plain(each: UpProjection) -> bool:
    """Whether the map is known to be its weight and a bias, by its code."""
    if bits_of(each.parameter) is not None or isinstance(each.parameter, DTensor) or is_divided(each.parameter):
        return True
    hooked = each.owner._forward_hooks or each.owner._forward_pre_hooks or "forward" in vars(each.owner)
    return type(each.owner).forward in (nn.Linear.forward, Conv1D.forward) and not hooked


@torch.no_grad()
def _acts_plainly(each: UpProjection) -> bool:
    """Whether the map is its weight and a bias on some inputs."""
    given = _probes(each, torch.empty(0, each.shape[0 if each.kind == "conv1d" else -1]))
    matrix = at_least_float32(plain_matrix(each.owner, each.parameter))
    expected = at_least_float32(given[1:]) @ (matrix if each.kind == "conv1d" else matrix.T)
    try:
        with _on_probes(each):
            output = each.owner(given[None])
    except Exception:  # a module that is not called like a map, each with an error of its own
        return False
    if not isinstance(output, Tensor) or output.shape != (1, len(given), expected.shape[1]):
        return False
    output = at_least_float32(output[0])
    error = (output[1:] - output[0] - expected).abs().max()
    return bool(error <= COARSE * output.abs().max())  # some round their input to 8 bits


def _probes(each: UpProjection, others: Tensor) -> Tensor:
    """(1 + N + PROBES, I) inputs of a map: zeros, the (N, I) others, and random ones."""
    dtype = each.parameter.dtype if each.parameter.dtype in PLAIN else torch.float32
    random = torch.randn(PROBES, others.shape[1], generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.zeros_like(random[:1]), others, random]).to(each.parameter.device, dtype)


@contextlib.contextmanager
def _on_probes(each: UpProjection) -> Iterator[None]:
    """The map in evaluation mode and its own precision, with the random numbers restored afterwards."""
    device = each.parameter.device
    with (
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        evaluating(each.outer),
        own_precision(each.outer),
    ):
        yield


def _rounding(each: UpProjection) -> float:
    """The error of the map's outputs that rounding explains, relative to the largest."""
    exact = all(parameter.dtype in (torch.float32, torch.float64) for parameter in each.outer.parameters())
    return CLOSE if exact else COARSE


@contextlib.contextmanager
def standing_in(up_projections: Sequence[UpProjection]) -> Iterator[list[nn.Parameter]]:
    """Parameters whose gradients are those of the effective matrices, in the order of the up-projections.

    The stored parameter, or for an adapted map W_eff as a parameter of its own: the map's output becomes
    `out + a (W_eff - W_eff.detach())^T`, which changes no value. In an adapted stack the adapter is added to the
    stored parameter, which therefore has the same gradient.
    """
    with contextlib.ExitStack() as stack:
        yield [_stand_in(each, stack) if each.adapted and is_map(each) else each.parameter for each in up_projections]


def _stand_in(each: UpProjection, stack: contextlib.ExitStack) -> nn.Parameter:
    weight = nn.Parameter(effective_matrix(each).clone())

    def add(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        nothing = (weight - weight.detach()).to(output.dtype)
        given = input_of(args, kwargs).to(output.dtype)
        return output + F.linear(given, nothing.T if each.kind == "conv1d" else nothing)

    stack.callback(each.outer.register_forward_hook(add, with_kwargs=True).remove)
    return weight


@contextlib.contextmanager
def merged_stacks(up_projections: Sequence[UpProjection]) -> Iterator[None]:
    """Adds the adapters of stacks to their stored parameters, and undoes it."""
    stacks = [each for each in up_projections if each.adapted and not is_map(each)]
    own = {each.parameter: each.parameter.data for each in stacks}
    wrappers = [each for stack in stacks for each in _wrappers(stack) if not (each.disable_adapters or each.merged)]
    for each in stacks:
        each.parameter.data = effective_matrix(each).to(each.parameter.dtype)
    for wrapper in wrappers:
        wrapper.enable_adapters(False)
    try:
        yield
    finally:
        for parameter, data in own.items():
            parameter.data = data
        for wrapper in wrappers:
            wrapper.enable_adapters(True)


def undo_merge_if_off(model: nn.Module) -> None:
    """Undo the merge of adapters that are off, as the first forward of each does by itself."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and module.disable_adapters and module.merged:
            module.unmerge()


@contextlib.contextmanager
def unshared(model: nn.Module, n_layers: int, pattern: str | None) -> Iterator[tuple[UpProjection, ...]]:
    """The up-projections, as from `find_up_projections`, each with a parameter that no other module uses.

    A parameter that other modules use, as replicated layers do, is replaced by a copy until the end of the context.
    """
    uses = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    found = find_up_projections(model, n_layers, pattern)
    shared = [(each.owner, each.leaf, each.parameter) for each in found if uses[each.parameter] > 1]
    for owner, name, parameter in shared:
        owner._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    try:
        yield find_up_projections(model, n_layers, pattern)
    finally:
        for owner, name, parameter in shared:
            owner._parameters[name] = parameter


def _wrappers(each: UpProjection) -> Iterator[Any]:
    """The wrappers of PEFT's `target_parameters` around a stack, those of its other parameters left out."""
    module: Any = each.outer
    while module is not each.owner:
        if not isinstance(module, ParamWrapper):
            raise InputError(
                f"'{each.name}' is a stack of experts with an adapter ({type(module).__name__}) that is not LoRA's "
                f"target_parameters. {REMEDY}."
            )
        if module.parameter_name == each.leaf:
            yield module
        module = module.base_layer


def _delta_of_stack(each: UpProjection) -> Tensor:
    total = torch.zeros((), device=each.parameter.device)
    for wrapper in _wrappers(each):
        if not wrapper.merged and not wrapper.disable_adapters:
            for adapter in set(wrapper.active_adapters) & set(wrapper.lora_A):
                total = total + at_least_float32(wrapper.get_delta_weight(adapter))
    return total
