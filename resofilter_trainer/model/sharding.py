"""A model that does not fit one device, sharded over processes layer by layer (FSDP2). Knows layers, not scores.

    replicated   all outside the decoder layers (embeddings, last norm, head), and the measured up-projections
    sharded      everything else in a layer, gathered while the layer runs, in the forward and again in the backward

The measured weights are thus whole in every process, and the head can be read a tile at a time. Each process has
batches of its own. All processes gather a layer together, so each must run the model equally often, or all wait.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..config import InputError, ResonanceConfig
from .quantised import bits_of
from .up_projection import decoder_layers, find_up_projections


def shard(
    model: nn.Module, config: ResonanceConfig, device: torch.device, group: dist.ProcessGroup | None = None
) -> None:
    """Shard a model in place over the processes of a group, each of which calls this.

    A process then stores 1 / N of the layers, the embeddings, the head and `n_layers` up-projections of O * I numbers
    each (in a mixture of experts all experts of a layer), and while a layer runs the whole of it.

    Args:
        model: the same model in every process, on the CPU or on `device`.
        config: the layers to measure.
        device: the device of this process.
        group: the processes; by default all.

    Raises:
        InputError: there is one process only; the model is sharded already, offloaded or quantised; or it has no known
            up-projection.
    """
    _check(model)
    mesh = DeviceMesh.from_group(group or cast(dist.ProcessGroup, dist.group.WORLD), device.type)
    path, layers = decoder_layers(model)
    whole = _whole(model, config, path, layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)  # the root, which orders the layers
    for each in (*whole, *model.buffers()):  # fully_shard does not move these
        each.data = each.data.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process stores a shard of the model, so that all must run it at the same time."""
    return _sharded_parameter(model) is not None


def of_first_process(model: nn.Module, value: Any) -> Any:
    """The first process's `value`, in every process of a sharded model; each must call this.

    A tensor is returned on the CPU.
    """
    sharded = _sharded_parameter(model)
    assert sharded is not None, "the model is not sharded"
    values = [value.cpu() if isinstance(value, Tensor) else value]
    dist.broadcast_object_list(values, group=sharded.device_mesh.get_group(), group_src=0)
    return values[0]


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
        if parameter.device.type == "meta":
            raise InputError(f"'{name}' is offloaded, and cannot be sharded: load the model without device_map.")


def _whole(model: nn.Module, config: ResonanceConfig, path: str, layers: nn.ModuleList) -> set[nn.Parameter]:
    """The replicated parameters: all outside the layers, the measured ones, and those that layers share."""
    everywhere = model.named_parameters(remove_duplicate=False)
    whole = {parameter for name, parameter in everywhere if not name.startswith(f"{path}.")}
    for each in find_up_projections(model, config.n_layers, config.up_projection):
        whole.update(each.module.parameters())
    uses = Counter(parameter for layer in layers for parameter in layer.parameters())
    return whole | {parameter for parameter, count in uses.items() if count > 1}
