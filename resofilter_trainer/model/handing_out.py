"""The weights of one process, handed out to others that have the same model without numbers (on the meta device).

Knows tensors and processes, not what a model measures. torch's own `set_model_state_dict(broadcast_from_rank0=True)`
takes the first of all processes, holds its weights until the end and leaves out buffers that are not saved; this takes
the first of any group, frees a layer's weights once they are handed out, and fills every tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .quantised import bits_of

OWN = "_parameters", "_buffers", "_modules"  # where a module keeps what torch knows of
HOLDERS = list, tuple, dict


def has_no_numbers(model: nn.Module) -> bool:
    """Whether a model has its structure alone: every parameter is on the meta device."""
    return all(each.device.type == "meta" for each in model.parameters())


def structure(model: nn.Module) -> str | None:
    """Digest of the names, shapes, dtypes and flags of a model's tensors, and of which are tied.

    Returns:
        None for a model that cannot be handed out: quantised, with tensors that are not contiguous, or with tensors
        that neither torch nor a module's own attributes know, such as those in a list.
    """
    if any(bits_of(each) is not None for each in model.parameters()) or _hidden(model):
        return None
    places: dict[int, str] = {}
    digest = xxhash.xxh3_128()
    for owner, name, tensor in _tensors(model):
        if not tensor.is_contiguous():
            return None
        first = places.setdefault(id(tensor), f"{owner} {name}")
        digest.update(f"{owner} {name} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad} {first};".encode())
    return digest.hexdigest()


def hand_out_whole(
    model: nn.Module, whole: set[nn.Parameter], device: torch.device, group: dist.ProcessGroup
) -> set[nn.Parameter]:
    """Give every process of a group the first one's buffers and some of its parameters, on `device`.

    Args:
        model: the first process's model, and the same without numbers in the others.
        whole: the parameters to hand out.
        device: the device of this process.
        group: the processes; each calls this.

    Returns:
        The parameters that were handed out: in the processes without numbers, new ones.
    """
    filled: dict[int, Tensor] = {}
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = module._parameters, module._buffers, vars(module)
        for place in places:
            for name, tensor in list(place.items()):
                if not isinstance(tensor, Tensor) or (isinstance(tensor, nn.Parameter) and tensor not in whole):
                    continue
                if id(tensor) not in filled:
                    filled[id(tensor)] = _filled(tensor, device, group)
                place[name] = filled[id(tensor)]
    return {each for each in filled.values() if isinstance(each, nn.Parameter)}


def hand_out_shards(layer: nn.Module, weights: dict[str, nn.Parameter], device: torch.device) -> None:
    """Give every process its shard of the first one's weights in a layer that is sharded already.

    Args:
        layer: the layer, whose shards have no numbers in the other processes.
        weights: in the first process, the weights by name as they were before sharding, which are taken out one by
            one; in the others, nothing.
        device: the device of this process.
    """
    filled: dict[int, Any] = {}
    for prefix, module in layer.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in filled:
                weight = weights.pop(f"{prefix}.{name}" if prefix else name, None)
                own = _own_shard(parameter, None if weight is None else weight.detach().to(device), device)
                filled[id(parameter)] = parameter if weight is not None else _with_shard(parameter, own)
            module._parameters[name] = filled[id(parameter)]


def _own_shard(parameter: DTensor, weight: Tensor | None, device: torch.device) -> Tensor:
    """This process's rows of the first one's weight, which has them already: FSDP2 divides the first dimension.

    torch's `distribute_tensor` would take a whole weight's memory in every process.
    """
    mesh = parameter.device_mesh
    longest = -(-parameter.shape[0] // mesh.size())
    shape = longest, *parameter.shape[1:]
    own, parts = torch.empty(shape, dtype=parameter.dtype, device=device), None
    if weight is not None:
        parts = [weight[start : start + longest] for start in range(0, longest * mesh.size(), longest)]
        parts = [_bytes(part if len(part) == longest else _padded(part, shape)) for part in parts]
    dist.scatter(_bytes(own), parts, group=mesh.get_group(), group_src=0)
    return own[: len(parameter.to_local())]


def _with_shard(parameter: DTensor, own: Tensor) -> nn.Parameter:
    mesh, size = parameter.device_mesh, parameter.shape
    shards = DTensor.from_local(own, mesh, parameter.placements, shape=size, stride=parameter.stride())
    return nn.Parameter(shards, parameter.requires_grad)


def _padded(part: Tensor, shape: tuple[int, ...]) -> Tensor:
    whole = part.new_zeros(shape)
    whole[: len(part)] = part
    return whole


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, as gloo does not know every dtype: its own memory, if it is contiguous."""
    return tensor.reshape(-1).view(torch.uint8)


def _filled(tensor: Tensor, device: torch.device, group: dist.ProcessGroup) -> Tensor:
    """The first process's numbers, in this one."""
    if tensor.device.type == "meta":
        here = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    else:
        here = tensor.detach().to(device)
    if here.numel():
        dist.broadcast(_bytes(here), group=group, group_src=0)
    if not isinstance(tensor, nn.Parameter):
        return here
    if tensor.device.type == "meta":
        return nn.Parameter(here, tensor.requires_grad)
    tensor.data = here
    return tensor


def _tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Each tensor of each module: the module's name, its own, and the tensor, tied ones again."""
    for owner, module in model.named_modules():
        for place in (module._parameters, module._buffers, vars(module)):
            yield from ((owner, name, each) for name, each in place.items() if isinstance(each, Tensor))


def _hidden(model: nn.Module) -> bool:
    """Whether a module keeps tensors in a list, a tuple or a dict of its own."""
    kept = (each for module in model.modules() for name, each in vars(module).items() if name not in OWN)
    items = (each.values() if isinstance(each, dict) else each for each in kept if isinstance(each, HOLDERS))
    return any(isinstance(item, Tensor) for each in items for item in each)
