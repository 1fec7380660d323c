"""A model that does not fit one device, sharded over processes layer by layer (FSDP2). Knows layers, not scores.

    replicated   all outside the decoder layers (embeddings, last norm, head), and the measured up-projections
    sharded      everything else in a layer, gathered while the layer runs, in the forward and again in the backward

The measured weights are thus whole in every process, and the head can be read a tile at a time. Each process has
batches of its own. All processes gather a layer together, so each must run the model equally often, or all wait.

One process alone may have the weights, and the others the model on the meta device: then they are handed out.

A training run has its model sharded by accelerate, all of it. There, a layer's weights are whole in the backward of
that layer, where they are measured; elsewhere they are gathered by `gathered` or `whole`, by all processes together.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..config import InputError, ResonanceConfig
from .handing_out import hand_out_shards, hand_out_whole, has_no_numbers
from .plain import CHECKPOINTED
from .quantised import bits_of, plain_matrix
from .up_projection import UpProjection, decoder_layers, find_up_projections
from .zero3 import is_divided, present

OFFLOADED = "is offloaded, and cannot be sharded: load the model without device_map."


def shard(
    model: nn.Module, config: ResonanceConfig, device: torch.device, group: dist.ProcessGroup | None = None
) -> None:
    """Shard a model in place over the processes of a group, each of which calls this.

    A process then stores 1 / N of the layers, the embeddings, the head and `n_layers` up-projections of O * I numbers
    each (in a mixture of experts all experts of a layer), and while a layer runs the whole of it.

    Args:
        model: the same model in every process, on the CPU or on `device`; or in the first process of the group, and
            the same without numbers, on the meta device, in all others.
        config: the layers to measure.
        device: the device of this process.
        group: the processes; by default all.

    Raises:
        InputError: there is one process only; the model is sharded already, offloaded or quantised; or it has no known
            up-projection.
    """
    _check(model)
    group = group or cast(dist.ProcessGroup, dist.group.WORLD)
    handed_out = _one_has_the_weights(model, group)
    mesh = DeviceMesh.from_group(group, device.type)
    path, layers = decoder_layers(model)
    whole = _whole(model, config, path, layers)
    receives = has_no_numbers(model)
    if handed_out:
        whole = hand_out_whole(model, whole, device, group)
    for layer in layers:
        weights = {} if receives else dict(layer.named_parameters(remove_duplicate=False))
        fully_shard(layer, mesh=mesh, ignored_params=whole)
        if handed_out:
            hand_out_shards(layer, weights, device)
    fully_shard(model, mesh=mesh, ignored_params=whole)  # the root, which orders the layers
    for each in (*whole, *model.buffers()):  # fully_shard does not move these
        each.data = each.data.to(device)


def neighbours(size: int, timeout: timedelta) -> dist.ProcessGroup:
    """The group of this process: `size` processes that follow each other; in the last group those that are left.

    Args:
        size: the number of processes of a group.
        timeout: how long a process waits for the others of its group.

    Every process calls this.
    """
    processes, mine = dist.get_world_size(), None
    for start in range(0, processes, size):
        ranks = list(range(start, min(start + size, processes)))
        group = dist.new_group(ranks, timeout=timeout)  # all processes make each group
        mine = group if dist.get_rank() in ranks else mine
    return cast(dist.ProcessGroup, mine)


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that hold a sharded model together, and must run it at the same time; None of any other model."""
    sharded = _sharded_parameter(model)
    return None if sharded is None else sharded.device_mesh.get_group()


def is_sharded(model: nn.Module) -> bool:
    """Whether each process stores a shard of the model, so that all must run it at the same time."""
    return any(isinstance(each, DTensor) or is_divided(each) for each in model.parameters())


def is_fsdp2(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model, whose layers' weights are then whole while they run."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole, detached; all processes that share it must call this. Any other tensor unchanged."""
    if is_divided(tensor):
        with present([tensor]):
            return tensor.detach().clone()
    if not isinstance(tensor, DTensor):
        return tensor
    here = cast(DTensor, tensor.detach().to(tensor.device_mesh.device_type))  # from a CPU, if it is offloaded to one
    return here.full_tensor()


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model by the names that they have without checkpointing, gathered one at a time."""
    for name, parameter in model.named_parameters():
        yield name.replace(f"{CHECKPOINTED}.", ""), whole(parameter)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Replaces the sharded parameters of a module, outside of its own forward and backward, by whole ones."""
    with contextlib.ExitStack() as stack:
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if isinstance(parameter, DTensor):
                    stack.callback(owner._parameters.__setitem__, name, parameter)
                    owner._parameters[name] = nn.Parameter(whole(parameter), parameter.requires_grad)
        yield


def own_part(each: UpProjection) -> Tensor:
    """The entries of a stored up-projection that this process has, detached: all of them unless it is sharded."""
    stored = plain_matrix(each.owner, each.parameter)
    if not isinstance(stored, DTensor):
        return each.up(stored)
    local = stored.to_local()
    wanted = torch.zeros(len(stored), dtype=torch.bool)
    wanted[each.index[0]] = True
    _, (start, *_) = compute_local_shape_and_global_offset(stored.shape, stored.device_mesh, stored.placements)
    own = wanted[start : start + len(local)].to(local.device)
    return local[own][(slice(None), *each.index[1:])]


def sum_over_shards(sums: Tensor, parameter: Tensor) -> Tensor:
    """Sums over the entries of a sharded parameter from those of every process's shard; all processes call this."""
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    places = [Partial() if place.is_shard() else Replicate() for place in parameter.placements]
    return DTensor.from_local(sums.to(mesh.device_type), mesh, places).full_tensor()


def of_first(group: dist.ProcessGroup, value: Any) -> Any:
    """The `value` of the first process of a group, in every process of it; each must call this."""
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def of_first_process(model: nn.Module, value: Any) -> Any:
    """The first process's `value`, in every process of a sharded model; each must call this.

    A tensor is returned on the CPU.
    """
    group = group_of(model)
    assert group is not None, "the model is not sharded"
    return of_first(group, value.cpu() if isinstance(value, Tensor) else value)


def _sharded_parameter(model: nn.Module) -> DTensor | None:
    return next((each for each in model.parameters() if isinstance(each, DTensor)), None)


def _check(model: nn.Module) -> None:
    if not dist.is_initialized():
        raise InputError("A model is sharded over several processes, and there is one: use accelerate launch.")
    if is_sharded(model):
        raise InputError("The model is sharded already: pass it whole, as it was loaded.")
    for name, parameter in model.named_parameters():
        if bits_of(parameter) is not None:
            raise InputError(f"'{name}' is quantised, and a quantised model cannot be sharded: do one of the two.")
        if parameter.device.type == "meta" and not has_no_numbers(model):
            raise InputError(f"'{name}' {OFFLOADED}")


def _one_has_the_weights(model: nn.Module, group: dist.ProcessGroup) -> bool:
    """Whether the first process of a group alone has the weights. Raises InputError where it has none."""
    without: list[bool] = [False] * dist.get_world_size(group)
    dist.all_gather_object(without, has_no_numbers(model), group=group)
    if without[0]:
        raise InputError(f"'{next(name for name, _ in model.named_parameters())}' {OFFLOADED}")
    return any(without)


def _whole(model: nn.Module, config: ResonanceConfig, path: str, layers: nn.ModuleList) -> set[nn.Parameter]:
    """The replicated parameters: all outside the layers, the measured ones, and those that layers share."""
    everywhere = model.named_parameters(remove_duplicate=False)
    whole = {parameter for name, parameter in everywhere if not name.startswith(f"{path}.")}
    for each in find_up_projections(model, config.n_layers, config.up_projection):
        whole.update(each.module.parameters())
    uses = Counter(parameter for layer in layers for parameter in layer.parameters())
    return whole | {parameter for parameter, count in uses.items() if count > 1}
